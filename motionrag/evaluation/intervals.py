"""Confidence intervals by bootstrap over queries; the seeds of a query are averaged first, for they share its scene."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def interval(
    *groups: np.ndarray, figure: Callable[..., np.ndarray] = lambda mean: mean, seed: int = 0
) -> tuple[float, float, float]:
    """A figure made of means over the same queries, with its 95 % interval.

    Args:
        *groups: Each `(q)`: one value for each query, in the same order.
        figure: Takes one mean for each group, also as arrays.
        seed: Of the resampling.

    Returns:
        The figure, the 2.5 % and the 97.5 % quantile.
    """
    values = np.stack(groups)
    rng = np.random.default_rng(seed)
    resampled = values[:, rng.integers(0, values.shape[1], (RESAMPLES, values.shape[1]))].mean(-1)
    low, high = np.nanquantile(figure(*resampled), (0.025, 0.975))
    return float(figure(*values.mean(-1))), float(low), float(high)
