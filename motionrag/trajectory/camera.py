"""Camera motion as dense flow: named moves and pose files, over a depth map or a flat scene.

A pose is a 3×4 world-to-camera matrix; x points right, y down, z into the picture. Shapes: `f` frames, `h w` pixels.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = 19
_ROUNDING = 1e-6
"""Pixels by which arithmetic may push a pixel of the border out of the image."""


@dataclass(frozen=True)
class CameraPath:
    """Poses over time and the lens.

    Args:
        poses: `(f, 3, 4)`, float64, world to camera.
        focal: focal lengths in x and y, as fractions of the image's width and height.
        centre: principal point in x and y, as fractions of the image's width and height.
    """

    poses: np.ndarray
    focal: tuple[float, float]
    centre: tuple[float, float] = (0.5, 0.5)

    def intrinsics(self, height: int, width: int) -> np.ndarray:
        """The 3×3 camera matrix in pixels of an image of this size."""
        (fx, fy), (cx, cy) = self.focal, self.centre
        return np.array([[fx * width, 0, cx * width], [0, fy * height, cy * height], [0, 0, 1]])


class CameraFlow(NamedTuple):
    """Camera motion as a condition.

    Args:
        flow: `(f, h, w, 2)`, float32, pixels from frame 0; 0 where and when a pixel has left the image.
        mask: `(f, h, w, 1)`, float32, all 1: the whole image moves.
        visible: `(h, w)`, bool: stays in the image in all frames.
    """

    flow: "Tensor"
    mask: "Tensor"
    visible: "Tensor"


def camera_flow(
    move: str | CameraPath,
    *,
    height: int,
    width: int,
    num_frames: int = 16,
    amount: float | None = None,
    depth: Any = None,
) -> CameraFlow:
    """The flow of the whole image under a camera move.

    Args:
        move: a name out of `CAMERA_MOVES`, such as "pan left", or a path read with `read_poses`.
        height: rows of the image.
        width: columns of the image.
        num_frames: frames of the video; a `CameraPath` brings its own and must agree.
        amount: how far the last frame is from the first. Pan, tilt, roll and rotate: degrees (default 10). Truck,
            pedestal and zoom: parts of the distance to the scene, below 1 for zoom (default 0.2). Named moves only.
        depth: `(h, w)`, above 0, distance of each pixel in any unit (for a pose file in the unit of its translations);
            None for a flat scene, which is at distance 1.

    Returns:
        Flow, mask and visibility.

    Raises:
        ValueError: for an unknown move, an amount or depth that makes no sense, or frames that do not fit.
    """
    import torch

    if not isinstance(move, str | CameraPath):
        raise ValueError(f"A camera move is a name or what read_poses gives; this is {move!r}.")
    scene = _checked_depth(depth, height, width)
    if isinstance(move, str):
        path = _named_path(move, amount, num_frames, float(np.median(scene)), height, width)
    elif amount is not None:
        raise ValueError("amount belongs to named moves; a camera path says itself how far it goes.")
    elif len(move.poses) != num_frames:
        raise ValueError(f"The camera path has {len(move.poses)} poses, the video {num_frames} frames; give as many.")
    else:
        path = move
    flow, visible = pose_flow(path.poses, path.intrinsics(height, width), scene)
    return CameraFlow(flow, torch.ones((num_frames, height, width, 1)), visible)


def pose_flow(poses: Any, intrinsics: Any, depth: Any) -> "tuple[Tensor, Tensor]":
    """Where each pixel of the first frame goes when the camera moves past a still scene.

    Args:
        poses: `(f, 3, 4)`, world to camera. The first one places the scene; it need not be the identity.
        intrinsics: `(3, 3)`, in pixels.
        depth: `(h, w)`, in the unit of the translations.

    Returns:
        flow `(f, h, w, 2)`, float32, pixels from frame 0, and 0 where and when a pixel is behind the camera or outside
        the image; visible `(h, w)`, bool, in the image in all frames.
    """
    import torch

    poses, intrinsics, depth = (np.asarray(value, np.float64) for value in (poses, intrinsics, depth))
    height, width = depth.shape
    rows, columns = np.mgrid[:height, :width]
    pixels = rearrange([columns, rows, np.ones_like(rows)], "c h w -> c (h w)")
    world = np.linalg.inv(intrinsics @ poses[0, :, :3]) @ (
        pixels * rearrange(depth, "h w -> (h w)") - intrinsics @ poses[0, :, 3:]
    )
    flow = np.zeros((len(poses), 2, height * width), np.float32)
    visible = np.ones(height * width, bool)
    far = np.array([[width - 1], [height - 1]])
    # A frame at a time: all at once is slower, for it does not fit into caches. Frame 0 is still and visible.
    for frame, pose in enumerate(poses[1:], 1):
        x, y, z = (intrinsics @ pose[:, :3]) @ world + intrinsics @ pose[:, 3:]
        in_front = z > 0
        z[~in_front] = 1
        position = np.stack([x, y]) / z
        outside = (position < -_ROUNDING) | (position > far + _ROUNDING)
        valid = in_front & ~outside.any(0)
        flow[frame] = np.where(valid, position - pixels[:2], 0)
        visible &= valid
    return (
        torch.from_numpy(np.ascontiguousarray(rearrange(flow, "f xy (h w) -> f h w xy", h=height))),
        torch.from_numpy(rearrange(visible, "(h w) -> h w", h=height)),
    )


def named_poses(move: str, amount: float, num_frames: int, *, distance: float = 1.0) -> np.ndarray:
    """The poses of a named move at constant speed.

    Args:
        move: a name out of `CAMERA_MOVES`.
        amount: degrees for turning moves, units of the depth for the others, reached in the last frame.
        num_frames: how many poses.
        distance: for "rotate": how far away the point is that the camera goes around.

    Returns:
        `(num_frames, 3, 4)`, float64; the first is the identity.

    Raises:
        ValueError: for an unknown move.
    """
    if move not in CAMERA_MOVES:
        raise ValueError(f"{move!r} is no camera move; use one of {', '.join(CAMERA_MOVES)}.")
    return np.stack([CAMERA_MOVES[move](part * amount, distance) for part in np.linspace(0, 1, num_frames)])


def read_poses(path: str | os.PathLike[str], *, num_frames: int = 16, stride: int = 1) -> CameraPath:
    """Read a camera path in the format of RealEstate10K.

    The first line is a title. Each further one holds a time stamp, the focal lengths and the principal point as
    fractions of the image's sides, two unused numbers, and the 3×4 world-to-camera matrix row by row.

    Args:
        path: the text file.
        num_frames: how many poses to take, from the first.
        stride: take every so many-th line.

    Returns:
        The path, with the lens of the first pose.

    Raises:
        ValueError: names the line that is not as described, or says that the file has too few.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").strip().splitlines()[1:]
    if stride < 1 or num_frames < 1 or len(lines) < (num_frames - 1) * stride + 1:
        raise ValueError(f"{path} has {len(lines)} poses; {num_frames} frames with stride {stride} do not fit.")
    rows = np.array([_pose_row(path, index, lines[index]) for index in range(0, num_frames * stride, stride)])
    fx, fy, cx, cy = (float(value) for value in rows[0, 1:5])
    return CameraPath(rearrange(rows[:, 7:], "f (r c) -> f r c", r=3), (fx, fy), (cx, cy))


