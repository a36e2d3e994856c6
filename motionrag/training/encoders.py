"""Pretraining of the pocket's small encoders on the world's ground truth.

The published encoders were trained on millions of clips and images; the pocket's learn from its own world: the video
encoder where things are at every time, how the content of the first frame moves, and which family with which
parameters it is; the image encoder where things are, with their colours and shapes; open_clip to match a first frame
with a description. Video and image encoder are trained together with their resamplers, so that 25 tokens carry it;
motion tokens are asked how things move more than where they are.
"""

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.bundle import MotionBundle
from motionrag.encoder import MotionEncoder
from motionrag.training.diffusion import save_parts
from motionrag.training.optimisation import OptimisedModule
from motionrag.video import sample_indices

_GRID = 8  # cells about which a readout answers, in each direction
_CELL = 4  # pixels: as fine as a feature is asked about its own patch


class Readout(nn.Module):
    """Answers questions from all tokens of a clip or an image at once.

    Args:
        num_tokens: l.
        dim: Channels of the tokens.
        answers: Name → shape of what is asked, without the batch.
    """

    def __init__(self, *, num_tokens: int, dim: int, answers: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.answers = answers
        self.sizes = [math.prod(shape) for shape in answers.values()]
        self.layers = nn.Sequential(nn.Linear(num_tokens * dim, 384), nn.GELU(), nn.Linear(384, sum(self.sizes)))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Answer.

        Args:
            tokens: `(b l d)`.

        Returns:
            Name → `(b *shape)`, float32.
        """
        said = self.layers(rearrange(tokens, "b l d -> b (l d)")).float().split(self.sizes, dim=1)
        return {
            name: values.unflatten(1, shape) for (name, shape), values in zip(self.answers.items(), said, strict=True)
        }


def occupancy(masks: Tensor, grid: int) -> Tensor:
    """Share of each cell that is covered by things.

    Args:
        masks: `(b t h w)`, 0 for the backdrop.
        grid: Cells in each direction.

    Returns:
        `(b t grid grid)`.
    """
    return F.adaptive_avg_pool2d((masks > 0).float(), grid)


def position_error(position: nn.Linear, features: Tensor) -> Tensor:
    """Each feature is to know its own position: without that a resampler's queries find nothing to choose by.

    Args:
        position: Features to logits of positions.
        features: `(b l c)`.

    Returns:
        The mean cross-entropy.
    """
    own = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
    return F.cross_entropy(position(features).float().flatten(0, 1), own.flatten())


class VideoEncoderTraining(OptimisedModule):
    """Trains VideoMAE and the motion resampler.

    Args:
        bundle: Folder of the bundle; encoder and resampler are written back when training ends.
        num_families: Motion families to tell apart.
        num_parameters: Most parameters of a family.
        token_noise: Standard deviation of what is added to the tokens before they are read out. Tokens have a fixed
            energy, so that it goes into what is asked and clips that move alike get tokens that are alike.
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
        token_noise: float = 0.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.token_noise = token_noise
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.encoder = MotionEncoder(self.bundle).video_encoder.requires_grad_(True)
        self.resampler = self.bundle.motion_resampler.requires_grad_(True)
        config = self.bundle.config.parts["motion_resampler"]
        times = self.encoder.num_frames
        self.readout = Readout(
            num_tokens=config["num_queries"],
            dim=config["output_dim"],
            answers={
                "track": (times, 2),
                "displacement": (times, 2),
                "backdrop": (times, 2),
                "family": (num_families,),
                "parameters": (num_families, num_parameters),
            },
        )
        model: Any = self.encoder.model.config
        self.dense = nn.Linear(model.hidden_size, model.tubelet_size * (model.patch_size // _CELL) ** 2)
        self.position = nn.Linear(model.hidden_size, self._num_positions())

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
        tokens = self.resampler(self.encoder.grey_features())[0].float().cpu()
        save_parts(self.bundle, self.hparams["bundle"], unconditional_tokens=tokens, motion_resampler=self.resampler)

    def _losses(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        times = sample_indices(batch["video"].shape[1], self.encoder.num_frames)
        pixels = self.encoder.preprocess(batch["video"][:, times])
        features = self.encoder.model(pixels).last_hidden_state
        tokens = self.resampler(features)
        noise = self.token_noise * torch.randn_like(tokens) if self.training else 0
        said = self.readout(tokens + noise)
        masks, flow = batch["masks"][:, times], batch["flow"][:, times].float()
        still = rearrange(batch["masks"][:, 0, _CELL::8, _CELL::8] == 0, "b h w -> b 1 h w 1")
        backdrop = (flow * still).sum(dim=(2, 3)) / still.sum(dim=(2, 3)).clamp(min=1)
        own = said["parameters"][torch.arange(len(tokens)), batch["family"]]
        known = batch["parameters"].isfinite()
        error = (own - batch["parameters"].nan_to_num()).square() * known
        track = batch["tracks"].nanmean(dim=1)  # the mean of all things
        displacement = track[:, times] - track[:, :1]
        losses = {
            "dense": F.binary_cross_entropy_with_logits(*self._dense_occupancy(features, masks)),
            "position": 0.2 * position_error(self.position, features),
            # In units of eight pixels. Places are what is learned first, then ways.
            "track": 0.5 * F.smooth_l1_loss(said["track"], track[:, times] / 8 - 4),
            "displacement": 2 * F.smooth_l1_loss(said["displacement"], displacement / 8),
            "backdrop": F.smooth_l1_loss(said["backdrop"], backdrop / 8),
            "family": 0.2 * F.cross_entropy(said["family"], batch["family"]),
            "parameters": 0.5 * error.sum() / known.sum(),
        }
        return losses, (said["family"].argmax(1) == batch["family"]).float().mean()

    def _dense_occupancy(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What each feature says of its own patch, and the truth: without it the resampler finds nothing for long."""
        config: Any = self.encoder.model.config
        cells, side = config.patch_size // _CELL, config.image_size // config.patch_size
        said = rearrange(
            self.dense(features).float(),
            "b (t h w) (u i j) -> b (t u) (h i) (w j)",
            h=side,
            w=side,
            u=config.tubelet_size,
            i=cells,
        )
        return said, occupancy(masks, side * cells)

    def _num_positions(self) -> int:
        config: Any = self.encoder.model.config
        return int((config.image_size // config.patch_size) ** 2 * config.num_frames // config.tubelet_size)


class ImageEncoderTraining(OptimisedModule):
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
        config = self.bundle.config.parts["context_resampler"]
        self.readout = Readout(
            num_tokens=config["num_queries"],
            dim=config["output_dim"],
            answers={
                "occupancy": (1, 2 * _GRID, 2 * _GRID),
                "colours": (num_colours, _GRID, _GRID),
                "shapes": (num_shapes, _GRID, _GRID),
            },
        )
        model: Any = self.encoder.model.config
        self.position = nn.Linear(model.hidden_size, (model.image_size // model.patch_size) ** 2 + 1)

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
        features = self.encoder.model(self.encoder.preprocess(batch["image"])).last_hidden_state
        tokens = self.resampler(features)
        said = self.readout(tokens)
        # The thing that covers a place, if one does.
        thing = reduce(batch["masks"].long(), "b (h i) (w j) -> b h w", "max", h=_GRID, w=_GRID) - 1
        clips = torch.arange(len(thing), device=thing.device)[:, None, None]
        true_colours = torch.where(thing >= 0, batch["colours"][clips, thing.clamp(min=0)], -1)
        true_shapes = torch.where(thing >= 0, batch["shapes"][clips, thing.clamp(min=0)], -1)
        return {
            "occupancy": F.binary_cross_entropy_with_logits(
                said["occupancy"], occupancy(batch["masks"][:, None], 2 * _GRID)
            ),
            "position": 0.2 * position_error(self.position, features),
            "colour": 0.2 * F.cross_entropy(said["colours"], true_colours, ignore_index=-1),
            "shape": 0.2 * F.cross_entropy(said["shapes"], true_shapes, ignore_index=-1),
        }


class RetrievalEncoderTraining(OptimisedModule):
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
