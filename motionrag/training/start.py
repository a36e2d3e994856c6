"""Where training from scratch starts: an untrained bundle of the published sizes for a backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from motionrag.adapters import AttentionInjection, FeatureModulation
from motionrag.backbones import backbone_of_index
from motionrag.bundle import ENCODERS, BundleConfig, EncoderSource, MotionBundle
from motionrag.models import CAMA, Resampler

NUM_TOKENS, TOKEN_DIM = 25, 1024


def new_bundle(
    base_model: str,
    folder: str | Path,
    *,
    encoders: Mapping[str, EncoderSource] = ENCODERS,
    control: bool = False,
    seed: int = 0,
) -> MotionBundle:
    """Write an untrained bundle of the published sizes. Of base model and encoders only the configs are read.

    Args:
        base_model: Diffusers pipeline, hub id or folder.
        folder: Of the bundle; must not exist.
        encoders: "video", "image", "clip" and "text" → frozen encoder.
        control: Add feature modulation, for control by trajectories (SVD).
        seed: Of the weights.

    Returns:
        The bundle.

    Raises:
        FileExistsError: If there is something at `folder`.
        ValueError: If motionrag cannot train this backbone, or control does not fit it.
    """
    import diffusers
    from transformers import AutoConfig

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; an untrained bundle would replace what is in it.")
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    backbone = backbone_of_index(diffusers.DiffusionPipeline.load_config(base_model))
    denoiser_class = getattr(diffusers, backbone.denoiser_class)
    denoiser_config = denoiser_class.load_config(base_model, subfolder=backbone.denoiser)
    with torch.device("meta"):  # gigabytes, of which the adapter needs the shapes
        denoiser = denoiser_class.from_config(denoiser_config)
    torch.manual_seed(seed)
    adapters: dict[str, Any] = {"motion_injection": AttentionInjection.for_model(denoiser, token_dim=TOKEN_DIM)}
    if control:
        adapters["feature_modulation"] = FeatureModulation.for_model(denoiser)
    resampler = {
        "dim": TOKEN_DIM,
        "output_dim": TOKEN_DIM,
        "num_queries": NUM_TOKENS,
        "depth": 4,
        "num_heads": 12,
        "head_dim": 64,
    }
    widths = {name: int(AutoConfig.from_pretrained(encoders[name].source).hidden_size) for name in ("video", "image")}
    motion_resampler = {"input_dim": widths["video"], **resampler}
    context_resampler = {"input_dim": widths["image"], **resampler}
    cama = {"dim": TOKEN_DIM, "depth": 4, "num_heads": 16, "ff_dim": 4 * TOKEN_DIM, "num_tokens": NUM_TOKENS}
    bundle = MotionBundle(
        BundleConfig(
            backbone=backbone.name,
            base_model=base_model,
            encoders=dict(encoders),
            parts={
                "motion_resampler": motion_resampler,
                "context_resampler": context_resampler,
                "cama": cama,
                **{name: adapter.config() for name, adapter in adapters.items()},
            },
            trained=False,
        ),
        unconditional_tokens=torch.zeros(NUM_TOKENS, TOKEN_DIM),  # follow from the trained resampler
        motion_resampler=Resampler(**motion_resampler),
        context_resampler=Resampler(**context_resampler),
        cama=CAMA(**cama),
        **adapters,
    )
    bundle.save_pretrained(folder)
    return bundle
