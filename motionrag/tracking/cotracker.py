"""CoTracker, where its package is installed and its weights lie on this machine; nothing is downloaded.

Its weights are licensed CC-BY-NC 4.0: for research, not for products. MC-Bench's published figures come from it.
"""

import hashlib
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor


class CoTracker:
    """Follows points with CoTracker.

    Attributes:
        name: What results are labelled with: it holds the weights' hash.

    Args:
        weights: The checkpoint file, such as `scaled_offline.pth`.
        device: Where to run.

    Raises:
        ImportError: If the package is not installed.
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, weights: str | Path, *, device: torch.device | str = "cpu") -> None:
        weights = Path(weights)
        if not weights.is_file():
            raise FileNotFoundError(f"There are no CoTracker weights at {weights}; download a checkpoint and name it.")
        try:
            from cotracker.predictor import CoTrackerPredictor
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "cotracker":
                raise
            raise ImportError(
                "CoTracker is not installed: pip install git+https://github.com/facebookresearch/co-tracker "
                "(its weights are CC-BY-NC 4.0), or use the tracker 'optical-flow'."
            ) from error
        self.device = torch.device(device)
        self.predictor = CoTrackerPredictor(checkpoint=str(weights)).to(self.device).eval()
        self.name = f"cotracker {hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"

    @torch.no_grad()
    def __call__(self, frames: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points; they are followed jointly, so that a point's track depends on the others a little.

        Args:
            frames: `(t 3 h w)` uint8.
            points: `(n 2)` float32, in frame 0.

        Returns:
            tracks `(n t 2)` float32 and visible `(n t)` bool, on the CPU.
        """
        queries = torch.cat([torch.zeros(len(points), 1), points], dim=1)  # (frame, x, y)
        # It wants grey levels, 0 to 255.
        tracks, visible = self.predictor(frames[None].float().to(self.device), queries=queries[None].to(self.device))
        return (
            rearrange(tracks, "1 t n xy -> n t xy").float().cpu(),
            rearrange(visible, "1 t n -> n t").bool().cpu(),
        )
