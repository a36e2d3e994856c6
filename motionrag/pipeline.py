"""The method on one page: retrieve → adapt → inject → generate.

`MotionRAGPipeline` holds a diffusers pipeline; it subclasses none and changes nothing in it. Shapes: b videos,
k references, l tokens of a clip, d width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from motionrag.adapters import AttentionInjection, InjectedEffect
from motionrag.adapters.injection import diffusers_hooks
from motionrag.backbones import Backbone, backbone_of_index, backbone_of_pipeline
from motionrag.bundle import POCKET, MotionBundle
from motionrag.database import MotionDatabase, Reference
from motionrag.database.manifest import Manifest
from motionrag.encoder import MotionEncoder
from motionrag.encoders.preprocessing import ImageLike, image_to_tensor
from motionrag.output import MotionRAGOutput


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
        self.pipeline = pipeline
        self.bundle = bundle
        self.encoder = encoder or MotionEncoder(bundle)
        self._lock = Lock()
        self._database: MotionDatabase | None = None
        self.database = database  # type: ignore[assignment]
        self.injection: AttentionInjection = bundle.motion_injection
        self.injection.attach(*self._denoisers)  # last: a refused argument leaves no hook behind

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
        pipeline = pipeline_class.from_pretrained(str(source), **pipeline_options)
        return cls(pipeline, bundle, database=database)

    @property
    def database(self) -> MotionDatabase | None:
        """Where references come from. Setting another one, or its folder, moves to another domain."""
        return self._database

    @database.setter
    def database(self, database: MotionDatabase | str | Path | None) -> None:
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
        references: Sequence[Reference] | Sequence[Sequence[Reference]] | None = None,
        motion_tokens: Tensor | None = None,
        retrieval_weights: Mapping[str, float] | None = None,
        where: str | None = None,
        exclude: Any = None,
        min_similarity: float | None = None,
        published_image_range: bool = False,
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
        self._check_options(negative_prompt, pipeline_options)
        images, prompts = _as_batch(image, prompt)
        is_single = not isinstance(image, (list, tuple)) and isinstance(prompt, str)
        height, width, num_frames = self.backbone.output_size(self.pipeline, height, width, num_frames)
        defaults = self.bundle.config
        guidance_scale = _first_given(guidance_scale, defaults.guidance_scale, self.backbone.guidance_scale)
        num_inference_steps = _first_given(num_inference_steps, defaults.num_inference_steps, 50)
        pixels = [image_to_tensor(each) for each in images]
        pictures = [_to_pil(each) for each in pixels]

        search = {"weights": retrieval_weights, "where": where, "exclude": exclude}
        threshold = self.bundle.config.min_similarity if min_similarity is None else min_similarity
        wants_motion = motion_scale != 0 and num_references != 0
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
        with self._alone():
            frames, effect = self._generate(pictures, prompts, motion_tokens, scales, options)
        return MotionRAGOutput(
            frames=frames,
            references=found[0] if is_single else found,
            abstained=abstained[0] if is_single else abstained,
            injected_effect=effect,
            motion_tokens=motion_tokens,
            fps=self.backbone.fps(self.pipeline),
            settings={
                "prompt": prompts[0] if is_single else prompts,
                "negative_prompt": negative_prompt,
                "num_references": num_references,
                "motion_scale": motion_scale,
                "min_similarity": threshold,
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
        return {
            **self.bundle.info(),
            "injection_sites": len(self.injection.sites),
            "injection_paths": self.injection.paths(self.encoder.num_tokens),
            "injection_parameters": sum(parameter.numel() for parameter in self.injection.parameters()),
            "backbone_parameters": sum(
                parameter.numel() for model in self._denoisers for parameter in model.parameters()
            ),
            "database": None if self.database is None else self.database.info(),
        }

    @property
    def _denoisers(self) -> list[Any]:
        return self.backbone.denoisers(self.pipeline)

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
                "There is no database to retrieve motion from: set pipe.database = 'FOLDER', pass references=…, "
                "or ask for the plain backbone with num_references=0."
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

    def _check_options(self, negative_prompt: str | list[str] | None, options: Mapping[str, Any]) -> None:
        """Refuse what this family's pipeline does not take, and what would bypass the injection."""
        if negative_prompt is not None and self.backbone.embed_prompts is None:
            raise ValueError(f"{self.backbone.name} reads no text, so there is no negative prompt; leave it out.")
        if self.backbone.guidance_option in options:
            raise ValueError(f"Pass guidance_scale=… in place of {self.backbone.guidance_option}=….")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time: the diffusers pipeline and the injection both hold the state of a call."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("This pipeline is making a video in another thread; wait for it, or load a second one.")
        try:
            yield
        finally:
            self._lock.release()

    def _generate(
        self,
        pictures: list[Image.Image],
        prompts: list[str],
        motion_tokens: Tensor | None,
        scales: Sequence[float],
        options: Mapping[str, Any],
    ) -> tuple[Any, InjectedEffect]:
        """Run the diffusers pipeline, with the injection switched on for this call alone."""
        if len(pictures) > 1 and not self.backbone.takes_batches:
            return self._generate_in_turn(pictures, prompts, motion_tokens, scales, options)
        # A single image goes in alone, so that diffusers' own rules for it apply.
        call = {"image": pictures if len(pictures) > 1 else pictures[0], **options}
        if self.backbone.embed_prompts:
            call["prompt"] = prompts
        denoisers = self._denoisers
        for denoiser in denoisers:
            if hasattr(denoiser, "_reset_stateful_cache"):  # diffusers leaves it full when a call ends in an error
                denoiser._reset_stateful_cache()
        if motion_tokens is None:
            return self.pipeline(**call).frames, InjectedEffect(mean=0.0, per_site={})
        for denoiser in denoisers:
            _refuse_what_cannot_be_right(denoiser)
        self.injection.reattach(*denoisers)  # LoRA may have come or gone, the denoiser may be another
        device: torch.device = self.pipeline._execution_device
        stored: torch.dtype = denoisers[0].dtype
        # Layerwise casting stores one byte a number and computes in more; float32 is then always right.
        self.injection.to(device=device, dtype=stored if stored.itemsize > 1 else torch.float32)
        scale = torch.tensor(scales)
        is_guided = options[self.backbone.guidance_option] > 1
        if is_guided:  # two passes, the unconditional rows first
            unconditional = self.bundle.unconditional_tokens.expand_as(motion_tokens)
            motion_tokens, scale = torch.cat([unconditional, motion_tokens]), scale.repeat(2)
        with self.injection.condition(motion_tokens.to(device), scale.to(device), is_guided=is_guided) as condition:
            frames = self.pipeline(**call).frames
            return frames, condition.effect()

    def _generate_in_turn(
        self,
        pictures: list[Image.Image],
        prompts: list[str],
        motion_tokens: Tensor | None,
        scales: Sequence[float],
        options: Mapping[str, Any],
    ) -> tuple[Any, InjectedEffect]:
        """One call of the diffusers pipeline for each image, for families that take one at a time."""
        frames, effects = [], []
        for index, picture in enumerate(pictures):
            own = {name: _own(options.get(name), index) for name in ("generator", "negative_prompt")}
            tokens = None if motion_tokens is None or scales[index] == 0 else motion_tokens[index : index + 1]
            made, effect = self._generate(
                [picture], [prompts[index]], tokens, scales[index : index + 1], {**options, **own}
            )
            frames.append(made)
            effects.append(effect)
        return _joined(frames), InjectedEffect.mean_of(effects)


def _refuse_what_cannot_be_right(denoiser: Any) -> None:
    """Features of diffusers under which motion would reach the wrong rows, or has never been seen to be right."""
    name = type(denoiser).__name__
    if "faster_cache_denoiser" in diffusers_hooks(denoiser):
        raise ValueError(
            f"FasterCache runs {name} without the unconditional half of guidance in some steps, so motion would reach "
            "the wrong half; call disable_cache() on it, or enable FirstBlockCache in its place."
        )
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ValueError(
            f"{name} is split over devices by enable_parallelism, with which motion injection has not been tested; "
            "load the pipeline again without it."
        )


def _own(option: Any, index: int) -> Any:
    """What one image of several gets of an option that may be a list."""
    return option[index] if isinstance(option, list) else option


def _joined(videos: list[Any]) -> Any:
    """Batches of one video as one batch: lists, arrays or tensors."""
    if isinstance(videos[0], Tensor):
        return torch.cat(videos)
    if isinstance(videos[0], np.ndarray):
        return np.concatenate(videos)
    return [video for batch in videos for video in batch]


def _first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


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
