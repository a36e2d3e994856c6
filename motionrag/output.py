"""What a generation returns, and how it is written to disk."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from motionrag.adapters import InjectedEffect
from motionrag.database import Reference
from motionrag.video import write_video

# Settings that a batch may give for every video.
_PER_VIDEO = ("prompt", "negative_prompt", "seed")


@dataclass
class MotionRAGOutput:
    """Videos, and where their motion came from.

    For a single image, `references` is one list and `abstained` one bool; for a list of images there is one of each
    for every image.

    Attributes:
        frames: Like diffusers: a list of lists of PIL images, `(b t h w c)` in [0, 1] for "np", `(b t c h w)` in
            [0, 1] for "pt".
        references: What was retrieved, best first; empty where nothing was similar enough.
        abstained: True where motion was asked for, but no reference was similar enough: the plain backbone's video.
        injected_effect: Size of the injected term against the attention's output; 0 means that nothing was injected.
        motion_tokens: The tokens that were injected, `(b l d)`; None if there were none.
        fps: Frames per second that the backbone was trained at.
        settings: How the video was made, as JSON values.
    """

    frames: Any
    references: list[Reference] | list[list[Reference]]
    abstained: bool | list[bool]
    injected_effect: InjectedEffect
    motion_tokens: torch.Tensor | None
    fps: int
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> list[Path]:
        """Write the videos and, beside each, a JSON file with its references and settings.

        Args:
            path: `.mp4` or `.gif`; several videos become `name-0.mp4`, `name-1.mp4`, ….

        Returns:
            The video files. Size and frame rate are the backbone's own.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        videos = [_as_uint8(video) for video in self.frames]
        files = [path] if len(videos) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(videos))]
        for index, (file, video) in enumerate(zip(files, videos, strict=True)):
            write_video(file, video, self.fps)
            content = json.dumps(self.to_dict(index), indent=2, ensure_ascii=False, allow_nan=False)
            file.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
        return files

    def to_dict(self, index: int = 0) -> dict[str, Any]:
        """Everything but the pixels of one video, as JSON values.

        Args:
            index: Which video.

        Returns:
            Settings, references, abstention and the injected effect.
        """
        batched = isinstance(self.abstained, list)
        references = self.references[index] if batched else self.references
        settings = {
            name: value[index] if name in _PER_VIDEO and isinstance(value, (list, tuple)) else value
            for name, value in self.settings.items()
        }
        content = {
            **settings,
            "fps": self.fps,
            "abstained": self.abstained[index] if isinstance(self.abstained, list) else self.abstained,
            "references": [reference.to_dict() for reference in references],  # type: ignore[union-attr]
            "injected_effect": {"mean": self.injected_effect.mean, "per_site": self.injected_effect.per_site},
        }
        return {name: _json_value(value) for name, value in content.items()}


def _json_value(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {str(name): _json_value(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_uint8(video: Any) -> np.ndarray:
    """Frames of one video in any of diffusers' output types as `(t h w 3)` uint8."""
    if isinstance(video, torch.Tensor):
        video = rearrange(video.float().cpu().numpy(), "t c h w -> t h w c")
    if isinstance(video, np.ndarray):
        return (video.clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack([np.asarray(frame) for frame in video])
