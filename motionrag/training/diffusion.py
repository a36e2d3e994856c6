"""Stages 0 and 1: the diffusion loss, with gradients to the backbone or to the motion injection alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.bundle import MotionBundle
from motionrag.training.encoded import load_pipeline
from motionrag.training.optimisation import OptimisedModule


class _SiteOutputs:
    """What reaches the output projections of a denoiser's attentions, an injected term included, in the last call."""

    def __init__(self, denoiser: nn.Module, sites: Sequence[str]) -> None:
        self._values: dict[str, Tensor] = {}
        for site in sites:
            denoiser.get_submodule(site).register_forward_pre_hook(partial(self._keep, site))

    def _keep(self, site: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._values[site] = args[0]

    def take(self, num_text: int) -> dict[str, Tensor]:
        """Hand out and forget.

        Args:
            num_text: Positions of the prompt, which come first in CogVideoX's attention and are left out.

        Returns:
            Site → `(b f·h·w c)`.
        """
        values, self._values = self._values, {}
        return {site: value[:, num_text:] for site, value in values.items()}


def replace_clips(chosen: Tensor, ours: Tensor, others: Tensor) -> Tensor:
    """Replace some clips of a batch.

    Args:
        chosen: Which `(b)`, bool.
        ours: In their place `(b …)` or `(1 …)`.
        others: The batch `(b …)`.

    Returns:
        `(b …)`.
    """
    return torch.where(chosen.to(others.device).view(-1, *[1] * (others.ndim - 1)), ours, others)


class DiffusionTraining(OptimisedModule):
    """What the stages that need the backbone share: its loss with reproducible noise."""

    backbone: Any
    pipeline: Any
    source: str

    def diffusion_loss(self, batch: dict[str, Tensor], *, step: int, described_share: float = 0.0) -> Tensor:
        """Loss of a batch, averaged; noise, timesteps and prompts follow from seed, step and rank.

        Args:
            batch: From `EncodedClips`.
            step: Counts batches; a resumed run draws what the interrupted one would have drawn.
            described_share: Share of clips whose prompt also tells how things move; these are never emptied if it is 1.

        Returns:
            One number.
        """
        generator = self.generator(step)
        settings = self.hparams
        chance = torch.rand(len(batch["latents"]), generator=generator)
        prompts = batch["prompt_embeds"]
        if described_share:
            prompts = replace_clips(chance >= 1 - described_share, batch["described_prompt_embeds"], prompts)
        if described_share < 1:
            prompts = replace_clips(chance < settings["prompt_dropout"], batch["empty_prompt_embeds"], prompts)
        losses: Tensor = self.backbone.training_loss(
            self.pipeline,
            {**batch, "prompt_embeds": prompts},
            generator,
            max_weight=settings["max_weight"],
            motion_weight=settings["motion_weight"],
            timestep_shift=settings["timestep_shift"],
        )
        return losses.mean()

    def generator(self, step: int, *, stream: int = 0) -> torch.Generator:
        """The source of chance of one batch.

        Args:
            step: Counts batches.
            stream: What is drawn; streams are independent of each other.

        Returns:
            A generator on the CPU.
        """
        # Hashed, because torch's generator looks at the lowest 32 bits of a seed only.
        words = (self.hparams["seed"], self.global_rank, stream, step)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss on clips that are not trained on, with the same noise every time.

        Args:
            batch: From `EncodedClips`.
            batch_idx: Chooses the noise.
        """
        self.log("validation/loss", self.diffusion_loss(batch, step=batch_idx), prog_bar=True)

    def is_frozen(self, key: str) -> bool:
        """Which tensors checkpoints leave out, since they are where they came from.

        Args:
            key: Of the state dict.

        Returns:
            Whether it is one of them; here none is.
        """
        return False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen.

        Args:
            checkpoint: Changed in place.
        """
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not self.is_frozen(key)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what is frozen back, so that everything else loads strictly.

        Args:
            checkpoint: Changed in place.
        """
        frozen = {key: value for key, value in self.state_dict().items() if self.is_frozen(key)}
        checkpoint["state_dict"] = {**frozen, **checkpoint["state_dict"]}

    @property
    def batches(self) -> int:
        """Batches that were used so far."""
        return self.trainer.fit_loop.total_batch_idx


class BackboneTraining(DiffusionTraining):
    """Stage 0: trains or fine-tunes the denoiser itself, without motion tokens.

    Args:
        pipeline: Diffusers pipeline, folder or hub id.
        output: Folder that gets the trained denoiser when training ends.
        learning_rate: The highest.
        weight_decay: Of matrices.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
        prompt_dropout: Share of clips whose prompt is emptied.
        described_share: Share of clips whose prompt also tells how things move, for datasets that know.
        max_weight: Highest loss weight of a timestep, see the backbone's loss.
        motion_weight: How much more the loss counts what moves.
        timestep_shift: Above 1 high noise comes more often, where motion is decided; see the backbone's loss.
        place_weight: Weight of a second loss that asks what every attention of a CogVideoX puts out for its own frame
            and place. The motion injection queries with it; small models do not keep the place there by themselves.
        gradient_checkpointing: Save memory for a third more time.
        seed: Of noise and timesteps.
    """

    def __init__(
        self,
        pipeline: str,
        output: str,
        *,
        learning_rate: float = 5e-5,
        weight_decay: float = 1e-2,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        prompt_dropout: float = 0.1,
        described_share: float = 0.0,
        max_weight: float = 1e4,
        motion_weight: float = 0.0,
        timestep_shift: float = 1.0,
        place_weight: float = 0.0,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.source = pipeline
        self.backbone, self.pipeline = load_pipeline(self.source, frozen=False)
        self.denoiser: nn.Module = getattr(self.pipeline, self.backbone.denoiser).train()
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.outputs: _SiteOutputs | None = None
        if place_weight:
            config: Any = self.denoiser.config
            self.cells = (config.sample_height // config.patch_size) * (config.sample_width // config.patch_size)
            sites = self.backbone.sites(self.denoiser)
            width = config.num_attention_heads * config.attention_head_dim
            self.places = nn.ModuleList(nn.Linear(width, config.sample_frames + self.cells) for _ in sites)
            self.outputs = _SiteOutputs(self.denoiser, sites)

    def _place_error(self, hidden: Sequence[Tensor]) -> Tensor:
        """How badly what attentions put out `(b f·h·w c)` tells its own frame and cell (cross-entropy)."""
        errors = []
        for place, values in zip(self.places, hidden, strict=True):
            own = torch.arange(values.shape[1], device=values.device).expand(values.shape[:2]).flatten()
            logits = place(values).float().flatten(0, 1)
            frame, cell = logits.split([logits.shape[1] - self.cells, self.cells], dim=1)
            errors.append(F.cross_entropy(frame, own // self.cells) + F.cross_entropy(cell, own % self.cells))
        return torch.stack(errors).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch.

        Args:
            batch: From `EncodedClips`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        loss = self.diffusion_loss(batch, step=self.batches, described_share=self.hparams["described_share"])
        self.log("train/loss", loss, prog_bar=True)
        if self.outputs is None:
            return loss
        place = self._place_error(list(self.outputs.take(batch["prompt_embeds"].shape[1]).values()))
        self.log("train/place", place, prog_bar=True)
        return loss + self.hparams["place_weight"] * place

    def on_train_end(self) -> None:
        """Write the denoiser in diffusers' layout."""
        if self.trainer.is_global_zero:
            self.denoiser.save_pretrained(Path(self.hparams["output"]))  # type: ignore[operator]


class InjectionTraining(DiffusionTraining):
    """Stage 1: trains motion injection and motion resampler; a clip's reference is the clip itself.

    Paper, 3.5: AdamW 5e-5, gradient norm at most 0.5, motion tokens dropped with p 0.15. The backbone is frozen.

    Args:
        bundle: Folder of the bundle to start from; the trained parts are written back when training ends.
        pipeline: Diffusers pipeline; None: the bundle's base model.
        learning_rate: The highest.
        weight_decay: Of matrices.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
        token_dropout: Share of clips whose motion tokens are those of a grey clip.
        prompt_dropout: Share of clips whose prompt is emptied.
        max_weight: Highest loss weight of a timestep, see the backbone's loss.
        motion_weight: How much more the loss counts what moves.
        timestep_shift: Above 1 high noise comes more often, where motion is decided; see the backbone's loss.
        teacher_weight: Weight of a second loss: what the attentions of a CogVideoX put out is to be what they put out
            under a prompt that tells how things move. It reaches every site directly, where the diffusion loss alone
            takes long to find a way; 0 leaves it out.
        train_resampler: Whether the motion resampler learns too.
        gradient_checkpointing: Save memory for a third more time.
        precision: Of the frozen backbone's weights, "float32" or "bfloat16"; what is trained is kept in float32.
        seed: Of noise and timesteps.
    """

    def __init__(
        self,
        bundle: str,
        *,
        pipeline: str | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 1e-2,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        token_dropout: float = 0.15,
        prompt_dropout: float = 0.1,
        max_weight: float = 1e4,
        motion_weight: float = 0.0,
        timestep_shift: float = 1.0,
        teacher_weight: float = 0.0,
        train_resampler: bool = True,
        gradient_checkpointing: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.source = pipeline or self.bundle.path_or_id(self.bundle.config.base_model)
        self.backbone, self.pipeline = load_pipeline(self.source, frozen=False, dtype=getattr(torch, precision))
        self.denoiser: nn.Module = getattr(self.pipeline, self.backbone.denoiser).requires_grad_(False)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.injection = self.bundle.motion_injection.requires_grad_(True)
        self.resampler = self.bundle.motion_resampler.requires_grad_(train_resampler)
        self.injection.attach(self.denoiser)
        self.outputs: _SiteOutputs | None = None
        if teacher_weight:
            self.outputs = _SiteOutputs(self.denoiser, self.injection.site_names)

    def motion_tokens(self, batch: dict[str, Tensor], drop: Tensor | None = None) -> Tensor:
        """Motion tokens of the clips themselves.

        Args:
            batch: With `motion_features` and `grey_features` `(b l c)`.
            drop: Clips whose tokens are replaced by a grey clip's `(b)`, bool; None: none.

        Returns:
            `(b l d)`.
        """
        features = batch["motion_features"]
        if drop is not None:
            features = replace_clips(drop, batch["grey_features"], features)
        return self.resampler(features)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch. The condition stays set until the backward pass is over, which Lightning runs later.

        Args:
            batch: From `EncodedClips`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        draw = self.generator(self.batches, stream=1)
        drop = torch.rand(len(batch["latents"]), generator=draw) < self.hparams["token_dropout"]
        self.injection.clear_condition()
        taught = self._teach(batch)
        self.injection.set_condition(self.motion_tokens(batch, drop))
        loss = self.diffusion_loss(batch, step=self.batches)
        self.log("train/loss", loss, prog_bar=True)
        if self.outputs is None:
            return loss
        said = self.outputs.take(batch["prompt_embeds"].shape[1])
        # Relative to how much the outputs differ from each other, clip by clip without dropped tokens.
        errors = [(said[site] - taught[site])[~drop].square().mean() / taught[site].var() for site in taught]
        teacher = torch.stack(errors).mean()
        self.log("train/teacher", teacher, prog_bar=True)
        return loss + self.hparams["teacher_weight"] * teacher

    @torch.no_grad()
    def _teach(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the attentions put out without motion tokens, but with prompts that tell how things move."""
        if self.outputs is None:
            return {}
        self.diffusion_loss(batch, step=self.batches, described_share=1.0)
        return self.outputs.take(batch["prompt_embeds"].shape[1])

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop injecting.

        Args:
            *args: Not used.
        """
        self.injection.clear_condition()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss without motion, and with each clip's own.

        Args:
            batch: From `EncodedClips`.
            batch_idx: Chooses the noise.
        """
        plain = self.diffusion_loss(batch, step=batch_idx)
        with self.injection.condition(self.motion_tokens(batch)):
            guided = self.diffusion_loss(batch, step=batch_idx)
        self.log_dict(
            {"validation/plain": plain, "validation/loss": guided, "validation/share": guided / plain}, prog_bar=True
        )

    def is_frozen(self, key: str) -> bool:
        """The whole backbone.

        Args:
            key: As in the base class.

        Returns:
            As there.
        """
        return key.startswith("denoiser.")

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Write the bundle with the trained parts and the unconditional tokens that follow from them."""
        if not self.trainer.is_global_zero:
            return
        batch = next(iter(self.trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
        grey = self.resampler(batch["grey_features"][:1].to(self.device))[0]
        save_parts(self.bundle, self.hparams["bundle"], unconditional_tokens=grey.float().cpu(), **self.trained_parts())

    def trained_parts(self) -> dict[str, Any]:
        """What this stage trains.

        Returns:
            Part of the bundle → module.
        """
        return {"motion_injection": self.injection, "motion_resampler": self.resampler}


def save_parts(
    bundle: MotionBundle,
    folder: str | Path,
    *,
    unconditional_tokens: Tensor | None = None,
    denoiser: str | None = None,
    **parts: nn.Module,
) -> None:
    """Write a bundle in which some parts are replaced; the others stay as they are.

    Args:
        bundle: The one that training started from.
        folder: Where to write.
        unconditional_tokens: `(l d)`; None keeps the bundle's.
        denoiser: Folder in the bundle with a denoiser of its own; None keeps what the bundle says.
        **parts: Trained modules by name.
    """
    # The last stage that a bundle needs is the one that trains CAMA; one without CAMA is there for its control.
    last = "cama" if "cama" in bundle.config.parts else "feature_modulation"
    trained = bundle.config.trained or last in parts
    config = replace(bundle.own_config, trained=trained, denoiser=denoiser or bundle.own_config.denoiser)
    others = {name: getattr(bundle, name) for name in config.parts if name not in parts}
    written = MotionBundle(
        config,
        folder=bundle.folder,
        shared=bundle.shared,
        unconditional_tokens=unconditional_tokens,
        **others,
        **parts,
    )
    written.save_pretrained(folder)
