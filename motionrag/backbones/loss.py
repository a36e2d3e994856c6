"""What the diffusion losses of all families share."""

import torch
from torch import Tensor


def latent_error(clean: Tensor, latents: Tensor, *, motion_weight: float) -> Tensor:
    """Squared error of clean latents, with more weight on what moves.

    Args:
        clean: Predicted, `(b f c h w)`.
        latents: The truth, `(b f c h w)`.
        motion_weight: How much more latents count that differ from the first frame's; 0 treats all alike.

    Returns:
        A weighted mean for each clip `(b)`.
    """
    change = (latents - latents[:, :1]).abs().mean(dim=2, keepdim=True)
    emphasis = 1 + motion_weight * torch.tanh(change)
    return (emphasis * (clean.float() - latents).square()).flatten(1).mean(1) / emphasis.flatten(1).mean(1)
