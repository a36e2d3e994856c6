"""What the diffusion losses of all families share."""

import torch
from torch import Tensor


def shifted(share: Tensor, shift: float) -> Tensor:
    """Timesteps or noise levels that come more often at high noise: s of Stable Diffusion 3 (section 5.3.2).

    Args:
        share: Uniform, of the highest, 0 to 1.
        shift: s; 1 changes nothing.

    Returns:
        s·t/(1+(s-1)·t).
    """
    return shift * share / (1 + (shift - 1) * share)


def error_after_first(clean: Tensor, latents: Tensor, *, motion_weight: float) -> Tensor:
    """The error where the first latent frame is given: the mean over the others.

    The mean by which the weights of what moves are divided counts the first frame too, with 1.

    Args:
        clean: As in `latent_error`; its first frame is not looked at.
        latents: As in `latent_error`, at least two frames.
        motion_weight: As in `latent_error`.

    Returns:
        A weighted mean for each clip `(b)`.
    """
    frames = latents.shape[1]
    clean = torch.cat([latents[:, :1], clean[:, 1:]], dim=1)
    return frames / (frames - 1) * latent_error(clean, latents, motion_weight=motion_weight)


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
