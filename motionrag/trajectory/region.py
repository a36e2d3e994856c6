"""Region trajectories: the way of a small block of the image, and how drawn ways become MotionPro's condition.

Coordinates are x then y in pixels, with the origin at the upper left corner of the image: the pixel in column i covers
i ≤ x < i + 1. Shapes: `f` frames, `h w` pixels, `n` points.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange, repeat

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 8
"""Side of a region in pixels; the published weights know no other."""


@dataclass(frozen=True, init=False)
class RegionTrajectory:
    """The way of the 8×8 block around the first point, spread evenly over the frames. One point: it stays there."""

    points: tuple[tuple[float, float], ...]
    normalised: bool
    may_leave: bool

    def __init__(self, points: Any, *, normalised: bool = False, may_leave: bool = False) -> None:
        """Hold the points of one way.

        Args:
            points: `(n, 2)`, x then y, in pixels of the image, at least one.
            normalised: the points are fractions of the image's width and height instead, 0 to 1.
            may_leave: the way may end outside the image. Without it a point outside is taken for a mistake of units.

        Raises:
            ValueError: for no points, another shape, or numbers that are not finite.
        """
        array = _as_points(points)
        object.__setattr__(self, "points", tuple((float(x), float(y)) for x, y in array))
        object.__setattr__(self, "normalised", normalised)
        object.__setattr__(self, "may_leave", may_leave)

    @property
    def stationary(self) -> bool:
        """Whether all points are the same one."""
        return all(point == self.points[0] for point in self.points)

    def in_pixels(self, height: int, width: int) -> "RegionTrajectory":
        """The same way in pixels of an image of this size; a way that is in pixels already is returned as it is."""
        if not self.normalised:
            return self
        points = np.array(self.points)
        # The far edge, a share of 1, is the last pixel's: it belongs to the image.
        pixels = np.where(points == 1, np.nextafter((width, height), 0), points * (width, height))
        return RegionTrajectory(pixels, may_leave=self.may_leave)

    def resized(self, old: tuple[int, int], new: tuple[int, int]) -> "RegionTrajectory":
        """Follow a resized image.

        Args:
            old: height and width of the image that the points are in.
            new: height and width it was resized to.

        Returns:
            The way in the resized image; normalised points need no change.
        """
        if self.normalised:
            return self
        scale = (new[1] / old[1], new[0] / old[0])
        return RegionTrajectory(np.array(self.points) * scale, may_leave=self.may_leave)

    def cropped(self, *, left: int, top: int, width: int, height: int) -> "RegionTrajectory":
        """Follow a cropped image. The way may leave the crop later, for the object does so too.

        Args:
            left: first column that is kept.
            top: first row that is kept.
            width: columns that are kept.
            height: rows that are kept.

        Returns:
            The way in the crop.

        Raises:
            ValueError: if the points are normalised, or the way starts outside the crop.
        """
        if self.normalised:
            raise ValueError("Normalised points do not know the crop's pixels; call in_pixels(height, width) first.")
        moved = np.array(self.points) - (left, top)
        if not _inside(moved, height, width)[0]:
            raise ValueError(
                f"The trajectory starts at {_show(self.points[0])}, outside the crop of {width}x{height} pixels at "
                f"({left}, {top}); leave it out or crop elsewhere."
            )
        leaves = bool((~_inside(moved, height, width)).any())
        return RegionTrajectory(moved, may_leave=self.may_leave or leaves)


def interpolate(points: Any, num_frames: int) -> "Tensor":
    """Positions over time on the smooth way through all points that does not overshoot them (PCHIP).

    Args:
        points: `(n, 2)`, spread evenly over the time from the first to the last frame.
        num_frames: how many positions to return; a single one is the first point.

    Returns:
        `(num_frames, 2)`, float32, in the unit of the points.

    Raises:
        ValueError: for bad points, or fewer than one frame.
    """
    import torch

    return torch.from_numpy(_positions(_as_points(points), num_frames).astype(np.float32))


def rasterise(
    trajectories: Sequence[Any],
    *,
    height: int,
    width: int,
    num_frames: int = 16,
    brush: Any = None,
    published: bool = False,
) -> "tuple[Tensor, Tensor]":
    """Write drawn ways into the flow and motion mask that MotionPro is conditioned on.

    Each way fills the 8×8 block around its first point, rows y-4 to y+3 and columns x-4 to x+3, cut at the border,
    with its displacement from frame 0. Where blocks overlap, later ways win. The mask is the brush and all blocks. In
    training it is where the video moves, and flow 0 inside says "moves, nobody knows where to": what must stay is best
    left out of the brush.

    Args:
        trajectories: ways as `RegionTrajectory`, or plain lists of points in pixels; may be empty.
        height: rows of the image.
        width: columns of the image.
        num_frames: frames of the video, f.
        brush: `(h, w)`, the region that may move, where not zero; None for no region besides the blocks.
        published: repeat the released MotionPro code, faults included: blocks over the left or upper border are lost
            or appear on the far side, a stationary point drifts by (1, 1), the mask sees only the last frame.

    Returns:
        flow `(f, h, w, 2)`, displacement x then y in pixels; mask `(f, h, w, 1)`, 0 or 1, the same in all frames. Both
        are float32.

    Raises:
        ValueError: names the way that is empty, not finite or outside the image; or for a brush of another size.
    """
    import torch

    if height < 1 or width < 1:
        raise ValueError(f"An image of {width}x{height} pixels has no room for trajectories; use at least 1x1.")
    mask = _brush_array(brush, height, width)
    ways = [_named_trajectory(way, index, height, width) for index, way in enumerate(trajectories)]
    flow = np.zeros((_checked_frames(num_frames), height, width, 2), np.float32)
    if published:
        _write_published(flow, mask, ways)
    else:
        for index, way in enumerate(ways):
            check_inside(way, index, height, width)
            block = block_at(way.points[0], height, width)
            flow[:, block[0], block[1]] = _displacement(np.array(way.points), num_frames)
            mask[block] = True
    frames = repeat(mask, "h w -> f h w 1", f=num_frames).astype(np.float32)
    return torch.from_numpy(flow), torch.from_numpy(frames)


def trajectory_list(trajectories: Iterable[Any], height: int, width: int) -> list[RegionTrajectory]:
    """Ways in pixels of an image; each may be given as a `RegionTrajectory` or as plain points.

    Args:
        trajectories: the ways.
        height: rows of the image.
        width: columns of the image.

    Returns:
        The ways in pixels.

    Raises:
        ValueError: names the way that is empty, not finite or of another shape.
    """
    return [_named_trajectory(way, index, height, width) for index, way in enumerate(trajectories)]


def _as_points(points: Any) -> np.ndarray:
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A trajectory is a list of (x, y) points; this is {points!r}.") from error
    if array.size == 0:
        raise ValueError("A trajectory needs at least one (x, y) point; this one is empty.")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"A trajectory is a list of (x, y) points, shape (n, 2); this one has shape {array.shape}.")
    if not np.isfinite(array).all():
        bad = int(np.nonzero(~np.isfinite(array).all(1))[0][0])
        raise ValueError(f"Point {bad} of a trajectory is ({array[bad, 0]}, {array[bad, 1]}); use finite numbers.")
    return array


def _named_trajectory(way: Any, index: int, height: int, width: int) -> RegionTrajectory:
    try:
        trajectory = way if isinstance(way, RegionTrajectory) else RegionTrajectory(way)
    except ValueError as error:
        raise ValueError(f"trajectories[{index}]: {error}") from error
    return trajectory.in_pixels(height, width)


def _inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which points lie in the image."""
    return np.asarray(((points >= 0) & (points < (width, height))).all(axis=1))


