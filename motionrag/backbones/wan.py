"""Wan image-to-video: 2.1 (14B), 2.2 A14B with a transformer for high and one for low noise, and 2.2 TI2V-5B.

Motion is injected at the cross-attention of every block. Its queries are the tokens of the video alone; the prompt, and
in 2.1 the image embedding, come in as keys and values, so what is added there reaches the video and never the text.

The family conditions on the image in two ways. The 14B models see the noisy latents with the image beside them, in more
channels. TI2V-5B (`expand_timesteps`) sees the image as the first latent frame, without noise and at timestep 0.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from motionrag.backbones.backbone import Backbone
from motionrag.backbones.loss import error_after_first, latent_error, shifted
from motionrag.backbones.prompt import encode_prompts
from motionrag.backbones.size import valid_frames, valid_size

# Height, width and frames of the training clips, which no config tells.
OWN_SIZE = (480, 832, 81)
OWN_SIZE_5B = (704, 1280, 121)

# The 14B models find the image embedding in front of the prompt by this length, so it must never be another.
PROMPT_LENGTH = 512


def output_size(pipeline: Any, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
    """Fill in and check the size of the video. Where diffusers rounds with a warning, this raises.

    Sides are multiples of 16, and of the VAE's spatial factor times the patch (together 16, or 32 in TI2V-5B); frames
    are 1 more than a multiple of the VAE's temporal factor, up to the number that the model was trained on (81, or 121
    in TI2V-5B). Any such picture size works; the 720P model does best at 720×1280.

    Args:
        pipeline: A diffusers `WanImageToVideoPipeline`.
        height: Pixels, or None for 480 (704 in TI2V-5B).
        width: Pixels, or None for 832 (1280 in TI2V-5B).
        num_frames: Frames of the video, or None for the model's own.

    Returns:
        Height, width and number of frames.

    Raises:
        ValueError: If the model cannot make that size; the nearest valid one is named.
    """
    own_height, own_width, longest = OWN_SIZE_5B if pipeline.config.expand_timesteps else OWN_SIZE
    patch = WAN.denoisers(pipeline)[0].config.patch_size
    step = math.lcm(16, *(pipeline.vae_scale_factor_spatial * side for side in patch[1:]))
    height, width = valid_size(
        "Wan", own_height if height is None else height, own_width if width is None else width, step
    )
    num_frames = longest if num_frames is None else num_frames
    return height, width, valid_frames("Wan", num_frames, pipeline.vae_scale_factor_temporal, longest)


@torch.no_grad()
def encode(pipeline: Any, video: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Run what stays frozen in training: autoencoder, text encoder, and the image encoder where there is one.

    Args:
        pipeline: With VAE, text encoder and tokenizer, in Wan 2.1 also image encoder and processor; the transformers
            are not used.
        video: `(b t c h w)` in [-1, 1]; t is 1 more than a multiple of the VAE's temporal factor.
        captions: One for each clip.

    Returns:
        `latents` `(b f c h w)`, normalised by the VAE's mean and deviation; `image_latents`, which the pipeline calls
        condition and which keep its layout: `(b 4+c f h w)`, a mask of the given frames (one channel for each frame
        of a latent frame) and the latents of the first frame followed by grey, or in TI2V-5B `(b c 1 h w)`, the
        latents of the first frame; `prompt_embeds` `(b 512 d)`; with an image encoder `image_embeds` `(b n e)`.

    Raises:
        ValueError: If the VAE would drop frames.
    """
    vae, device = pipeline.vae, pipeline.vae.device
    num_frames = video.shape[1]
    valid_frames("Wan", num_frames, pipeline.vae_scale_factor_temporal, longest=num_frames)
    pixels = rearrange(video, "b t c h w -> b c t h w").to(device=device, dtype=vae.dtype)
    latents = _normalised_latents(vae, pixels)
    encoded = {
        "latents": rearrange(latents, "b c f h w -> b f c h w"),
        # The VAE is causal: its first latent frame knows the first frame only.
        "image_latents": latents[:, :, :1] if pipeline.config.expand_timesteps else _condition(pipeline, pixels),
        "prompt_embeds": embed_prompts(pipeline, captions),
    }
    if pipeline.image_encoder is not None:
        pictures = pipeline.video_processor.postprocess(video[:, 0].float().cpu(), output_type="pil")
        encoded["image_embeds"] = pipeline.encode_image(pictures, device)
    return encoded


def _normalised_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Latents `(b c f h w)` of pixels `(b c t h w)` in [-1, 1], in full precision as the pipeline keeps them."""
    latents = vae.encode(pixels).latent_dist.mode().float()  # type: ignore[operator]
    config: Any = vae.config
    mean = rearrange(latents.new_tensor(config.latents_mean), "c -> c 1 1 1")
    deviation = rearrange(latents.new_tensor(config.latents_std), "c -> c 1 1 1")
    return (latents - mean) / deviation


def _condition(pipeline: Any, pixels: Tensor) -> Tensor:
    """What the 14B models see beside the noisy latents, `(b 4+c f h w)`, for pixels `(b c t h w)`."""
    still = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
    latents = _normalised_latents(pipeline.vae, still)
    is_given = torch.zeros_like(latents[:, :1])
    is_given[:, :, 0] = 1
    mask = repeat(is_given, "b 1 f h w -> b m f h w", m=pipeline.vae_scale_factor_temporal)
    return torch.cat([mask, latents], dim=1)


@torch.no_grad()
def empty_prompt(pipeline: Any) -> Tensor:
    """The embedding of no words.

    Args:
        pipeline: With text encoder and tokenizer.

    Returns:
        `(1 512 d)`.
    """
    return embed_prompts(pipeline, [""])


@torch.no_grad()
def embed_prompts(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Embed prompts as the pipeline does.

    Args:
        pipeline: With text encoder and tokenizer.
        prompts: Texts; what is longer than 512 tokens is cut.

    Returns:
        `(b 512 d)`, zero after the end of a prompt.
    """
    embeds: Tensor = encode_prompts(pipeline, prompts, PROMPT_LENGTH)[0]
    return embeds


