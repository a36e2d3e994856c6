"""How much a region of a video moves, by optical flow that has to explain what it sees better than standing still does.

Optical flow always gives some displacement. In still pictures with noise of one grey level it drifts by a pixel within
16 frames, so its plain length says little of a region that hardly moves.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.tracking import dense_flow
from motionrag.tracking.chain import sample_at

MARGIN = 1.0
"""Grey levels of 255 by which flow must explain a pixel's surroundings better than standing still does.

In still pictures with noise of up to ±3 grey levels 0.001 pixels are left of 1.6, with ±6 levels 0.2 of 1.9; of a pan
by 6.25 pixels 5.2 are left, for what is even cannot be seen moving.
"""
_SURROUNDINGS = 5  # pixels square


def region_motion(frames: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the motion of a region from frame 0 on.

    Args:
        frames: `(t h w 3)` uint8.
        region: `(h w)` bool, in frame 0.

    Returns:
        Two numbers, on the mean over the region's pixels and later frames: how many pixels long the flow is where it
        explains the picture better than standing still, counted as 0 elsewhere; and how long it is as it stands.
    """
    pictures = rearrange(frames, "t h w c -> t c h w")
    flow, _ = dense_flow(pictures)
    length = flow.norm(dim=-1)
    pictures = pictures.float()
    gain = _difference(pictures) - _difference(_taken_back(pictures, flow))
    moved = torch.where(gain > MARGIN, length, 0)
    return moved[1:, region].mean(), length[1:, region].mean()


def _taken_back(pictures: Tensor, flow: Tensor) -> Tensor:
    """What each picture `(t c h w)` shows where the flow `(t h w 2)` leads."""
    height, width = flow.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return sample_at(pictures, torch.stack([columns, rows], dim=-1) + flow)


def _difference(pictures: Tensor) -> Tensor:
    """Mean absolute difference to the first picture, around each pixel `(t h w)`."""
    error = (pictures - pictures[:1]).abs().mean(dim=1, keepdim=True)
    return F.avg_pool2d(error, _SURROUNDINGS, 1, _SURROUNDINGS // 2, count_include_pad=False)[:, 0]
