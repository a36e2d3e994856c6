"""Training of a small autoencoder that compresses space only, frame by frame: CogVideoX's, or one of images.

In CogVideoX's all temporal taps of the convolutions but the frame's own are zero, and stay so. A frame then runs
through two-dimensional convolutions with the same weights, twice as fast, and the result is what the network gives for
a single frame.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from motionrag.backbones.cogvideox import causal_convolutions, single_frames
from motionrag.training.optimisation import OptimisedModule


class AutoencoderTraining(OptimisedModule):
    """Trains the VAE of CogVideoX, or an `AutoencoderKL`, on single frames.

    The loss is the mean absolute error of pixels and of their differences to the neighbours, with things weighted more
    than the backdrop, and a small KL term. Narrow networks learn faint tints last, for most of that loss is edges, and
    a denoiser confuses colours that are hardly in the latents; two more terms, about the pixels that one cell of the
    latents covers, put them there.

    Args:
        folder: Of the VAE, in diffusers' layout; the trained one is written back when training ends.
        learning_rate: The highest.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero.
        thing_weight: Weight of pixels of things against 1 for the backdrop.
        average_weight: Weight of the absolute error of a cell's mean; 0 leaves it out.
        colour_weight: Weight of the absolute error of the first three latent channels against a cell's `colours`; 0
            leaves it out.
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
        average_weight: float = 0.0,
        colour_weight: float = 0.0,
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
        settings = self.hparams
        video = rearrange(batch["video"], "b 1 c h w -> b c h w")
        latents = self.framewise.encode(video)
        error = self.framewise.decode(latents.sample()).float() - video
        weight = 1 + (settings["thing_weight"] - 1) * (batch["masks"] > 0)
        pixels = (weight * error.abs()).mean()
        edges = sum((weight * F.pad(error.diff(dim=axis), pad)).abs().mean() for axis, pad in _NEIGHBOURS)
        cells = latents.mean.shape[-2:]
        averages = F.adaptive_avg_pool2d(error, cells).abs().mean()
        # CogVideoX's latents have an axis of one frame.
        colour = (latents.mean[:, :3].flatten(2) - colours(video, *cells).flatten(2)).abs().mean()
        self.log_dict({"train/error": pixels + 0.5 * edges, "train/colour": colour}, prog_bar=True)
        return (
            pixels
            + 0.5 * edges
            + settings["average_weight"] * averages
            + settings["colour_weight"] * colour
            + settings["kl_weight"] * latents.kl().mean() / latents.mean[0].numel()
        )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the peak signal-to-noise ratio.

        Args:
            batch: As in training.
            batch_idx: Not used.
        """
        video = rearrange(batch["video"], "b 1 c h w -> b c h w")
        frames = self.framewise.decode(self.framewise.encode(video).sample()).float()
        error = (frames.clamp(-1, 1) - video).square().flatten(1).mean(1)
        self.log("validation/psnr", (10 * torch.log10(4 / error)).mean(), prog_bar=True)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Set the scale that gives latents unit variance, and write the VAE."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batch = next(iter(data.val_dataloader() or data.train_dataloader()))
        latents = self.framewise.encode(rearrange(batch["video"].to(self.device), "b 1 c h w -> b c h w"))
        self.vae.register_to_config(scaling_factor=float(1 / latents.mode().std()))
        self.vae.save_pretrained(Path(self.folder))


def colours(frames: Tensor, rows: int, columns: int) -> Tensor:
    """Mean colours of cells as lightness, red against blue, and green against both.

    Args:
        frames: `(b 3 h w)` in [-1, 1], red, green and blue.
        rows: Of cells.
        columns: Likewise.

    Returns:
        `(b 3 rows columns)`; the factors give each channel about unit variance over the pocket's frames.
    """
    red, green, blue = F.adaptive_avg_pool2d(frames, (rows, columns)).unbind(1)
    return torch.stack([2 * (red + green + blue), 5 * (red - blue), 10 * green - 5 * (red + blue)], dim=1)


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
        with torch.no_grad():
            for layer in causal_convolutions(vae):
                # (c c t h w): what comes before a single frame is zero, so these weights stay zero.
                layer.conv.weight[:, :, :-1] = 0

    def encode(self, frames: Tensor) -> Any:
        with single_frames(self.vae):
            return self.vae.encode(rearrange(frames, "b c h w -> b c 1 h w")).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        with single_frames(self.vae):
            return rearrange(self.vae.decode(latents).sample, "b c 1 h w -> b c h w")


class _FramewiseImages:
    """A VAE of images on frames `(b c h w)`."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def encode(self, frames: Tensor) -> Any:
        return self.vae.encode(frames).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


_FRAMEWISE: dict[str, type[Any]] = {
    "AutoencoderKLCogVideoX": _FramewiseCogVideoX,
    "AutoencoderKL": _FramewiseImages,
}
