"""Tracking without weights: optical flow from each frame to the next (OpenCV's DIS), chained from frame 0.

A point counts as seen while the flow there and back agrees and it is inside the frame. Once lost it stays lost, for a
chain cannot tell what comes out from behind an object; its track goes on with the flow of what covers it.

Shapes: t frames, h w pixels, n points. Coordinates as in the package: (0, 0) is the centre of the upper left pixel.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.tracking.frames import to_uint8

# Smaller videos are enlarged: on the pocket's 64 pixels this halves the error.
_SHORTER_SIDE = 128
# Brox' and Malik's rule for flow there and back: |f + b|² ≤ 0.01 (|f|² + |b|²) + 0.5, in pixels.
_RELATIVE, _ABSOLUTE = 0.01, 0.5


class OpticalFlowTracker:
    """Follows points by chained optical flow.

    Attributes:
        name: What results of this tracker are labelled with.
    """

    name = "optical-flow"

    def __call__(self, frames: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points.

        Args:
            frames: `(t 3 h w)` uint8.
            points: `(n 2)` float32, in frame 0. One outside the frame moves like the nearest pixel, unseen.

        Returns:
            tracks `(n t 2)` float32 and visible `(n t)` bool.

        Raises:
            ImportError: If OpenCV is not installed.
        """
        return _follow(frames, points)


def dense_flow(video: Tensor) -> tuple[Tensor, Tensor]:
    """Flow from frame 0 to every frame, as training of feature modulation reads it.

    Args:
        video: `(t 3 h w)`, uint8, or floating in [-1, 1].

    Returns:
        flow `(t h w 2)` float32: displacement of the content of frame 0, pixels, x then y; visible `(t h w)` bool:
        whether that content is still seen.

    Raises:
        ValueError: For another layout or range.
        ImportError: If OpenCV is not installed.
    """
    frames = to_uint8(video)
    height, width = frames.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = rearrange([columns, rows], "xy h w -> (h w) xy").float()
    tracks, visible = _follow(frames, pixels)
    flow = rearrange(tracks - pixels[:, None], "(h w) t xy -> t h w xy", h=height)
    return flow, rearrange(visible, "(h w) t -> t h w", h=height)


def _follow(frames: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    estimator = _estimator()
    factor = math.ceil(_SHORTER_SIDE / min(frames.shape[2:])) if min(frames.shape[2:]) < _SHORTER_SIDE else 1
    pictures = [_grey(frame, factor) for frame in frames]
    limit = torch.tensor([pictures[0].shape[1] - 1, pictures[0].shape[0] - 1])
    position = (points + 0.5) * factor - 0.5
    seen = _inside(position, limit, factor)
    tracks, visible = [position], [seen]
    for before, after in pairwise(pictures):
        step = _sample(estimator.calc(before, after, None), position)
        position = position + step
        back = _sample(estimator.calc(after, before, None), position)
        allowed = _RELATIVE * (step.square().sum(-1) + back.square().sum(-1)) + _ABSOLUTE
        seen = seen & ((step + back).square().sum(-1) <= allowed) & _inside(position, limit, factor)
        tracks.append(position)
        visible.append(seen)
    return (torch.stack(tracks, dim=1) + 0.5) / factor - 0.5, torch.stack(visible, dim=1)


def _estimator() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ImportError("Tracking by optical flow needs OpenCV: pip install 'motionrag[control]'") from error
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def _grey(frame: Tensor, factor: int) -> np.ndarray:
    import cv2

    picture = cv2.cvtColor(np.ascontiguousarray(rearrange(frame, "c h w -> h w c").numpy()), cv2.COLOR_RGB2GRAY)
    if factor == 1:
        return picture
    height, width = picture.shape
    return cv2.resize(picture, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)


def _inside(position: Tensor, limit: Tensor, factor: int) -> Tensor:
    """Whether positions `(n 2)` are on the picture, up to the outer edge of its border pixels: `(n)`."""
    margin = 0.5 * factor
    return ((position >= -margin) & (position <= limit + margin)).all(-1)


def _sample(flow: np.ndarray, position: Tensor) -> Tensor:
    """Flow `(h w 2)` at positions `(n 2)`, bilinear, beyond the border that of the border: `(n 2)`."""
    height, width = flow.shape[:2]
    grid = 2 * position / torch.tensor([max(1, width - 1), max(1, height - 1)]) - 1
    picture = rearrange(torch.from_numpy(flow), "h w xy -> 1 xy h w")
    sampled = F.grid_sample(picture, grid[None, None], padding_mode="border", align_corners=True)
    return rearrange(sampled, "1 xy 1 n -> n xy")