def training_loss(
    pipeline: Any,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    *,
    max_weight: float,
    motion_weight: float,
    timestep_shift: float = 1.0,
) -> Tensor:
    """The loss of rectified flow: squared error of the clean latents, weighted by 1/σ².

    The model predicts v = noise - latents at (1-σ)·latents + σ·noise, so without a bound on the weight this is the
    plain squared error of v. Trained is `transformer`. In Wan 2.2 A14B it works at high noise alone, so σ is drawn
    from the pipeline's `boundary_ratio` up to 1; `transformer_2`, for the noise below, takes no part. In TI2V-5B the
    first latent frame is given and does not count.

    Args:
        pipeline: With transformer and scheduler; nothing else is used.
        batch: From `encode`.
        generator: Of noise levels and noise, on the CPU.
        max_weight: Highest value of 1/σ².
        motion_weight: How much more latents count that differ from the first frame's; 0 treats all alike.
        timestep_shift: s of Stable Diffusion 3 (section 5.3.2): a share t of the noise levels becomes s·t/(1+(s-1)·t).

    Returns:
        One number for each clip `(b)`.

    Raises:
        ValueError: If the pipeline holds no `transformer`, or a TI2V-5B gets clips of a single latent frame.
    """
    transformer, latents = pipeline.transformer, batch["latents"]
    if transformer is None:
        raise ValueError("Wan is trained at its high-noise transformer, which this pipeline lacks; load it whole.")
    level = _noise_levels(len(latents), generator, shift=timestep_shift, lowest=pipeline.config.boundary_ratio or 0.0)
    level = level.to(latents.device)
    sigma = rearrange(level, "b -> b 1 1 1 1")
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = (1 - sigma) * latents + sigma * noise
    steps = pipeline.scheduler.config.num_train_timesteps * level
    inputs, timestep = _inputs(pipeline, rearrange(noisy, "b f c h w -> b c f h w"), batch["image_latents"], steps)
    predicted = transformer(
        hidden_states=inputs,
        timestep=timestep,
        encoder_hidden_states=batch["prompt_embeds"],
        encoder_hidden_states_image=None if transformer.config.image_dim is None else batch["image_embeds"],
    ).sample
    clean = noisy - sigma * rearrange(predicted.float(), "b c f h w -> b f c h w")
    weight = (1 / level**2).clamp(max=max_weight)
    if not pipeline.config.expand_timesteps:
        return weight * latent_error(clean, latents, motion_weight=motion_weight)
    if latents.shape[1] == 1:
        raise ValueError("This Wan model is given the first latent frame; train it on clips of 5 frames or more.")
    return weight * error_after_first(clean, latents, motion_weight=motion_weight)


def _noise_levels(count: int, generator: torch.Generator, *, shift: float, lowest: float) -> Tensor:
    """Draw σ `(count)`: uniform, then shifted, of that the part from `lowest` (not with it) to 1."""
    lowest_share = lowest / (shift - (shift - 1) * lowest)
    share = 1 - (1 - lowest_share) * torch.rand(count, generator=generator)  # never 0, where 1/σ² ends
    return shifted(share, shift)


def _inputs(pipeline: Any, noisy: Tensor, condition: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """What the transformer sees of noisy latents `(b c f h w)` at steps `(b)`, and its timestep for it.

    That is the condition in further channels, and the steps; or the first frame from the condition and a timestep for
    each token `(b f·h·w)`.
    """
    if not pipeline.config.expand_timesteps:
        return torch.cat([noisy, condition], dim=1), steps
    patch = pipeline.transformer.config.patch_size
    frames, height, width = (side // part for side, part in zip(noisy.shape[2:], patch, strict=True))
    is_noisy = torch.arange(frames, device=steps.device) > 0
    timestep = repeat(steps[:, None] * is_noisy, "b f -> b (f cells)", cells=height * width)
    return torch.cat([condition, noisy[:, :, 1:]], dim=2), timestep


WAN = Backbone(
    name="wan",
    denoiser_class="WanTransformer3DModel",
    denoiser="transformer",
    second_denoiser="transformer_2",
    injection_sites=re.compile(r"blocks\.\d+\.attn2\.to_out\.0"),
    pipeline_class="WanImageToVideoPipeline",
    output_size=output_size,
    fps=lambda pipeline: 24 if pipeline.config.expand_timesteps else 16,
    guidance_scale=5.0,
    takes_batches=False,  # diffusers repeats the latents of one image over the batch
    encode=encode,
    embed_prompts=embed_prompts,
    empty_prompt=empty_prompt,
    training_loss=training_loss,
    frozen_parts=("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"),
    public_weights={
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "Apache-2.0",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "Apache-2.0",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "Apache-2.0",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "Apache-2.0",
    },
    stored_as={"WanPipeline": {"expand_timesteps": True}},  # TI2V-5B: text to video, and with an image
)
