"""Stable Video Diffusion: sites, size and frame rules, and how it is trained. It reads no text.

Every spatial cross-attention (`attn2`) sees one image token, so its output, and with it what motion injection adds,
is the same at every position, frame and step of a sample.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from motionrag.backbones.backbone import Backbone
from motionrag.backbones.loss import latent_error
from motionrag.backbones.size import valid_frames, valid_size

FPS = 7
HEIGHT, WIDTH = 576, 1024
MOTION_BUCKET = 127  # diffusers' default; the model was told how much a clip moves, here it learns that from the tokens
TOLD = (FPS - 1, MOTION_BUCKET)  # diffusers passes on one frame per second less than it is given
CONTROL_FPS, CONTROL_BUCKET = 9, 17  # MotionPro tells the model 8 frames per second
SIGMA = (0.7, 1.6)  # log-normal noise level in training
IMAGE_NOISE = (-3.0, 0.5)  # log-normal noise of the image that the video starts from


def output_size(pipeline: Any, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
    """Fill in and check the size of the video.

    Sides are multiples of the VAE's factor and of all that the UNet halves; from 2 frames to as many as the model was
    trained on.

    Args:
        pipeline: A diffusers `StableVideoDiffusionPipeline`.
        height: Pixels, or None for 576.
        width: Pixels, or None for 1024.
        num_frames: Frames of the video, or None for the model's own.

    Returns:
        Height, width and number of frames.

    Raises:
        ValueError: If the model cannot make that size; the nearest valid one is named.
    """
    config = pipeline.unet.config
    step = pipeline.vae_scale_factor * 2 ** (len(config.block_out_channels) - 1)
    height, width = valid_size("SVD", HEIGHT if height is None else height, WIDTH if width is None else width, step)
    num_frames = config.num_frames if num_frames is None else num_frames
    # Guidance grows from the first frame to the last; with one frame diffusers takes it for off and fails.
    return height, width, valid_frames("SVD", num_frames, 1, config.num_frames, shortest=2)


@torch.no_grad()
def encode(pipeline: Any, video: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Run what stays frozen in training: autoencoder and image encoder. The result can be stored.

    The image is conditioned on with a little noise, which the autoencoder has to see: it is drawn here, once for each
    clip, and follows from the clip's first frame.

    Args:
        pipeline: With VAE, image encoder and feature extractor; the UNet is not used.
        video: `(b t c h w)` in [-1, 1].
        captions: Not used; the model reads no text.

    Returns:
        `latents` `(b t c h w)`, `image_latents` `(b c h w)` of the noisy first frame, not scaled, `prompt_embeds`
        `(b 1 d)` of the first frame, and its `noise_aug_strength` `(b)`.
    """
    vae, device = pipeline.vae, pipeline.vae.device
    frames = rearrange(video, "b t c h w -> (b t) c h w").to(device=device, dtype=vae.dtype)
    latents = rearrange(vae.encode(frames).latent_dist.mode(), "(b t) c h w -> b t c h w", b=len(video))
    first = video[:, 0].float().cpu()
    noises, strengths = [], []
    for image in first:
        generator = torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes()))
        strengths.append((IMAGE_NOISE[0] + IMAGE_NOISE[1] * torch.randn((), generator=generator)).exp())
        noises.append(torch.randn(image.shape, generator=generator))
    strength = torch.stack(strengths)
    noisy = first + rearrange(strength, "b -> b 1 1 1") * torch.stack(noises)
    pictures = pipeline.video_processor.postprocess(first, output_type="pil")
    return {
        "latents": vae.config.scaling_factor * latents,
        "image_latents": vae.encode(noisy.to(frames)).latent_dist.mode(),
        "prompt_embeds": pipeline._encode_image(pictures, device, 1, False),
        "noise_aug_strength": strength,
    }


def empty_prompt(pipeline: Any) -> Tensor:
    """What guidance puts in place of the image embedding.

    Args:
        pipeline: With image encoder.

    Returns:
        Zeros `(1 1 d)`.
    """
    return torch.zeros(1, 1, pipeline.image_encoder.config.projection_dim)


def training_loss(
    pipeline: Any,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    *,
    max_weight: float,
    motion_weight: float,
    timestep_shift: float = 1.0,
) -> Tensor:
    """The loss of EDM: squared error of the clean latents, weighted by (σ² + 1)/σ², with σ log-normal.

    The network predicts v, and input, output and time are scaled as diffusers' `EulerDiscreteScheduler` does for SVD.
    A clip whose embedding is empty loses its image latents too, as in the unconditional half of guidance.

    Args:
        pipeline: With UNet; nothing else is used.
        batch: From `encode`; with `told` `(b 2)`, frames per second less one and motion bucket, if the model is told
            others than diffusers' own.
        generator: Of noise and noise levels, on the CPU.
        max_weight: Highest value of (σ² + 1)/σ².
        motion_weight: How much more latents count that differ from the first frame's; 0 treats all alike.
        timestep_shift: Factor of σ.

    Returns:
        One number for each clip `(b)`.
    """
    latents, embeds = batch["latents"], batch["prompt_embeds"]
    drawn = torch.randn(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    level = timestep_shift * (SIGMA[0] + SIGMA[1] * drawn).exp().to(latents)
    sigma = rearrange(level, "b -> b 1 1 1 1")
    noisy = latents + sigma * noise
    conditioned = rearrange(embeds.flatten(1).any(dim=1), "b -> b 1 1 1")
    image = repeat(conditioned * batch["image_latents"], "b c h w -> b t c h w", t=latents.shape[1])
    strength = batch["noise_aug_strength"]
    told = batch.get("told", strength.new_tensor(TOLD).expand(len(latents), 2))
    predicted = pipeline.unet(
        torch.cat([noisy / (sigma**2 + 1).sqrt(), image], dim=2),
        0.25 * level.log(),
        encoder_hidden_states=embeds,
        added_time_ids=torch.cat([told, strength[:, None]], dim=1),
    ).sample
    clean = noisy / (sigma**2 + 1) - predicted.float() * sigma / (sigma**2 + 1).sqrt()
    weight = ((level**2 + 1) / level**2).clamp(max=max_weight)
    return weight * latent_error(clean, latents, motion_weight=motion_weight)


SVD = Backbone(
    name="svd",
    denoiser_class="UNetSpatioTemporalConditionModel",
    denoiser="unet",
    # The 16 spatial attn2; `temporal_transformer_blocks` does not match.
    injection_sites=re.compile(
        r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_out\.0"
    ),
    pipeline_class="StableVideoDiffusionPipeline",
    output_size=output_size,
    fps=lambda pipeline: FPS,
    guidance_scale=3.0,
    guidance_option="max_guidance_scale",
    encode=encode,
    empty_prompt=empty_prompt,
    training_loss=training_loss,
    frozen_parts=("vae", "image_encoder", "feature_extractor"),
    public_weights={
        "stabilityai/stable-video-diffusion-img2vid": "Stability AI Community License",
        "stabilityai/stable-video-diffusion-img2vid-xt": "Stability AI Community License",
    },
    control_options={"fps": CONTROL_FPS, "motion_bucket_id": CONTROL_BUCKET},
    published_prefix="unet.",
)
