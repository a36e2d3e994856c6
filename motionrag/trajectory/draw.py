"""Show what was asked for: ways, their regions and the mask over an image or a video."""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from motionrag.trajectory.region import BLOCK, RegionTrajectory, interpolate, trajectory_list

if TYPE_CHECKING:
    from PIL.Image import Image

_FINER = 4
"""The overlay is drawn this much larger and then reduced, for smooth edges."""
_MASK_COLOUR = (255, 255, 255, 90)


def draw_trajectories(image: "Image", trajectories: Sequence[Any], *, mask: Any = None) -> "Image":
    """Draw ways as arrows, stationary points as rings, their blocks, and a veil over the mask.

    Args:
        image: the first frame.
        trajectories: as for `rasterise`.
        mask: `(h, w)`, not 0 where the picture may move; None for no veil.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: for a bad way, or a mask of another size.
    """
    ways = trajectory_list(trajectories, image.height, image.width)
    veiled = _veil(image.convert("RGB"), mask)
    steps = max(64, *(8 * len(way.points) for way in ways)) if ways else 0
    overlay = _Overlay(veiled)
    for index, way in enumerate(ways):
        overlay.block(way, _colour(index, len(ways)))
        overlay.way(interpolate(way.points, steps).numpy(), way, _colour(index, len(ways)))
    return overlay.over(veiled)


def draw_on_video(frames: Any, trajectories: Sequence[Any], *, mask: Any = None) -> np.ndarray:
    """Draw in each frame where the ways should be by then: the way so far, and a dot at its end.

    Args:
        frames: `(f, h, w, 3)`, uint8, or a list of RGB pictures.
        trajectories: as for `rasterise`.
        mask: `(h, w)`, not 0 where the picture may move; None for no veil.

    Returns:
        New frames, `(f, h, w, 3)`, uint8.

    Raises:
        ValueError: for frames of another kind, a bad way, or a mask of another size.
    """
    from PIL import Image

    frames = np.asarray(frames) if isinstance(frames, np.ndarray) else np.stack([np.asarray(each) for each in frames])
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"Frames are (f, h, w, 3) in uint8; these are {frames.shape} in {frames.dtype}.")
    ways = trajectory_list(trajectories, *frames.shape[1:3])
    positions = [interpolate(way.points, len(frames)).numpy() for way in ways]
    drawn = []
    for index, frame in enumerate(frames):
        veiled = _veil(Image.fromarray(frame), mask)
        overlay = _Overlay(veiled)
        for number, track in enumerate(positions):
            overlay.dot(track[: index + 1], _colour(number, len(ways)))
        drawn.append(np.asarray(overlay.over(veiled)))
    return np.stack(drawn)


def _colour(index: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / max(count, 1), 0.85, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def _veil(image: "Image", mask: Any) -> "Image":
    """The image with a light veil where it may move."""
    from PIL import Image

    if mask is None:
        return image
    array = np.asarray(mask)
    if array.shape != (image.height, image.width):
        raise ValueError(f"The mask has shape {array.shape}, the image {(image.height, image.width)}; resize the mask.")
    veil = Image.new("RGB", image.size, _MASK_COLOUR[:3])
    return Image.composite(veil, image, Image.fromarray(((array != 0) * _MASK_COLOUR[3]).astype(np.uint8)))


class _Overlay:
    """A transparent picture to draw on, several times as large as the image below."""

    def __init__(self, image: "Image") -> None:
        from PIL import Image, ImageDraw

        self.picture = Image.new("RGBA", (image.width * _FINER, image.height * _FINER))
        self.draw = ImageDraw.Draw(self.picture)
        # In pixels of the image; thin on small images, readable on large ones.
        self.line = max(1.0, min(image.size) / 160)

    def over(self, image: "Image") -> "Image":
        from PIL import Image

        # Reducing with the alpha multiplied in, or edges turn dark.
        small = self.picture.convert("RGBa").resize(image.size, Image.Resampling.BOX).convert("RGBA")
        return Image.alpha_composite(image.convert("RGBA"), small).convert("RGB")

    def block(self, way: RegionTrajectory, colour: tuple[int, int, int]) -> None:
        x, y = (int(value) for value in way.points[0])
        half = BLOCK // 2
        corners = [((x + dx) * _FINER, (y + dy) * _FINER) for dx, dy in ((-half, -half), (half, half))]
        self.draw.rectangle(corners, outline=(*colour, 255), fill=(*colour, 60), width=_FINER)

    def way(self, track: np.ndarray, way: RegionTrajectory, colour: tuple[int, int, int]) -> None:
        if way.stationary:
            self._circle(track[0], 5 * self.line, outline=(0, 0, 0, 160))
            self._circle(track[0], 4.5 * self.line, outline=(*colour, 255))
            self._circle(track[0], 1.5 * self.line, fill=(*colour, 255), outline=(*colour, 255))
            return
        self._lines(track, colour)
        for point in way.points:
            self._circle(np.array(point), 1.2 * self.line, fill=(255, 255, 255, 255), outline=(*colour, 255))
        self._head(track, colour)

    def dot(self, track: np.ndarray, colour: tuple[int, int, int]) -> None:
        if len(track) > 1:
            self._lines(track, colour)
        self._circle(track[-1], 2.5 * self.line, fill=(*colour, 255), outline=(255, 255, 255, 255))

    def _lines(self, track: np.ndarray, colour: tuple[int, int, int]) -> None:
        # A dark rim, so that the line shows on any picture.
        for width, tone in ((2.2 * self.line, (0, 0, 0, 160)), (1.2 * self.line, (*colour, 255))):
            points = [(float(x), float(y)) for x, y in track * _FINER]
            self.draw.line(points, fill=tone, width=round(width * _FINER), joint="curve")

    def _circle(self, centre: np.ndarray, radius: float, **look: Any) -> None:
        x, y = (float(value) * _FINER for value in centre)
        size = radius * _FINER
        self.draw.ellipse((x - size, y - size, x + size, y + size), width=round(self.line * _FINER * 0.6), **look)

    def _head(self, track: np.ndarray, colour: tuple[int, int, int]) -> None:
        """An arrow head in the direction in which the way arrives."""
        away = np.linalg.norm(track - track[-1], axis=1)
        earlier = np.nonzero(away > 2 * self.line)[0]
        start = track[earlier[-1]] if len(earlier) else track[int(away.argmax())]
        ahead = (track[-1] - start) / np.linalg.norm(track[-1] - start)
        aside = np.array([-ahead[1], ahead[0]])
        base, tip = track[-1] - 3 * self.line * ahead, track[-1] + 2 * self.line * ahead
        corners = [tip, base + 2.6 * self.line * aside, base - 2.6 * self.line * aside]
        self.draw.polygon(
            [(float(x), float(y)) for x, y in np.array(corners) * _FINER], fill=(*colour, 255), outline=(0, 0, 0, 160)
        )
