"""Zero-shot swap: one image, one prompt, two databases in which the same verb names two dynamics.

A pair's two truths show the same scene from the same start, moved by each dynamics. It uses families whose path does
not depend on where it starts, so that both truths exist. Both databases hold clips in the same style: only the motion
differs.
"""

from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from motionrag.evaluation.material import SEED
from motionrag.pocket.world import NUM_FRAMES, SIZE, Domain, WorldClip, domain, same_start

# Trained, one thing, and the displacement is the same wherever it starts.
FREE_FAMILIES = ("slide", "spring", "drift", "orbit", "spiral", "zigzag", "hop", "wander")
_APART = 0.1  # of the frame: less, and the two motions could not be told apart


@dataclass(frozen=True)
class SwapPair:
    """Two domains with one verb and one style, and a scene under both.

    Attributes:
        domains: The two.
        truths: The scene from the same start, moved by each.
    """

    domains: tuple[Domain, Domain]
    truths: tuple[WorldClip, WorldClip]


def swap_pairs(number: int) -> list[SwapPair]:
    """Draw pairs.

    Args:
        number: How many.

    Returns:
        Pairs with a verb of their own each.
    """
    pairs: list[SwapPair] = []
    verbs: set[str] = set()
    for attempt in count():
        if len(pairs) == number:
            break
        pair = _pair(np.random.default_rng((SEED, 9, attempt)), attempt)
        if pair is not None and pair.domains[0].verb not in verbs:
            pairs.append(pair)
            verbs.add(pair.domains[0].verb)
    return pairs


def _pair(rng: np.random.Generator, attempt: int) -> SwapPair | None:
    """A pair, or None if no start keeps both motions inside or they are too much alike."""
    families = rng.choice(FREE_FAMILIES, 2, replace=False)
    first = domain((SEED, 9, attempt, 1), family=str(families[0]))
    other = domain((SEED, 9, attempt, 2), family=str(families[1]))
    domains = (first, replace(first, dynamics=other.dynamics))
    one, two = same_start(domains, (SEED, 9, attempt, 0), truth=False)
    distance = np.sqrt(((one.tracks - two.tracks) ** 2).sum(-1).sum() / (NUM_FRAMES - 1))
    is_inside = all(each.visible.all() and each.tracks.min() > 0 and each.tracks.max() < SIZE for each in (one, two))
    return SwapPair(domains, (one, two)) if is_inside and distance >= _APART * SIZE else None
