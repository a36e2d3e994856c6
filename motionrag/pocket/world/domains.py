"""Which clips exist: domains with a made-up verb each, and clips drawn from them by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from motionrag.pocket.world.dynamics import FAMILIES, SIZE, TRAINED_FAMILIES, Dynamics, Motion
from motionrag.pocket.world.render import WorldClip, render
from motionrag.pocket.world.scene import Scene, Style

_ONSETS = ("bl", "d", "fr", "gl", "k", "m", "n", "pl", "r", "s", "sp", "t", "v", "w", "z", "gr")
_VOWELS = ("a", "e", "i", "o", "u", "ee", "oo", "ai")
_CODAS = ("b", "ck", "ff", "g", "lp", "mp", "nd", "p", "rn", "sk", "t", "x", "zz", "rf", "nk", "ld")


@dataclass(frozen=True)
class Domain:
    """The looks of scenes, one dynamics, and the verb that names it.

    Attributes:
        verb: Made up, third person: "blicks".
        dynamics: How everything in it moves.
        style: How everything in it looks.
    """

    verb: str
    dynamics: Dynamics
    style: Style


def made_up_verb(rng: np.random.Generator) -> str:
    """Draw a verb that means nothing.

    Args:
        rng: Source of chance.

    Returns:
        One of 262 144 words of two syllables or 2 048 of one, third person.
    """
    syllables = [str(rng.choice(_ONSETS)) + str(rng.choice(_VOWELS)) for _ in range(int(rng.integers(1, 3)))]
    return "".join(syllables) + str(rng.choice(_CODAS)) + "s"


def domain(
    seed: int | tuple[int, ...], *, family: str | None = None, held_out_range: bool = False, style: Style | None = None
) -> Domain:
    """Make a domain.

    Args:
        seed: The same seed gives the same domain.
        family: Motion family; None draws one of those that are trained on.
        held_out_range: Take the first parameter from the range that training never sees.
        style: Looks; None draws them.

    Returns:
        The domain.

    Raises:
        ValueError: If there is no such family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"There is no motion family {family!r}; there are {', '.join(FAMILIES)}.")
    rng = np.random.default_rng(seed)
    family = family or str(rng.choice(TRAINED_FAMILIES))
    dynamics = Dynamics.sample(rng, family, held_out_range=held_out_range)
    return Domain(made_up_verb(rng), dynamics, style or Style.sample(rng))


def named_domain(verb: str, *, family: str | None = None) -> Domain:
    """Make the domain that a verb names: "blick" means the same motion for everybody.

    Args:
        verb: A word of letters.
        family: Motion family; None takes the trained one that the verb stands for.

    Returns:
        The domain, in all looks.

    Raises:
        ValueError: If the word is empty or holds anything but letters, or there is no such family.
    """
    if not verb.isalpha():
        raise ValueError(f"A domain is named by one word of letters, such as 'blick', got {verb!r}.")
    made = domain(tuple(verb.lower().encode()), family=family, style=Style())
    return Domain(f"{verb.lower()}s", made.dynamics, made.style)


def sample_clip(domain: Domain, seed: int | tuple[int, ...], *, truth: bool = True) -> WorldClip:
    """Draw one clip of a domain.

    Args:
        domain: Looks and dynamics.
        seed: The same seed gives the same pixels.
        truth: Whether to compute flow too; without it the flow fields have no frames.

    Returns:
        The clip.
    """
    return _clip(domain, *draw_scene(domain, seed), truth=truth)


def draw_scene(domain: Domain, seed: int | tuple[int, ...]) -> tuple[Scene, Motion]:
    """What `sample_clip` shows, without rendering it.

    Args:
        domain: Looks and dynamics.
        seed: As in `sample_clip`.

    Returns:
        What is there, and where it is.
    """
    rng = np.random.default_rng(seed)
    scene = Scene.sample(rng, domain.style, FAMILIES[domain.dynamics.family].num_things)
    return scene, domain.dynamics.move(rng, np.array([each.radius for each in scene.things]))


