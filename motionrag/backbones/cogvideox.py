"""CogVideoX image-to-video (2B-style and 5B): sites, size and frame rules.

The attention of a block runs over text and video tokens together, so the injection acts on both, as published.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.backbones.backbone import Backbone
from motionrag.backbones.loss import latent_error, shifted
from motionrag.backbones.prompt import encode_prompts
from motionrag.backbones.size import valid_frames, valid_size, wrong_size


def output_size(pipeline: Any, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
    """Fill in and check the size of the video.

    Sizes are multiples of the VAE's spatial factor times the patch; frames are 1 more than a multiple of twice the
    VAE's temporal factor: 1, 9, 17, …, up to the number that the model was trained on (49; 81 for 1.5). A model with
    learned positions (5B-I2V) knows a single picture size.

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

    if not config.use_learned_positional_embeddings:
        valid_size("CogVideoX", height, width, spatial * config.patch_size)
    elif (height, width) != (own_height, own_width):
        raise wrong_size("CogVideoX", height, width, (own_height, own_width))
    num_frames = valid_frames("CogVideoX", num_frames, temporal, config.sample_frames)
    return height, width, num_frames


def call_options(pipeline: Any) -> dict[str, Any]:
    """Arguments of every call: the pipeline's own default prompt length fits the published sizes only.

    Args:
        pipeline: A diffusers `CogVideoXImageToVideoPipeline`.

    Returns:
        Keyword arguments.
    """
    return {"max_sequence_length": pipeline.transformer.config.max_text_seq_length}


