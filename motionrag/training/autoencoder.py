"""Training of a small autoencoder that compresses space only, frame by frame: CogVideoX's, or that of SVD.

All temporal taps of their convolutions but the frame's own are zero, and stay so. In CogVideoX's a frame then runs
through two-dimensional convolutions with the same weights, twice as fast, and the result is what the network gives for
a single frame. The decoder of SVD still normalises over all frames of a clip together, where training sees single ones:
on clips that costs the pocket 0.1 dB.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.backbones.cogvideox import causal_convolutions, single_frames
from motionrag.training.optimisation import OptimisedModule


class AutoencoderTraining(OptimisedModule):
    """Trains the VAE of CogVideoX or SVD on single frames.

    The loss is the mean absolute error of pixels and of their differences to the neighbours, with things weighted
    more than the backdrop, and a small KL term.

    Args:
        folder: Of the VAE, in diffusers' layout; the trained one is written back when training ends.
        learning_rate: The highest.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero.
        thing_weight: Weight of pixels of things against 1 for the backdrop.
        kl_weight: Weight of the KL divergence of the latents.

    Raises:
        ValueError: If the VAE is of another class, or compresses time.
    """

    weight_decay = 0.0

    def __init__(
        self,
        folder: str,
        *,
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        thing_weight: float = 4.0,
        kl_weight: float = 1e-5,
    ) -> None:
        super().__init__()
        from diffusers import AutoModel

        self.save_hyperparameters()
        self.folder = folder
        self.vae: Any = AutoModel.from_pretrained(folder).train()
        name = self.vae.config._class_name
        if name not in _FRAMEWISE:
            raise ValueError(f"{folder} holds a {name}; what is trained frame by frame is {' or '.join(_FRAMEWISE)}.")
        self.framewise: _Framewise = _FRAMEWISE[name](self.vae)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Reconstruct frames.

        Args:
            batch: `video` `(b 1 c h w)` in [-1, 1], `masks` `(b 1 h w)`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        error, kl, _ = self._reconstruct(batch)
        self.log("train/error", error, prog_bar=True)
        return error + self.hparams["kl_weight"] * kl

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the peak signal-to-noise ratio.

        Args:
            batch: As in training.
            batch_idx: Not used.
        """
        _, _, frames = self._reconstruct(batch)
        error = (frames.clamp(-1, 1) - batch["video"]).square().flatten(1).mean(1)
        self.log("validation/psnr", (10 * torch.log10(4 / error)).mean(), prog_bar=True)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Set the scale that gives latents unit variance, and write the VAE."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batch = next(iter(data.val_dataloader() or data.train_dataloader()))
        latents = self.framewise.encode(rearrange(batch["video"].to(self.device), "b 1 c h w -> b c h w"))
        self.vae.register_to_config(scaling_factor=float(1 / latents.mode().std()))
        self.vae.save_pretrained(Path(self.folder))

    def _reconstruct(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Error, KL divergence and the frames `(b t c h w)`."""
        video = rearrange(batch["video"], "b 1 c h w -> b c h w")
        latents = self.framewise.encode(video)
        frames = self.framewise.decode(latents.sample()).float()
        weight = 1 + (self.hparams["thing_weight"] - 1) * (batch["masks"] > 0)
        difference = frames - video
        error = (weight * difference.abs()).mean()
        edges = sum((weight * F.pad(difference.diff(dim=axis), pad)).abs().mean() for axis, pad in _NEIGHBOURS)
        return (
            error + 0.5 * edges,
            latents.kl().mean() / latents.mean[0].numel(),
            rearrange(frames, "b c h w -> b 1 c h w"),
        )


_NEIGHBOURS = ((-1, (0, 1)), (-2, (0, 0, 0, 1)))


class _Framewise(Protocol):
    def encode(self, frames: Tensor) -> Any: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class _FramewiseCogVideoX:
    """A CogVideoX VAE with temporal factor 1 on frames `(b c h w)`; its latents have an axis of one frame."""

    def __init__(self, vae: Any) -> None:
        if vae.config.temporal_compression_ratio != 1:
            raise ValueError("The VAE compresses time; only one with temporal_compression_ratio 1 is trained here.")
        self.vae = vae
        _keep_tap([layer.conv for layer in causal_convolutions(vae)], -1)

    def encode(self, frames: Tensor) -> Any:
        with single_frames(self.vae):
            return self.vae.encode(rearrange(frames, "b c h w -> b c 1 h w")).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        with single_frames(self.vae):
            return rearrange(self.vae.decode(latents).sample, "b c 1 h w -> b c h w")


class _FramewiseTemporalDecoder:
    """The VAE of SVD on frames `(b c h w)`; time is mixed in its decoder only."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        _keep_tap([layer for layer in vae.decoder.modules() if isinstance(layer, nn.Conv3d)], 1)

    def encode(self, frames: Tensor) -> Any:
        return self.vae.encode(frames).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, num_frames=1).sample


_FRAMEWISE: dict[str, type[Any]] = {
    "AutoencoderKLCogVideoX": _FramewiseCogVideoX,
    "AutoencoderKLTemporalDecoder": _FramewiseTemporalDecoder,
}


@torch.no_grad()
def _keep_tap(convolutions: Sequence[nn.Conv3d], tap: int) -> None:
    """Zero the weights `(c c t h w)` of all frames but one; frames around a single one are zero, so they stay zero."""
    for convolution in convolutions:
        own = convolution.weight[:, :, tap].clone()
        convolution.weight.zero_()
        convolution.weight[:, :, tap] = own
