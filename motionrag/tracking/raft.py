"""Tracking with RAFT, torchvision's learned optical flow, from each frame to the next, chained from frame 0.

Its weights may have terms of their own, from the data they were trained on; torchvision's documentation names them.
"""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.encoders.fingerprint import fingerprint
from motionrag.tracking.chain import follow

# The network's features are 8 times smaller than its pictures.
_STRIDE = 8


class Raft:
    """Follows points by chained flow of RAFT (the large model).

    Attributes:
        name: What results are labelled with: it holds the weights' hash.

    Args:
        weights: State dict of torchvision's `raft_large` as safetensors; None: torchvision's own, which it downloads.
        device: Where to run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or holds the weights of something else.
    """

    def __init__(self, weights: str | Path | None = None, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        model = _load(weights).requires_grad_(False).eval()
        self.name = f"raft {fingerprint('raft', {}, model)[:12]}"
        self.model = model.to(self.device)

    def __call__(self, frames: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points.

        Args:
            frames: `(t 3 h w)` uint8.
            points: `(n 2)` float32, in frame 0. One outside the frame moves like the nearest pixel, unseen.

        Returns:
            tracks `(n t 2)` float32 and visible `(n t)` bool, on the CPU.
        """
        return follow(frames, points, self)

    def pictures(self, frames: Tensor, factor: int) -> list[Tensor]:
        """Enlarge frames and fill their sides up to multiples of 8.

        Args:
            frames: `(t 3 h w)` uint8.
            factor: How many times larger the pictures shall be.

        Returns:
            t pictures `(3 h w)` in [-1, 1], on the device.
        """
        colours = frames.to(self.device).float() / 127.5 - 1
        if factor > 1:
            colours = F.interpolate(colours, scale_factor=factor, mode="bicubic", align_corners=False).clamp(-1, 1)
        below, right = (-colours.shape[2]) % _STRIDE, (-colours.shape[3]) % _STRIDE
        return list(F.pad(colours, (0, right, 0, below), mode="replicate"))

    @torch.no_grad()
    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """Find where the content of a picture goes.

        Args:
            before: `(3 h w)` in [-1, 1].
            after: The same.

        Returns:
            `(h w 2)` float32 on the CPU, pixels, x then y.
        """
        with torch.autocast(self.device.type, enabled=False):
            refined = self.model(before[None], after[None])  # one flow of each round, the last is the best
        return rearrange(refined[-1], "1 xy h w -> h w xy").float().cpu()


def _load(weights: str | Path | None) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    if weights is None:
        return raft_large(weights=Raft_Large_Weights.DEFAULT)
    file = Path(weights)
    if not file.is_file():
        raise FileNotFoundError(f"There are no RAFT weights at {file}; name a safetensors file of raft_large.")
    model = raft_large()
    try:
        model.load_state_dict(load_file(file))
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no safetensors file; write RAFT's state dict with safetensors.torch.save_file."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{file} holds other weights than those of torchvision's raft_large.") from error
    return model
