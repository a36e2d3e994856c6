"""How things move: families of motion with continuous parameters.

Falling, throwing, sliding, ricocheting, colliding, swinging and springing are simulated by pymunk; the other families
are curves. `FAMILIES` is the list. Pixels and seconds; x to the right, y down; angles in radians.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

SIZE, NUM_FRAMES, FPS = 64, 17, 8
FLOOR = 57.0  # the height at which things that fall come to lie
HELD_OUT_FROM = 0.85  # of a family's first parameter: the upper 15 % of its range are never trained on
_SUBSTEPS = 16
_TIMES = np.arange(NUM_FRAMES) / FPS


@dataclass
class Motion:
    """Where everything is in each frame; n things, t frames.

    Attributes:
        positions: Centres `(n t 2)`, x then y, in pixels of the world.
        angles: Rotation `(n t)`, radians.
        scales: Size against the thing's radius `(n t)`.
        camera: `(t 3)`: shift x, shift y in pixels, and zoom.
        pivot: Where a rope is fixed, if there is one.
        has_floor: Whether a floor is drawn.
    """

    positions: np.ndarray
    angles: np.ndarray
    scales: np.ndarray
    camera: np.ndarray
    pivot: tuple[float, float] | None = None
    has_floor: bool = False

    @classmethod
    def along(
        cls,
        positions: np.ndarray,
        *,
        angles: np.ndarray | None = None,
        scales: np.ndarray | None = None,
        camera: np.ndarray | None = None,
        pivot: tuple[float, float] | None = None,
        has_floor: bool = False,
    ) -> "Motion":
        """Things that move; what is not given does not change.

        Args:
            positions: As the attribute, and likewise the others.
            angles: None: upright.
            scales: None: as large as the radius.
            camera: None: still.
            pivot: None: no rope.
            has_floor: Whether a floor is drawn.

        Returns:
            The motion.
        """
        count = len(positions)
        return cls(
            positions=positions,
            angles=np.zeros((count, NUM_FRAMES)) if angles is None else angles,
            scales=np.ones((count, NUM_FRAMES)) if scales is None else scales,
            camera=np.tile([0.0, 0.0, 1.0], (NUM_FRAMES, 1)) if camera is None else camera,
            pivot=pivot,
            has_floor=has_floor,
        )


@dataclass(frozen=True)
class Dynamics:
    """One way to move: a family and its parameters.

    Attributes:
        family: A key of `FAMILIES`.
        parameters: Name → value, in the family's units.
    """

    family: str
    parameters: Mapping[str, float]

    @classmethod
    def sample(cls, rng: np.random.Generator, family: str, *, held_out_range: bool = False) -> "Dynamics":
        """Draw parameters.

        Args:
            rng: Source of chance.
            family: A key of `FAMILIES`.
            held_out_range: Take the first parameter from the upper 15 % of its range, which training never sees.

        Returns:
            The dynamics.
        """
        values = {}
        for number, (name, (low, high)) in enumerate(FAMILIES[family].parameters.items()):
            share = rng.uniform()
            if number == 0:
                share = HELD_OUT_FROM + share * (1 - HELD_OUT_FROM) if held_out_range else share * HELD_OUT_FROM
            values[name] = float(low + share * (high - low))
        return cls(family, values)

    @property
    def normalised(self) -> dict[str, float]:
        """Parameters as shares of their ranges, 0 to 1."""
        ranges = FAMILIES[self.family].parameters
        return {
            name: (value - ranges[name][0]) / (ranges[name][1] - ranges[name][0])
            for name, value in self.parameters.items()
        }

    def move(self, rng: np.random.Generator, radii: np.ndarray) -> Motion:
        """Place things and let them move so that they stay in the frame.

        Args:
            rng: Chooses where they start.
            radii: Of the things `(n)`, pixels.

        Returns:
            The motion. Where no start keeps everything inside (rare), the least bad of those that were tried.
        """
        best, least = None, math.inf
        for _ in range(40):
            motion = FAMILIES[self.family].move(self.parameters, rng, radii)
            reach = (motion.scales * radii[:, None])[..., None] * 0.8
            outside = np.maximum(reach - motion.positions, motion.positions + reach - SIZE).max()
            if outside < least:
                best, least = motion, outside
            if least <= 0:
                break
        assert best is not None  # noqa: S101
        return best


Move = Callable[[Mapping[str, float], np.random.Generator, np.ndarray], Motion]


@dataclass(frozen=True)
class Family:
    """A kind of motion.

    Attributes:
        words: What it is in plain words, third person.
        parameters: Name → lowest and highest value. Of the first one, the upper 15 % are held out.
        move: Places the things and moves them.
        num_things: How many things take part.
        held_out: True if no training ever sees it.
        bound_to_place: True if a floor, walls, a rope or the camera tie it to where it happens.
    """

    words: str
    parameters: Mapping[str, tuple[float, float]]
    move: Move = field(repr=False)
    num_things: int = 1
    held_out: bool = False
    bound_to_place: bool = False


def _start(rng: np.random.Generator, radius: float, displacement: np.ndarray) -> np.ndarray:
    """A start from which the displacement `(t 2)` stays inside the frame, where there is one; else centred."""
    low = radius - displacement.min(axis=0)
    high = SIZE - radius - displacement.max(axis=0)
    middle = (low + high) / 2
    low, high = np.where(low > high, middle, low), np.where(low > high, middle, high)
    return rng.uniform(low, high)


def _curve(path: Callable[[Mapping[str, float], np.ndarray], np.ndarray]) -> Move:
    """A family whose displacement `(t 2)` is a function of parameters and seconds."""

    def move(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
        displacement = path(parameters, _TIMES)
        displacement = displacement - displacement[0]
        return Motion.along((_start(rng, float(radii[0]), displacement) + displacement)[None])

    return move


def _direction(angle: float) -> np.ndarray:
    return np.array([math.cos(angle), math.sin(angle)])


def _simulate(
    starts: np.ndarray,
    velocities: np.ndarray,
    radii: np.ndarray,
    *,
    gravity: float = 0.0,
    elasticity: float = 1.0,
    deceleration: float = 0.0,
    has_floor: bool = False,
    has_walls: bool = False,
    pin: np.ndarray | None = None,
    spring: tuple[np.ndarray, float, float] | None = None,
) -> np.ndarray:
    """Discs in pymunk; returns their centres `(n t 2)`."""
    import pymunk

    space = pymunk.Space()
    space.gravity = (0, gravity)
    bodies = []
    for start, velocity, radius in zip(starts, velocities, radii, strict=True):
        body = pymunk.Body(1.0, pymunk.moment_for_circle(1.0, 0, float(radius)))
        body.position, body.velocity = tuple(start), tuple(velocity)
        disc = pymunk.Circle(body, float(radius))
        disc.elasticity = elasticity
        space.add(body, disc)
        bodies.append(body)
    floor = FLOOR if has_floor else SIZE
    lines = [((-200, floor), (300, floor))] if has_floor or has_walls else []
    if has_walls:
        lines += [((0, -200), (0, 300)), ((SIZE, -200), (SIZE, 300)), ((-200, 0), (300, 0))]
    for begin, end in lines:
        line = pymunk.Segment(space.static_body, begin, end, 0)
        line.elasticity = 1.0
        space.add(line)
    if pin is not None:
        space.add(pymunk.PinJoint(space.static_body, bodies[0], tuple(pin), (0, 0)))
    if spring is not None:
        anchor, stiffness, damping = spring
        space.add(pymunk.DampedSpring(space.static_body, bodies[0], tuple(anchor), (0, 0), 0, stiffness, damping))

    step = 1 / FPS / _SUBSTEPS
    tracks = [[tuple(body.position) for body in bodies]]
    for _ in range(NUM_FRAMES - 1):
        for _ in range(_SUBSTEPS):
            if deceleration:
                for body in bodies:
                    speed = body.velocity.length
                    body.velocity = body.velocity * max(0.0, 1 - deceleration * step / speed) if speed else (0, 0)
            space.step(step)
        tracks.append([tuple(body.position) for body in bodies])
    return np.array(tracks).transpose(1, 0, 2)


def _anywhere(rng: np.random.Generator, radius: float, bottom: float = SIZE) -> np.ndarray:
    return rng.uniform((radius, radius), (SIZE - radius, bottom - radius))


def _fall(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    start = rng.uniform((radii[0], radii[0]), (SIZE - radii[0], 0.45 * SIZE))
    tracks = _simulate(
        start[None],
        np.zeros((1, 2)),
        radii,
        gravity=parameters["gravity"],
        elasticity=parameters["elasticity"],
        has_floor=True,
    )
    return Motion.along(tracks, has_floor=True)


def _throw(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    velocity = np.array([parameters["speed_x"], -parameters["speed_up"]])
    start = _anywhere(rng, float(radii[0]), FLOOR)
    tracks = _simulate(
        start[None], velocity[None], radii, gravity=parameters["gravity"], elasticity=0.6, has_floor=True
    )
    return Motion.along(tracks, has_floor=True)


def _slide(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    velocity = parameters["speed"] * _direction(parameters["angle"])
    tracks = _simulate(np.zeros((1, 2)), velocity[None], radii, deceleration=parameters["friction"])
    return Motion.along(tracks + _start(rng, float(radii[0]), tracks[0]))


def _ricochet(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    velocity = parameters["speed"] * _direction(parameters["angle"])
    start = _anywhere(rng, float(radii[0]))
    return Motion.along(_simulate(start[None], velocity[None], radii, has_walls=True))


def _collide(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    direction = _direction(parameters["angle"])
    gap = radii.sum() + parameters["gap"]
    starts = np.stack([-direction * gap / 2, direction * gap / 2])
    velocities = np.stack([parameters["speed"] * direction, np.zeros(2)])
    tracks = _simulate(starts, velocities, radii, elasticity=parameters["elasticity"])
    everything = tracks.reshape(-1, 2)
    return Motion.along(tracks + _start(rng, float(radii.max()), everything))


def _pendulum(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    amplitude, length = parameters["amplitude"], parameters["length"]
    bob = length * np.array([math.sin(amplitude), math.cos(amplitude)])
    tracks = _simulate(bob[None], np.zeros((1, 2)), radii, gravity=parameters["gravity"], pin=np.zeros(2))
    pivot = _start(rng, 2.0, np.concatenate([np.zeros((1, 2)), tracks[0] + [0, radii[0]], tracks[0] - [radii[0], 0]]))
    return Motion.along(tracks + pivot, pivot=(float(pivot[0]), float(pivot[1])))


def _spring(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    anchor = parameters["amplitude"] * _direction(parameters["angle"])
    tracks = _simulate(
        np.zeros((1, 2)),
        np.zeros((1, 2)),
        radii,
        spring=(anchor, parameters["stiffness"], parameters["damping"]),
    )
    return Motion.along(tracks + _start(rng, float(radii[0]), tracks[0]))


def _spin(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    place = _anywhere(rng, float(radii[0]))
    angles = parameters["turns"] * math.tau * _TIMES[None] / _TIMES[-1]
    return Motion.along(np.tile(place, (1, NUM_FRAMES, 1)), angles=angles)


def _grow(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    scales = np.exp(parameters["rate"] * _TIMES)[None]
    place = _anywhere(rng, float(radii[0] * scales.max()))
    return Motion.along(np.tile(place, (1, NUM_FRAMES, 1)), scales=scales)


def _swarm(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    count = len(radii)
    phases = math.tau * np.arange(count) / count + rng.uniform(0, math.tau)
    turning = phases[:, None] + parameters["turning"] * _TIMES
    centre = parameters["speed"] * _TIMES[:, None] * _direction(parameters["angle"])
    tracks = 12.5 * np.stack([np.cos(turning), np.sin(turning)], axis=-1) + centre
    everything = tracks.reshape(-1, 2)
    return Motion.along(tracks + _start(rng, float(radii.max()), everything))


def _pan(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    shift = parameters["speed"] * _TIMES[:, None] * _direction(parameters["angle"])
    place = _start(rng, float(radii[0]), shift)
    camera = np.concatenate([shift, np.ones((NUM_FRAMES, 1))], axis=1)
    return Motion.along(np.tile(place, (1, NUM_FRAMES, 1)), camera=camera)


def _zoom(parameters: Mapping[str, float], rng: np.random.Generator, radii: np.ndarray) -> Motion:
    zoom = np.exp(parameters["rate"] * _TIMES)
    reach = (SIZE / 2 - radii[0] * zoom.max()) / zoom.max()
    place = SIZE / 2 + rng.uniform(-reach, reach, 2)
    camera = np.stack([np.zeros(NUM_FRAMES), np.zeros(NUM_FRAMES), zoom], axis=1)
    return Motion.along(np.tile(place, (1, NUM_FRAMES, 1)), camera=camera)


def _orbit_path(parameters: Mapping[str, float], times: np.ndarray) -> np.ndarray:
    angle = parameters["phase"] + parameters["speed"] * times
    return parameters["radius"] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _spiral_path(parameters: Mapping[str, float], times: np.ndarray) -> np.ndarray:
    angle = parameters["phase"] + parameters["speed"] * times
    return (parameters["growth"] * times)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _along(angle: float, ahead: np.ndarray, aside: np.ndarray) -> np.ndarray:
    forward = _direction(angle)
    return ahead[:, None] * forward + aside[:, None] * np.array([-forward[1], forward[0]])


def _triangle_wave(cycles: np.ndarray) -> np.ndarray:
    return 2 * np.abs(2 * ((cycles + 0.25) % 1) - 1) - 1


def _wander_path(parameters: Mapping[str, float], times: np.ndarray) -> np.ndarray:
    share = times / times[-1]
    waves = np.stack([share, np.sin(math.pi * share), np.sin(2 * math.pi * share), np.sin(3 * math.pi * share)])
    return np.stack([sum(parameters[f"{axis}{i}"] * waves[i] for i in range(4)) for axis in "xy"], axis=-1)


_ANY_ANGLE = (-math.pi, math.pi)

FAMILIES: dict[str, Family] = {
    "fall": Family("falls", {"gravity": (8, 70), "elasticity": (0.0, 0.9)}, _fall, bound_to_place=True),
    "throw": Family(
        "is thrown", {"speed_up": (15, 42), "speed_x": (-16, 16), "gravity": (24, 60)}, _throw, bound_to_place=True
    ),
    "slide": Family("slides to a stop", {"speed": (18, 46), "angle": _ANY_ANGLE, "friction": (9, 30)}, _slide),
    "ricochet": Family("ricochets", {"speed": (16, 44), "angle": _ANY_ANGLE}, _ricochet, bound_to_place=True),
    "collide": Family(
        "collide",
        {"speed": (16, 34), "angle": _ANY_ANGLE, "gap": (3, 12), "elasticity": (0.2, 1.0)},
        _collide,
        num_things=2,
    ),
    "pendulum": Family(
        "swings", {"gravity": (40, 240), "amplitude": (-1.1, 1.1), "length": (18, 30)}, _pendulum, bound_to_place=True
    ),
    "spring": Family(
        "springs to and fro",
        {"stiffness": (3, 16), "angle": _ANY_ANGLE, "amplitude": (7, 15), "damping": (0.0, 1.2)},
        _spring,
    ),
    "drift": Family(
        "drifts",
        {"speed": (6, 20), "angle": _ANY_ANGLE},
        _curve(lambda p, t: _along(p["angle"], p["speed"] * t, 0 * t)),
    ),
    "orbit": Family("circles", {"radius": (7, 17), "speed": (-4.0, 4.0), "phase": _ANY_ANGLE}, _curve(_orbit_path)),
    "spiral": Family("spirals", {"growth": (5, 12), "speed": (-4.5, 4.5), "phase": _ANY_ANGLE}, _curve(_spiral_path)),
    "zigzag": Family(
        "zigzags",
        {"speed": (9, 20), "angle": _ANY_ANGLE, "width": (4, 9), "frequency": (0.6, 1.4)},
        _curve(lambda p, t: _along(p["angle"], p["speed"] * t, p["width"] * _triangle_wave(p["frequency"] * t))),
    ),
    "hop": Family(
        "hops",
        {"height": (9, 26), "speed": (-16, 16), "frequency": (0.6, 1.5)},
        _curve(lambda p, t: np.stack([p["speed"] * t, -p["height"] * np.abs(np.sin(np.pi * p["frequency"] * t))], -1)),
    ),
    "spin": Family("spins", {"turns": (-1.2, 1.2)}, _spin),
    "grow": Family("changes its size", {"rate": (-0.35, 0.4)}, _grow),
    "swarm": Family("swarm", {"turning": (-1.4, 1.4), "speed": (0, 9), "angle": _ANY_ANGLE}, _swarm, num_things=3),
    "pan": Family("is passed by the camera", {"speed": (6, 20), "angle": _ANY_ANGLE}, _pan, bound_to_place=True),
    "zoom": Family("is zoomed at", {"rate": (-0.3, 0.35)}, _zoom, bound_to_place=True),
    "wander": Family(
        "wanders",
        {f"{axis}{i}": (-reach, reach) for i, reach in enumerate((26, 16, 10, 6)) for axis in "xy"},
        _curve(_wander_path),
    ),
    "eight": Family(
        "draws an eight",
        {"reach": (12, 19), "angle": _ANY_ANGLE, "speed": (0.35, 0.6)},
        _curve(
            lambda p, t: _along(
                p["angle"],
                p["reach"] * np.sin(math.tau * p["speed"] * t),
                0.6 * p["reach"] * np.sin(2 * math.tau * p["speed"] * t),
            )
        ),
        held_out=True,
    ),
    "boomerang": Family(
        "flies off and comes back",
        {"speed": (26, 48), "angle": _ANY_ANGLE, "bend": (-14, 14)},
        _curve(
            lambda p, t: _along(p["angle"], p["speed"] * t * (1 - t / t[-1]), p["bend"] * np.sin(np.pi * t / t[-1]))
        ),
        held_out=True,
    ),
    "stairs": Family(
        "climbs stairs",
        {"step": (9, 15), "angle": _ANY_ANGLE},
        _curve(
            lambda p, t: _along(
                p["angle"],
                p["step"] * (np.clip(2 * t, 0, 1) + np.clip(2 * t - 2, 0, 1)),
                p["step"] * (np.clip(2 * t - 1, 0, 1) + np.clip(2 * t - 3, 0, 1)),
            )
        ),
        held_out=True,
    ),
    "swoop": Family(
        "swoops",
        {"depth": (12, 26), "angle": _ANY_ANGLE, "speed": (8, 17)},
        _curve(lambda p, t: _along(p["angle"], p["speed"] * t, p["depth"] * np.sin(np.pi * t / t[-1]) ** 2)),
        held_out=True,
    ),
}
TRAINED_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.held_out)
HELD_OUT_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.held_out)
