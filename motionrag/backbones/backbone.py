"""The record that describes a backbone family. It holds facts, no weights and no state."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        pipeline_class: Class name of the diffusers pipeline.
        output_size: The size of the video that a call will make, `(pipeline, height, width, num_frames)`, with None
            filled in; raises ValueError naming the nearest valid size, also for more frames than it was trained on.
        fps: Frames per second at which the pipeline's model was trained.
        guidance_scale: Default strength of classifier-free guidance, off at 1.
        encode: What training runs once for each clip, `(pipeline, video (b t c h w) in [-1, 1], captions)` → tensors
            whose first dimension is the clip. `latents`, `image_latents` and `prompt_embeds` are among them.
        empty_prompt: Pipeline → `(1 n d)`, the `prompt_embeds` of the unconditional half of guidance.
        training_loss: `(pipeline, batch of what encode gave, generator, *, max_weight, motion_weight,
            timestep_shift)` → `(b)`.
        frozen_parts: Parts of the pipeline that `encode` needs and `training_loss` does not.
        public_weights: Hub id of the public weights → their licence.
        embed_prompts: Pipeline and prompts → `prompt_embeds` `(b n d)`; None if the family takes no text.
        guidance_option: Argument of the pipeline that takes the strength of guidance.
        call_options: Further arguments that every call of the pipeline needs.
        control_options: Arguments of a call that follows trajectories, as feature modulation was trained with.
        takes_batches: False if a call of the pipeline makes the video of one image only.
        second_denoiser: Attribute that holds a second network of the same class; both it and `denoiser` may be None
            in a pipeline then.
        stored_as: Further pipeline classes that public weights of this family name in `model_index.json` → entries that
            must stand there beside.
        published_prefix: Prefix of the denoiser's keys in the published MotionRAG checkpoints; None: there are none.
    """

    name: str
    denoiser_class: str
    denoiser: str
    injection_sites: re.Pattern[str]
    pipeline_class: str
    output_size: Callable[[Any, int | None, int | None, int | None], tuple[int, int, int]]
    fps: Callable[[Any], int]
    guidance_scale: float
    encode: Callable[..., dict[str, Tensor]]
    empty_prompt: Callable[[Any], Tensor]
    training_loss: Callable[..., Tensor]
    frozen_parts: tuple[str, ...]
    public_weights: Mapping[str, str]
    embed_prompts: Callable[[Any, Sequence[str]], Tensor] | None = None
    guidance_option: str = "guidance_scale"
    call_options: Callable[[Any], dict[str, Any]] | None = None
    control_options: Mapping[str, Any] = field(default_factory=dict)
    takes_batches: bool = True
    second_denoiser: str | None = None
    stored_as: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published_prefix: str | None = None

    def denoisers(self, pipeline: Any) -> list[Any]:
        """The denoising networks that a pipeline holds.

        Args:
            pipeline: Of this family.

        Returns:
            One network, or two.

        Raises:
            ValueError: If it holds none.
        """
        names = [name for name in (self.denoiser, self.second_denoiser) if name is not None]
        found = [model for name in names if (model := getattr(pipeline, name, None)) is not None]
        if not found:
            raise ValueError(f"This {type(pipeline).__name__} holds no {' and no '.join(names)}; load it whole.")
        return found

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
