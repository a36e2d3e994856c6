"""Tracks of points, with whichever tracker."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from motionrag.tracking.cotracker import CoTracker
from motionrag.tracking.frames import to_uint8
from motionrag.tracking.optical_flow import OpticalFlowTracker
from motionrag.tracking.raft import Raft

TRACKERS = ("optical-flow", "raft", "cotracker")


class Tracker(Protocol):
    """Anything that follows points.

    Attributes:
        name: Identifies the method and its weights: results of different names are not mixed.
    """

    name: str

    def __call__(self, frames: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points.

        Args:
            frames: `(t 3 h w)` uint8, on the CPU.
            points: `(n 2)` float32, pixels in frame 0, x then y; they may lie outside the frame.

        Returns:
            tracks `(n t 2)` float32 and visible `(n t)` bool, on the CPU.
        """
        ...


def track_points(video: Tensor, points: Any, *, tracker: Tracker | None = None) -> tuple[Tensor, Tensor]:
    """Follow points from frame 0.

    Args:
        video: `(t 3 h w)`, uint8, or floating in [-1, 1].
        points: `(n 2)`, pixels in frame 0, x then y; (0, 0) is the centre of the upper left pixel. A point outside the
            frame is followed as its tracker does it, and is not visible with the default one.
        tracker: None for optical flow, which needs no weights.

    Returns:
        tracks `(n t 2)` float32, pixels, and visible `(n t)` bool; the tracks begin exactly at the points.

    Raises:
        ValueError: For another layout or range, points that are not finite, or a tracker that returns other shapes.
    """
    frames = to_uint8(video)
    starts = torch.as_tensor(points, dtype=torch.float32)
    if starts.ndim != 2 or starts.shape[1] != 2:
        raise ValueError(f"Points to track are (n 2); these are {tuple(starts.shape)}.")
    bad = ~starts.isfinite().all(1)
    if bad.any():
        raise ValueError(f"Point {int(bad.nonzero()[0])} to track holds a number that is not finite.")
    count, time = len(starts), len(frames)
    if not count:
        return torch.zeros(0, time, 2), torch.zeros(0, time, dtype=torch.bool)
    chosen = tracker or OpticalFlowTracker()
    tracks, visible = chosen(frames, starts)
    if tracks.shape != (count, time, 2) or visible.shape != (count, time):
        raise ValueError(
            f"The tracker {chosen.name!r} must return tracks {(count, time, 2)} and visible {(count, time)}, "
            f"got {tuple(tracks.shape)} and {tuple(visible.shape)}."
        )
    return torch.cat([starts[:, None], tracks[:, 1:]], dim=1), visible


def load_tracker(
    name: str = "optical-flow", *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Tracker:
    """Make a tracker by its name.

    Args:
        name: One of `TRACKERS`.
        weights: Checkpoint of a learned tracker: for "raft" a safetensors file, or None for torchvision's own, which
            it downloads.
        device: Where a learned tracker runs.

    Returns:
        The tracker.

    Raises:
        ValueError: If there is no such tracker, or weights are given or missing where they do not fit.
    """
    if name not in TRACKERS:
        raise ValueError(f"There is no tracker {name!r}; choose from {', '.join(TRACKERS)}.")
    if name == "optical-flow":
        if weights is not None:
            raise ValueError("The tracker 'optical-flow' has no weights; choose a learned one, or leave them out.")
        return OpticalFlowTracker()
    if name == "raft":
        return Raft(weights, device=device)
    if weights is None:
        raise ValueError("The tracker 'cotracker' needs the path of its weights; it downloads nothing.")
    return CoTracker(weights, device=device)
