"""The method on one page: retrieve → adapt → inject → generate.

`MotionRAGPipeline` holds a diffusers pipeline; it subclasses none and changes nothing in it. Shapes: b videos,
k references, l tokens of a clip, d width.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from motionrag.adapters import AttentionInjection, FeatureModulation
from motionrag.backbones import Backbone, backbone_of_index, backbone_of_pipeline
from motionrag.backbones.quiet import quiet_about_autoencoder
from motionrag.bundle import POCKET, MotionBundle
from motionrag.control import control_flow
from motionrag.database import MotionDatabase, Reference
from motionrag.database.manifest import Manifest
from motionrag.encoder import MotionEncoder
from motionrag.encoders.preprocessing import ImageLike, image_to_tensor
from motionrag.generation import SteeredPipeline, Steering
from motionrag.output import MotionRAGOutput
from motionrag.suggestion import Suggestion, suggest_trajectories
from motionrag.trajectory import CameraPath, RegionTrajectory, Tracks
from motionrag.video import read_clip


class MotionRAGPipeline:
    """Image-to-video generation with retrieved motion.

    Args:
        pipeline: A diffusers image-to-video pipeline of a known family; it stays frozen.
        bundle: The trained parts for that family.
        database: Where references come from: a database or its folder.
        encoder: Encodes query images; by default the bundle's.

    Raises:
        ValueError: If the bundle was made for another family, or the pipeline's family is unknown.
    """

    def __init__(
        self,
        pipeline: Any,
        bundle: MotionBundle,
        *,
        database: MotionDatabase | str | Path | None = None,
        encoder: MotionEncoder | None = None,
    ) -> None:
        self.backbone: Backbone = backbone_of_pipeline(type(pipeline))
        if bundle.config.backbone != self.backbone.name:
            raise ValueError(
                f"The bundle was made for {bundle.config.backbone}, but {type(pipeline).__name__} is of the family "
                f"{self.backbone.name}."
            )
        _check_own_denoiser(pipeline, bundle, self.backbone)
        self.pipeline = pipeline
        self.bundle = bundle
        self.encoder = encoder or MotionEncoder(bundle)
        self._database: MotionDatabase | None = None
        self.database = database  # type: ignore[assignment]
        parts = bundle.config.parts
        self._steered = SteeredPipeline(  # last: a refused argument leaves no hook behind
            pipeline,
            self.backbone,
            injection=bundle.motion_injection if "motion_injection" in parts else None,
            modulation=bundle.feature_modulation if "feature_modulation" in parts else None,
            unconditional_tokens=lambda: bundle.unconditional_tokens,
            has_published_norm=bundle.config.denoiser is not None and "feature_modulation" in parts,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = POCKET,
        *,
        bundle: MotionBundle | str | Path | None = None,
        database: MotionDatabase | str | Path | None = None,
        **pipeline_options: Any,
    ) -> "MotionRAGPipeline":
        """Load a backbone and its bundle.

        Args:
            source: "pocket", a bundle that names its base model, or, with `bundle`, a diffusers pipeline's hub id or
                folder.
            bundle: The trained parts: a bundle, its folder or its hub id.
            database: A database or its folder.
            **pipeline_options: Passed to diffusers' `from_pretrained`, for example `dtype` or `variant`.

        Returns:
            The pipeline, on the CPU unless diffusers was told otherwise.

        Raises:
            FileNotFoundError: If there is no such bundle.
            ValueError: If the base model's family is unknown.
        """
        import diffusers

        if bundle is None:
            bundle = MotionBundle.from_pretrained(source)
            source = bundle.path_or_id(bundle.config.base_model)
        elif not isinstance(bundle, MotionBundle):
            bundle = MotionBundle.from_pretrained(bundle)
        backbone = backbone_of_index(diffusers.DiffusionPipeline.load_config(str(source)))
        pipeline_class = getattr(diffusers, backbone.pipeline_class)
        if "torch_dtype" not in pipeline_options:
            # Left alone, diffusers takes the text encoder's dtype from its file and float32 for the rest.
            pipeline_options.setdefault("dtype", torch.float32)
        if bundle.config.denoiser is not None and backbone.denoiser not in pipeline_options:
            denoiser_class = getattr(diffusers, backbone.denoiser_class)
            dtype = pipeline_options.get("dtype", pipeline_options.get("torch_dtype"))
            denoiser = denoiser_class.from_pretrained(bundle.path_or_id(bundle.config.denoiser), dtype=dtype)
            pipeline_options[backbone.denoiser] = denoiser
        with quiet_about_autoencoder():
            pipeline = pipeline_class.from_pretrained(str(source), **pipeline_options)
        return cls(pipeline, bundle, database=database)

    @property
    def database(self) -> MotionDatabase | None:
        """Where references come from. Setting another one, or its folder, moves to another domain."""
        return self._database

    @database.setter
    def database(self, database: MotionDatabase | str | Path | None) -> None:
        if database is not None and "motion_injection" not in self.bundle.config.parts:
            raise ValueError("This bundle has no motion_injection, so it has no use for a database; leave it out.")
        if isinstance(database, (str, Path)):
            # One set of encoders serves both, unless the database has a text encoder of its own.
            is_shared = Manifest.read(Path(database)).encoder["text_encoder"] == self.encoder.text_source
            database = MotionDatabase(database, encoder=self.encoder if is_shared else None)
        if database is not None:
            database.check_fingerprints(self.encoder, ["motion_tokens", "context_tokens"])
        self._database = database

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | list[str] | None = None,
        num_references: int = 9,
        motion_scale: float = 1.0,
        motion_guidance_scale: float | None = None,
        references: Sequence[Reference] | Sequence[Sequence[Reference]] | None = None,
        motion_tokens: Tensor | None = None,
        retrieval_weights: Mapping[str, float] | None = None,
        where: str | None = None,
        exclude: Any = None,
        min_similarity: float | None = None,
        published_image_range: bool = False,
        trajectories: Any = (),
        motion_mask: Any = None,
        camera: str | CameraPath | None = None,
        flow: Tensor | None = None,
        control_scale: float = 1.0,
        control_guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        **pipeline_options: Any,
    ) -> MotionRAGOutput:
        """Generate videos that start at the images and move like the retrieved references.

        Images are brought to RGB with their EXIF rotation applied, then resized to the video's size as diffusers does.

        Args:
            image: PIL image, path or array, or a list of them.
            prompt: One prompt, or one for each image. It also searches the captions.
            negative_prompt: As in diffusers.
            num_references: Most references for each image; 0 gives the plain backbone's video.
            motion_scale: Strength of the injection; 0 gives the plain backbone's video.
            motion_guidance_scale: Above 1 every denoising step runs once more, without the injected motion, and goes on
                in the direction in which the two differ: motion is followed more closely. Below 1 it is weakened, 0 is
                the plain backbone. None for the bundle's default, or 1, which is off, as in the published system.
            references: Use all of these and search nothing: one list, or one for each image; best first.
            motion_tokens: Inject these `(b l d)` as they are: nothing is retrieved and nothing adapted.
            retrieval_weights: How to search: "text" (prompt against captions) and "image" (image against first frames)
                → weight. By default by text where there is a prompt and the database has captions, else by image.
            where: SQL condition on the database's columns.
            exclude: Clips or files that must not be references.
            min_similarity: Retrieved clips below this score are not used; if none is left, nothing is injected and the
                output says so. None takes the bundle's threshold; without one, every reference is used.
            published_image_range: Show CAMA the query image as the published CogVideoX pipeline does, in [0, 1] where
                the references' images are in [-1, 1]; see docs/parity.md.
            trajectories: Ways that things take (MotionPro): `RegionTrajectory` or several, or lists of points (x, y) in
                pixels of the image; or `Tracks` from a file. For several images they are the same in each.
            motion_mask: Region that may move besides: file, picture, or array of the image's size.
            camera: Camera move by name, such as "pan left", or a `CameraPath` from a pose file.
            flow: In place of these three, the condition itself: `(b f 3 h w)` or `(f 3 h w)` at the video's size,
                displacement from frame 0 in pixels and motion mask.
            control_scale: Strength of the control; 0 leaves it out.
            control_guidance_scale: Above 1 every denoising step runs once more, without control, and goes on in the
                direction in which the two differ: ways are followed more closely. None for the bundle's default, or 1,
                which is off, as in MotionPro.
            height: Pixels; None for the backbone's own.
            width: Pixels; None for the backbone's own.
            num_frames: Frames; None for the backbone's own.
            num_inference_steps: Denoising steps; None for the bundle's default, or 50.
            guidance_scale: Classifier-free guidance, off at 1; None for the bundle's default, or the backbone's.
            generator: Makes the result reproducible.
            output_type: "pil", "np" or "pt".
            **pipeline_options: Passed to the diffusers pipeline, for example `callback_on_step_end`.

        Returns:
            Frames, references and the size of the injected effect.

        Raises:
            ValueError: If an argument is malformed, or one that the backbone does not take, or motion is asked for
                without a database or references.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type must be "pil", "np" or "pt", got {output_type!r}.')
        images, prompts = _as_batch(image, prompt)
        self._check_options(negative_prompt, pipeline_options, len(images))
        is_single = not isinstance(image, (list, tuple)) and isinstance(prompt, str)
        defaults = self.bundle.config
        height, width, num_frames = self.backbone.output_size(
            self.pipeline,
            _first_given(height, defaults.height),
            _first_given(width, defaults.width),
            _first_given(num_frames, defaults.num_frames),
        )
        guidance_scale = _first_given(guidance_scale, defaults.guidance_scale, self.backbone.guidance_scale)
        motion_guidance_scale = _first_given(motion_guidance_scale, defaults.motion_guidance_scale, 1.0)
        control_guidance_scale = _first_given(control_guidance_scale, defaults.control_guidance_scale, 1.0)
        _check_scale("motion_guidance_scale", motion_guidance_scale)
        _check_scale("control_guidance_scale", control_guidance_scale)
        num_inference_steps = _first_given(num_inference_steps, defaults.num_inference_steps, 50)
        pixels = [image_to_tensor(each) for each in images]
        pictures = [_to_pil(each) for each in pixels]

        search = {"weights": retrieval_weights, "where": where, "exclude": exclude}
        threshold = self.bundle.config.min_similarity if min_similarity is None else min_similarity
        drawn = _given_control(trajectories, motion_mask, camera, flow)
        is_asked = motion_tokens is not None or references is not None or self.database is not None
        # Control may stand alone: then nobody has to say that there is nothing to retrieve from.
        wants_motion = motion_scale != 0 and num_references != 0 and (is_asked or not drawn)
        if wants_motion:
            _ = self.injection  # refuses a bundle that cannot bring it in
        sizes = [(each.shape[1], each.shape[2]) for each in pixels]
        control = self._control(drawn, sizes, (height, width), num_frames) if drawn and control_scale != 0 else None
        if references is not None and num_references == 0:
            raise ValueError("num_references=0 asks for the plain backbone, but references are given; leave one out.")
        if motion_tokens is not None and (references is not None or num_references == 0):
            raise ValueError("motion_tokens are injected as they are; leave out references and num_references=0.")
        found: list[list[Reference]] = [[] for _ in images]
        if motion_tokens is not None:
            self._check_tokens(motion_tokens, len(images))
        elif wants_motion and references is not None:
            found = _given_references(references, len(images))
        elif wants_motion:
            queries = zip(pictures, prompts, strict=True)
            found = [self._retrieve(*query, num_references, threshold, **search) for query in queries]
        is_injected = [motion_tokens is not None or bool(hits) for hits in found]
        abstained = [wants_motion and not injected for injected in is_injected]
        if any(found):
            motion_tokens = self._adapt([(each + 1) / 2 for each in pixels] if published_image_range else pixels, found)

        options: dict[str, Any] = {
            **(self.backbone.call_options(self.pipeline) if self.backbone.call_options else {}),
            **(self.backbone.control_options if control is not None else {}),
            "num_inference_steps": num_inference_steps,
            self.backbone.guidance_option: guidance_scale,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "generator": generator,
            "output_type": output_type,
            **({"negative_prompt": negative_prompt} if self.backbone.embed_prompts else {}),
            **pipeline_options,
        }
        scales = [motion_scale if injected else 0.0 for injected in is_injected]
        steering = Steering(
            motion_tokens if any(scales) else None,
            scales,
            motion_guidance_scale=motion_guidance_scale,
            flow=control,
            control_scale=control_scale,
            control_guidance_scale=control_guidance_scale,
        )
        frames, effect = self._steered(pictures, prompts, steering, options)
        return MotionRAGOutput(
            frames=frames,
            references=found[0] if is_single else found,
            abstained=abstained[0] if is_single else abstained,
            injected_effect=effect,
            motion_tokens=motion_tokens,
            fps=_first_given(defaults.fps, self.backbone.fps(self.pipeline)),
            settings={
                "prompt": prompts[0] if is_single else prompts,
                "negative_prompt": negative_prompt,
                "num_references": num_references,
                "motion_scale": motion_scale,
                "motion_guidance_scale": motion_guidance_scale,
                "min_similarity": threshold,
                "control": {name: _in_words(value) for name, value in drawn.items()},
                "control_scale": None if control is None else control_scale,
                "control_guidance_scale": None if control is None else control_guidance_scale,
                "height": height,
                "width": width,
                "num_frames": num_frames,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "seed": _seeds(generator),
                "base_model": self.bundle.config.base_model,
                "trained": self.bundle.config.trained,
                "database": None if self.database is None else str(self.database.path),
            },
        )

    def suggest_trajectories(self, image: ImageLike, reference: Reference, *, count: int = 4) -> Suggestion:
        """Propose trajectories and a mask for an image from what moves in a retrieved clip, to edit or to pass on.

        Args:
            image: PIL image, path or array.
            reference: From a search, or from an output's references; its file must be there.
            count: Most trajectories.

        Returns:
            Trajectories in pixels of the image, and the motion mask at its size.
        """
        frames = torch.from_numpy(read_clip(reference.clip).frames)
        _, height, width = image_to_tensor(image).shape
        return suggest_trajectories(rearrange(frames, "t h w c -> t c h w"), (height, width), count=count)

    def to(self, device: torch.device | str) -> "MotionRAGPipeline":
        """Move everything to a device.

        Args:
            device: For example "cuda".

        Returns:
            This pipeline.
        """
        self.pipeline.to(device)
        self.encoder.to(device)
        if self.database is not None:
            self.database.encoder.to(device)
        return self

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Keep the backbone's parts on the CPU and move each to the accelerator while it runs, as in diffusers.

        Args:
            *args: Passed on.
            **kwargs: Passed on.
        """
        self.pipeline.enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Keep every layer of the backbone on the CPU and move it to the accelerator while it runs, as in diffusers.

        Args:
            *args: Passed on.
            **kwargs: Passed on.
        """
        self.pipeline.enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Move groups of the backbone's layers to the accelerator while they run, as in diffusers.

        Args:
            *args: Passed on.
            **kwargs: Passed on.
        """
        self.pipeline.enable_group_offload(*args, **kwargs)

    def info(self) -> dict[str, Any]:
        """Facts about the parts, as JSON values.

        Returns:
            Backbone, sites, how the injection is computed there, parameter counts, database, and the licence of every
            weight that is used.
        """
        injection, modulation = self._steered.injection, self._steered.modulation
        return {
            **self.bundle.info(),
            "injection_sites": 0 if injection is None else len(injection.sites),
            "injection_paths": {} if injection is None else injection.paths(self.encoder.num_tokens),
            "injection_parameters": 0 if injection is None else _count(injection),
            "modulation_parameters": 0 if modulation is None else _count(modulation),
            "backbone_parameters": sum(_count(model) for model in self.denoisers),
            "database": None if self.database is None else self.database.info(),
        }

    @property
    def denoisers(self) -> list[Any]:
        """The backbone's networks that carry the adapters: one, or two experts."""
        return self._steered.denoisers

    @property
    def injection(self) -> AttentionInjection:
        """The attention adapter, attached: what motion tokens enter by."""
        if self._steered.injection is None:
            raise ValueError(
                "This bundle has no motion_injection, so no motion can enter: pass trajectories, or ask for the "
                "plain backbone with num_references=0 (--references 0)."
            )
        return self._steered.injection

    @property
    def modulation(self) -> FeatureModulation:
        """The trajectory adapter, attached: what drawn control enters by."""
        if self._steered.modulation is None:
            raise ValueError(
                "This bundle has no feature_modulation, so trajectories, masks and camera moves cannot be followed; "
                "only SVD's UNet has the layers for it (motionrag convert makes a bundle of MotionPro's weights)."
            )
        return self._steered.modulation

    def _retrieve(
        self,
        picture: Image.Image,
        prompt: str,
        k: int,
        threshold: float | None,
        weights: Mapping[str, float] | None,
        where: str | None,
        exclude: Any,
    ) -> list[Reference]:
        """References for one image that are similar enough, best first."""
        if k < 0:
            raise ValueError(f"num_references must be 0 or more, got {k}.")
        if self.database is None:
            raise ValueError(
                "There is no database to retrieve motion from: set pipe.database = 'FOLDER' (--database FOLDER), pass "
                "references=…, or ask for the plain backbone with num_references=0 (--references 0)."
            )
        if weights is None:
            by_text = bool(prompt.strip()) and self.database.has_captions
            weights = {"text": 1.0} if by_text else {"image": 1.0}
        unknown = weights.keys() - {"text", "image"}
        if unknown:
            raise ValueError(f"retrieval_weights knows 'text' and 'image', got {sorted(unknown)}.")
        hits = self.database.search(
            text=prompt if "text" in weights else None,
            image=picture if "image" in weights else None,
            k=k,
            where=where,
            weights=weights,
            exclude=exclude,
        )
        return [hit for hit in hits if threshold is None or hit.score >= threshold]

    def _check_tokens(self, motion_tokens: Tensor, batch: int) -> None:
        expected = (batch, self.encoder.num_tokens, self.encoder.token_dim)
        if tuple(motion_tokens.shape) != expected or not torch.isfinite(motion_tokens).all():
            raise ValueError(f"motion_tokens must be finite and {expected}, got {tuple(motion_tokens.shape)}.")

    def _control(
        self,
        drawn: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_size: tuple[int, int],
        num_frames: int,
    ) -> Tensor:
        """The flow that the modulation follows, `(b f 3 h w)`."""
        _ = self.modulation  # refuses a bundle that cannot follow
        if "flow" not in drawn:
            arguments = {**drawn, "video_size": video_size, "num_frames": num_frames}
            return torch.stack([control_flow(image_size=size, **arguments) for size in image_sizes])
        flow: Tensor = drawn["flow"]
        expected = (len(image_sizes), num_frames, 3, *video_size)
        flow = flow.expand(expected) if flow.ndim == 4 and flow.shape == expected[1:] else flow
        if tuple(flow.shape) != expected:
            raise ValueError(f"flow must be {expected} or {expected[1:]}, got {tuple(flow.shape)}.")
        return flow

    def _adapt(self, pixels: Sequence[Tensor], found: Sequence[Sequence[Reference]]) -> Tensor:
        """Motion tokens `(b l d)` for the images: CAMA on their references; unconditional where there are none."""
        cama = self.bundle.cama.to(self.encoder.device)
        query_contexts = self.encoder.encode_context(pixels)
        predictions = []
        for query_context, hits in zip(query_contexts, found, strict=True):
            if not hits:
                predictions.append(self.bundle.unconditional_tokens)
                continue
            ascending = hits[::-1]  # the most similar goes last, right before the query
            reference_tokens = torch.stack([hit.motion_tokens for hit in ascending])
            context_tokens = torch.stack([*(hit.context_tokens for hit in ascending), query_context])
            device = self.encoder.device
            predictions.append(
                cama.predict(reference_tokens[None].to(device), context_tokens[None].to(device))[0].cpu()
            )
        return torch.stack(predictions)

    def _check_options(
        self, negative_prompt: str | list[str] | None, options: Mapping[str, Any], num_images: int
    ) -> None:
        """Refuse what this family's pipeline does not take, and what would bypass or mix up the adapters."""
        if num_images > 1 and options.get("num_videos_per_prompt", 1) != 1:
            raise ValueError(
                "num_videos_per_prompt is for one image; repeat the images of several in the list instead."
            )
        if negative_prompt is not None and self.backbone.embed_prompts is None:
            raise ValueError(f"{self.backbone.name} reads no text, so there is no negative prompt; leave it out.")
        if self.backbone.guidance_option in options:
            raise ValueError(f"Pass guidance_scale=… in place of {self.backbone.guidance_option}=….")


