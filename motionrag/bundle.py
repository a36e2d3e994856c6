"""The bundle: the trained set for one backbone, saved and shared as one folder.

    config.json                         what the parts are and which frozen encoders and base model they belong to
    motion_resampler.safetensors        video features → motion tokens
    context_resampler.safetensors       image features → context tokens
    cama.safetensors                    CAMA
    motion_injection.safetensors        attention adapters of the backbone
    feature_modulation.safetensors      trajectory adapter of the backbone (MotionPro)
    unconditional_tokens.safetensors    motion tokens of a grey clip, for guidance
    README.md                           model card

Any subset of the parts may be there. Parts are read when they are first used. It holds no frozen weights: encoders
and base model are named by hub id, or by a folder inside the bundle as in the embedded ones. Bundles of different
backbones can share what makes and adapts motion tokens, and with it databases: see `BundleConfig.shared`.
"""

import copy
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrag.adapters import AttentionInjection, FeatureModulation
from motionrag.encoders.fingerprint import fingerprint
from motionrag.model_card import CARD, has_own_card, model_card
from motionrag.models import CAMA, Resampler

logger = logging.getLogger(__name__)

FORMAT = 1
POCKET = "pocket"
# Name → folder in the package.
EMBEDDED = {POCKET: "pocket/weights", "pocket-control": "pocket/weights/control"}
# Files that can run code when they are read.
_UNSAFE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py")
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.md", "*.model")

_NO_BUNDLE = (
    "{} is no bundle: it has no config.json. If it is a diffusers model, name a bundle beside it: bundle=… (--bundle)."
)

_HUB_ID = re.compile(r"(hf-hub:)?[A-Za-z0-9][\w.-]*/[\w.-]+")

PARTS: dict[str, type[nn.Module]] = {
    "motion_resampler": Resampler,
    "context_resampler": Resampler,
    "cama": CAMA,
    "motion_injection": AttentionInjection,
    "feature_modulation": FeatureModulation,
}
# The parts that are made for no backbone in particular.
_LENT = ("motion_resampler", "context_resampler", "cama")


@dataclass(frozen=True)
class EncoderSource:
    """Where a frozen encoder comes from.

    Attributes:
        source: Hub id, or folder relative to the bundle.
        licence: Licence of its weights, as SPDX name or in words.
        pretrained: Tag of the weights, where the library names model and weights apart (open_clip).
    """

    source: str
    licence: str = ""
    pretrained: str | None = None


# The video encoder and the image encoder are the published ones. Sentence encoders that run code of their own are
# never loaded, so the text encoder is another.
ENCODERS = {
    "video": EncoderSource("MCG-NJU/videomae-base-finetuned-ssv2", "CC-BY-NC-4.0"),
    "image": EncoderSource("facebook/dinov2-large", "Apache-2.0"),
    "clip": EncoderSource("ViT-B-32", "MIT", pretrained="laion2b_s34b_b79k"),
    "text": EncoderSource("sentence-transformers/all-MiniLM-L6-v2", "Apache-2.0"),
}


