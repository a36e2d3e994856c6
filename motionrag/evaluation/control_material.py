"""What trajectory control is measured on: scenes that no training has seen, and ways that things in them shall go.

Three kinds. *Drags*: one thing goes a way that no motion family knows, and all others stay. *Together*: the things move
by a domain, and one of them is dragged. *True ways*: things are dragged where they truly go. The camera stands still
in all of them. With every scene comes the video that does exactly what is asked, so that instruments can be checked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from motionrag.evaluation.material import SEED
from motionrag.pocket.world import (
    HELD_OUT_FAMILIES,
    NUM_FRAMES,
    SIZE,
    TRAINED_FAMILIES,
    Domain,
    Scene,
    WorldClip,
    domain,
    render,
    sample_clip,
)
from motionrag.pocket.world.domains import draw_scene
from motionrag.pocket.world.drags import bent_way
from motionrag.pocket.world.dynamics import Motion
from motionrag.trajectory import interpolate

# Behind SEED, so that nothing here is a scene of another evaluation.
_DRAGS, _TOGETHER, _DOMAINS, _TRUE = 11, 12, 13, 14
NEAREST, FARTHEST = 12.0, 30.0  # pixels from the start of a drag to its end
_BEND = 0.35  # of that distance: how far the points between may lie aside
_GAP = 2.0  # pixels between a dragged thing and the others
_TRIES = 100
_LEAST = 2.0  # pixels that a true way must lead away from its start, on the mean
WAYLESS = ("spin", "grow", "pan", "zoom")
"""Families that move on the spot, or by the camera."""


@dataclass(frozen=True)
class Drag:
    """What is asked of a scene.

    Attributes:
        things: Numbers of the things that are dragged.
        ways: Key points of each `(p 2)`, pixels, x then y; the first lies on the thing.
        brush: `(h w)` bool: what may move.
        asked: The video that does it.
    """

    things: tuple[int, ...]
    ways: tuple[np.ndarray, ...]
    brush: np.ndarray
    asked: WorldClip


@dataclass(frozen=True)
class DragScene:
    """A scene and what is asked of it.

    Attributes:
        clip: How its domain moves it; the first frame is the image.
        drag: What is asked.
        all_at_once: All three things dragged at once, each its own way, where there are three.
        domain: Number of its domain, where there is a database.
    """

    clip: WorldClip
    drag: Drag
    all_at_once: Drag | None = None
    domain: int = 0


def drag_scenes(number: int, *, seed: int = 0) -> list[DragScene]:
    """Draw scenes in which one thing is dragged and the others stay.

    Args:
        number: How many; scenes of two and of three things take turns.
        seed: Scene i of a seed is always the same, whatever the number.

    Returns:
        The scenes.
    """
    scenes: list[DragScene] = []
    for attempt in count():
        if len(scenes) == number:
            break
        family = ("collide", "swarm")[len(scenes) % 2]
        drawn = _drag_scene(domain((SEED, _DRAGS, seed, attempt), family=family), (SEED, _DRAGS, seed, attempt, 1))
        if drawn is not None:
            scenes.append(drawn)
    return scenes


def together_domains(number: int, *, seed: int = 0) -> list[Domain]:
    """Draw domains of several things that move independently of each other, each with a verb of its own.

    Args:
        number: How many.
        seed: Domain i of a seed is always the same.

    Returns:
        The domains. They are swarms: of two that collide, neither has a true motion once the other is dragged away.
    """
    domains: list[Domain] = []
    for attempt in count():
        if len(domains) == number:
            break
        drawn = domain((SEED, _DOMAINS, seed, attempt), family="swarm")
        if drawn.verb not in [each.verb for each in domains]:
            domains.append(drawn)
    return domains


def together_scenes(domains: Sequence[Domain], number: int, *, seed: int = 0) -> list[DragScene]:
    """Draw scenes in which one thing is dragged while the others move by their domain.

    Args:
        domains: From `together_domains`; they take turns.
        number: How many scenes.
        seed: Scene i of a seed is always the same for the same domains.

    Returns:
        The scenes; the brush covers all things.
    """
    scenes: list[DragScene] = []
    for attempt in count():
        if len(scenes) == number:
            break
        index = len(scenes) % len(domains)
        drawn = _together_scene(domains[index], (SEED, _TOGETHER, seed, attempt))
        if drawn is not None:
            scenes.append(replace(drawn, domain=index))
    return scenes


def true_way_scenes(number: int, *, held_out: bool, seed: int = 0) -> list[DragScene]:
    """Draw clips whose things are dragged where they truly go.

    Args:
        number: How many; families take turns.
        held_out: Families that no training has seen, in place of the trained ones.
        seed: Scene i of a seed is always the same.

    Returns:
        The scenes. Things that are not seen all the time are not in any, and those that hardly move are not dragged.
    """
    families = [name for name in (HELD_OUT_FAMILIES if held_out else TRAINED_FAMILIES) if name not in WAYLESS]
    scenes: list[DragScene] = []
    for attempt in count():
        if len(scenes) == number:
            break
        family = families[len(scenes) % len(families)]
        key = (SEED, _TRUE, seed, int(held_out), attempt)
        clip = sample_clip(domain(key, family=family), (*key, 1), truth=False)
        lengths = np.linalg.norm(clip.tracks - clip.tracks[:, :1], axis=-1)[:, 1:].mean(axis=1)
        things = tuple(int(index) for index in np.nonzero(lengths >= _LEAST)[0])
        if things and clip.visible.all():
            scenes.append(DragScene(clip, _drag(clip, {thing: clip.tracks[thing] for thing in things}, clip)))
    return scenes


def covered(drag: Drag) -> np.ndarray:
    """Where dragged things are in any frame of what is asked.

    Args:
        drag: What is asked.

    Returns:
        `(h w)` bool.
    """
    return np.asarray(_covered(drag.asked, drag.things).any(axis=0))


def _covered(clip: WorldClip, things: Sequence[int]) -> np.ndarray:
    """`(t h w)` bool."""
    return np.isin(clip.masks, [thing + 1 for thing in things])


def _drag_scene(drawn: Domain, seed: tuple[int, ...]) -> DragScene | None:
    """A scene whose ways cross no other thing, or None."""
    scene, motion = draw_scene(drawn, seed)
    rng = np.random.default_rng((*seed, 1))
    first = int(rng.integers(len(scene.things)))
    positions, ways = np.repeat(motion.positions[:, :1], NUM_FRAMES, axis=1), {}
    # Each way keeps clear of the things that have none yet at their places, so the first is right on its own, too.
    asked, is_three = [], len(scene.things) == 3
    for step in range(3 if is_three else 1):
        thing = (first + step) % len(scene.things)
        way = _clear_way(rng, scene, positions, thing)
        if way is None:
            return None
        ways[thing] = way
        positions[thing] = interpolate(way, NUM_FRAMES).numpy()
        asked.append(positions.copy())
    clip = sample_clip(drawn, seed, truth=False)
    if not clip.visible[:, 0].all():
        return None
    one = _drag(clip, {first: ways[first]}, _moved(clip, scene, motion, asked[0]))
    return DragScene(clip, one, _drag(clip, ways, _moved(clip, scene, motion, asked[-1])) if is_three else None)


def _together_scene(drawn: Domain, seed: tuple[int, ...]) -> DragScene | None:
    scene, motion = draw_scene(drawn, seed)
    rng = np.random.default_rng((*seed, 1))
    thing = int(rng.integers(len(scene.things)))
    way = _clear_way(rng, scene, motion.positions, thing)
    if way is None:
        return None
    clip = sample_clip(drawn, seed, truth=False)
    if not clip.visible.all():
        return None
    positions = motion.positions.copy()
    positions[thing] = interpolate(way, NUM_FRAMES).numpy()
    drag = _drag(clip, {thing: way}, _moved(clip, scene, motion, positions))
    return DragScene(clip, replace(drag, brush=clip.masks[0] > 0))


def _drag(clip: WorldClip, ways: Mapping[int, np.ndarray], asked: WorldClip) -> Drag:
    """Ways of centres, begun on their things; the brush covers these."""
    things = tuple(sorted(ways))
    begun = tuple(_on_thing(clip, thing) + ways[thing] - ways[thing][0] for thing in things)
    return Drag(things, begun, _covered(clip, things)[0], asked)


def _moved(clip: WorldClip, scene: Scene, motion: Motion, positions: np.ndarray) -> WorldClip:
    """The scene of a clip with its things elsewhere, `(n t 2)`."""
    return replace(clip, **render(scene, replace(motion, positions=positions.copy()), truth=False))


def _clear_way(rng: np.random.Generator, scene: Scene, positions: np.ndarray, thing: int) -> np.ndarray | None:
    """Three or four points `(p 2)` from the thing's centre on: inside the frame, away from the others' `(n t 2)`."""
    radii = np.array([each.radius for each in scene.things])
    start, radius = positions[thing, 0], radii[thing]
    others = np.arange(len(radii)) != thing
    # A thing that begins at the edge may go along it.
    low, high = np.minimum(start, radius), np.maximum(start, SIZE - radius)
    for _ in range(_TRIES):
        points = bent_way(rng, start, number=int(rng.integers(3, 5)), distance=(NEAREST, FARTHEST), bend=_BEND)
        path = interpolate(points, NUM_FRAMES).numpy()
        apart = np.linalg.norm(path - positions[others], axis=-1) - (radius + radii[others])[:, None]
        is_inside = (path >= low - 1e-4).all() and (path <= high + 1e-4).all()  # the path is in float32
        if is_inside and apart.min() >= _GAP:
            return points
    return None


def _on_thing(clip: WorldClip, thing: int) -> np.ndarray:
    """The middle of the thing's pixel nearest its centre, where a person would begin: a ring has a hole there."""
    rows, columns = np.nonzero(clip.masks[0] == thing + 1)
    pixels = np.stack([columns, rows], axis=-1) + 0.5
    return np.asarray(pixels[np.linalg.norm(pixels - clip.tracks[thing, 0], axis=-1).argmin()])