@torch.no_grad()
def encode(pipeline: Any, video: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Run what stays frozen in training: autoencoder and text encoder. The result can be stored.

    Args:
        pipeline: With VAE, text encoder and tokenizer; the transformer is not used.
        video: `(b t c h w)` in [-1, 1].
        captions: One for each clip.

    Returns:
        `latents` `(b f c h w)`, `image_latents` `(b c h w)` of the first frame, `prompt_embeds` `(b n d)`.
    """
    vae = pipeline.vae
    pixels = rearrange(video, "b t c h w -> b c t h w").to(device=vae.device, dtype=vae.dtype)
    factor = vae.config.scaling_factor
    if is_framewise(vae):
        with single_frames(vae):
            frames = rearrange(pixels, "b c t h w -> (b t) c 1 h w")
            latents = rearrange(vae.encode(frames).latent_dist.mode(), "(b t) c 1 h w -> b t c h w", b=len(video))
        images = latents[:, 0]
    else:
        latents = rearrange(vae.encode(pixels).latent_dist.mode(), "b c f h w -> b f c h w")
        images = vae.encode(pixels[:, :, :1]).latent_dist.mode()[:, :, 0]
    return {
        "latents": factor * latents,
        "image_latents": images / factor if vae.config.invert_scale_latents else factor * images,
        "prompt_embeds": embed_prompts(pipeline, captions),
    }


@torch.no_grad()
def empty_prompt(pipeline: Any) -> Tensor:
    """The embedding of no words.

    Args:
        pipeline: With text encoder and tokenizer.

    Returns:
        `(1 n d)`.
    """
    return embed_prompts(pipeline, [""])


@torch.no_grad()
def embed_prompts(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Embed prompts as the pipeline does.

    Args:
        pipeline: With text encoder and tokenizer.
        prompts: Texts; what is longer than the tokenizer's `model_max_length` is cut.

    Returns:
        `(b n d)`.
    """
    embeds: Tensor = encode_prompts(pipeline, prompts, pipeline.tokenizer.model_max_length)[0]
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
    """The diffusion loss of CogVideoX: squared error of the clean latents, weighted by 1/(1-ᾱ).

    For a model that predicts v this is the plain squared error of v.

    Args:
        pipeline: With transformer and scheduler; nothing else is used.
        batch: From `encode`.
        generator: Of timesteps and noise, on the CPU.
        max_weight: Highest value of 1/(1-ᾱ); it has no bound for models that predict clean latents.
        motion_weight: How much more latents count that differ from the first frame's; 0 treats all alike.
        timestep_shift: s of Stable Diffusion 3 (section 5.3.2): a share t of the timesteps becomes s·t/(1+(s-1)·t).

    Returns:
        One number for each clip `(b)`.
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    latents = batch["latents"]
    count = scheduler.config.num_train_timesteps
    share = (torch.randint(count, latents.shape[:1], generator=generator) + 0.5) / count
    steps = (count * shifted(share, timestep_shift)).long()
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    steps = steps.to(latents.device)
    noisy = scheduler.add_noise(latents, noise, steps)
    image = torch.zeros_like(latents)
    image[:, 0] = batch["image_latents"]
    padding = -latents.shape[1] % (transformer.config.patch_size_t or 1)  # CogVideoX 1.5 repeats the first latents
    inputs = torch.cat([noisy, image], dim=2)
    inputs = torch.cat([inputs[:, :padding], inputs], dim=1)
    predicted = transformer(
        hidden_states=inputs,
        encoder_hidden_states=batch["prompt_embeds"],
        timestep=steps,
        image_rotary_emb=_rotary_embedding(pipeline, inputs),
        ofs=None if transformer.config.ofs_embed_dim is None else latents.new_full((1,), 2.0),
    ).sample[:, padding:]
    kind = scheduler.config.prediction_type
    if kind not in ("v_prediction", "sample"):
        raise ValueError(f"Training knows models that predict v or the sample, not {kind!r}.")
    clean = scheduler.get_velocity(predicted, noisy, steps) if kind == "v_prediction" else predicted
    noise_share = 1 - scheduler.alphas_cumprod.to(latents)[steps]
    weight = (1 / noise_share).clamp(max=max_weight)
    return weight * latent_error(clean, latents, motion_weight=motion_weight)


def _rotary_embedding(pipeline: Any, inputs: Tensor) -> Any:
    if not pipeline.transformer.config.use_rotary_positional_embeddings:
        return None
    frames, _, height, width = inputs.shape[1:]
    return pipeline._prepare_rotary_positional_embeddings(
        height * pipeline.vae_scale_factor_spatial, width * pipeline.vae_scale_factor_spatial, frames, inputs.device
    )


def is_framewise(vae: nn.Module) -> bool:
    """Tell whether a VAE compresses space only and looks at no other frame.

    Args:
        vae: diffusers' `AutoencoderKLCogVideoX`.

    Returns:
        True if all temporal taps of its convolutions but the last are zero, as in the pocket's.
    """
    if vae.config.temporal_compression_ratio != 1:  # type: ignore[union-attr]
        return False
    return not any(layer.conv.weight[:, :, :-1].any() for layer in causal_convolutions(vae))


@contextmanager
def single_frames(vae: nn.Module) -> Iterator[None]:
    """Run a framewise VAE on single frames in two dimensions: the same result in half the time.

    Args:
        vae: For which `is_framewise` holds.

    Yields:
        Nothing; inside the block the network takes clips of one frame.
    """
    layers = causal_convolutions(vae)
    for layer in layers:
        layer.forward = partial(_convolve_frame, layer.conv)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def causal_convolutions(vae: nn.Module) -> list[Any]:
    """List the convolutions over time of a CogVideoX autoencoder.

    Args:
        vae: diffusers' `AutoencoderKLCogVideoX`.

    Returns:
        Its `CogVideoXCausalConv3d`.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    return [layer for layer in vae.modules() if isinstance(layer, CogVideoXCausalConv3d)]


def _convolve_frame(convolution: nn.Conv3d, video: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, None]:
    weight = convolution.weight[:, :, -1]
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    frame = F.conv2d(video[:, :, 0], weight, convolution.bias, convolution.stride[1:], padding)
    return frame[:, :, None], None


COGVIDEOX = Backbone(
    name="cogvideox",
    denoiser_class="CogVideoXTransformer3DModel",
    denoiser="transformer",
    injection_sites=re.compile(r"transformer_blocks\.\d+\.attn1\.to_out\.0"),
    pipeline_class="CogVideoXImageToVideoPipeline",
    output_size=output_size,
    fps=lambda pipeline: 16 if pipeline.transformer.config.patch_size_t else 8,  # 1.5, and the first
    guidance_scale=6.0,
    call_options=call_options,
    encode=encode,
    embed_prompts=embed_prompts,
    empty_prompt=empty_prompt,
    training_loss=training_loss,
    frozen_parts=("vae", "text_encoder", "tokenizer"),
    public_weights={
        "THUDM/CogVideoX-5b-I2V": "CogVideoX License",
        "THUDM/CogVideoX1.5-5B-I2V": "CogVideoX License",
    },
    published_prefix="transformer.",
)