def _check_own_denoiser(pipeline: Any, bundle: MotionBundle, backbone: Backbone) -> None:
    """Refuse the base model's denoiser where the parts were trained with another, which fits by its shapes."""
    if bundle.config.denoiser is None:
        return
    expected = bundle.path_or_id(bundle.config.denoiser)
    if backbone.denoisers(pipeline)[0].config.get("_name_or_path") != expected:
        raise ValueError(
            f"The bundle was trained with a {backbone.denoiser} of its own: load the pipeline by "
            f"MotionRAGPipeline.from_pretrained(bundle), or with the {backbone.denoiser} from {expected}."
        )


def _given_control(trajectories: Any, motion_mask: Any, camera: Any, flow: Tensor | None) -> dict[str, Any]:
    """The arguments of control that were given, by name."""
    is_empty = trajectories is None or (hasattr(trajectories, "__len__") and len(trajectories) == 0)
    drawn = {"trajectories": None if is_empty else trajectories, "motion_mask": motion_mask, "camera": camera}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    if flow is not None and drawn:
        raise ValueError(f"flow is the whole condition; leave out {' and '.join(drawn)}.")
    return drawn if flow is None else {"flow": flow}


def _in_words(drawn: Any) -> Any:
    """What was drawn, as JSON values: names and points as they are, pictures and tensors by their kind."""
    if isinstance(drawn, (str, Path)):
        return str(drawn)
    if isinstance(drawn, Tracks):
        drawn = drawn.trajectories
    if isinstance(drawn, RegionTrajectory):
        return [list(point) for point in drawn.points]
    if isinstance(drawn, (list, tuple)):
        return [_in_words(each) for each in drawn]
    if isinstance(drawn, (int, float)):
        return drawn
    return f"{type(drawn).__name__} {'×'.join(map(str, getattr(drawn, 'shape', ())))}".strip()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_scale(name: str, scale: Any) -> None:
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"{name} must be a finite number, got {scale!r}; 1 is off.")


def _first_given(*values: Any) -> Any:
    """The first value that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


def _as_batch(image: Any, prompt: str | Sequence[str]) -> tuple[list[Any], list[str]]:
    """One image for every prompt and one prompt for every image."""
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    size = max(len(images), len(prompts))
    if not images or not prompts or {len(images), len(prompts)} - {1, size}:
        raise ValueError(f"Got {len(images)} images and {len(prompts)} prompts; pass one, or as many of each.")
    return (images * size if len(images) == 1 else images), (prompts * size if len(prompts) == 1 else prompts)


def _given_references(references: Sequence[Any], batch: int) -> list[list[Reference]]:
    is_flat = all(isinstance(each, Reference) for each in references)
    nested = [list(references)] * batch if is_flat else [list(hits) for hits in references]
    if len(nested) != batch:
        raise ValueError(f"Got references for {len(nested)} images, but there are {batch}.")
    return nested


def _to_pil(pixels: Tensor) -> Image.Image:
    """`(c h w)` in [-1, 1] as an 8-bit picture."""
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def _seeds(generator: torch.Generator | list[torch.Generator] | None) -> int | list[int] | None:
    if generator is None:
        return None
    return [each.initial_seed() for each in generator] if isinstance(generator, list) else generator.initial_seed()
