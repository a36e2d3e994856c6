"""Points followed by flow from each frame to the next, chained from frame 0, whichever method estimates that flow.

A point counts as seen while the flow there and back agrees and it is inside the frame. Once lost it stays lost, for a
chain cannot tell what comes out from behind an object; its track goes on with the flow of what covers it.

Shapes: t frames, h w pixels, n points. Coordinates as in the package: (0, 0) is the centre of the upper left pixel.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

# Smaller videos are enlarged: on the pocket's 64 pixels this halves the error of DIS, and RAFT takes nothing smaller.
_SHORTER_SIDE = 128
# Brox' and Malik's rule for flow there and back: |f + b|² ≤ 0.01 (|f|² + |b|²) + 0.5, in pixels.
_RELATIVE, _ABSOLUTE = 0.01, 0.5


class FlowEstimator(Protocol):
    """A method that finds the flow between two pictures."""

    def pictures(self, frames: Tensor, factor: int) -> Sequence[Any]:
        """Bring frames to the form in which they are compared.

        Args:
            frames: `(t 3 h w)` uint8, on the CPU.
            factor: How many times larger the pictures shall be, at least 1.

        Returns:
            A picture for each frame; rows and columns may be added below and to the right.
        """
        ...

    def between(self, before: Any, after: Any) -> Tensor:
        """Find where the content of a picture goes.

        Args:
            before: A picture.
            after: Another one.

        Returns:
            `(h w 2)` float32 on the CPU, pixels of the pictures, x then y.
        """
        ...


def follow(frames: Tensor, points: Tensor, estimator: FlowEstimator) -> tuple[Tensor, Tensor]:
    """Follow points through a video.

    Args:
        frames: `(t 3 h w)` uint8.
        points: `(n 2)` float32, in frame 0. One outside the frame moves like the nearest pixel, unseen.
        estimator: Of the flow from frame to frame.

    Returns:
        tracks `(n t 2)` float32 and visible `(n t)` bool.
    """
    height, width = frames.shape[2:]
    factor = math.ceil(_SHORTER_SIDE / min(height, width)) if min(height, width) < _SHORTER_SIDE else 1
    rows, columns = height * factor, width * factor
    limit = torch.tensor([columns - 1, rows - 1])
    position = (points + 0.5) * factor - 0.5
    seen = _inside(position, limit, factor)
    tracks, visible = [position], [seen]
    for before, after in pairwise(estimator.pictures(frames, factor)):
        step = _sample(estimator.between(before, after)[:rows, :columns], position)
        position = position + step
        back = _sample(estimator.between(after, before)[:rows, :columns], position)
        allowed = _RELATIVE * (step.square().sum(-1) + back.square().sum(-1)) + _ABSOLUTE
        seen = seen & ((step + back).square().sum(-1) <= allowed) & _inside(position, limit, factor)
        tracks.append(position)
        visible.append(seen)
    return (torch.stack(tracks, dim=1) + 0.5) / factor - 0.5, torch.stack(visible, dim=1)


def sample_at(pictures: Tensor, position: Tensor) -> Tensor:
    """Read pictures between their pixels, bilinear, beyond the border that of the border.

    Args:
        pictures: `(t c h w)`.
        position: `(t y x 2)`, pixels, x then y; coordinates as in the package.

    Returns:
        `(t c y x)`.
    """
    height, width = pictures.shape[2:]
    grid = 2 * position / torch.tensor([max(1, width - 1), max(1, height - 1)]) - 1
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=True)


def _inside(position: Tensor, limit: Tensor, factor: int) -> Tensor:
    """Whether positions `(n 2)` are on the picture, up to the outer edge of its border pixels: `(n)`."""
    margin = 0.5 * factor
    return ((position >= -margin) & (position <= limit + margin)).all(-1)


def _sample(flow: Tensor, position: Tensor) -> Tensor:
    """Flow `(h w 2)` at positions `(n 2)`, bilinear, beyond the border that of the border: `(n 2)`."""
    sampled = sample_at(rearrange(flow, "h w xy -> 1 xy h w"), rearrange(position, "n xy -> 1 1 n xy"))
    return rearrange(sampled, "1 xy 1 n -> n xy")
