"""Pretraining of the pocket's small encoders on the world's ground truth.

The published encoders were trained on millions of clips and images; the pocket's learn from its own world: the video
encoder where things are at every time, how the content of the first frame moves, and which family with which
parameters it is; the image encoder where things are, with their colours and shapes; open_clip to match a first frame
with a description. Video and image encoder are trained together with their resamplers, so that 25 tokens carry it.
"""

from typing import Any

import pytorch_lightning as lightning
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.bundle import MotionBundle
from motionrag.encoder import MotionEncoder
from motionrag.training.diffusion import save_parts
from motionrag.training.optimisation import optimisation
from motionrag.video import sample_indices

_GRID = 8  # places at which a readout answers, in each direction
_FINE = 2  # answers of occupancy in each direction of a place


class Readout(nn.Module):
    """Answers questions about places and times from a clip's tokens: one query for each, one cross-attention.

    Args:
        dim: Channels of the tokens.
        num_times: Times that are asked about.
        num_answers: Numbers for each place and time.
    """

    def __init__(self, *, dim: int, num_times: int, num_answers: int) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.randn(num_times, 1, dim) * 0.5)
        self.places = nn.Parameter(torch.randn(1, _GRID * _GRID, dim) * 0.5)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.answer = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, num_answers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Answer.

        Args:
            tokens: `(b l d)`.

        Returns:
            `(b t h w a)`.
        """
        queries = repeat(self.times + self.places, "t p d -> b (t p) d", b=len(tokens))
        attended, _ = self.attention(self.norm(queries), tokens, tokens, need_weights=False)
        return rearrange(self.answer(queries + attended), "b (t h w) a -> b t h w a", h=_GRID, w=_GRID)


def occupancy(masks: Tensor) -> Tensor:
    """Share of each place that is covered by things, finer than the grid.

    Args:
        masks: `(b t h w)`, 0 for the backdrop.

    Returns:
        `(b t h w a)`: the four quarters of each of 8×8 places.
    """
    covered = F.adaptive_avg_pool2d((masks > 0).float(), _GRID * _FINE)
    return rearrange(covered, "b t (h i) (w j) -> b t h w (i j)", i=_FINE, j=_FINE)


class _EncoderTraining(lightning.LightningModule):
    def configure_optimizers(self) -> Any:
        """AdamW on everything that needs gradients.

        Returns:
            Optimiser and schedule.
        """
        settings = self.hparams
        return optimisation(
            self.parameters(),
            learning_rate=settings["learning_rate"],
            weight_decay=1e-2,
            warmup_steps=settings["warmup_steps"],
            decay_steps=settings["decay_steps"],
        )


class VideoEncoderTraining(_EncoderTraining):
    """Trains VideoMAE and the motion resampler.

    Args:
        bundle: Folder of the bundle; encoder and resampler are written back when training ends.
        num_families: Motion families to tell apart.
        num_parameters: Most parameters of a family.
        learning_rate: The highest.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
    """

    def __init__(
        self,
        bundle: str,
        *,
        num_families: int,
        num_parameters: int,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.encoder = MotionEncoder(self.bundle).video_encoder.requires_grad_(True)
        self.resampler = self.bundle.motion_resampler.requires_grad_(True)
        dim = self.resampler.proj_out.out_features
        self.readout = Readout(dim=dim, num_times=self.encoder.num_frames, num_answers=_FINE**2 + 2)
        self.family = nn.Linear(dim, num_families)
        self.parameter_values = nn.Linear(dim, num_families * num_parameters)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch.

        Args:
            batch: From `PocketClips`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        losses, _ = self._losses(batch)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return sum(losses.values())  # type: ignore[return-value]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the losses and the share of families that are told right.

        Args:
            batch: As in training.
            batch_idx: Not used.
        """
        losses, accuracy = self._losses(batch)
        self.log_dict({f"validation/{name}": value for name, value in losses.items()})
        self.log("validation/accuracy", accuracy, prog_bar=True)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Write the encoder, the resampler and the unconditional tokens."""
        folder = self.bundle.path_or_id(self.bundle.config.encoders["video"].source)
        self.encoder.save_pretrained(folder)
        size = self.encoder.size
        grey = torch.zeros(1, self.encoder.num_frames, 3, size, size, device=self.device)
        tokens = self.resampler(self.encoder(grey))[0].float().cpu()
        save_parts(self.bundle, self.hparams["bundle"], unconditional_tokens=tokens, motion_resampler=self.resampler)

    def _losses(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        times = sample_indices(batch["video"].shape[1], self.encoder.num_frames)
        pixels = self.encoder.preprocess(batch["video"][:, times])
        tokens = self.resampler(self.encoder.model(pixels).last_hidden_state)
        answers = self.readout(tokens).float()
        where, flow = answers[..., : _FINE**2], answers[..., _FINE**2 :]
        covered = occupancy(batch["masks"][:, times])
        true_flow = batch["flow"][:, times].float() / 8  # units of a place
        moves = 1 + 8 * (true_flow.abs().amax(dim=(1, -1), keepdim=True) > 0.1)
        pooled = tokens.mean(dim=1)
        families = self.family(pooled).float()
        shares = rearrange(self.parameter_values(pooled).float(), "b (f p) -> b f p", f=families.shape[1])
        own = shares[torch.arange(len(shares)), batch["family"]]
        known = batch["parameters"].isfinite()
        error = (own - batch["parameters"].nan_to_num()).square() * known
        losses = {
            "occupancy": 2 * F.binary_cross_entropy_with_logits(where, covered),
            "flow": (moves * F.smooth_l1_loss(flow, true_flow, reduction="none")).mean(),
            "family": 0.2 * F.cross_entropy(families, batch["family"]),
            "parameters": 0.5 * error.sum() / known.sum(),
        }
        return losses, (families.argmax(1) == batch["family"]).float().mean()


class ImageEncoderTraining(_EncoderTraining):
    """Trains DINOv2 and the context resampler to tell where things are, with their colours and shapes.

    Args:
        bundle: Folder of the bundle; encoder and resampler are written back when training ends.
        num_colours: Colours of things.
        num_shapes: Shapes of things.
        learning_rate: The highest.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
    """

    def __init__(
        self,
        bundle: str,
        *,
        num_colours: int,
        num_shapes: int,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.encoder = MotionEncoder(self.bundle).image_encoder.requires_grad_(True)
        self.resampler = self.bundle.context_resampler.requires_grad_(True)
        dim = self.resampler.proj_out.out_features
        self.num_colours, self.num_shapes = num_colours, num_shapes
        self.readout = Readout(dim=dim, num_times=1, num_answers=_FINE**2 + num_colours + num_shapes)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch.

        Args:
            batch: From `PocketScenes`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        losses = self._losses(batch)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return sum(losses.values())  # type: ignore[return-value]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the losses.

        Args:
            batch: As in training.
            batch_idx: Not used.
        """
        self.log_dict({f"validation/{name}": value for name, value in self._losses(batch).items()}, prog_bar=True)

    def on_train_end(self) -> None:
        """Write the encoder and the resampler."""
        self.encoder.save_pretrained(self.bundle.path_or_id(self.bundle.config.encoders["image"].source))
        save_parts(self.bundle, self.hparams["bundle"], context_resampler=self.resampler)

    def _losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = self.resampler(self.encoder.model(self.encoder.preprocess(batch["image"])).last_hidden_state)
        answers = self.readout(tokens)[:, 0].float()
        where, colours, shapes = answers.split([_FINE**2, self.num_colours, self.num_shapes], dim=-1)
        # The thing that covers a place, if one does.
        thing = reduce(batch["masks"].long(), "b (h i) (w j) -> b h w", "max", h=_GRID, w=_GRID) - 1
        clips = torch.arange(len(thing), device=thing.device)[:, None, None]
        true_colours = torch.where(thing >= 0, batch["colours"][clips, thing.clamp(min=0)], -1)
        true_shapes = torch.where(thing >= 0, batch["shapes"][clips, thing.clamp(min=0)], -1)
        return {
            "occupancy": 2 * F.binary_cross_entropy_with_logits(where, occupancy(batch["masks"][:, None])[:, 0]),
            "colour": 0.2 * F.cross_entropy(colours.flatten(0, 2), true_colours.flatten(), ignore_index=-1),
            "shape": 0.2 * F.cross_entropy(shapes.flatten(0, 2), true_shapes.flatten(), ignore_index=-1),
        }