def check_inside(way: RegionTrajectory, index: int, height: int, width: int) -> None:
    """Refuse a way that starts outside the image, or leaves it without saying so.

    Args:
        way: in pixels.
        index: its number, for the error.
        height: rows of the image.
        width: columns of the image.

    Raises:
        ValueError: names the way and the point.
    """
    inside = _inside(np.array(way.points), height, width)
    if not inside[0]:
        raise ValueError(
            f"trajectories[{index}] starts at {_show(way.points[0])}, outside the image of {width}x{height} pixels; "
            "points are x then y in pixels, or fractions with normalised=True."
        )
    if not inside.all() and not way.may_leave:
        bad = int(np.nonzero(~inside)[0][0])
        raise ValueError(
            f"trajectories[{index}] leaves the image of {width}x{height} pixels at point {bad}, "
            f"{_show(way.points[bad])}; if the object shall leave it, say RegionTrajectory(…, may_leave=True)."
        )


def _show(point: tuple[float, float]) -> str:
    return f"({point[0]:g}, {point[1]:g})"


def block_at(point: tuple[float, float], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the 8×8 block around a point, cut at the border.

    Args:
        point: x, y in pixels.
        height: rows of the image.
        width: columns of the image.

    Returns:
        Rows and columns.
    """
    x, y = min(int(point[0]), width - 1), min(int(point[1]), height - 1)
    half = BLOCK // 2
    return slice(max(y - half, 0), min(y + half, height)), slice(max(x - half, 0), min(x + half, width))


def _brush_array(brush: Any, height: int, width: int) -> np.ndarray:
    if brush is None:
        return np.zeros((height, width), bool)
    array = np.asarray(brush)
    if array.shape != (height, width):
        raise ValueError(
            f"The brush has shape {array.shape}, the image {(height, width)}; resize it with the image, and read "
            "pictures of several channels with read_mask."
        )
    return array != 0


def _checked_frames(num_frames: int) -> int:
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; use at least 1.")
    return num_frames


def _positions(points: np.ndarray, num_frames: int) -> np.ndarray:
    """The way in float64; points are one unit of time apart, which keeps the formulas short."""
    time = np.linspace(0, 1, _checked_frames(num_frames)) * (len(points) - 1)
    if len(points) == 1:
        return points.repeat(num_frames, 0)
    start = np.minimum(time.astype(int), len(points) - 2)
    s = rearrange(time - start, "f -> f 1")
    slopes = _slopes(points)
    first, second, step = points[start], points[start + 1], 1 - s
    # In differences, so that a way that rests does so exactly.
    curve = first + (second - first) * s**2 * (3 - 2 * s)
    return np.asarray(curve + slopes[start] * s * step**2 - slopes[start + 1] * s**2 * step)


def _slopes(points: np.ndarray) -> np.ndarray:
    """Fritsch and Butland: harmonic mean of the neighbouring differences, 0 at a turn, so nothing overshoots."""
    differences = np.diff(points, axis=0)
    if len(differences) == 1:
        return differences.repeat(2, 0)
    before, after = differences[:-1], differences[1:]
    same_way = before * after > 0
    inner = np.where(same_way, 2 * before * after / np.where(same_way, before + after, 1), 0)
    ends = [_end_slope(differences[0], differences[1]), _end_slope(differences[-1], differences[-2])]
    return np.concatenate([ends[:1], inner, ends[1:]])


def _end_slope(nearest: np.ndarray, next_one: np.ndarray) -> np.ndarray:
    """Three-point estimate at an end, kept from changing the direction and from overshooting."""
    slope = (3 * nearest - next_one) / 2
    slope = np.where(slope * nearest <= 0, 0, slope)
    turns = nearest * next_one <= 0
    return np.where(turns & (np.abs(slope) > 3 * np.abs(nearest)), 3 * nearest, slope)


def _displacement(points: np.ndarray, num_frames: int) -> np.ndarray:
    positions = _positions(points, num_frames)
    return rearrange(positions - positions[0], "f xy -> f 1 1 xy")


def _write_published(flow: np.ndarray, mask: np.ndarray, ways: list[RegionTrajectory]) -> None:
    half = BLOCK // 2
    for way in ways:
        points = np.array(way.points)
        if len(points) == 1:
            points = np.concatenate([points, points + 1])
        x, y = int(points[0, 0]), int(points[0, 1])
        # A negative start counts from the far side, as in the released code.
        flow[:, y - half : y + half, x - half : x + half] = _displacement(points, len(flow))
    mask |= (flow[-1] != 0).any(-1)
