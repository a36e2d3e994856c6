"""Track error: how far the things of a generated clip are from where they truly go, in % of the frame's side.

The root of the mean squared distance over things and frames; frame 0 is given, so it does not count. A thing that
cannot be found stays where it was seen last.
"""

import torch
from torch import Tensor

from motionrag.evaluation.tracks import track


def track_errors(frames: Tensor, tracks: Tensor, first_masks: Tensor, colours: Tensor) -> Tensor:
    """Track error of generated clips.

    Args:
        frames: Generated, `(b t h w 3)` uint8.
        tracks: The truth, `(b n t 2)`, pixels, x then y; NaN where there is no thing.
        first_masks: True masks of frame 0, `(b h w)`: 0 for the backdrop, i + 1 for thing i.
        colours: `(b n)`, indices into `pocket.world.scene.COLOURS`, -1 where there is no thing.

    Returns:
        `(b)`, % of the frame's side.
    """
    tracked = track(frames, starts=tracks[:, :, 0], first_masks=first_masks, colours=colours)
    return position_errors(tracked.positions, tracks, frames.shape[2])


def position_errors(positions: Tensor, tracks: Tensor, size: int) -> Tensor:
    """Track error of positions.

    Args:
        positions: `(b n t 2)`, pixels; NaN where there is no thing.
        tracks: The truth, `(b n t 2)`, likewise.
        size: Side of the frame, pixels.

    Returns:
        `(b)`, % of the frame's side.
    """
    squared = (positions - tracks)[:, :, 1:].square().sum(-1)
    return 100 / size * torch.nanmean(squared.flatten(1), dim=1).sqrt()
