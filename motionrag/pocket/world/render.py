"""From a scene and a motion to pixels, tracks, flow, visibility and masks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from motionrag.pocket.world.dynamics import FLOOR, FPS, NUM_FRAMES, SIZE, Motion
from motionrag.pocket.world.scene import COLOURS, Backdrop, Scene, Thing

__all__ = ["FPS", "NUM_FRAMES", "SIZE", "WorldClip", "render"]


@dataclass(frozen=True)
class WorldClip:
    """A clip and everything that is true about it; n things, t frames.

    Attributes:
        frames: `(t h w 3)` uint8.
        tracks: Centres of the things `(n t 2)` float32, pixels, x then y.
        visible: Whether at least half of a thing can be seen `(n t)` bool.
        masks: `(t h w)` uint8: 0 for the backdrop, i + 1 for thing i.
        flow: Where the content of frame 0 has moved `(t h w 2)` float32: displacement from frame 0, pixels, x then y.
        flow_visible: Whether that content is in the frame and not hidden `(t h w)` bool.
        family: Motion family.
        parameters: Of the family.
        caption: With the made-up verb.
        plain_caption: With the family in plain words.
        things: Colour, shape, texture and radius of each thing.
    """

    frames: np.ndarray
    tracks: np.ndarray
    visible: np.ndarray
    masks: np.ndarray
    flow: np.ndarray
    flow_visible: np.ndarray
    family: str
    parameters: dict[str, float]
    caption: str
    plain_caption: str
    things: tuple[Thing, ...]


def render(scene: Scene, motion: Motion, *, truth: bool = True) -> dict[str, Any]:
    """Draw a scene that moves. Edges are one pixel soft.

    Args:
        scene: What is there.
        motion: Where it is.
        truth: Whether flow is wanted too; it takes a third of the time.

    Returns:
        The fields `frames`, `tracks`, `visible`, `masks`, `flow`, `flow_visible` of `WorldClip`.
    """
    axis = np.arange(SIZE) + 0.5
    screen = np.stack(np.meshgrid(axis, axis), axis=-1)  # (h w 2)
    shift, zoom = motion.camera[:, None, None, :2], motion.camera[:, None, None, 2:]
    world = (screen - SIZE / 2 - shift) / zoom + SIZE / 2  # (t h w 2)
    picture = _backdrop(scene.backdrop, world)
    if motion.has_floor:
        _blend(picture, 0.72 * picture, np.clip(world[..., 1] - FLOOR + 0.5, 0, 1))
    if motion.pivot is not None:
        rope = _distance_to_line(world, np.array(motion.pivot), motion.positions[0][:, None, None])
        _blend(picture, np.full(3, 235.0), np.clip(1.1 - rope, 0, 1))
    masks = np.zeros(world.shape[:3], np.uint8)
    areas = []
    for index, thing in enumerate(scene.things):
        local = _local(world, motion, index)
        size = motion.scales[index][:, None, None] * thing.radius
        cover = np.clip(0.5 - _distance(thing.shape, local, size) * zoom[..., 0], 0, 1)
        _blend(picture, _surface(thing, local, size), cover)
        areas.append((cover > 0.5).sum(axis=(1, 2)))
        masks[cover > 0.5] = index + 1
    seen = np.stack([(masks == index + 1).sum(axis=(1, 2)) for index in range(len(scene.things))])
    whole = np.stack([np.pi / 6 * (motion.scales[i] * each.radius) ** 2 for i, each in enumerate(scene.things)])
    tracks = (motion.positions - SIZE / 2) * motion.camera[:, 2:] + SIZE / 2 + motion.camera[:, :2]
    fields: dict[str, Any] = {
        "frames": np.round(picture).astype(np.uint8),
        "tracks": tracks.astype(np.float32),
        "visible": seen >= 0.5 * np.maximum(np.stack(areas), whole),
        "masks": masks,
    }
    if truth:
        fields["flow"], fields["flow_visible"] = _flow(screen, world, motion, masks)
    return fields


def _blend(picture: np.ndarray, paint: np.ndarray, cover: np.ndarray) -> None:
    picture += (paint - picture) * cover[..., None]


def _backdrop(backdrop: Backdrop, world: np.ndarray) -> np.ndarray:
    x = (world[..., 0] - SIZE / 2) * np.cos(backdrop.angle) + (world[..., 1] - SIZE / 2) * np.sin(backdrop.angle)
    y = (world[..., 1] - SIZE / 2) * np.cos(backdrop.angle) - (world[..., 0] - SIZE / 2) * np.sin(backdrop.angle)
    wave = 2 * np.pi / backdrop.period
    if backdrop.kind == "gradient":
        share = 0.5 + x / (1.5 * SIZE)
    elif backdrop.kind == "stripes":
        share = 0.5 + 0.5 * np.tanh(2.5 * np.sin(wave * x + backdrop.phase))
    elif backdrop.kind == "checks":
        share = 0.5 + 0.5 * np.tanh(3 * np.sin(wave * x + backdrop.phase) * np.sin(wave * y))
    else:
        slow = np.sin(0.7 * wave * x + backdrop.phase) + np.sin(0.9 * wave * y - backdrop.phase)
        share = 0.5 + 0.25 * (slow + 0.5 * np.sin(1.3 * wave * (x + y)) * np.sin(0.8 * wave * (x - y)))
    share = np.clip(share, 0, 1)[..., None]
    near, far = np.array(backdrop.near), np.array(backdrop.far)
    return near + (far - near) * share


def _local(world: np.ndarray, motion: Motion, index: int) -> np.ndarray:
    """Coordinates of a thing that turns with it, in pixels."""
    offset = world - motion.positions[index][:, None, None]
    cosine, sine = np.cos(motion.angles[index])[:, None, None], np.sin(motion.angles[index])[:, None, None]
    return np.stack(
        [offset[..., 0] * cosine + offset[..., 1] * sine, offset[..., 1] * cosine - offset[..., 0] * sine], axis=-1
    )


def _distance(shape: str, local: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in pixels, negative inside; all shapes have about the same area."""
    x, y = np.abs(local[..., 0]), np.abs(local[..., 1])
    if shape == "ball":
        return np.hypot(x, y) - size
    if shape == "box":
        return np.maximum(x, y) - 0.88 * size
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * size) - 0.36 * size
    if shape == "cross":
        bar, length = 0.42 * size, 1.1 * size
        return np.minimum(np.maximum(x - length, y - bar), np.maximum(x - bar, y - length))
    # Triangle, pointing up.
    return np.maximum(0.866 * x - 0.5 * local[..., 1], local[..., 1]) - 0.68 * size