def same_start(domains: Sequence[Domain], seed: int | tuple[int, ...], *, truth: bool = True) -> list[WorldClip]:
    """Draw one scene and let it move by the dynamics of each domain: the first frames are the same.

    Args:
        domains: Of one thing each, and not bound to a place. The looks are those of the first.
        seed: The same seed gives the same pixels.
        truth: As in `sample_clip`.

    Returns:
        A clip for each domain. Where there is a start from which everything stays in the frame, it is used.

    Raises:
        ValueError: If a domain moves several things, or a floor, walls, a rope or the camera tie it to a place.
    """
    for each in domains:
        family = FAMILIES[each.dynamics.family]
        if family.num_things > 1 or family.bound_to_place:
            raise ValueError(f"The motion of {each.dynamics.family!r} cannot be begun at any place by a single thing.")
    rng = np.random.default_rng(seed)
    scene = Scene.sample(rng, domains[0].style, 1)
    radii = np.array([scene.things[0].radius])
    motions = [each.dynamics.move(rng, radii) for each in domains]
    paths = [motion.positions - motion.positions[:, :1] for motion in motions]
    reaches = [motion.scales[..., None] * radii for motion in motions]
    low = np.max([(reach - path).max(axis=1) for path, reach in zip(paths, reaches, strict=True)], axis=0)
    high = np.min([(SIZE - reach - path).min(axis=1) for path, reach in zip(paths, reaches, strict=True)], axis=0)
    middle = (low + high) / 2
    start = rng.uniform(np.where(low > high, middle, low), np.where(low > high, middle, high))
    moved = [replace(motion, positions=start[:, None] + path) for motion, path in zip(motions, paths, strict=True)]
    return [_clip(each, scene, motion, truth=truth) for each, motion in zip(domains, moved, strict=True)]


def _clip(domain: Domain, scene: Scene, motion: Motion, *, truth: bool) -> WorldClip:
    fields = render(scene, motion, truth=truth)
    if not truth:
        fields["flow"] = np.zeros((0, 0, 0, 2), np.float32)
        fields["flow_visible"] = np.zeros((0, 0, 0), bool)
    return WorldClip(
        **fields,
        family=domain.dynamics.family,
        parameters=dict(domain.dynamics.parameters),
        caption=_caption(scene, domain.verb),
        plain_caption=f"{scene.name} {FAMILIES[domain.dynamics.family].words}",
        things=scene.things,
    )


def training_clip(seed: int, domain_index: int, index: int = 0) -> WorldClip:
    """Draw a clip of an endless training set.

    Args:
        seed: Of the set.
        domain_index: Of the domain in the set.
        index: Of the clip in the domain.

    Returns:
        The clip, never of a held-out family or range.
    """
    return sample_clip(domain((seed, domain_index)), (seed, domain_index, 1 + index))


def training_scene(seed: int, domain_index: int, index: int = 0) -> Scene:
    """What `training_clip` shows, without rendering it.

    Args:
        seed: Of the set.
        domain_index: Of the domain in the set.
        index: Of the clip in the domain.

    Returns:
        The scene.
    """
    drawn = domain((seed, domain_index))
    family = FAMILIES[drawn.dynamics.family]
    return Scene.sample(np.random.default_rng((seed, domain_index, 1 + index)), drawn.style, family.num_things)


def training_caption(seed: int, domain_index: int, index: int = 0) -> str:
    """The caption of `training_clip`.

    Args:
        seed: Of the set.
        domain_index: Of the domain in the set.
        index: Of the clip in the domain.

    Returns:
        For example "a red ball blicks".
    """
    return _caption(training_scene(seed, domain_index, index), domain((seed, domain_index)).verb)


def _caption(scene: Scene, verb: str) -> str:
    return f"{scene.name} {verb.removesuffix('s') if len(scene.things) > 1 else verb}"