class RetrievalEncoderTraining(_EncoderTraining):
    """Trains open_clip to match first frames and descriptions.

    Args:
        bundle: Folder of the bundle; the model is written back when training ends.
        learning_rate: The highest.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
    """

    def __init__(
        self, bundle: str, *, learning_rate: float = 1e-3, warmup_steps: int = 100, decay_steps: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.encoder = MotionEncoder(self.bundle).clip_encoder.requires_grad_(True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One batch.

        Args:
            batch: From `PocketScenes`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        loss, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss and the share of images whose own description is the nearest.

        Args:
            batch: As in training.
            batch_idx: Not used.
        """
        loss, accuracy = self._loss(batch)
        self.log_dict({"validation/loss": loss, "validation/accuracy": accuracy}, prog_bar=True)

    def on_train_end(self) -> None:
        """Write the model."""
        self.encoder.save_pretrained(self.bundle.path_or_id(self.bundle.config.encoders["clip"].source))

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        model: Any = self.encoder.model
        images = F.normalize(model.encode_image(self.encoder.preprocess(batch["image"])).float(), dim=-1)
        words = self.encoder.tokenizer(list(batch["description"])).to(self.device)
        texts = F.normalize(model.encode_text(words).float(), dim=-1)
        similarity = model.logit_scale.exp().clamp(max=100) * images @ texts.T
        own = torch.arange(len(images), device=self.device)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        return loss, (similarity.argmax(dim=1) == own).float().mean()
