"""CogVideoX image-to-video (2B-style and 5B): sites, size and frame rules.

The attention of a block runs over text and video tokens together, so the injection acts on both, as published.
"""

import re
from typing import Any

from motionrag.backbones.backbone import Backbone


def output_size(pipeline: Any, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
    """Fill in and check the size of the video.

    Sizes are multiples of the VAE's spatial factor times the patch; frames are 1 more than a multiple of twice the
    VAE's temporal factor: 1, 9, 17, …, 49. A model with learned positions (5B-I2V) knows a single picture size and a
    longest video.

    Args:
        pipeline: A diffusers `CogVideoXImageToVideoPipeline`.
        height: Pixels, or None for the model's own.
        width: Pixels, or None for the model's own.
        num_frames: Frames of the video, or None for the model's own.

    Returns:
        Height, width and number of frames.

    Raises:
        ValueError: If the model cannot make that size; the nearest valid one is named.
    """
    config = pipeline.transformer.config
    spatial = pipeline.vae_scale_factor_spatial
    # Twice, since diffusers' VAE decodes an even number of latent frames to too many: 2 give 8 frames, not 5.
    temporal = 2 * pipeline.vae_scale_factor_temporal
    own_height, own_width = config.sample_height * spatial, config.sample_width * spatial
    height = own_height if height is None else height
    width = own_width if width is None else width
    num_frames = config.sample_frames if num_frames is None else num_frames

    step = spatial * config.patch_size
    nearest = (max(step, round(height / step) * step), max(step, round(width / step) * step))
    if config.use_learned_positional_embeddings:
        nearest = (own_height, own_width)
    if (height, width) != nearest:
        raise ValueError(
            f"This CogVideoX model cannot make {height}×{width} (height×width); the nearest valid size is "
            f"{nearest[0]}×{nearest[1]}."
        )

    steps = max(0, round((num_frames - 1) / temporal))
    if config.use_learned_positional_embeddings:
        steps = min(steps, (config.sample_frames - 1) // temporal)
    if num_frames != steps * temporal + 1:
        raise ValueError(
            f"This CogVideoX model cannot make {num_frames} frames; the nearest valid number is {steps * temporal + 1}."
        )
    return height, width, num_frames


def call_options(pipeline: Any) -> dict[str, Any]:
    """Arguments of every call: the pipeline's own default prompt length fits the published sizes only.

    Args:
        pipeline: A diffusers `CogVideoXImageToVideoPipeline`.

    Returns:
        Keyword arguments.
    """
    return {"max_sequence_length": pipeline.transformer.config.max_text_seq_length}


COGVIDEOX = Backbone(
    name="cogvideox",
    denoiser_class="CogVideoXTransformer3DModel",
    denoiser="transformer",
    injection_sites=re.compile(r"transformer_blocks\.\d+\.attn1\.to_out\.0"),
    published_prefix="transformer.",
    fps=8,
    pipeline_class="CogVideoXImageToVideoPipeline",
    guidance_scale=6.0,
    output_size=output_size,
    call_options=call_options,
)
