"""LTX-Video image-to-video (0.9.x): sites, size and frame rules, and how it is trained.

The image is the first latent frame: it stays clean, and its tokens have timestep 0. A cross-attention (`attn2`) asks
with video tokens only, so what is injected there acts on the video alone.

Prompts are padded, and the model has to know which positions hold text. Here the padding of every embedding is zero,
so the mask follows from the embeddings, also after training has put another prompt in a clip's place. The model gives
padding a weight of exactly 0, so zeros change nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from motionrag.backbones.backbone import Backbone
from motionrag.backbones.loss import error_after_first, shifted
from motionrag.backbones.prompt import encode_prompts
from motionrag.backbones.size import valid_frames, valid_size

FPS = 24
LONGEST = 257  # frames; Lightricks recommends no more
PROMPT_LENGTH = 128  # tokens, diffusers' default


def output_size(pipeline: Any, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
    """Fill in and check the size of the video.

    Sides are multiples of the VAE's spatial factor (32), for a token is one latent; frames are 1 more than a multiple
    of its temporal factor (8), up to 257. diffusers names 121 frames as the pipeline's default and 161 as its call's:
    121 it is, 5 seconds at 24 fps, in three quarters of the tokens.

    Args:
        pipeline: A diffusers `LTXImageToVideoPipeline`.
        height: Pixels, or None for 512.
        width: Pixels, or None for 704.
        num_frames: Frames of the video, or None for 121.

    Returns:
        Height, width and number of frames.

    Raises:
        ValueError: If the model cannot make that size; the nearest valid one is named.
    """
    height = pipeline.default_height if height is None else height
    width = pipeline.default_width if width is None else width
    num_frames = pipeline.default_frames if num_frames is None else num_frames
    return (
        *valid_size("LTX", height, width, pipeline.vae_spatial_compression_ratio),
        valid_frames("LTX", num_frames, pipeline.vae_temporal_compression_ratio, LONGEST),
    )


def call_options(pipeline: Any) -> dict[str, Any]:
    """Arguments of every call: diffusers' own defaults are 25 frames per second, and a decoder told of no noise.

    Decoders from 0.9.1 on were trained to finish the denoising, and are given what diffusers' guide recommends.

    Args:
        pipeline: A diffusers `LTXImageToVideoPipeline`.

    Returns:
        Keyword arguments.
    """
    options: dict[str, Any] = {"frame_rate": FPS, "max_sequence_length": _prompt_length(pipeline)}
    if pipeline.vae.config.timestep_conditioning:
        options |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    return options


@torch.no_grad()
def encode(pipeline: Any, video: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Run what stays frozen in training: autoencoder and text encoder. The result can be stored.

    Latents are the mean of the autoencoder's distribution, from which the pipeline draws.

    Args:
        pipeline: With VAE, text encoder and tokenizer; the transformer is not used.
        video: `(b t c h w)` in [-1, 1].
        captions: One for each clip.

    Returns:
        `latents` `(b f c h w)`, `image_latents` `(b c h w)` of the first frame, `prompt_embeds` `(b n d)`, zero where
        `prompt_attention_mask` `(b n)` is.
    """
    pixels = rearrange(video, "b t c h w -> b c t h w").to(device=pipeline.vae.device, dtype=pipeline.vae.dtype)
    embeds, mask = _encode_prompts(pipeline, captions)
    return {
        "latents": _latents(pipeline.vae, pixels),
        "image_latents": _latents(pipeline.vae, pixels[:, :, :1])[:, 0],
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
    }


def empty_prompt(pipeline: Any) -> Tensor:
    """The embedding of no words.

    Args:
        pipeline: With text encoder and tokenizer.

    Returns:
        `(1 n d)`.
    """
    return embed_prompts(pipeline, [""])


