"""Clips in which every thing goes a way of its own, or stays: what drawn trajectories ask for, and no domain shows.

The things of a domain all move alike, so a model that has seen domains alone does not know that one of three can be
dragged while the others stand still.
"""

import numpy as np

from motionrag.pocket.world.domains import domain
from motionrag.pocket.world.dynamics import NUM_FRAMES, SIZE, Motion
from motionrag.pocket.world.render import WorldClip, render
from motionrag.pocket.world.scene import Scene
from motionrag.trajectory import interpolate

SHARES = (0.25, 0.3, 0.45)  # of scenes with one, two and three things
STILL = 0.35  # share of things that stay
_DISTANCE = (4.0, 38.0)  # pixels from start to end of a way
_BEND = 0.4  # of that distance: how far the points between may lie aside
_TURN = 0.3  # share of things that turn while they move
_TRIES = 60


def drag_clip(seed: int, index: int) -> WorldClip:
    """Draw a clip of an endless set; the camera stands still.

    Args:
        seed: Of the set.
        index: Of the clip.

    Returns:
        The clip. It belongs to no family and has no parameters; its captions name the things alone.
    """
    rng = np.random.default_rng((seed, index, 2))
    count = int(rng.choice(len(SHARES), p=SHARES)) + 1
    scene = Scene.sample(rng, domain((seed, index)).style, count)
    radii = np.array([thing.radius for thing in scene.things])
    starts = _apart(rng, radii)
    positions = np.stack([_way(rng, start, radius) for start, radius in zip(starts, radii, strict=True)])
    turns = rng.uniform(-np.pi, np.pi, count) * (rng.uniform(size=count) < _TURN)
    moves = np.linalg.norm(positions - positions[:, :1], axis=-1)
    shares = moves / np.maximum(moves.max(axis=1, keepdims=True), 1)
    fields = render(scene, Motion.along(positions, angles=turns[:, None] * shares))
    return WorldClip(
        **fields, family="", parameters={}, caption=scene.name, plain_caption=scene.name, things=scene.things
    )


def bent_way(
    rng: np.random.Generator, start: np.ndarray, *, number: int, distance: tuple[float, float], bend: float
) -> np.ndarray:
    """Draw key points that lead in some direction, those between somewhat aside.

    Args:
        rng: Source of chance.
        start: The first `(2)`, pixels, x then y.
        number: How many, at least 2.
        distance: Least and greatest from the first to the last.
        bend: How far those between may lie aside, as a share of that distance.

    Returns:
        `(number 2)`; they may lead out of the frame.
    """
    length, angle = rng.uniform(*distance), rng.uniform(-np.pi, np.pi)
    aside = np.zeros(number)
    aside[1:-1] = rng.uniform(-bend, bend, number - 2) * length
    ahead = np.linspace(0, length, number)
    forward = np.array([np.cos(angle), np.sin(angle)])
    points: np.ndarray = start + ahead[:, None] * forward + aside[:, None] * np.array([-forward[1], forward[0]])
    return points


def _apart(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Starts `(n 2)` inside the frame at which things touch as little as possible."""
    best, widest = np.zeros((len(radii), 2)), -np.inf
    for _ in range(_TRIES):
        starts = rng.uniform(radii[:, None], SIZE - radii[:, None], (len(radii), 2))
        gaps = np.linalg.norm(starts[:, None] - starts[None], axis=-1) - radii[:, None] - radii[None]
        gap = gaps[~np.eye(len(radii), dtype=bool)].min(initial=np.inf)
        if gap > widest:
            best, widest = starts, gap
        if gap > 0:
            break
    return best


def _way(rng: np.random.Generator, start: np.ndarray, radius: float) -> np.ndarray:
    """Centres `(t 2)` along a smooth way that stays in the frame; a still thing if chance or place wants it."""
    still = np.repeat(start[None], NUM_FRAMES, axis=0)
    if rng.uniform() < STILL:
        return still
    for _ in range(_TRIES):
        points = bent_way(rng, start, number=int(rng.integers(2, 5)), distance=_DISTANCE, bend=_BEND)
        if (points >= radius).all() and (points <= SIZE - radius).all():  # and so all between: PCHIP never overshoots
            return interpolate(points, NUM_FRAMES).double().numpy()
    return still
