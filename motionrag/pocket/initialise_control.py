"""Makes the second pocket as training finds it: a small Stable Video Diffusion that can be dragged.

It shares encoders, resamplers and CAMA with the first, so databases serve both. Its own are the backbone, motion
injection and feature modulation.
"""

from pathlib import Path
from typing import Any

import torch

from motionrag.adapters import AttentionInjection, FeatureModulation
from motionrag.bundle import BundleConfig, MotionBundle
from motionrag.pocket.initialise import LICENCE, MIN_SIMILARITY, NUM_FRAMES, SEED, SIZE, TOKEN_DIM, ready
from motionrag.pocket.world import FPS

LATENT_CHANNELS, IMAGE_DIM, WIDTH = 16, 32, 64


def control_backbone() -> Any:
    """A Stable Video Diffusion pipeline: 64 pixels, 17 frames, latents of 8×8.

    The image encoder stays as it is made here: what a picture shows reaches the UNet through its latents.
    """
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    # SVD's own class normalises in 32 groups, which in a network as narrow as this are single channels, and attends
    # over the whole frame: 2 dB less after as many steps. SVD's pipeline takes any autoencoder of images.
    vae = AutoencoderKL(
        block_out_channels=(32, 48, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    unet = UNetSpatioTemporalConditionModel(
        sample_size=SIZE // 8,
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(WIDTH, WIDTH),
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=3 * 32,
        layers_per_block=1,
        cross_attention_dim=IMAGE_DIM,
        num_attention_heads=(2, 2),
        num_frames=NUM_FRAMES,
    )
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=224,  # what the pipeline gives it
            patch_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=IMAGE_DIM,
        )
    )
    scheduler = EulerDiscreteScheduler(  # as SVD's, but for the highest noise, which hides latents as small as these
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=80.0,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=image_encoder,
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    )


def initialise_control(folder: str | Path, *, shared: str = "..") -> None:
    """Write the second pocket: bundle and backbone, in float32.

    Args:
        folder: Made if it does not exist.
        shared: Folder of the first, as the bundle names it.
    """
    folder = Path(folder)
    torch.manual_seed(SEED)
    pipeline = control_backbone()
    pipeline.save_pretrained(folder / "backbone")
    parts: dict[str, Any] = {
        "motion_injection": ready(AttentionInjection.for_model(pipeline.unet, token_dim=TOKEN_DIM)),
        "feature_modulation": FeatureModulation.for_model(pipeline.unet),
    }
    config = BundleConfig(
        backbone="svd",
        base_model="backbone",
        parts={name: part.config() for name, part in parts.items()},
        trained=False,
        min_similarity=MIN_SIMILARITY,
        guidance_scale=1.0,
        control_guidance_scale=3.0,
        num_inference_steps=20,
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        fps=FPS,
        shared=shared,
        licence=LICENCE,
        base_model_licence=LICENCE,
    )
    MotionBundle(config, **parts).save_pretrained(folder)
