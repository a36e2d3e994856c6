"""Videos on their way into a tracker."""

import torch
from torch import Tensor

# Rounding of a decoder or a codec may leave the range by a little; a video in [0, 255] is a mistake.
_MARGIN = 0.01


def to_uint8(video: Tensor) -> Tensor:
    """Check a video and bring it to whole grey levels.

    Args:
        video: `(t 3 h w)`, uint8, or floating in [-1, 1].

    Returns:
        `(t 3 h w)` uint8 on the CPU.

    Raises:
        ValueError: For another layout or range, or NaN.
    """
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"A video to track is (t 3 h w); this one is {tuple(video.shape)}.")
    if video.dtype == torch.uint8:
        return video.cpu()
    if not video.is_floating_point():
        raise ValueError(f"A video to track is uint8, or floating in [-1, 1]; this one is {video.dtype}.")
    low, high = float(video.min()), float(video.max())
    # The comparison is false for NaN too.
    if not (low >= -1 - _MARGIN and high <= 1 + _MARGIN):
        raise ValueError(
            f"A floating video to track is in [-1, 1]; this one is in [{low:.3g}, {high:.3g}]. Scale it, or pass uint8."
        )
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
