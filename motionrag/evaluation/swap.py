"""Zero-shot swap: one image, one prompt, two databases in which the same verb names two dynamics.

A pair's two truths show the same scene from the same start, moved by each dynamics. It uses families whose path does
not depend on where it starts, so that both truths exist. Both databases hold clips in the same style: only the motion
differs.
"""

from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from motionrag.evaluation.material import SEED
from motionrag.pocket.world import FAMILIES, NUM_FRAMES, SIZE, Domain, Scene, WorldClip, domain, render
from motionrag.pocket.world.dynamics import Motion

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
    scene = Scene.sample(rng, first.style, 1)
    radius = scene.things[0].radius
    motions = [each.dynamics.move(rng, np.array([radius])) for each in domains]
    paths = np.stack([motion.positions - motion.positions[:, :1] for motion in motions])[:, 0]  # (2 t 2)
    low = 0.8 * radius - paths.min(axis=(0, 1))
    high = SIZE - 0.8 * radius - paths.max(axis=(0, 1))
    distance = np.sqrt(((paths[0] - paths[1]) ** 2).sum(-1).sum() / (NUM_FRAMES - 1))
    if (low > high).any() or distance < _APART * SIZE:
        return None
    start = rng.uniform(low, high)
    truths = [
        _truth(scene, replace(motion, positions=(start + path)[None]), each)
        for motion, path, each in zip(motions, paths, domains, strict=True)
    ]
    return SwapPair(domains, (truths[0], truths[1]))


def _truth(scene: Scene, motion: Motion, moved_by: Domain) -> WorldClip:
    return WorldClip(
        **render(scene, motion, truth=False),
        flow=np.zeros((0, 0, 0, 2), np.float32),
        flow_visible=np.zeros((0, 0, 0), bool),
        family=moved_by.dynamics.family,
        parameters=dict(moved_by.dynamics.parameters),
        caption=f"{scene.name} {moved_by.verb}",
        plain_caption=f"{scene.name} {FAMILIES[moved_by.dynamics.family].words}",
        things=scene.things,
    )