def _pose_row(path: str | os.PathLike[str], index: int, line: str) -> list[float]:
    try:
        row = [float(value) for value in line.split()]
    except ValueError:
        row = []
    if len(row) != _COLUMNS or not np.isfinite(row).all():
        raise ValueError(f"{path}, line {index + 2}: a pose line has {_COLUMNS} numbers; this one is {line[:60]!r}.")
    return row


def _checked_depth(depth: Any, height: int, width: int) -> np.ndarray:
    if depth is None:
        return np.ones((height, width))
    scene = np.asarray(depth, np.float64)
    if scene.shape != (height, width):
        raise ValueError(f"The depth map has shape {scene.shape}, the image {(height, width)}; resize the map.")
    if not (np.isfinite(scene).all() and (scene > 0).all()):
        raise ValueError("The depth map needs finite distances above 0 in every pixel.")
    return scene


def _named_path(
    move: str, amount: float | None, num_frames: int, distance: float, height: int, width: int
) -> CameraPath:
    turns = move.startswith(("pan", "tilt", "roll", "rotate"))
    chosen = (10.0 if turns else 0.2) if amount is None else amount
    if not (math.isfinite(chosen) and chosen >= 0) or (move.startswith("zoom") and chosen >= 1):
        raise ValueError(f"amount={amount} does not fit {move!r}; use 0 or more, and below 1 for zoom.")
    poses = named_poses(move, chosen if turns else chosen * distance, num_frames, distance=distance)
    # As long as the longer side: an opening of 53°, a common lens.
    longer = max(height, width)
    return CameraPath(poses, (longer / width, longer / height))


def _pose(rotation: np.ndarray, x: float = 0, y: float = 0, z: float = 0) -> np.ndarray:
    return np.concatenate([rotation, [[x], [y], [z]]], 1)


def _turn(axis: int, degrees: float) -> np.ndarray:
    """Turn about an axis, from the axis after it towards the one before."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    one, other = sorted({0, 1, 2} - {axis})
    matrix = np.eye(3)
    matrix[one, one] = matrix[other, other] = cosine
    matrix[one, other], matrix[other, one] = sine, -sine
    return matrix


def _go_around(degrees: float, distance: float) -> np.ndarray:
    rotation, target = _turn(1, -degrees), np.array([0, 0, distance])
    return _pose(rotation, *(target - rotation @ target))


_Move = Callable[[float, float], np.ndarray]
_STILL = np.eye(3)
CAMERA_MOVES: dict[str, _Move] = {
    "pan left": lambda a, _: _pose(_turn(1, a)),
    "pan right": lambda a, _: _pose(_turn(1, -a)),
    "tilt up": lambda a, _: _pose(_turn(0, a)),
    "tilt down": lambda a, _: _pose(_turn(0, -a)),
    "roll clockwise": lambda a, _: _pose(_turn(2, a)),
    "roll counterclockwise": lambda a, _: _pose(_turn(2, -a)),
    "rotate clockwise": _go_around,
    "rotate counterclockwise": lambda a, distance: _go_around(-a, distance),
    "truck left": lambda a, _: _pose(_STILL, x=a),
    "truck right": lambda a, _: _pose(_STILL, x=-a),
    "pedestal up": lambda a, _: _pose(_STILL, y=a),
    "pedestal down": lambda a, _: _pose(_STILL, y=-a),
    "zoom in": lambda a, _: _pose(_STILL, z=-a),
    "zoom out": lambda a, _: _pose(_STILL, z=a),
}
"""World-to-camera pose of each named move, given how far it has got and the distance to the scene."""