@dataclass(frozen=True)
class BundleConfig:
    """Everything about a bundle except its tensors.

    Attributes:
        backbone: Family, such as "cogvideox".
        base_model: Hub id of the frozen diffusers pipeline, or folder relative to the bundle.
        encoders: "video", "image", "clip" and "text" → where the frozen encoder comes from.
        parts: Part → keyword arguments of its class.
        trained: False for random weights, which only show that everything runs.
        licence: Licence of the parts.
        base_model_licence: Licence of the base model's weights.
        min_similarity: Below this score nothing is injected (abstention), unless a call says otherwise.
        guidance_scale: Classifier-free guidance of a call that names none; None takes the backbone's.
        motion_guidance_scale: Guidance of injected motion in a call that names none; None takes 1, which is off.
        control_guidance_scale: Guidance of drawn control in a call that names none; None takes 1, which is off.
        num_inference_steps: Denoising steps of a call that names none; None takes 50.
        height: Pixels of a call that names none; None takes the backbone's own. Likewise width and num_frames.
        width: Pixels.
        num_frames: Frames.
        fps: Frames per second of the videos; None takes the backbone's.
        denoiser: Folder in the bundle with a denoiser that the parts were trained with, in place of the base model's.
        shared: Another bundle that gives what this one has not: encoders, resamplers, CAMA, unconditional tokens. A
            folder relative to this bundle (also upwards, ".."), "pocket" or a hub id.
        format: Version of this layout.
    """

    backbone: str
    base_model: str
    encoders: dict[str, EncoderSource] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: bool = True
    licence: str = ""
    base_model_licence: str = ""
    min_similarity: float | None = None
    guidance_scale: float | None = None
    motion_guidance_scale: float | None = None
    control_guidance_scale: float | None = None
    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    denoiser: str | None = None
    shared: str | None = None
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> "BundleConfig":
        """Read `config.json`.

        Args:
            path: The file.

        Returns:
            The config.

        Raises:
            ValueError: If a field is missing or unknown, or the format is another.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path} is no readable bundle config: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no bundle config: expected an object of fields, got {type(content).__name__}.")
        known = {item.name for item in fields(cls)}
        required = {"backbone", "base_model", "encoders", "parts", "format"}
        unknown, missing = sorted(content.keys() - known), sorted(required - content.keys())
        if unknown or missing:
            raise ValueError(f"{path}: missing fields: {missing or 'none'}; unknown fields: {unknown or 'none'}.")
        if content["format"] != FORMAT:
            raise ValueError(f"{path} has bundle format {content['format']}, this version of motionrag reads {FORMAT}.")
        odd = sorted(content["parts"].keys() - PARTS.keys())
        if odd:
            raise ValueError(f"{path} names unknown parts {odd}; known are {sorted(PARTS)}.")
        try:
            content["encoders"] = {name: EncoderSource(**value) for name, value in content["encoders"].items()}
        except TypeError as error:
            raise ValueError(f"{path} describes an encoder wrongly: {error}") from error
        return cls(**content)

    def write(self, path: Path) -> None:
        """Write `config.json`.

        Args:
            path: The file; replaced in one step.
        """
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)


def resolve(source: str | Path, **hub_options: Any) -> Path:
    """Find the folder of a bundle.

    Args:
        source: "pocket" or "pocket-control" for the embedded ones, a folder, or a hub id (downloaded: JSON, text and
            safetensors only).
        **hub_options: Passed to `huggingface_hub.snapshot_download`, for example `revision` or `token`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not give it.
    """
    if str(source) in EMBEDDED:
        return Path(__file__).parent / EMBEDDED[str(source)]
    folder = Path(source)
    return folder if folder.is_dir() else _download(str(source), **hub_options)


def _download(source: str, **hub_options: Any) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    try:
        hf_hub_download(source, "config.json", **hub_options)  # before gigabytes of something else come
        return Path(snapshot_download(source, allow_patterns=list(_DOWNLOADED), **hub_options))
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(_NO_BUNDLE.format(source)) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither {' nor '.join(map(repr, EMBEDDED))}, nor a folder, nor a bundle that the hub gives "
            f"({error})."
        ) from error


def _read_config(folder: Path) -> BundleConfig:
    """The config of a folder that is a bundle and holds nothing that could run code."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(_NO_BUNDLE.format(folder))
    unsafe = [file.name for file in folder.rglob("*") if file.suffix.lower() in _UNSAFE_SUFFIXES]
    if unsafe:
        raise ValueError(f"{folder} holds files that can run code ({', '.join(unsafe[:3])}); bundles are safetensors.")
    return BundleConfig.read(folder / "config.json")


def _find_shared(folder: Path, shared: str, **hub_options: Any) -> Path:
    """The folder of the bundle that the one in `folder` shares."""
    beside = (folder / shared).resolve()
    if (beside / "config.json").is_file():
        return beside
    # The working folder is not looked at, and a path is never asked of the hub.
    if shared in EMBEDDED:
        return resolve(shared)
    if not beside.is_dir() and _HUB_ID.fullmatch(shared):
        try:
            return _download(shared, **hub_options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} takes what it has not from another bundle: {error}") from error
    raise FileNotFoundError(
        f"{folder} takes what it has not from the bundle {shared!r}, but there is none at {beside}; put it there, or "
        "correct `shared` in config.json."
    )


