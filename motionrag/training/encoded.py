"""What never changes in training, computed once: latents, prompt embeddings, motion features and flow, on disk.

The cache is named by the weights that made it, so a cache of other weights is never read.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from motionrag.backbones import Backbone, backbone_of_index
from motionrag.backbones.quiet import quiet_about_autoencoder
from motionrag.encoder import MotionEncoder
from motionrag.encoders.fingerprint import fingerprint
from motionrag.tracking import DenseTracker, dense_tracker
from motionrag.trajectory.region import BLOCK
from motionrag.video import sample_indices

_DONE = "done.json"
_TRUE = "true"


class EncodedClips(Dataset):
    """Clips as a frozen backbone and a frozen video encoder see them.

    Args:
        clips: Samples with `video` `(t c h w)` in [-1, 1] and `caption`; with `described_caption` if they have it.
        folder: Where caches are kept.
        pipeline: Diffusers pipeline whose frozen parts encode latents and prompts; None: neither.
        bundle: Bundle whose frozen encoders make `features`.
        features: Which: "motion_features", "motion_tokens", "context_features".
        flow: What tells where the content of frame 0 goes, for feature modulation: "optical-flow", "raft", "cotracker",
            or "true", if the clips know (`true_flow` and `true_visible`); None: no flow is wanted.
        flow_weights: File of the weights of "raft" (None: torchvision's) or "cotracker".
        batch_size: Clips that are encoded together.
        device: Where the encoders run.
        precision: "bfloat16" runs the encoders under autocast, "float32" as they are.
    """

    def __init__(
        self,
        clips: Dataset,
        *,
        folder: str,
        pipeline: str | None = None,
        bundle: str | None = None,
        features: Sequence[str] = (),
        flow: str | None = None,
        flow_weights: str | None = None,
        batch_size: int = 16,
        device: str = "cpu",
        precision: str = "bfloat16",
    ) -> None:
        assert isinstance(clips, Sized)  # noqa: S101
        if bool(features) != (bundle is not None):
            raise ValueError(f"A bundle makes features: name both or neither, got {bundle=} and {features=}.")
        self.clips = clips
        self.batch_size, self.device, self.precision = batch_size, device, precision
        self.arrays: dict[str, np.ndarray] = {}
        encoders: list[_Encoder] = [] if pipeline is None else [_PipelineEncoder(pipeline, device)]
        if bundle is not None:
            encoder = MotionEncoder.from_pretrained(bundle, device=device)
            encoders += [_FEATURES[name](encoder) for name in features]
        if flow is not None:
            encoders.append(_Flow(flow, flow_weights, device))
        elif flow_weights is not None:
            raise ValueError("flow_weights belong to a flow; name it, such as flow='raft', or leave the weights out.")
        for each in encoders:
            self._read_or_encode(Path(folder), each)

    def __len__(self) -> int:
        return len(self.clips)  # type: ignore[arg-type] # checked above

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One clip.

        Args:
            index: Which.

        Returns:
            `latents`, `image_latents`, `prompt_embeds` (what the backbone's `encode` gives), `motion_features` `(l c)`,
            `motion_tokens` `(l d)` and `context_features` `(l c)`, `flow` `(f h w 2)`, pixels from frame 0, x then
            y, and `visible` `(h w)`, 1 where the content of frame 0 is seen in all frames, else 0, as far as they were
            asked for; float32. With them `empty_prompt_embeds` and `grey_features`, what stands for no prompt and the
            features of a grey clip, and `described_prompt_embeds` if the clips have such captions.
        """
        return {
            name: torch.from_numpy(np.array(values[index if len(values) > 1 else 0])).float()
            for name, values in self.arrays.items()
        }

    def _read_or_encode(self, root: Path, encoder: "_Encoder") -> None:
        key = hashlib.sha256(f"{encoder.fingerprint} {_identity(self.clips)}".encode()).hexdigest()[:16]
        folder = root / f"{type(encoder).__name__.strip('_')}-{key}"
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # one of several training processes encodes, the others wait and read
            if not (folder / _DONE).exists():
                self._encode(folder, encoder)
        for path in sorted(folder.glob("*.npy")):
            self.arrays[path.stem] = np.load(path, mmap_mode="r")

    @torch.no_grad()
    def _encode(self, folder: Path, encoder: "_Encoder") -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, constant in encoder.constants().items():
            np.save(folder / f"{name}.npy", constant.cpu().half().numpy())
        arrays: dict[str, np.ndarray] = {}
        start = 0
        for batch in tqdm(DataLoader(self.clips, self.batch_size), f"encode ({folder.name})"):
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                encoded: dict[str, Tensor] = encoder.encode(batch)
            if "visible" in encoded:
                _check_visible(encoded["visible"], start)
            for name, values in encoded.items():
                rows = (values if values.dtype == torch.bool else values.float().half()).cpu().numpy()
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", rows.dtype, (len(self), *rows.shape[1:])
                    )
                arrays[name][start : start + len(rows)] = rows
            start += len(batch["video"])
        for stored in arrays.values():
            stored.flush()  # type: ignore[attr-defined] # open_memmap gives a memmap
        (folder / _DONE).write_text(json.dumps({"clips": start}), encoding="utf-8")


class _Encoder(Protocol):
    fingerprint: str

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def constants(self) -> dict[str, Tensor]: ...


