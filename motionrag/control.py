"""What a user draws on the image becomes the condition of the video: ways, brush and camera, at the video's size.

The image is stretched to the video's size, as diffusers does, and what is drawn on it follows.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.trajectory import (
    BLOCK,
    CameraPath,
    RegionTrajectory,
    Tracks,
    camera_flow,
    keep_blocks,
    rasterise,
    read_mask,
    spread_blocks,
)
from motionrag.trajectory.region import block_at, check_inside, trajectory_list

CAMERA_RATIO = 0.85  # share of the blocks that are told nothing of the camera, as in the published code
_CAMERA_SEED = 0

Size = tuple[int, int]


def control_flow(
    *,
    image_size: Size,
    video_size: Size,
    num_frames: int,
    trajectories: Any = (),
    motion_mask: Any = None,
    camera: str | CameraPath | None = None,
) -> Tensor:
    """Write what was drawn on one image into the flow that `FeatureModulation` is conditioned on.

    Args:
        image_size: Height and width of the image that was drawn on.
        video_size: Height and width of the video.
        num_frames: Frames of the video, f.
        trajectories: `RegionTrajectory` or several, or lists of points (x, y) in pixels of the image; or `Tracks` on a
            canvas of their own, which is stretched to the image.
        motion_mask: Region that may move besides the trajectories' own blocks: file, picture, or array of the image's
            size, not 0 where it may.
        camera: Name of a camera move such as "pan left", or a path read with `read_poses`. It is added to the
            trajectories' motion, except to those that stay; all else may move then.

    Returns:
        `(f 3 h w)`: displacement from frame 0 in pixels of the video, x and y, and the motion mask, 0 or 1.

    Raises:
        ValueError: Names the trajectory, mask or camera move that makes no sense.
    """
    height, width = video_size
    ways = _stretched(trajectories, image_size, video_size)
    brush = None if motion_mask is None else _stretched_mask(motion_mask, image_size, video_size)
    flow, mask = rasterise(ways, height=height, width=width, num_frames=num_frames, brush=brush)
    if camera is not None:
        moved = camera_flow(camera, height=height, width=width, num_frames=num_frames)
        told = _told_of_camera(ways, moved.visible)
        flow = flow + moved.flow * rearrange(told, "h w -> 1 h w 1")
        mask = moved.mask
    return rearrange(torch.cat([flow, mask], dim=3), "f h w c -> f c h w")


def _stretched(trajectories: Any, image_size: Size, video_size: Size) -> list[RegionTrajectory]:
    """Ways in pixels of the video, of ways on the image, where they are checked."""
    if isinstance(trajectories, str | os.PathLike):
        raise ValueError(
            f"trajectories is the name {str(trajectories)!r}; read the file: read_tracks({str(trajectories)!r})."
        )
    if isinstance(trajectories, RegionTrajectory):
        trajectories = [trajectories]
    if isinstance(trajectories, Tracks):
        trajectories = trajectories.resized(height=image_size[0], width=image_size[1]).trajectories
    ways = []
    limit = np.nextafter((video_size[1], video_size[0]), 0)  # rounding may carry a point over the edge
    for index, way in enumerate(trajectory_list(trajectories, *image_size)):
        check_inside(way, index, *image_size)
        points = np.array(way.resized(image_size, video_size).points)
        ways.append(RegionTrajectory(points if way.may_leave else points.clip(0, limit), may_leave=way.may_leave))
    return ways


def _stretched_mask(motion_mask: Any, image_size: Size, video_size: Size) -> Tensor:
    mask = read_mask(motion_mask, height=image_size[0], width=image_size[1])
    # The largest value, so that a thin stroke on a large image is not lost.
    return rearrange(F.adaptive_max_pool2d(rearrange(mask, "h w -> 1 h w"), video_size), "1 h w -> h w")


def _told_of_camera(ways: Sequence[RegionTrajectory], visible: Tensor) -> Tensor:
    """Pixels `(h w)` that get the camera's motion: a few blocks and the drawn ones, where they stay in the image."""
    height, width = visible.shape
    blocks = (math.ceil(height / BLOCK), math.ceil(width / BLOCK))
    draws = torch.rand(blocks, generator=torch.Generator().manual_seed(_CAMERA_SEED), dtype=torch.float64)
    told = spread_blocks(keep_blocks(visible, CAMERA_RATIO, draws), height=height, width=width) != 0
    for way in ways:
        told[block_at(way.points[0], height, width)] = not way.stationary
    return told & visible
