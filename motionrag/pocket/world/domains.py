"""Which clips exist: domains with a made-up verb each, and clips drawn from them by seed."""

from dataclasses import dataclass

import numpy as np

from motionrag.pocket.world.dynamics import TRAINED_FAMILIES, FAMILIES, Dynamics
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
        One of 131 072 two-syllable words or 2 048 short ones, third person.
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
    """
    rng = np.random.default_rng(seed)
    family = family or str(rng.choice(TRAINED_FAMILIES))
    dynamics = Dynamics.sample(rng, family, held_out_range=held_out_range)
    return Domain(made_up_verb(rng), dynamics, style or Style.sample(rng))


def named_domain(verb: str) -> Domain:
    """Make the domain that a verb names: "blick" means the same motion for everybody.

    Args:
        verb: A word of letters.

    Returns:
        The domain, of a trained family, in all looks.

    Raises:
        ValueError: If the word is empty or holds anything but letters.
    """
    if not verb.isalpha():
        raise ValueError(f"A domain is named by one word of letters, such as 'blick', got {verb!r}.")
    made = domain(tuple(verb.lower().encode()), style=Style())
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
    rng = np.random.default_rng(seed)
    family = FAMILIES[domain.dynamics.family]
    scene = Scene.sample(rng, domain.style, family.num_things)
    motion = domain.dynamics.move(rng, np.array([each.radius for each in scene.things]))
    fields = render(scene, motion, truth=truth)
    if not truth:
        fields["flow"] = np.zeros((0, 0, 0, 2), np.float32)
        fields["flow_visible"] = np.zeros((0, 0, 0), bool)
    is_plural = len(scene.things) > 1
    verb = domain.verb.removesuffix("s") if is_plural else domain.verb
    return WorldClip(
        **fields,
        family=domain.dynamics.family,
        parameters=dict(domain.dynamics.parameters),
        caption=f"{scene.name} {verb}",
        plain_caption=f"{scene.name} {family.words}",
        things=scene.things,
    )


def training_clip(seed: int, index: int, *, truth: bool = True) -> WorldClip:
    """Draw clip `index` of an endless training set: every clip of a domain of its own.

    Args:
        seed: Of the set.
        index: Of the clip.
        truth: As in `sample_clip`.

    Returns:
        The clip, never of a held-out family or range.
    """
    return sample_clip(domain((seed, index)), (seed, index, 1), truth=truth)
