"""What a user draws on the image becomes the condition of the video: ways, brush and camera, at the video's size.

The image is stretched to the video's size, as diffusers does, and what is drawn on it follows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.trajectory import (
    BLOCK,
    CameraPath,
    Tracks,
    camera_flow,
    keep_blocks,
    rasterise,
    read_mask,
    spread_blocks,
)
from motionrag.trajectory.region import trajectory_list

CAMERA_RATIO = 0.85  # share of the blocks that are told nothing of the camera, as in the published code
_CAMERA_SEED = 0


def control_flow(
    *,
    image_size: tuple[int, int],
    video_size: tuple[int, int],
    num_frames: int,
    trajectories: Tracks | Sequence[Any] = (),
    motion_mask: Any = None,
    camera: str | CameraPath | None = None,
) -> Tensor:
    """Write what was drawn on one image into the flow that `FeatureModulation` is conditioned on.

    Args:
        image_size: Height and width of the image that was drawn on.
        video_size: Height and width of the video.
        num_frames: Frames of the video, f.
        trajectories: `RegionTrajectory`, or lists of points (x, y) in pixels of the image; or `Tracks` on a canvas of
            their own, which is stretched to the image.
        motion_mask: Region that may move besides the trajectories' own blocks: file, picture, or array of the image's
            size, not 0 where it may.
        camera: Name of a camera move such as "pan left", or a path read with `read_poses`; it is added to the
            trajectories' motion, and then the whole image may move.

    Returns:
        `(f 3 h w)`: displacement from frame 0 in pixels of the video, x and y, and the motion mask, 0 or 1.

    Raises:
        ValueError: Names the trajectory, mask or camera move that makes no sense.
    """
    height, width = video_size
    if isinstance(trajectories, Tracks):
        trajectories = trajectories.resized(height=image_size[0], width=image_size[1]).trajectories
    ways = [way.resized(image_size, video_size) for way in trajectory_list(trajectories, *image_size)]
    brush = None if motion_mask is None else _resized_mask(motion_mask, image_size, video_size)
    flow, mask = rasterise(ways, height=height, width=width, num_frames=num_frames, brush=brush)
    if camera is not None:
        moved = camera_flow(camera, height=height, width=width, num_frames=num_frames)
        draws = torch.rand(
            height // BLOCK, width // BLOCK, generator=torch.Generator().manual_seed(_CAMERA_SEED), dtype=torch.float64
        )
        told = spread_blocks(keep_blocks(moved.visible, CAMERA_RATIO, draws), height=height, width=width)
        drawn = flow.abs().sum(dim=(0, 3)) > 0
        flow = flow + moved.flow * rearrange((told != 0) | drawn, "h w -> 1 h w 1")
        mask = moved.mask
    return rearrange(torch.cat([flow, mask], dim=3), "f h w c -> f c h w")


def _resized_mask(motion_mask: Any, image_size: tuple[int, int], video_size: tuple[int, int]) -> Tensor:
    mask = read_mask(motion_mask, height=image_size[0], width=image_size[1])
    return rearrange(F.interpolate(rearrange(mask, "h w -> 1 1 h w"), video_size, mode="nearest"), "1 1 h w -> h w")
