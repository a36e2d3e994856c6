"""Appearance: whether a generated clip still looks like its image, apart from where its things are.

PSNR of frame 0 against the image; the share of frames in which a thing keeps its colour, which means that its colour
covers between half and twice its true area; and how well its shape is kept: the overlap (intersection over union) of
what is seen of it with its true mask of the same frame, moved to where it was tracked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from motionrag.evaluation.tracks import Tracked

# Pixels of which more than half counts as the thing; `Tracked.shares` starts at that half.
_SEEN_ABOVE = 0.0


@dataclass(frozen=True)
class Appearance:
    """What is kept of the looks.

    Attributes:
        psnr: Of frame 0, `(b)`, dB.
        colour_kept: `(b)`, share of things and frames, 0 to 1.
        shape_kept: `(b)`, mean overlap over things and frames, 0 to 1.
    """

    psnr: Tensor
    colour_kept: Tensor
    shape_kept: Tensor


def appearance(frames: Tensor, images: Tensor, tracked: Tracked, tracks: Tensor, masks: Tensor) -> Appearance:
    """Compare the looks of generated clips with the truth.

    Args:
        frames: Generated, `(b t h w 3)` uint8.
        images: What they were generated from, `(b h w 3)` uint8.
        tracked: The tracker's result on `frames`.
        tracks: True centres, `(b n t 2)`, pixels; NaN where there is no thing.
        masks: True masks, `(b t h w)`: 0 for the backdrop, i + 1 for thing i.

    Returns:
        Three figures for each clip.
    """
    error = (frames[:, 0].float() - images.float()).square().flatten(1).mean(1)
    things = tracks.shape[1]
    truth = torch.stack([masks == index + 1 for index in range(things)], dim=1)  # (b n t h w)
    exists = ~tracks[..., 0].isnan()
    true_area = truth.sum((-2, -1))
    # A thing of which nothing is visible in the truth cannot keep anything.
    counts = exists & (true_area > 0)
    ratio = tracked.areas / true_area.clamp(min=1)
    colour_kept = tracked.found & (ratio >= 0.5) & (ratio <= 2)

    seen = tracked.shares > _SEEN_ABOVE
    moved = _move(truth, (tracked.positions - tracks).nan_to_num(0).round().long())
    overlap = (seen & moved).sum((-2, -1)) / (seen | moved).sum((-2, -1)).clamp(min=1)
    return Appearance(
        psnr=10 * torch.log10(255**2 / error.clamp(min=1e-2)),
        colour_kept=_mean(colour_kept.float(), counts),
        shape_kept=_mean(overlap, counts),
    )


def _move(masks: Tensor, shift: Tensor) -> Tensor:
    """Masks `(b n t h w)` moved by whole pixels `(b n t 2)`, x then y; nothing comes in at the sides."""
    height, width = masks.shape[-2:]
    x = torch.arange(width) - shift[..., :1]  # (b n t w)
    y = torch.arange(height) - shift[..., 1:]  # (b n t h)
    inside = ((y >= 0) & (y < height))[..., None] & ((x >= 0) & (x < width))[..., None, :]
    source = y.clamp(0, height - 1)[..., None] * width + x.clamp(0, width - 1)[..., None, :]
    return masks.flatten(-2).gather(-1, source.flatten(-2)).view_as(masks) & inside


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return (values * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)
