"""Training of feature modulation (MotionPro): of a clip's flow a few blocks are told, and the model makes the clip.

What the denoiser itself learns meanwhile is a choice: nothing, LoRA as in the published training, or everything, for
a model that is small enough to learn to move and to be steered at once.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from motionrag.adapters import AttentionInjection
from motionrag.adapters.modulation import published_group_norm
from motionrag.backbones.svd import CONTROL_FPS, TOLD
from motionrag.bundle import MotionBundle
from motionrag.training.diffusion import DiffusionTraining, replace_clips, save_parts
from motionrag.training.encoded import load_pipeline
from motionrag.trajectory import motion_bucket, motion_mask, sample_regions

_OWN_DENOISER = "denoiser"
_LORA = "lora_"  # in the name of every low-rank matrix
_CONTROL, _TOKENS = 1, 2  # streams of chance


class ControlTraining(DiffusionTraining):
    """Trains feature modulation on the flow of the clips themselves.

    As MotionPro: 8×8 blocks are kept with probability 1 - r, r drawn anew for every clip, where they are visible in
    all frames; the mask is where the clip moves; the motion bucket is the mean displacement.

    Args:
        bundle: Folder of the bundle to start from; the trained parts are written back when training ends.
        pipeline: Diffusers pipeline; None: the bundle's base model.
        denoiser: What of the denoiser is trained. "frozen": nothing, and it is the bundle's own if it has one. "lora":
            low-rank matrices on every linear layer, merged when training ends. "whole": everything. Both start from the
            pipeline's, and what they write replaces a denoiser that the bundle has.
        output: Folder that gets a denoiser that was trained; None: `denoiser` in the bundle, which then names it.
        lora_rank: Of the low-rank matrices (published: 32); their scale is 1.
        token_dropout: Share of clips without motion tokens, while motion injection learns beside the modulation from
            the clips' own tokens; None: there are no motion tokens.
        control_dropout: Share of clips without control.
        drop_ratio: Lower and upper end of r (published: 0.75 and 1).
        shift_blocks: Move the grid of blocks at random, for drawn tracks start anywhere. Published: no.
        bucket: Motion bucket under control; None: the clip's mean displacement in pixels, as published.
        learning_rate: The highest.
        weight_decay: Of matrices.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
        prompt_dropout: Share of clips whose image is emptied.
        max_weight: Highest loss weight of a noise level, see the backbone's loss.
        motion_weight: How much more the loss counts what moves.
        timestep_shift: Above 1 high noise comes more often, where motion is decided; see the backbone's loss.
        gradient_checkpointing: Save memory for a third more time.
        precision: Of frozen weights, "float32" or "bfloat16"; what is trained is kept in float32.
        seed: Of noise, noise levels and blocks.

    Raises:
        ValueError: If the bundle lacks a part that is to be trained.
    """

    def __init__(
        self,
        bundle: str,
        *,
        pipeline: str | None = None,
        denoiser: Literal["frozen", "lora", "whole"] = "frozen",
        output: str | None = None,
        lora_rank: int = 32,
        token_dropout: float | None = None,
        control_dropout: float = 0.0,
        drop_ratio: tuple[float, float] = (0.75, 1.0),
        shift_blocks: bool = False,
        bucket: float | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 1e-2,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        prompt_dropout: float = 0.1,
        max_weight: float = 1e4,
        motion_weight: float = 0.0,
        timestep_shift: float = 1.0,
        gradient_checkpointing: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.source = pipeline or self.bundle.path_or_id(self.bundle.config.base_model)
        dtype = torch.float32 if denoiser == "whole" else getattr(torch, precision)
        own = self.bundle.config.denoiser if denoiser == "frozen" and pipeline is None else None
        own_folder = None if own is None else self.bundle.path_or_id(own)
        self.backbone, self.pipeline = load_pipeline(self.source, frozen=False, dtype=dtype, denoiser=own_folder)
        self.denoiser: Any = getattr(self.pipeline, self.backbone.denoiser)
        self.writes_own = denoiser != "frozen" and output is None
        self.norms = ExitStack()
        if self.writes_own or own is not None:  # bundles with a denoiser of their own run with these norms
            self.norms.enter_context(published_group_norm(self.denoiser))
        self.denoiser.requires_grad_(denoiser == "whole").train(denoiser == "whole")
        if denoiser == "lora":
            _add_lora(self.denoiser, lora_rank)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.modulation = self.bundle.feature_modulation.requires_grad_(True)
        self.modulation.attach(self.denoiser)
        self.injection: AttentionInjection | None = None
        if token_dropout is not None:
            self.injection = self.bundle.motion_injection
            self.injection.requires_grad_(True)
            self.resampler = self.bundle.motion_resampler.requires_grad_(False)
            self.injection.attach(self.denoiser)

    def flow(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """What of each clip's flow is told.

        Args:
            batch: With `flow` `(b f h w 2)`, pixels from frame 0, and `visible` `(b h w)`.
            generator: Of the blocks.

        Returns:
            `(b f 3 h w)`: displacement in the kept blocks, and the mask of all that moves.
        """
        options = {"ratio": self.hparams["drop_ratio"], "shift": self.hparams["shift_blocks"], "generator": generator}
        told = []
        for flow, visible in zip(batch["flow"], batch["visible"], strict=True):
            kept, _ = sample_regions(flow, visible, **options)
            mask = repeat(motion_mask(flow).to(flow), "h w -> f h w 1", f=len(flow))
            told.append(rearrange(torch.cat([kept, mask], dim=3), "f h w c -> f c h w"))
        return torch.stack(told)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch. Conditions stay set until the backward pass is over, which Lightning runs later.

        Args:
            batch: From `EncodedClips`, with flow.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        self._clear()
        number = len(batch["latents"])
        draw = self.generator(self.batches, stream=_CONTROL)
        controlled = torch.rand(number, generator=draw) >= self.hparams["control_dropout"]
        self.modulation.set_condition(self.flow(batch, draw), controlled.to(batch["latents"]))
        if self.injection is not None:
            draw = self.generator(self.batches, stream=_TOKENS)
            moved = torch.rand(number, generator=draw) >= self.hparams["token_dropout"]
            self.injection.set_condition(self.resampler(batch["motion_features"]), moved.to(batch["latents"]))
        with self._attention():
            loss = self.diffusion_loss({**batch, "told": self._told(batch, controlled)}, step=self.batches)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop steering.

        Args:
            *args: Not used.
        """
        self._clear()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss without control, with it, and with motion tokens alone.

        Args:
            batch: From `EncodedClips`, with flow.
            batch_idx: Chooses noise and blocks.
        """
        everyone = torch.ones(len(batch["latents"]), dtype=torch.bool)
        plain = self.diffusion_loss(batch, step=batch_idx)
        with self.modulation.condition(self.flow(batch, self.generator(batch_idx, stream=_CONTROL))):
            controlled = self.diffusion_loss({**batch, "told": self._told(batch, everyone)}, step=batch_idx)
        losses = {"plain": plain, "loss": controlled, "share": controlled / plain}
        if self.injection is not None:
            with self.injection.condition(self.resampler(batch["motion_features"])):
                losses["share_tokens"] = self.diffusion_loss(batch, step=batch_idx) / plain
        self.log_dict({f"validation/{name}": value for name, value in losses.items()}, prog_bar=True)

    def is_frozen(self, key: str) -> bool:
        """What of the denoiser does not learn, and the resampler.

        Args:
            key: As in the base class.

        Returns:
            As there.
        """
        if not key.startswith("denoiser."):
            return key.startswith("resampler.")
        return {"frozen": True, "lora": _LORA not in key, "whole": False}[self.hparams["denoiser"]]

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Write the bundle with the trained parts, and the denoiser if it was trained."""
        if not self.trainer.is_global_zero:
            return
        parts: dict[str, Any] = {"feature_modulation": self.modulation}
        if self.injection is not None:
            parts["motion_injection"] = self.injection
        folder, own = Path(self.hparams["bundle"]), None
        if self.hparams["denoiser"] != "frozen":
            for part in parts.values():
                part.detach()
            if self.hparams["denoiser"] == "lora":
                _merge_lora(self.denoiser)
            own = _OWN_DENOISER if self.writes_own else None
            self.denoiser.save_pretrained(Path(self.hparams["output"] or folder / _OWN_DENOISER))
        save_parts(self.bundle, folder, denoiser=own, **parts)

    def _told(self, batch: Mapping[str, Tensor], controlled: Tensor) -> Tensor:
        """Frames per second less one, and motion bucket `(b 2)`; under control they are others."""
        bucket = self.hparams["bucket"]
        buckets = [motion_bucket(flow) if bucket is None else bucket for flow in batch["flow"]]
        ours = torch.tensor([(CONTROL_FPS - 1, each) for each in buckets]).to(batch["latents"])
        return replace_clips(controlled, ours, ours.new_tensor(TOLD).expand_as(ours))

    def _attention(self) -> AbstractContextManager[None]:
        """On a CPU plain products: on a small UNet's short sequences training is a third faster than with fused ones.

        Not with gradient checkpointing, which runs the forward pass again later.
        """
        is_plain = self.device.type == "cpu" and not self.hparams["gradient_checkpointing"]
        return sdpa_kernel(SDPBackend.MATH) if is_plain else nullcontext()

    def _clear(self) -> None:
        self.modulation.clear_condition()
        if self.injection is not None:
            self.injection.clear_condition()


def _add_lora(denoiser: nn.Module, rank: int) -> None:
    """Low-rank matrices on every linear layer; they alone get gradients, and are kept in float32."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), denoiser)
    for name, parameter in denoiser.named_parameters():
        if _LORA in name:
            parameter.data = parameter.data.float()


def _merge_lora(denoiser: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge()
        denoiser.set_submodule(name, layer.get_base_layer())
