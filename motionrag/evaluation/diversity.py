"""Diversity: how far generations of the same query from different noise move apart, in % of the frame's side.

Plain diversity is no merit in itself: where the motion is known, a good generator has little of it. It tells apart a
backbone that moves at random from one that does not move.
"""

from itertools import combinations

import torch
from torch import Tensor

from motionrag.evaluation.track_error import position_errors


def diversity(positions: Tensor, size: int) -> Tensor:
    """Mean track distance between all pairs of seeds.

    Args:
        positions: Tracked, `(s b n t 2)` for s seeds of the same b queries; pixels, NaN where there is no thing.
        size: Side of the frame, pixels.

    Returns:
        `(b)`, % of the frame's side.

    Raises:
        ValueError: If there is one seed only.
    """
    if len(positions) < 2:
        raise ValueError(f"Diversity compares generations from different noise; got {len(positions)} seed.")
    return torch.stack([position_errors(one, other, size) for one, other in combinations(positions, 2)]).mean(0)