class _PipelineEncoder:
    def __init__(self, source: str, device: str) -> None:
        self.backbone, self.pipeline = load_pipeline(source, frozen=True)
        self.pipeline.to(device)
        modules = {name: getattr(self.pipeline, name) for name in self.backbone.frozen_parts}
        prints = [fingerprint(name, {}, each) for name, each in modules.items() if isinstance(each, torch.nn.Module)]
        self.fingerprint = " ".join(prints)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        encoded = self.backbone.encode(self.pipeline, batch["video"], batch["caption"])
        if "described_caption" in batch and self.backbone.embed_prompts is not None:
            encoded["described_prompt_embeds"] = self.backbone.embed_prompts(self.pipeline, batch["described_caption"])
        return encoded

    def constants(self) -> dict[str, Tensor]:
        assert self.backbone.empty_prompt is not None  # noqa: S101 - likewise
        return {"empty_prompt_embeds": self.backbone.empty_prompt(self.pipeline)}


class _MotionFeatures:
    def __init__(self, encoder: MotionEncoder) -> None:
        self.encoder = encoder.video_encoder
        self.fingerprint = self.encoder.fingerprint

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"motion_features": self.encoder(sample_frames(batch["video"], self.encoder.num_frames))}

    def constants(self) -> dict[str, Tensor]:
        return {"grey_features": self.encoder.grey_features()}


class _MotionTokens:
    def __init__(self, encoder: MotionEncoder) -> None:
        self.encoder = encoder
        self.fingerprint = encoder.fingerprint("motion_tokens")

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        frames = sample_frames(batch["video"], self.encoder.num_frames)
        return {"motion_tokens": self.encoder.encode_motion(list(frames))}

    def constants(self) -> dict[str, Tensor]:
        return {}


class _ContextFeatures:
    def __init__(self, encoder: MotionEncoder) -> None:
        self.encoder = encoder.image_encoder
        self.fingerprint = self.encoder.fingerprint

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"context_features": self.encoder(batch["video"][:, 0])}

    def constants(self) -> dict[str, Tensor]:
        return {}


class _Flow:
    def __init__(self, kind: str, weights: str | None, device: str) -> None:
        self.track = None if kind == _TRUE else dense_tracker(kind, weights=weights, device=device)
        self.device_type = torch.device(device).type
        if self.track is None and weights is not None:
            raise ValueError("The true flow comes with the clips and has no weights; leave flow_weights out.")
        self.fingerprint = f"flow {_TRUE if self.track is None else self.track.name}"

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        flow, visible = _true_flow(batch) if self.track is None else self._tracked(self.track, batch["video"])
        return {"flow": flow, "visible": visible.bool().all(dim=1)}

    def constants(self) -> dict[str, Tensor]:
        return {}

    def _tracked(self, track: DenseTracker, videos: Tensor) -> tuple[Tensor, Tensor]:
        # Half a grey level decides between visible and not, so trackers never run in half precision.
        with torch.autocast(self.device_type, enabled=False):
            flows, seen = zip(*[track(video) for video in videos], strict=True)
        return torch.stack(flows), torch.stack(seen)


def _true_flow(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    missing = [name for name in ("true_flow", "true_visible") if name not in batch]
    if missing:
        raise ValueError(
            f"flow='{_TRUE}' needs clips that know their flow, and these bring no {' and no '.join(missing)}; "
            "let them give it, or name a tracker such as 'optical-flow'."
        )
    return batch["true_flow"], batch["true_visible"]


def _check_visible(visible: Tensor, start: int) -> None:
    """Refuse clips that leave training nothing to keep; the first of the batch has the number `start`."""
    lost = ~visible[:, ::BLOCK, ::BLOCK].flatten(1).any(dim=1)
    if lost.any():
        raise ValueError(
            f"Clip {start + int(lost.nonzero()[0])}: no 8x8 block of its first frame is visible in all frames, so "
            "feature modulation has no flow to keep; leave the clip out."
        )


_FEATURES: dict[str, Callable[[MotionEncoder], _Encoder]] = {
    "motion_features": _MotionFeatures,
    "motion_tokens": _MotionTokens,
    "context_features": _ContextFeatures,
}


def sample_frames(video: Tensor, count: int) -> Tensor:
    """The frames that the video encoder sees.

    Args:
        video: `(b t c h w)`.
        count: How many it takes.

    Returns:
        `(b count c h w)`.
    """
    return video[:, sample_indices(video.shape[1], count)]


def load_pipeline(
    source: str, *, frozen: bool, dtype: torch.dtype = torch.float32, denoiser: str | None = None
) -> tuple[Backbone, Any]:
    """Load the part of a diffusers pipeline that is needed.

    Args:
        source: Hub id or folder.
        frozen: True for the parts that encode clips, False for the denoiser (the first of two) and what belongs to it.
        dtype: Of the weights.
        denoiser: Folder of a denoiser to take in place of the source's.

    Returns:
        The family and the pipeline, with None for the parts that are left out.

    Raises:
        ValueError: If motionrag cannot train the family.
    """
    import diffusers

    backbone = backbone_of_index(diffusers.DiffusionPipeline.load_config(source))
    left_out = (backbone.denoiser,) if frozen else backbone.frozen_parts
    if backbone.second_denoiser is not None:
        left_out = (*left_out, backbone.second_denoiser)
    options: dict[str, Any] = dict.fromkeys(left_out)
    if denoiser is not None:
        options[backbone.denoiser] = getattr(diffusers, backbone.denoiser_class).from_pretrained(denoiser, dtype=dtype)
    with quiet_about_autoencoder():
        return backbone, getattr(diffusers, backbone.pipeline_class).from_pretrained(source, dtype=dtype, **options)


def _identity(clips: Dataset) -> str:
    """Names the clips: the datasets of this package say what they hold."""
    identity = getattr(clips, "identity", None)
    if identity is None:
        raise ValueError(f"{type(clips).__name__} has no `identity`, so what is encoded of it cannot be kept.")
    return str(identity)
