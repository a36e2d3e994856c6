"""The autoencoder alone: what the backbone could show at best."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

_BATCH = 8


@torch.no_grad()
def reconstruct(pipeline: Any, frames: Tensor) -> Tensor:
    """Send clips through a diffusers pipeline's autoencoder and back.

    Args:
        pipeline: With a `vae` that takes videos `(b c t h w)`.
        frames: `(b t h w 3)` uint8.

    Returns:
        `(b t h w 3)` uint8.
    """
    vae, results = pipeline.vae, []
    for part in frames.split(_BATCH):
        video = rearrange(part, "b t h w c -> b c t h w").to(vae.device, vae.dtype) / 127.5 - 1
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        pixels = rearrange(decoded[:, :, : frames.shape[1]], "b c t h w -> b t h w c").float().cpu()
        results.append(((pixels + 1) * 127.5).round().clamp(0, 255).byte())
    return torch.cat(results)
