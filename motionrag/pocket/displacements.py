"""Words with which the captions of the backbone's training tell how a thing moves.

Captions of real video models describe motion, and so their backbones can be steered towards it; made-up verbs teach
nothing. As grounding models have words for places in their vocabulary, the pocket has words for displacements:
`<t2x09>` says that at the third of six times a thing is 5 to 10 pixels to the right of where it was at first. Prompts
need none of it.
"""

import itertools
import math

import torch
from torch import Tensor

FRAMES = (3, 5, 8, 11, 13, 16)
LEVELS = 16
STEP = 5  # pixels between levels
_WAVES = 4

_MEANINGS = list(itertools.product(range(len(FRAMES)), range(2), range(LEVELS)))  # time, axis, level
WORDS = [f"<t{time}{'xy'[axis]}{level:02d}>" for time, axis, level in _MEANINGS]


def describe(track: Tensor) -> str:
    """Say where a thing goes.

    Args:
        track: Column and row in each of 17 frames `(t 2)`, in pixels. What goes farther than 40 counts as 40.

    Returns:
        12 words.
    """
    displacements = track[list(FRAMES)] - track[0]
    levels = (displacements / STEP + LEVELS / 2).floor().long().clamp(0, LEVELS - 1).tolist()
    return "".join(f"<t{time}x{x:02d}><t{time}y{y:02d}>" for time, (x, y) in enumerate(levels))


def vectors(dim: int) -> Tensor:
    """Embeddings of `WORDS`: time, axis and a smooth code of the level, so that near levels have near vectors.

    Args:
        dim: Channels, at least 16.

    Returns:
        `(words dim)` of unit mean square.
    """
    times, axes = torch.eye(len(FRAMES)), torch.eye(2)
    rows = []
    for time, axis, level in _MEANINGS:
        angle = math.pi * (level + 0.5) / LEVELS * torch.arange(1, _WAVES + 1)
        rows.append(torch.cat([1.5 * times[time], 1.5 * axes[axis], angle.cos(), angle.sin()]))
    codes = torch.stack(rows)
    codes = torch.cat([codes, codes.new_zeros(len(codes), dim - codes.shape[1])], dim=1)
    return codes / codes.square().mean(1, keepdim=True).sqrt()
