"""What validation shows beside the loss: clips generated with the weights as they are, drawn under the truth.

The loss of a diffusion model says little about how things move. In the pocket's world the true tracks are known, so
their error is logged too.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import default_collate

from motionrag.backbones.quiet import quiet_about_autoencoder
from motionrag.sheet import SheetRow, contact_sheet
from motionrag.training.encoded import EncodedClips

# What stands in a batch for the prompt, under the names of the pipelines' arguments.
_PROMPT_TENSORS = ("prompt_embeds", "prompt_attention_mask")


class ValidationClips(lightning.Callback):
    """Generates the first clips of the validation set: without motion tokens and, from stage 1 on, with them.

    It runs on one device with the whole denoiser, so not under a strategy that shards it. Guidance is off. Of the
    frozen parts only the autoencoder is loaded, when it is first needed.

    Args:
        folder: Where sheets are written, one for each time.
        count: Clips.
        every_n_validations: How often.
        num_inference_steps: Denoising steps.
        seed: Of the noise.
    """

    def __init__(
        self, folder: str, *, count: int = 4, every_n_validations: int = 1, num_inference_steps: int = 10, seed: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.count, self.every_n_validations = count, every_n_validations
        self.num_inference_steps, self.seed = num_inference_steps, seed
        self._validations = 0
        self._pipeline: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be generated before anything is trained.

        Args:
            trainer: Not used.
            pl_module: Knows the backbone.
            stage: Not used.

        Raises:
            ValueError: If the backbone takes no prompts, or one image at a time.
        """
        backbone = pl_module.backbone
        if backbone.embed_prompts is None or not backbone.takes_batches:
            raise ValueError(f"A {backbone.name} makes no videos from stored prompts here; leave ValidationClips out.")

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Generate, draw and measure.

        Args:
            trainer: Gives the validation set.
            pl_module: What is trained.
        """
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        dataset = trainer.datamodule.validation  # type: ignore[attr-defined]
        count = min(self.count, len(dataset))
        batch = {
            name: values.to(pl_module.device)
            for name, values in default_collate([dataset[index] for index in range(count)]).items()
        }
        while isinstance(dataset, EncodedClips) or not hasattr(dataset, "texts"):
            dataset = dataset.clips
        truth = default_collate([dataset[index] for index in range(count)])
        pixels = (truth["video"] + 1) / 2
        videos = {"truth": _as_uint8(pixels)}
        with trainer.precision_plugin.forward_context():
            videos["without motion tokens"] = self._generate(pl_module, batch, pixels[:, 0], pixels.shape[1])
            if hasattr(pl_module, "injection"):
                with pl_module.injection.condition(pl_module.motion_tokens(batch)):
                    videos["with motion tokens"] = self._generate(pl_module, batch, pixels[:, 0], pixels.shape[1])
        if "tracks" in truth:
            from motionrag.evaluation.track_error import track_errors

            for name, frames in list(videos.items())[1:]:
                errors = track_errors(frames, truth["tracks"], truth["masks"][:, 0], truth["colours"])
                pl_module.log(f"validation/track_error_{name.split()[0]}", errors.nanmean(), rank_zero_only=True)
        rows = [
            SheetRow(name, frames[index].numpy(), truth["caption"][index] if name == "truth" else "")
            for index in range(count)
            for name, frames in videos.items()
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows).save(self.folder / f"step-{trainer.global_step:06d}.png")

    def _generate(self, module: Any, batch: dict[str, Tensor], images: Tensor, num_frames: int) -> Tensor:
        """Videos `(b t h w 3)` uint8 that start at the images `(b c h w)` in [0, 1]."""
        backbone = module.backbone
        if self._pipeline is None:
            left_out = {backbone.denoiser, *backbone.frozen_parts} - {"vae"}
            with quiet_about_autoencoder():
                self._pipeline = type(module.pipeline).from_pretrained(module.source, **dict.fromkeys(left_out))
            self._pipeline.register_modules(**{backbone.denoiser: module.denoiser})
            self._pipeline.set_progress_bar_config(disable=True)
            self._pipeline.vae.to(module.device)
        pipeline = self._pipeline
        frames = pipeline(
            image=images.to(module.device),
            **{name: batch[name] for name in _PROMPT_TENSORS if name in batch},
            guidance_scale=1.0,
            num_inference_steps=self.num_inference_steps,
            height=images.shape[-2],
            width=images.shape[-1],
            num_frames=num_frames,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="pt",
            **(backbone.call_options(pipeline) if backbone.call_options else {}),
        ).frames
        return _as_uint8(frames)


def _as_uint8(frames: Tensor) -> Tensor:
    return rearrange((frames.float().clamp(0, 1) * 255).round().byte().cpu(), "b t c h w -> b t h w c")