def embed_prompts(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Embed prompts as the pipeline does, with zeros in place of padding.

    Args:
        pipeline: With text encoder and tokenizer.
        prompts: Texts; what is longer than 128 tokens, or the tokenizer's `model_max_length`, is cut.

    Returns:
        `(b n d)`.
    """
    return _encode_prompts(pipeline, prompts)[0]


def training_loss(
    pipeline: Any,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    *,
    max_weight: float,
    motion_weight: float,
    timestep_shift: float = 1.0,
) -> Tensor:
    """The loss of a rectified flow: squared error of the clean latents, weighted by 1/σ².

    While `max_weight` does not cut, and all latents count alike, this is the plain squared error of v. The first latent
    frame is given and left out; only the mean by which the weights of `motion_weight` are divided counts it, with 1.

    Args:
        pipeline: With transformer and scheduler. Of the VAE its compression ratios alone are used; diffusers takes a
            VAE that is not loaded for one of LTX-Video, 32 and 8.
        batch: From `encode`; which positions of a prompt hold text is read off `prompt_embeds`.
        generator: Of timesteps and noise, on the CPU.
        max_weight: Highest value of 1/σ².
        motion_weight: How much more latents count that differ from the first frame's; 0 treats all alike.
        timestep_shift: s of Stable Diffusion 3 (section 5.3.2): a share t of the timesteps becomes s·t/(1+(s-1)·t).

    Returns:
        One number for each clip `(b)`.

    Raises:
        ValueError: If clips have a single latent frame, which leaves nothing to predict.
    """
    latents, embeds = batch["latents"], batch["prompt_embeds"]
    frames, _, height, width = latents.shape[1:]
    temporal, spatial = pipeline.vae_temporal_compression_ratio, pipeline.vae_spatial_compression_ratio
    if frames == 1:
        raise ValueError(f"The first latent frame of LTX is the image; train on {temporal + 1} frames or more.")
    share = 1 - torch.rand(len(latents), generator=generator)  # in (0, 1], for σ = 0 has no weight
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    sigma = shifted(share, timestep_shift).to(latents.device)
    level = repeat(sigma, "b -> b f 1 1 1", f=frames).clone()
    level[:, 0] = 0
    noisy = (1 - level) * latents + level * noise
    noisy[:, 0] = batch["image_latents"]
    times = pipeline.scheduler.config.num_train_timesteps * level
    velocity = pipeline.transformer(
        hidden_states=rearrange(noisy, "b f c h w -> b (f h w) c"),
        encoder_hidden_states=embeds,
        timestep=repeat(times, "b f 1 1 1 -> b (f h w)", h=height, w=width),
        encoder_attention_mask=embeds.any(dim=-1),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(temporal / FPS, spatial, spatial),
    ).sample
    clean = noisy - level * rearrange(velocity, "b (f h w) c -> b f c h w", f=frames, h=height)
    error = error_after_first(clean, latents, motion_weight=motion_weight)
    return (1 / sigma**2).clamp(max=max_weight) * error


def _prompt_length(pipeline: Any) -> int:
    """T5 tokenizers may have no limit of their own, which is a huge number then."""
    return min(pipeline.tokenizer_max_length, PROMPT_LENGTH)


@torch.no_grad()
def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings `(b n d)`, zero where there is no text, and where there is `(b n)`, bool."""
    embeds, mask, *_ = encode_prompts(pipeline, prompts, _prompt_length(pipeline))
    return embeds * rearrange(mask, "b n -> b n 1"), mask


def _latents(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels `(b c t h w)` to normalised latents `(b f c h w)`."""
    latents = rearrange(vae.encode(pixels).latent_dist.mode(), "b c f h w -> b f c h w")
    mean, std = (rearrange(values.to(latents), "c -> c 1 1") for values in (vae.latents_mean, vae.latents_std))
    return (latents - mean) / std


LTX = Backbone(
    name="ltx",
    denoiser_class="LTXVideoTransformer3DModel",
    denoiser="transformer",
    injection_sites=re.compile(r"transformer_blocks\.\d+\.attn2\.to_out\.0"),
    pipeline_class="LTXImageToVideoPipeline",
    output_size=output_size,
    fps=lambda pipeline: FPS,
    guidance_scale=3.0,
    call_options=call_options,
    encode=encode,
    embed_prompts=embed_prompts,
    empty_prompt=empty_prompt,
    training_loss=training_loss,
    frozen_parts=("vae", "text_encoder", "tokenizer"),
    public_weights={
        "Lightricks/LTX-Video": "one for each version: OpenRAIL-M for 0.9.5, LTX-Video Open Weights License later",
    },
    # The public weights make videos from text alone too, and name that pipeline; from 0.9.5 on the one for conditions.
    stored_as={"LTXPipeline": {}, "LTXConditionPipeline": {}},
)
