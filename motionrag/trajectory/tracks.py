"""A set of ways with the canvas they were drawn on: what the files of `formats/` are read into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motionrag.trajectory.region import RegionTrajectory, interpolate, trajectory_list

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, init=False)
class Tracks:
    """Ways in pixels of one canvas."""

    trajectories: tuple[RegionTrajectory, ...]
    height: int
    width: int
    visible: tuple[tuple[bool, ...], ...] | None
    fps: float | None

    def __init__(
        self, trajectories: Sequence[Any], *, height: int, width: int, visible: Any = None, fps: float | None = None
    ) -> None:
        """Hold ways; normalised ones are brought to pixels.

        Args:
            trajectories: ways as `RegionTrajectory`, or lists of points in pixels.
            height: rows of the canvas.
            width: columns of the canvas.
            visible: for each way, for each of its points, whether it can be seen; None if that is not known.
            fps: points per second, for files that hold one point a frame; None if that is not known.

        Raises:
            ValueError: for a bad way, a canvas without pixels, or visibility that does not fit.
        """
        if height < 1 or width < 1:
            raise ValueError(f"A canvas of {width}x{height} pixels holds no tracks; give its height and width.")
        ways = tuple(trajectory_list(trajectories, height, width))
        seen = None if visible is None else tuple(tuple(bool(value) for value in row) for row in visible)
        if seen is not None and [len(row) for row in seen] != [len(way.points) for way in ways]:
            raise ValueError("Visibility needs one value for each point of each track.")
        for name, value in (("trajectories", ways), ("height", height), ("width", width), ("visible", seen)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "fps", fps)

    def sampled(self, num_frames: int) -> "Tensor":
        """Positions of all ways in all frames, `(n, num_frames, 2)`, float32, in pixels."""
        import torch

        ways = [interpolate(way.points, num_frames) for way in self.trajectories]
        return torch.stack(ways) if ways else torch.zeros((0, num_frames, 2))

    def per_frame(self, num_frames: int) -> "Tracks":
        """The same ways with one point a frame, as most formats want them.

        Args:
            num_frames: points that each way gets. Ways that have as many already are kept as they are.

        Returns:
            Ways of `num_frames` points. Visibility is that of the nearest point in time.
        """
        if all(len(way.points) == num_frames for way in self.trajectories):
            return self
        ways = [
            RegionTrajectory(points.tolist(), may_leave=way.may_leave)
            for points, way in zip(self.sampled(num_frames), self.trajectories, strict=True)
        ]
        visible = self.visible and [
            [row[round(frame * (len(row) - 1) / max(num_frames - 1, 1))] for frame in range(num_frames)]
            for row in self.visible
        ]
        return Tracks(ways, height=self.height, width=self.width, visible=visible, fps=self.fps)

    def resized(self, *, height: int, width: int) -> "Tracks":
        """Bring the ways to another canvas.

        Args:
            height: rows of the new canvas, such as those of the image to animate.
            width: columns of the new canvas.

        Returns:
            The ways, stretched with the canvas.
        """
        ways = [way.resized((self.height, self.width), (height, width)) for way in self.trajectories]
        return Tracks(ways, height=height, width=width, visible=self.visible, fps=self.fps)
