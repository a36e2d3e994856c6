"""The record that describes a backbone family. It holds facts, no weights and no state."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Backbone:
    """Facts about one family of diffusers image-to-video models.

    Attributes:
        name: Short name, as in bundles and on the command line.
        denoiser_class: Class name of the denoising network.
        denoiser: Attribute of the pipeline that holds that network.
        injection_sites: Pattern of the paths of the attention output projections at which motion is injected.
        published_prefix: Prefix of the denoiser's keys in the published MotionRAG checkpoints.
        fps: Frames per second at which the family was trained.
        pipeline_class: Class name of the diffusers pipeline; None while motionrag can only adapt the denoiser.
        guidance_scale: Default strength of classifier-free guidance.
        output_size: The size of the video that a call will make, `(pipeline, height, width, num_frames)`, with None
            filled in; raises ValueError naming the nearest valid size. None while motionrag cannot generate with it.
        call_options: Further arguments that every call of the pipeline needs.
        encode: What training runs once for each clip, `(pipeline, video (b t c h w) in [-1, 1], captions)` → tensors
            whose first dimension is the clip; None while motionrag cannot train the family. `latents`, `image_latents`
            and `prompt_embeds` are among them.
        embed_prompts: Pipeline and prompts → `prompt_embeds` `(b n d)`; None if the family takes no text.
        empty_prompt: Pipeline → `(1 n d)`, the `prompt_embeds` of the unconditional half of guidance.
        training_loss: `(pipeline, batch of what encode gave, generator, *, max_weight, motion_weight,
            timestep_shift)` → `(b)`.
        frozen_parts: Parts of the pipeline that `encode` needs and `training_loss` does not.
    """

    name: str
    denoiser_class: str
    denoiser: str
    injection_sites: re.Pattern[str]
    published_prefix: str
    fps: int
    pipeline_class: str | None = None
    guidance_scale: float = 1.0
    output_size: Callable[[Any, int | None, int | None, int | None], tuple[int, int, int]] | None = None
    call_options: Callable[[Any], dict[str, Any]] | None = None
    encode: Callable[..., dict[str, Tensor]] | None = None
    embed_prompts: Callable[[Any, Sequence[str]], Tensor] | None = None
    empty_prompt: Callable[[Any], Tensor] | None = None
    training_loss: Callable[..., Tensor] | None = None
    frozen_parts: tuple[str, ...] = ()

    def sites(self, model: nn.Module) -> list[str]:
        """List the default injection sites of a denoiser of this family, in the order of its modules.

        Args:
            model: The denoising network, or any part of it whose paths match.

        Returns:
            Paths such as `transformer_blocks.0.attn1.to_out.0`.
        """
        # torch.compile wraps a module, but finds what is inside under the old name too.
        paths = (path.replace("_orig_mod.", "") for path, _ in model.named_modules())
        return [path for path in paths if self.injection_sites.fullmatch(path)]
