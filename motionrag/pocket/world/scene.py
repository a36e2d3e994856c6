"""What a scene shows: things with a shape, a colour and a texture, in front of a backdrop. Nothing moves here."""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (214, 56, 50),
    "blue": (50, 92, 220),
    "green": (46, 160, 76),
    "yellow": (240, 200, 44),
    "violet": (150, 70, 200),
    "orange": (242, 136, 36),
    "white": (244, 244, 240),
    "pink": (240, 120, 180),
}
SHAPES = ("ball", "box", "triangle", "ring", "cross")
TEXTURES = ("flat", "striped", "halved")
BACKDROPS = ("gradient", "stripes", "blotches", "checks")
# Muted, so that every colour of a thing stands out from them; lightness is drawn apart.
_TINTS = {
    "steel": (96, 104, 124),
    "moss": (84, 112, 100),
    "clay": (122, 100, 88),
    "plum": (100, 90, 118),
    "grey": (104, 104, 104),
    "sea": (70, 92, 120),
}


@dataclass(frozen=True)
class Thing:
    """An object.

    Attributes:
        shape: One of `SHAPES`.
        colour: A key of `COLOURS`.
        texture: One of `TEXTURES`.
        radius: Pixels.
    """

    shape: str
    colour: str
    texture: str
    radius: float

    @property
    def name(self) -> str:
        """As in captions: "red ball"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Backdrop:
    """What is behind the things, as a function of the place, so that a camera can move over it.

    Attributes:
        kind: One of `BACKDROPS`.
        near: RGB, 0 to 255.
        far: RGB, 0 to 255.
        angle: Direction of the pattern, radians.
        period: Pixels after which it repeats.
        phase: Radians.
        tint: What its colour is called.
    """

    kind: str
    near: tuple[float, float, float]
    far: tuple[float, float, float]
    angle: float
    period: float
    phase: float
    tint: str


@dataclass(frozen=True)
class Style:
    """The looks that the scenes of a domain share.

    Attributes:
        shapes: Which shapes occur.
        colours: Which colours occur.
        textures: Which textures occur.
        backdrops: Which kinds of backdrop occur.
        tint: What the backdrops' colour is called; None for any.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES
    backdrops: tuple[str, ...] = BACKDROPS
    tint: str | None = None

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Style":
        """Draw a style: three shapes, four colours, one kind and tint of backdrop.

        Args:
            rng: Source of chance.

        Returns:
            The style.
        """
        return cls(
            shapes=tuple(str(each) for each in rng.choice(SHAPES, 3, replace=False)),
            colours=tuple(str(each) for each in rng.choice(list(COLOURS), 4, replace=False)),
            backdrops=(str(rng.choice(BACKDROPS)),),
            tint=str(rng.choice(list(_TINTS))),
        )


@dataclass(frozen=True)
class Scene:
    """Things and their backdrop.

    Attributes:
        things: In drawing order; the last is in front.
        backdrop: Behind them.
    """

    things: tuple[Thing, ...]
    backdrop: Backdrop

    @classmethod
    def sample(cls, rng: np.random.Generator, style: Style, num_things: int) -> "Scene":
        """Draw a scene.

        Args:
            rng: Source of chance.
            style: The looks to choose from.
            num_things: How many things; their colours differ.

        Returns:
            The scene.
        """
        colours = [str(each) for each in rng.choice(list(style.colours), num_things, replace=False)]
        smallest, largest = (7.0, 10.0) if num_things == 1 else (6.0, 7.5)
        things = tuple(
            Thing(
                shape=str(rng.choice(style.shapes)),
                colour=colour,
                texture=str(rng.choice(style.textures)),
                radius=float(rng.uniform(smallest, largest)),
            )
            for colour in colours
        )
        tint = str(rng.choice(list(_TINTS))) if style.tint is None else style.tint
        lightness = rng.uniform(0.45, 1.15)
        contrast = rng.uniform(0.65, 0.85)
        backdrop = Backdrop(
            kind=str(rng.choice(style.backdrops)),
            near=_rgb(np.array(_TINTS[tint]) * lightness),
            far=_rgb(np.array(_TINTS[tint]) * lightness * contrast),
            angle=float(rng.uniform(0, np.pi)),
            period=float(rng.uniform(18, 32)),
            phase=float(rng.uniform(0, 2 * np.pi)),
            tint=tint,
        )
        return cls(things, backdrop)

    @property
    def name(self) -> str:
        """As in captions: "a red ball and a blue box"."""
        return " and ".join(f"a{'n' if each.name[0] in 'aeiou' else ''} {each.name}" for each in self.things)

    @property
    def description(self) -> str:
        """Everything that a picture shows: "a striped red ball in front of clay checks"."""
        things = " and ".join(f"a {each.texture} {each.name}" for each in self.things)
        return f"{things} in front of {self.backdrop.tint} {self.backdrop.kind}"


def _rgb(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
