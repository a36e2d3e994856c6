"""Training of a small CogVideoX autoencoder that compresses space only, frame by frame.

With a temporal factor of 1 nothing in the network needs the frames before: all temporal taps of its causal
convolutions but the last are zero, and stay so. A frame then runs through two-dimensional convolutions with the same
weights, twice as fast, and the result is what the network gives for a single frame.
"""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.backbones.cogvideox import causal_convolutions, single_frames
from motionrag.training.optimisation import OptimisedModule


class AutoencoderTraining(OptimisedModule):
    """Trains a CogVideoX VAE on single frames.

    The loss is the mean absolute error of pixels and of their differences to the neighbours, with things weighted
    more than the backdrop, and a small KL term.

    Args:
        folder: Of the VAE, in diffusers' layout; the trained one is written back when training ends.
        learning_rate: The highest.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero.
        thing_weight: Weight of pixels of things against 1 for the backdrop.
        kl_weight: Weight of the KL divergence of the latents.
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
        from diffusers import AutoencoderKLCogVideoX

        self.save_hyperparameters()
        self.folder = folder
        self.vae = AutoencoderKLCogVideoX.from_pretrained(folder).train()
        if self.vae.config.temporal_compression_ratio != 1:
            raise ValueError(f"{folder} compresses time; only a VAE with temporal_compression_ratio 1 is trained here.")
        _keep_last_tap(self.vae)

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
        loader: Any = self.trainer.val_dataloaders or self.trainer.train_dataloader
        batch = next(iter(loader))
        with single_frames(self.vae):
            latents = self.vae.encode(rearrange(batch["video"].to(self.device), "b t c h w -> b c t h w")).latent_dist
        self.vae.register_to_config(scaling_factor=float(1 / latents.mode().std()))
        self.vae.save_pretrained(Path(self.folder))

    def _reconstruct(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Error, KL divergence and the frames `(b t c h w)`."""
        video = rearrange(batch["video"], "b t c h w -> b c t h w")
        with single_frames(self.vae):
            latents = self.vae.encode(video).latent_dist
            frames = self.vae.decode(latents.sample()).sample.float()
        weight = 1 + (self.hparams["thing_weight"] - 1) * (batch["masks"][:, None] > 0)
        difference = frames - video
        error = (weight * difference.abs()).mean()
        edges = sum((weight * F.pad(difference.diff(dim=axis), pad)).abs().mean() for axis, pad in _NEIGHBOURS)
        return (
            error + 0.5 * edges,
            latents.kl().mean() / latents.mean[0].numel(),
            rearrange(frames, "b c t h w -> b t c h w"),
        )


_NEIGHBOURS = ((-1, (0, 1)), (-2, (0, 0, 0, 1)))


def _keep_last_tap(vae: nn.Module) -> None:
    with torch.no_grad():
        for layer in causal_convolutions(vae):
            last = layer.conv.weight[:, :, -1].clone()
            layer.conv.weight.zero_()
            layer.conv.weight[:, :, -1] = last