class MotionBundle:
    """The trained parts for one backbone.

    Args:
        config: What its own parts are.
        folder: Where parts that are not given are read from.
        shared: Gives the encoders, resamplers, CAMA and unconditional tokens that this one has not; `config.shared`
            names it. None although it is named: only the own parts can be used.
        unconditional_tokens: `(l d)`, motion tokens of a grey clip (0 in [-1, 1]).
        **parts: "motion_resampler", "context_resampler", "cama", "motion_injection", "feature_modulation" as modules.
            One that only the shared bundle describes is this bundle's own from now on.

    Attributes:
        config: What all parts are, the shared ones too; `own_config` is without these.
    """

    def __init__(
        self,
        config: BundleConfig,
        *,
        folder: Path | None = None,
        shared: "MotionBundle | None" = None,
        unconditional_tokens: Tensor | None = None,
        **parts: nn.Module,
    ) -> None:
        self.shared = shared
        self._lent_parts: set[str] = set()
        self._lent_encoders: set[str] = set()
        if shared is not None:
            lent_parts = {name: shared.config.parts[name] for name in _LENT if name in shared.config.parts}
            lent_encoders = shared.config.encoders
            self._lent_parts = lent_parts.keys() - config.parts.keys() - parts.keys()
            self._lent_encoders = lent_encoders.keys() - config.encoders.keys()
            config = replace(
                config, parts={**lent_parts, **config.parts}, encoders={**lent_encoders, **config.encoders}
            )
        if parts.keys() - config.parts.keys():
            raise ValueError(f"The config does not describe {sorted(parts.keys() - config.parts.keys())}.")
        self.config: BundleConfig = config
        self.folder = folder
        self._parts: dict[str, nn.Module] = {}
        self._fingerprints: dict[str, str] = {}
        for name, module in parts.items():
            self._keep(name, module)
        self._unconditional_tokens = unconditional_tokens

    @classmethod
    def from_pretrained(cls, source: str | Path = POCKET, **hub_options: Any) -> "MotionBundle":
        """Open a bundle; its tensors are read when they are first used.

        Args:
            source: "pocket", "pocket-control", a folder or a hub id.
            **hub_options: Passed on to the download, for example `revision`.

        Returns:
            The bundle, with the one that it shares.

        Raises:
            FileNotFoundError: If there is no such bundle, or not the one that it shares.
            ValueError: If the config is malformed, the folder holds files that could run code, or the shared bundle
                shares another in turn.
        """
        folder = resolve(source, **hub_options)
        config = _read_config(folder)
        if config.shared is None:
            return cls(config, folder=folder)
        hub_options.pop("revision", None)  # of this repository, not of the other
        lender = _find_shared(folder, config.shared, **hub_options)
        lent = _read_config(lender)
        if lent.shared is not None:
            raise ValueError(
                f"{folder} shares {config.shared!r}, a bundle that shares {lent.shared!r} in turn; name one that has "
                "all its parts itself."
            )
        return cls(config, folder=folder, shared=cls(lent, folder=lender))

    @property
    def own_config(self) -> BundleConfig:
        """The config without what the shared bundle gives, as in this bundle's config.json."""
        parts = {name: sizes for name, sizes in self.config.parts.items() if name not in self._lent_parts}
        encoders = {name: entry for name, entry in self.config.encoders.items() if name not in self._lent_encoders}
        return replace(self.config, parts=parts, encoders=encoders)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the bundle, in the precision that its parts have now.

        Encoders and base model that lie inside this bundle's folder are copied along; those named by a hub id stay
        where they are. A model card is written too, unless the folder has one of its own.

        A bundle that shares another goes on doing so in its own folder, where only its own parts are written. In any
        other folder it is written with all that it takes from the shared one, and shares nothing.

        Args:
            folder: Made if it does not exist; parts of another bundle in it are replaced. Everything is written aside
                first, then renamed, so that an error or a kill leaves no half file.

        Raises:
            ValueError: If the config describes a part that this bundle cannot give.
        """
        import tempfile

        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        at_home = self.folder is not None and folder.resolve() == self.folder.resolve()
        stays = self.shared is None or at_home
        config = self.own_config if stays else replace(self.config, shared=None, licence=self._licence_of_both())
        tensors = {name: self._part(name).state_dict() for name in config.parts}
        holder = self if stays else self._token_holder()
        if holder._holds_tokens():
            tensors["unconditional_tokens"] = {"motion_tokens": holder.unconditional_tokens}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
            config.write(Path(aside, "config.json"))
            for name, state in tensors.items():
                file = Path(aside, f"{name}.safetensors")
                save_file({key: value.contiguous() for key, value in state.items()}, file)
                shutil.copymode(Path(aside, "config.json"), file)  # safetensors lets the owner alone read them
            Path(aside, CARD).write_text(self._model_card(config), encoding="utf-8")
            for name in (*PARTS, "unconditional_tokens"):
                if name in tensors:
                    os.replace(Path(aside, f"{name}.safetensors"), folder / f"{name}.safetensors")
                else:
                    (folder / f"{name}.safetensors").unlink(missing_ok=True)
            self._copy_embedded(folder, config)
            if not has_own_card(folder):
                os.replace(Path(aside, CARD), folder / CARD)
            os.replace(Path(aside, "config.json"), folder / "config.json")

    def _licence_of_both(self) -> str:
        """What holds for own parts and shared ones together."""
        licences = [each.config.licence for each in (self, self.shared) if each is not None and each.config.licence]
        return " and ".join(dict.fromkeys(licences))

    def _model_card(self, config: BundleConfig) -> str:
        base_model = config.base_model
        is_folder = self._inside(base_model) is not None or Path(base_model).is_dir()
        on_hub = base_model if _HUB_ID.fullmatch(base_model) and not is_folder else None
        parts = {name: self._part(name) for name in config.parts}
        return model_card(config, parts, hub_base_model=on_hub)

    def _copy_embedded(self, folder: Path, config: BundleConfig) -> None:
        sources = [config.base_model, *(entry.source for entry in config.encoders.values())]
        for source in sources if config.denoiser is None else [*sources, config.denoiser]:
            inside = self._inside(source)
            if inside is not None and inside != (folder / source).resolve():
                shutil.copytree(inside, folder / source, dirs_exist_ok=True)

    def push_to_hub(self, repo_id: str, **hub_options: Any) -> str:
        """Upload the bundle with a model card, which never replaces one on the hub that somebody wrote by hand.

        Args:
            repo_id: Repository on the hub; made if it does not exist.
            **hub_options: Passed to `huggingface_hub.HfApi`, for example `token` or `endpoint`.

        Returns:
            Address of the commit.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(**hub_options)
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            if self.folder is not None and has_own_card(self.folder):
                shutil.copy(self.folder / CARD, folder)
            self.save_pretrained(folder)
            if not has_own_card(Path(folder)) and api.file_exists(repo_id, CARD):
                on_hub = Path(api.hf_hub_download(repo_id, CARD)).parent
                if has_own_card(on_hub):
                    Path(folder, CARD).unlink()
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)

    def info(self) -> dict[str, Any]:
        """Facts about the bundle, as JSON values.

        Returns:
            Family, base model, parts, and the licence of every weight that it pulls.
        """
        config = self.config
        lender = self.shared
        return {
            "bundle": str(self.folder or "in memory"),
            "backbone": config.backbone,
            "base_model": config.base_model,
            "trained": config.trained,
            "parts": sorted(config.parts),
            **({} if lender is None else {"shared": str(lender.folder or "in memory")}),
            "licences": {
                "bundle": config.licence,
                **({} if lender is None else {"shared": lender.config.licence}),
                config.base_model: config.base_model_licence,
                **{entry.source: entry.licence for entry in config.encoders.values()},
            },
        }

    @property
    def motion_resampler(self) -> Resampler:
        """Video features `(b l c)` → motion tokens."""
        return self._part("motion_resampler")  # type: ignore[return-value]

    @property
    def context_resampler(self) -> Resampler:
        """Image features `(b l c)` → context tokens."""
        return self._part("context_resampler")  # type: ignore[return-value]

    @property
    def cama(self) -> CAMA:
        """Context-aware motion adaptation."""
        return self._part("cama")  # type: ignore[return-value]

    @property
    def motion_injection(self) -> AttentionInjection:
        """Attention adapters, not attached."""
        return self._part("motion_injection")  # type: ignore[return-value]

    @property
    def feature_modulation(self) -> FeatureModulation:
        """Trajectory adapter, not attached."""
        return self._part("feature_modulation")  # type: ignore[return-value]

    @property
    def unconditional_tokens(self) -> Tensor:
        """Motion tokens of a grey clip (0 in [-1, 1]), `(l d)` float32: "no motion given", in guidance.

        A converted bundle may lack them; they are then computed once, if its video encoder is on this machine.
        """
        holder = self._token_holder()
        if holder is not self:
            return holder.unconditional_tokens
        if not self._holds_tokens():
            try:
                self._unconditional_tokens = self.compute_unconditional_tokens()
            except FileNotFoundError as error:
                raise ValueError(
                    f"The bundle {self.folder or 'in memory'} lacks unconditional_tokens.safetensors. {error}"
                ) from error
        if self._unconditional_tokens is None:
            state = self._read("unconditional_tokens")
            tokens = state.get("motion_tokens")
            if tokens is None or len(state) != 1 or tokens.ndim != 2 or not torch.isfinite(tokens).all():
                raise ValueError(
                    f"{self.folder}/unconditional_tokens.safetensors must hold one finite (tokens, channels) tensor "
                    "'motion_tokens' and nothing else; fetch the bundle again."
                )
            self._unconditional_tokens = tokens.float()
        return self._unconditional_tokens

    @torch.no_grad()
    def compute_unconditional_tokens(self) -> Tensor:
        """Run a grey clip through the video encoder and the motion resampler. Nothing is downloaded.

        Returns:
            `(l d)` float32, on the CPU.

        Raises:
            FileNotFoundError: If the bundle has no motion resampler, or its video encoder is not on this machine.
        """
        from motionrag.encoders import VideoMAEEncoder

        if "motion_resampler" not in self.config.parts or "video" not in self.config.encoders:
            raise FileNotFoundError("They need a motion resampler and a video encoder, and it does not name both.")
        source = self.config.encoders["video"].source
        try:
            encoder = VideoMAEEncoder.from_pretrained(self.path_or_id(source), local_files_only=True)
        except OSError as error:
            raise FileNotFoundError(
                f"They follow from the video encoder {source}, which is not on this machine: hf download {source}"
            ) from error
        logger.info("Computing the motion tokens of a grey clip with %s", source)
        # A copy: the bundle's own may be in another precision, or on an accelerator.
        resampler = copy.deepcopy(self.motion_resampler).to(device="cpu", dtype=torch.float32)
        return resampler(encoder.grey_features())[0]

    def part_fingerprint(self, name: str) -> str:
        """Hash of a part: its arguments and its weights as they were read or given.

        Args:
            name: For example "motion_resampler".

        Returns:
            32 hexadecimal characters; a later cast to another precision does not change it.
        """
        if self.shared is not None and name in self._lent_parts:
            return self.shared.part_fingerprint(name)
        self._part(name)
        return self._fingerprints[name]

    def path_or_id(self, source: str) -> str:
        """A source of the config as something to load from: a folder inside the bundle or the shared one, or a hub id.

        Args:
            source: `base_model` or the source of an encoder.

        Returns:
            Absolute folder, or the hub id (owner/name) as it is.

        Raises:
            FileNotFoundError: If it is neither.
        """
        lender = self._lender(source)
        if lender is not None:
            return lender.path_or_id(source)
        inside = self._inside(source)
        if (
            inside is None
            and not _HUB_ID.fullmatch(source)
            and not (Path(source).is_absolute() and Path(source).is_dir())
        ):
            # A bare name is never asked of the hub: it would give whatever somebody called so.
            raise FileNotFoundError(
                f"The bundle {self.folder or 'in memory'} names {source!r}, which is no folder in it and no hub id "
                "(owner/name); correct the name, or fetch the bundle again."
            )
        return source if inside is None else str(inside)

    def _inside(self, source: str) -> Path | None:
        """The folder of a source that lies in the bundle's own folder, or in that of the shared one which names it."""
        lender = self._lender(source)
        if lender is not None:
            return lender._inside(source)
        if self.folder is None:
            return None
        inside = (self.folder / source).resolve()
        return inside if inside.is_dir() and inside.is_relative_to(self.folder.resolve()) else None

    def _lender(self, source: str) -> "MotionBundle | None":
        """The shared bundle, if a source is one of its encoders' and nothing of this bundle's own."""
        own = self.own_config
        if source in (own.base_model, own.denoiser, *(entry.source for entry in own.encoders.values())):
            return None
        return self.shared if source in {entry.source for entry in self.config.encoders.values()} else None

    def _holds_tokens(self) -> bool:
        return self._unconditional_tokens is not None or self._file("unconditional_tokens") is not None

    def _token_holder(self) -> "MotionBundle":
        """Whose unconditional tokens are used. They follow from video encoder and motion resampler."""
        same = "motion_resampler" in self._lent_parts and "video" not in self.own_config.encoders
        return self.shared if self.shared is not None and same and not self._holds_tokens() else self

    def _part(self, name: str) -> nn.Module:
        if self.shared is not None and name in self._lent_parts:
            return self.shared._part(name)
        if name not in self._parts:
            if name not in self.config.parts:
                raise ValueError(f"This bundle has no {name}; it has {', '.join(self.config.parts) or 'nothing'}.")
            try:
                module = PARTS[name](**self.config.parts[name])
            except TypeError as error:
                raise ValueError(f"{self.folder}/config.json describes {name} wrongly: {error}") from error
            load_strictly(module, self._read(name), f"{self.folder}/{name}.safetensors")
            self._keep(name, module.eval().requires_grad_(False))
        return self._parts[name]

    def _keep(self, name: str, module: nn.Module) -> None:
        self._parts[name] = module
        self._fingerprints[name] = fingerprint(name, self.config.parts[name], module)

    def _file(self, name: str) -> Path | None:
        file = self.folder / f"{name}.safetensors" if self.folder is not None else None
        return file if file is not None and file.is_file() else None

    def _read(self, name: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(name)
        if file is None:
            raise ValueError(f"The bundle {self.folder or 'in memory'} lacks {name}.safetensors.")
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch the bundle again.") from error


def load_strictly(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict in float32, refusing other keys, other shapes and non-finite values.

    Args:
        module: Filled in place.
        state: Tensors by key, any floating dtype.
        origin: Named in errors.

    Raises:
        ValueError: If keys or shapes differ, all of them listed, or a tensor holds NaN or infinity.
    """
    check_tensors(module, state, origin)
    module.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)


def check_tensors(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Refuse tensors that are not exactly those of a module.

    Args:
        module: What they are meant for, also on the meta device; not changed.
        state: Tensors by key, any floating dtype.
        origin: Named in errors.

    Raises:
        ValueError: If keys or shapes differ, which are listed (at most 100 of a kind), or a tensor holds NaN or
            infinity.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        reshaped = [
            f"{key} {found[key]}, expected {expected[key]}"
            for key in expected.keys() & found.keys()
            if expected[key] != found[key]
        ]
        raise ValueError(
            f"{origin} does not fit {type(module).__name__}: missing: {_listed(missing)}; "
            f"unexpected: {_listed(unexpected)}; other shapes: {_listed(sorted(reshaped))}."
        )
    damaged = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if damaged:
        raise ValueError(f"{origin} holds NaN or infinity in {', '.join(damaged)}; fetch or convert it again.")


def _listed(keys: list[str], most: int = 100) -> str:
    """Keys for an error: of another network there are thousands."""
    if len(keys) > most:
        return f"{keys[:most]} and {len(keys) - most} more"
    return str(keys or "none")
