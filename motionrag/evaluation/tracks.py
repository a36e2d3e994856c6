"""Tracks things of known colour in frames of the pocket's world. An instrument, not a method: nothing here is trained.

A pixel is compared with straight lines in colour space. A thing's textures darken its colour to half, so its line runs
from half the colour to the colour. The backdrop's line is fitted to frame 0 outside the things. What lies nearer to a
thing's line than to all others counts as that thing, in part where colours mix at its edge. The position is the
centroid of what counts within a window around the last position. Its distance to the true centre in frame 0 (a
triangle's centroid is not its centre, one half of a thing may look like the backdrop) is kept in all frames.

Shapes: b clips, n things, t frames, h w pixels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from motionrag.pocket.world.scene import COLOURS

# RGB units: the autoencoder's blur and noise in flat areas are below this.
_COLOUR_NOISE = 22.0
# The backdrop covers more than nine tenths of a frame; a colour that fits both is rather the backdrop's.
_BACKDROP_PRIOR = 4.0
# Likelihood of a pixel that fits nothing, at three times the noise.
_OUTLIER = 0.011
# Standard deviations of the window in pixels, from the first look to the last. The fastest things of the world move
# 11 pixels a frame.
_WINDOWS = (16.0, 10.0, 10.0, 9.0, 9.0)
# A thing of which less than this share of its first area is seen counts as lost.
_LOST_BELOW = 0.15


@dataclass(frozen=True)
class Tracked:
    """Where things were seen.

    Attributes:
        positions: `(b n t 2)`, pixels, x then y; NaN where there is no thing. Lost things keep their last position.
        found: `(b n t)` bool; False where a thing was lost, or where there is none.
        areas: `(b n t)`, pixels that count as the thing near its position.
        shares: `(b n t h w)`, 0 to 1: how far a pixel counts as the thing.
    """

    positions: Tensor
    found: Tensor
    areas: Tensor
    shares: Tensor


def track(frames: Tensor, *, starts: Tensor, first_masks: Tensor, colours: Tensor) -> Tracked:
    """Follow things of known colour from known places.

    Args:
        frames: `(b t h w 3)` uint8.
        starts: True centres in frame 0, `(b n 2)`, pixels, x then y; NaN where there is no thing.
        first_masks: True masks of frame 0, `(b h w)`: 0 for the backdrop, i + 1 for thing i.
        colours: `(b n)`, indices into `COLOURS`, -1 where there is no thing.

    Returns:
        Positions, areas and pixels.

    Raises:
        ValueError: If shapes disagree.
    """
    batch, things = colours.shape
    if frames.ndim != 5 or len(frames) != batch or starts.shape != (batch, things, 2):
        raise ValueError(
            f"Tracking needs frames (b t h w 3), starts (b n 2) and colours (b n), got {tuple(frames.shape)}, "
            f"{tuple(starts.shape)} and {tuple(colours.shape)}."
        )
    if first_masks.shape != (batch, *frames.shape[2:4]):
        raise ValueError(f"Tracking needs masks of frame 0 (b h w), got {tuple(first_masks.shape)}.")
    exists = colours >= 0
    shares = _shares(frames.float(), first_masks, colours)
    position = torch.where(exists[..., None], starts.float(), 0.0)
    first_areas = torch.stack([(first_masks == index + 1).sum((1, 2)) for index in range(things)], dim=1)

    start = position
    offset = torch.zeros_like(position)
    positions, found, areas = [], [], []
    for index in range(frames.shape[1]):
        centroid, area = _centroid(shares[:, :, index], position - offset)
        seen = exists & (area >= _LOST_BELOW * first_areas)
        if index == 0:
            offset = torch.where(seen[..., None], start - centroid, 0.0)
        position = torch.where(seen[..., None], centroid + offset, position)
        positions.append(position)
        found.append(seen)
        areas.append(area * exists)
    missing = torch.where(exists, 0.0, torch.nan)[..., None, None]
    return Tracked(torch.stack(positions, 2) + missing, torch.stack(found, 2), torch.stack(areas, 2), shares)


def _shares(frames: Tensor, first_masks: Tensor, colours: Tensor) -> Tensor:
    """How far each pixel counts as each thing, `(b n t h w)`."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    full = palette[colours.clamp(min=0)]  # (b n 3)
    pixels = rearrange(frames, "b t h w c -> b (t h w) c")
    begin, end = _backdrop_line(frames[:, 0], first_masks == 0)
    begins = torch.cat([0.5 * full, begin[:, None]], dim=1)
    ends = torch.cat([full, end[:, None]], dim=1)
    likelihood = torch.exp(-_squared_distance(pixels, begins, ends) / (2 * _COLOUR_NOISE**2))
    likelihood[:, -1] *= _BACKDROP_PRIOR
    things = likelihood[:, :-1] * (colours >= 0)[..., None]
    share = things / (things.sum(1, keepdim=True) + likelihood[:, -1:] + _OUTLIER)
    _, time, height, width, _ = frames.shape
    # From 0.5 up, so that a backdrop of nearly the same colour does not add up.
    return rearrange((2 * share - 1).clamp(min=0), "b n (t h w) -> b n t h w", t=time, h=height, w=width)


