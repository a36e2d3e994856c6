"""Trajectories suggested by a retrieved clip: what moves in it is tracked, and a few ways are carried over.

They are a start for editing: a way keeps its place in the frame, and the image may have its thing elsewhere.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.tracking import Tracker, track_points
from motionrag.trajectory import RegionTrajectory

GRID = 16  # points that are tracked along each side of the frame
KEY_POINTS = 5  # of a suggested way
MOVING = 0.25  # of the fastest point's displacement, from which on a point counts as moving
LEAST_MOTION = 0.02  # of the frame's shorter side; what moves less stands still
SPACING = 0.15  # of the frame's shorter side, between the starts of two ways


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_trajectories` found.

    Attributes:
        trajectories: Ways in pixels of the image, that of the greatest displacement first; empty if nothing moves.
        motion_mask: `(h w)`, float32, 0 or 1, at the image's size: where the clip moves.
    """

    trajectories: list[RegionTrajectory]
    motion_mask: Tensor


def suggest_trajectories(
    video: Tensor, image_size: tuple[int, int], *, count: int = 4, tracker: Tracker | None = None
) -> Suggestion:
    """Track a clip and carry its most moving points over to an image.

    Args:
        video: `(t c h w)` in [-1, 1], or uint8.
        image_size: Height and width of the image, in pixels.
        count: Most ways.
        tracker: None for optical flow.

    Returns:
        Ways and mask.

    Raises:
        ValueError: If the video is malformed, or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}.")
    size = torch.tensor([video.shape[3], video.shape[2]])  # x, y
    cells = (torch.arange(GRID) + 0.5) / GRID
    starts = rearrange(torch.stack(torch.meshgrid(cells, cells, indexing="xy")), "xy y x -> (y x) xy") * size
    tracks, visible = track_points(video, starts, tracker=tracker)
    displacement = (tracks - tracks[:, :1]).norm(dim=2).amax(dim=1) * visible.all(dim=1)
    least = max(MOVING * float(displacement.max()), LEAST_MOTION * float(size.min()))
    moves = displacement >= least
    scale = torch.tensor([image_size[1], image_size[0]]) / size
    ways = [
        _way(tracks[index] * scale, image_size)
        for index in _spread(tracks[:, 0], displacement * moves, SPACING * float(size.min()), count)
    ]
    mask = F.interpolate(rearrange(moves.float(), "(y x) -> 1 1 y x", y=GRID), image_size, mode="nearest")
    return Suggestion(ways, rearrange(mask, "1 1 h w -> h w"))


def _spread(starts: Tensor, weights: Tensor, spacing: float, count: int) -> list[int]:
    """Indices of the heaviest points that keep their distance from heavier ones; none of weight 0."""
    chosen: list[int] = []
    remaining = weights.clone()
    while len(chosen) < count and remaining.max() > 0:
        best = int(remaining.argmax())
        chosen.append(best)
        remaining[(starts - starts[best]).norm(dim=1) < spacing] = 0
    return chosen


def _way(track: Tensor, image_size: tuple[int, int]) -> RegionTrajectory:
    """A tracked point `(t 2)` as a way of few points, kept inside the image."""
    keys = track[torch.linspace(0, len(track) - 1, KEY_POINTS).round().long()]
    limit = torch.tensor([image_size[1] - 1.0, image_size[0] - 1.0])
    return RegionTrajectory(keys.clamp(min=torch.zeros(2), max=limit).tolist())
