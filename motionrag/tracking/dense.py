"""Dense flow from frame 0 to every frame, with whichever tracker, as training of feature modulation reads it."""

import math
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor

from motionrag.tracking.frames import to_uint8
from motionrag.tracking.points import Tracker, load_tracker

# CoTracker pays for every point: it follows the middle of each 4×4 cell, and the cell moves with it.
_SPACINGS = {"cotracker": 4}


class DenseTracker:
    """Gives the flow of every pixel by following points.

    Attributes:
        name: What results are labelled with.

    Args:
        tracker: Follows the points.
        spacing: Side in pixels of the cells of which the middle is followed; 1 follows every pixel.
    """

    def __init__(self, tracker: Tracker, *, spacing: int = 1) -> None:
        self.tracker, self.spacing = tracker, spacing
        self.name = tracker.name if spacing == 1 else f"{tracker.name} every {spacing} pixels"

    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Find the flow.

        Args:
            video: `(t 3 h w)`, uint8, or floating in [-1, 1].

        Returns:
            flow `(t h w 2)` float32 and visible `(t h w)` bool, as `dense_flow` gives them.

        Raises:
            ValueError: For another layout or range.
        """
        frames = to_uint8(video)
        height, width = frames.shape[2:]
        rows, columns = torch.meshgrid(self._middles(height), self._middles(width), indexing="ij")
        points = rearrange([columns, rows], "xy y x -> (y x) xy")
        tracks, visible = self.tracker(frames, points)
        flow = rearrange(tracks - points[:, None], "(y x) t xy -> t y x xy", y=len(rows))
        return self._spread(flow, height, width), self._spread(
            rearrange(visible, "(y x) t -> t y x 1", y=len(rows)), height, width
        )[..., 0]

    def _middles(self, size: int) -> Tensor:
        cells = torch.arange(math.ceil(size / self.spacing))
        return (cells * self.spacing + (self.spacing - 1) / 2).clamp(max=size - 1)

    def _spread(self, cells: Tensor, height: int, width: int) -> Tensor:
        pixels = repeat(cells, "t y x c -> t (y by) (x bx) c", by=self.spacing, bx=self.spacing)
        return pixels[:, :height, :width]


def dense_tracker(
    name: str = "optical-flow", *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> DenseTracker:
    """Make what finds dense flow, for many videos.

    Args:
        name: One of `TRACKERS`. "cotracker" follows the middle of every 4×4 pixels, the others every pixel.
        weights: File of a learned tracker, as for `load_tracker`.
        device: Where a learned tracker runs.

    Returns:
        It, to be called with a video.
    """
    return DenseTracker(load_tracker(name, weights=weights, device=device), spacing=_SPACINGS.get(name, 1))


def dense_flow(
    video: Tensor,
    *,
    estimator: str = "optical-flow",
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Flow from frame 0 to every frame; `dense_tracker` loads the weights once for many videos.

    Args:
        video: `(t 3 h w)`, uint8, or floating in [-1, 1].
        estimator: One of `TRACKERS`.
        weights: File of a learned one, as for `load_tracker`.
        device: Where a learned one runs.

    Returns:
        flow `(t h w 2)` float32: displacement of the content of frame 0, pixels, x then y; visible `(t h w)` bool:
        whether that content is still seen.

    Raises:
        ValueError: For another layout or range.
        ImportError: If OpenCV is not installed.
    """
    return dense_tracker(estimator, weights=weights, device=device)(video)
