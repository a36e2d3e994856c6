"""Mean distance (MD): how far from the drawn ways things go, in pixels.

MD-Vid follows each drag's start through the video with a point tracker. `md_vid` is what the benchmark means to
measure; `md_vid_published` repeats its released evaluator, faults included, so that figures can be set beside printed
ones. MD-Img looks each start up in every frame by its image features; no code for it was released, so this is a
definition of our own after the practice in drag editing: its figures compare with each other, not with printed ones.

Shapes: n drags, t frames, p pairs of frame 0 and a later frame, m tracked block pixels. Points are x then y, pixels.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.trajectory import interpolate

# The released evaluator follows every pixel of a drag's 8×8 block and takes each 64th, from this one on: the start
# itself, as long as all blocks before are whole.
_HALF, _CENTRE, _WHOLE = 4, 36, 64


def targets(drags: Sequence[Sequence[Sequence[float]]], num_frames: int, *, published: bool = False) -> Tensor:
    """Where the drawn ways are in each frame.

    Args:
        drags: Key points of each, at least one.
        num_frames: Frames of the video.
        published: A drag of one point goes to (x + 1, y + 1), as in the released code; else it stays.

    Returns:
        `(n t 2)` float32.
    """
    ways = []
    for drag in drags:
        points = torch.tensor(drag, dtype=torch.float32)
        if published and len(points) == 1:
            points = torch.cat([points, points + 1])
        ways.append(interpolate(points, num_frames))
    return torch.stack(ways)


def md_vid(tracks: Tensor, drawn: Tensor, frames: Sequence[int]) -> Tensor:
    """Mean distance between tracked starts and drawn ways, at the same frames.

    Args:
        tracks: `(n t 2)`: each drag's start, tracked.
        drawn: `(n t 2)`, of `targets`.
        frames: Which to compare; frame 0 is given, so it does not belong here.

    Returns:
        Scalar, pixels: the mean over drags and frames.
    """
    chosen = list(frames)
    return (tracks[:, chosen] - drawn[:, chosen]).norm(dim=-1).mean()


def block_pixels(drags: Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """The pixels that the released evaluator tracks: 8×8 around each start, cut at the left and the top edge only.

    Args:
        drags: Key points of each.

    Returns:
        `(m 2)` float32, columns outside, rows inside.
    """
    pixels = [
        (float(column), float(row))
        for drag in drags
        for column in range(max(0, int(drag[0][0]) - _HALF), max(0, int(drag[0][0]) + _HALF))
        for row in range(max(0, int(drag[0][1]) - _HALF), max(0, int(drag[0][1]) + _HALF))
    ]
    return torch.tensor(pixels).reshape(-1, 2)


def md_vid_published(block_tracks: Tensor, drawn: Tensor, frames: Sequence[int]) -> Tensor | None:
    """The released evaluator's figure, faults included.

    A cut block moves the pixel that stands for it and for all later drags, and with fewer frames than all, target i is
    compared with the prediction in frame i of the video, not in the chosen frame.

    Args:
        block_tracks: `(m t 2)`: the pixels of `block_pixels`, tracked together.
        drawn: `(n t 2)`, of `targets(…, published=True)`.
        frames: Which to compare, without frame 0.

    Returns:
        Scalar, pixels; None where the released evaluator fails, because cut blocks leave a drag without a pixel.
    """
    chosen = list(frames)
    centres = block_tracks[_CENTRE::_WHOLE]
    if len(centres) < len(drawn):
        return None
    return (centres[: len(drawn), 1 : 1 + len(chosen)] - drawn[:, chosen]).norm(dim=-1).mean()


def md_img(features: Tensor, drawn: Tensor, frames: Sequence[int], *, size: tuple[int, int]) -> Tensor:
    """Mean distance between drawn ways and the places that look most like their starts.

    The similarity (cosine) of a start's feature to all features of a frame is enlarged to the frame's size, and its
    highest place is the match.

    Args:
        features: `(t d h w)`: dense image features of each frame, on a grid that covers the whole frame.
        drawn: `(n t 2)`, of `targets`.
        frames: Which to compare, without frame 0.
        size: Height and width of the frame in pixels, which `drawn` is in.

    Returns:
        Scalar, pixels: the mean over drags and frames.
    """
    height, width = size
    chosen = list(frames)
    normed = F.normalize(features.float(), dim=1)
    # As image coordinates from -1 to 1 between the outer edges; pixel 0 covers the first 1 / width.
    grid = (2 * drawn[:, 0] + 1) / torch.tensor([width, height]) - 1
    starts = F.grid_sample(normed[:1], grid[None, None], padding_mode="border", align_corners=False)
    starts = rearrange(F.normalize(starts, dim=1), "1 d 1 n -> n d")
    distances = []
    for frame in chosen:
        alike = torch.einsum("n d, d h w -> n h w", starts, normed[frame])
        full = F.interpolate(alike[None], size=size, mode="bilinear", align_corners=False)[0]
        best = full.flatten(1).argmax(1)
        found = rearrange([best % width, best // width], "xy n -> n xy")
        distances.append((found - drawn[:, frame]).norm(dim=-1))
    return torch.stack(distances).mean()