def _backdrop_line(first: Tensor, is_backdrop: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the line through the backdrop's colours `(b 3)`: its colours are one tint in different lightness."""
    weight = is_backdrop.flatten(1).float()[..., None]
    pixels = rearrange(first, "b h w c -> b (h w) c")
    total = weight.sum(1).clamp(min=1)
    mean = (weight * pixels).sum(1) / total
    centred = (pixels - mean[:, None]) * weight
    _, directions = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
    direction = directions[..., -1]
    along = (centred @ direction[..., None])[..., 0]
    # A soft extent: a rope or a soft edge is not the backdrop's colour.
    reach = 2.5 * (along.square().sum(1) / total[:, 0]).sqrt()
    return mean - reach[:, None] * direction, mean + reach[:, None] * direction


def _squared_distance(pixels: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    """Of pixels `(b p 3)` to the lines from begin to end `(b m 3)`: `(b m p)`."""
    along = ends - begins
    length = along.square().sum(-1).clamp(min=1e-6)
    to_begin = (pixels @ begins.transpose(1, 2)).transpose(1, 2)
    on_line = (pixels @ along.transpose(1, 2)).transpose(1, 2) - (begins * along).sum(-1)[..., None]
    place = (on_line / length[..., None]).clamp(0, 1)
    squared = pixels.square().sum(-1)[:, None] - 2 * to_begin + begins.square().sum(-1)[..., None]
    return (squared - 2 * place * on_line + place.square() * length[..., None]).clamp(min=0)


def _centroid(share: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid `(b n 2)` of `share` `(b n h w)` in a window that follows it, and the area in it `(b n)`."""
    height, width = share.shape[-2:]
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    area = torch.zeros(around.shape[:2])
    for window in _WINDOWS:
        in_x = torch.exp(-((x - around[..., :1]) ** 2) / (2 * window**2))
        in_y = torch.exp(-((y - around[..., 1:]) ** 2) / (2 * window**2))
        columns = share @ torch.stack([in_x, in_x * x], dim=-1)  # (b n h 2)
        mass = (in_y * columns[..., 0]).sum(-1)
        sum_x = (in_y * columns[..., 1]).sum(-1)
        sum_y = (in_y * y * columns[..., 0]).sum(-1)
        seen = mass > 1
        around = torch.where(seen[..., None], torch.stack([sum_x, sum_y], -1) / mass.clamp(min=1e-6)[..., None], around)
    near = (x - around[..., :1]).abs()[..., None, :].maximum((y - around[..., 1:]).abs()[..., None]) <= 3 * _WINDOWS[-1]
    area = (share * near).sum((-2, -1))
    return around, area