def _surface(thing: Thing, local: np.ndarray, size: np.ndarray) -> np.ndarray:
    colour = np.array(COLOURS[thing.colour], float)
    if thing.texture == "flat":
        return colour
    if thing.texture == "halved":
        dark = np.clip(local[..., 0] + 0.5, 0, 1)
    else:
        dark = 0.5 + 0.5 * np.tanh(3 * np.sin(np.pi * (local[..., 1] / size * 1.5 + 0.5)))
    return colour * (1 - 0.5 * dark[..., None])


def _distance_to_line(points: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = end - begin
    share = np.clip(((points - begin) * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return np.linalg.norm(points - begin - share[..., None] * along, axis=-1)


def _flow(screen: np.ndarray, world: np.ndarray, motion: Motion, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Displacement of the content of frame 0, and whether it can be seen."""
    place = np.broadcast_to(world[0], world.shape).copy()
    for index in range(len(motion.positions)):
        mine = masks[0] == index + 1
        local = _local(world[:1], motion, index)[0][mine] / motion.scales[index, 0]
        cosine, sine = np.cos(motion.angles[index])[:, None], np.sin(motion.angles[index])[:, None]
        turned = np.stack([local[:, 0] * cosine - local[:, 1] * sine, local[:, 0] * sine + local[:, 1] * cosine], -1)
        place[:, mine] = motion.positions[index][:, None] + motion.scales[index][:, None, None] * turned
    shift, zoom = motion.camera[:, None, None, :2], motion.camera[:, None, None, 2:]
    target = (place - SIZE / 2) * zoom + SIZE / 2 + shift
    flow = target - target[0]
    cell = np.floor(target).astype(int)
    inside = ((cell >= 0) & (cell < SIZE)).all(axis=-1)
    clipped = np.clip(cell, 0, SIZE - 1)
    frame = np.arange(len(masks))[:, None, None]
    same = masks[frame, clipped[..., 1], clipped[..., 0]] == masks[0]
    return flow.astype(np.float32), inside & same
