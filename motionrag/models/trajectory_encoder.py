"""The trajectory encoder of MotionPro: displacements and a motion mask become one feature map per level of a UNet.

It does not know where the features go (`adapters/modulation.py` does), nor how the displacements are drawn.

Shapes: b videos, f frames, c channels, h w pixels. Every convolution takes frames one by one; time is mixed by a
convolution over three frames at every pixel, whose first and last frame stand for those before and after.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

GROUPS = 8
STEM_FACTOR = 8  # the finest feature has the size of the latent


class SpatioTemporalConvolution(nn.Module):
    """A 3×3 convolution of every frame, then one over three frames at every pixel."""

    def __init__(self, *, in_channels: int, mid_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(in_channels, mid_channels, kernel_size=3, stride=stride, padding=1)
        self.temporal = nn.Conv1d(mid_channels, out_channels, kernel_size=3, padding=1, padding_mode="replicate")

    def forward(self, video: Tensor) -> Tensor:
        """Convolve `(b f c h w)`; height and width are divided by the stride."""
        frames = self.spatial(rearrange(video, "b f c h w -> (b f) c h w"))
        height, width = frames.shape[-2:]
        pixels = self.temporal(rearrange(frames, "(b f) c h w -> (b h w) c f", b=len(video)))
        return rearrange(pixels, "(b h w) c f -> b f c h w", h=height, w=width)


class TrajectoryLevel(nn.Module):
    """From the features of one level to those of the next, at half the size."""

    def __init__(self, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, in_channels)
        self.convolution = SpatioTemporalConvolution(
            in_channels=in_channels, mid_channels=out_channels, out_channels=out_channels
        )
        self.downsample = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=2, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        """Turn `(b f c h w)` into `(b f c h/2 w/2)`."""
        video = self.convolution(_activate(self.norm, video))
        frames = self.downsample(rearrange(video, "b f c h w -> (b f) c h w"))
        return rearrange(frames, "(b f) c h w -> b f c h w", b=len(video))


class TrajectoryEncoder(nn.Module):
    """Encodes region trajectories: three strided stages down to the latent's size, then one stage per level.

    Published sizes (MotionPro): channels 320, level multipliers 1, 2, 4, 4.

    Args:
        channels: Of the finest feature; a multiple of 32, for the stem's first norm has a quarter of it in 8 groups.
        level_multipliers: Width of every level in units of `channels`, finest first; it begins with 1.

    Raises:
        ValueError: If the channels or the multipliers do not fit.
    """

    def __init__(self, *, channels: int, level_multipliers: Sequence[int]) -> None:
        super().__init__()
        if channels <= 0 or channels % (4 * GROUPS):
            raise ValueError(f"The trajectory encoder needs a multiple of {4 * GROUPS} channels, got {channels}.")
        if not level_multipliers or level_multipliers[0] != 1 or min(level_multipliers) < 1:
            raise ValueError(f"Level multipliers are positive and begin with 1, got {list(level_multipliers)}.")
        self.channels = channels
        self.level_multipliers = tuple(level_multipliers)
        widths = [3, channels // 4, channels // 2, channels]
        self.stem = nn.ModuleList(
            SpatioTemporalConvolution(in_channels=before, mid_channels=after, out_channels=after, stride=2)
            for before, after in pairwise(widths)
        )
        self.stem_norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for width in widths[1:-1])
        widths = [channels * multiplier for multiplier in level_multipliers]
        self.levels = nn.ModuleList(
            TrajectoryLevel(in_channels=before, out_channels=after) for before, after in pairwise(widths)
        )

    @property
    def size_step(self) -> int:
        """Height and width of the flow are multiples of this, so that every level has half the size of the former."""
        return STEM_FACTOR * 2 ** len(self.levels)

    def forward(self, flow: Tensor) -> list[Tensor]:
        """Encode displacements and mask.

        Args:
            flow: `(b f 3 h w)`: displacement from frame 0 in pixels, x then y, and the motion mask in {0, 1}.

        Returns:
            One feature `(b f c h w)` per level, finest (1/8) first; sizes that do not divide are rounded up.

        Raises:
            ValueError: If the flow has another rank or number of channels.
        """
        if flow.ndim != 5 or flow.shape[2] != 3:
            raise ValueError(
                f"The flow must be (b, f, 3, h, w): displacement in x and y, and motion mask; got {tuple(flow.shape)}."
            )
        feature = self.stem[0](flow)
        for norm, convolution in zip(self.stem_norms, self.stem[1:], strict=True):
            feature = convolution(_activate(norm, feature))
        features = [feature]
        for level in self.levels:
            features.append(level(features[-1]))
        return features


def _activate(norm: nn.Module, video: Tensor) -> Tensor:
    """Normalise every frame of `(b f c h w)` for itself, then SiLU."""
    frames = norm(rearrange(video, "b f c h w -> (b f) c h w"))
    return F.silu(rearrange(frames, "(b f) c h w -> b f c h w", b=len(video)))
