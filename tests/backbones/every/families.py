"""Tiny pipelines of every family with a bundle in memory, and the injection by hand. No test lives here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from motionrag import MotionRAGPipeline
from motionrag.adapters import AttentionInjection
from motionrag.backbones import backbone_of_pipeline
from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle
from motionrag.models import Resampler
from tests.backbones.tiny_ltx import ltx_pipeline
from tests.backbones.tiny_wan import wan_pipeline
from tests.training.parts import pipeline as cogvideox_pipeline
from tests.training.parts import svd_pipeline

NUM_TOKENS, TOKEN_DIM = 3, 16
RESAMPLER = {
    "input_dim": 4,
    "dim": TOKEN_DIM,
    "output_dim": TOKEN_DIM,
    "num_queries": NUM_TOKENS,
    "depth": 1,
    "num_heads": 2,
    "head_dim": 4,
}


@dataclass(frozen=True)
class Family:
    """How to make a tiny pipeline of a family, and the smallest video for it.

    Attributes:
        make: Makes the diffusers pipeline, with the same weights every time.
        size: Height, width and number of frames.
        calls_a_step: How often the pipeline calls its denoiser in a step with guidance.
    """

    make: Callable[[], Any]
    size: tuple[int, int, int]
    calls_a_step: int = 1


FAMILIES = {
    "CogVideoX": Family(cogvideox_pipeline, (32, 32, 3)),
    "SVD": Family(svd_pipeline, (32, 32, 2)),
    "LTX": Family(ltx_pipeline, (64, 64, 9)),
    "Wan 2.1": Family(partial(wan_pipeline, "2.1"), (32, 32, 5), calls_a_step=2),
    "Wan 2.2": Family(partial(wan_pipeline, "2.2"), (32, 32, 5), calls_a_step=2),
    "Wan 5B": Family(partial(wan_pipeline, "5b"), (32, 32, 5), calls_a_step=2),
}


def image(seed: int = 0, family: str = "SVD") -> Image.Image:
    """A random picture of the family's size."""
    height, width, _ = FAMILIES[family].size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def tokens(rows: int = 1, seed: int = 2) -> torch.Tensor:
    return torch.randn(rows, NUM_TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(seed))


def diffusers_pipeline(family: str) -> Any:
    """A diffusers pipeline in evaluation mode, without a progress bar."""
    made = FAMILIES[family].make()
    made.set_progress_bar_config(disable=True)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return made


def bundle(pipeline: Any, *, seed: int = 1, every: int = 1) -> MotionBundle:
    """A bundle in memory. The injection's values are not zero, as after training; it has every n-th site."""
    torch.manual_seed(seed)
    backbone = backbone_of_pipeline(type(pipeline))
    denoiser = backbone.denoisers(pipeline)[0]
    injection = AttentionInjection.for_model(denoiser, TOKEN_DIM, sites=backbone.sites(denoiser)[::every])
    for adapter in injection.sites.values():
        torch.nn.init.normal_(adapter.to_v.weight, std=0.5)
    return MotionBundle(
        BundleConfig(
            backbone=backbone.name,
            base_model="backbone",
            encoders={"video": EncoderSource("video")},
            parts={"motion_resampler": RESAMPLER, "motion_injection": injection.config()},
        ),
        unconditional_tokens=torch.randn(NUM_TOKENS, TOKEN_DIM),
        motion_resampler=Resampler(**RESAMPLER),
        motion_injection=injection.eval(),
    )


def motion_pipeline(family: str, **options: Any) -> MotionRAGPipeline:
    """A pipeline with the same weights every time."""
    made = diffusers_pipeline(family)
    return MotionRAGPipeline(made, bundle(made, **options))


def settings(family: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a short call, without image, motion tokens and strength of guidance."""
    height, width, num_frames = FAMILIES[family].size
    defaults = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return {**defaults, **changes}


def run(pipe: MotionRAGPipeline, family: str, motion: torch.Tensor | None = None, **changes: Any) -> torch.Tensor:
    """Frames `(b t c h w)` of one image; with guidance, unless told otherwise."""
    motion = tokens() if motion is None else motion
    options = {"guidance_scale": 3.0, **settings(family), **changes}
    pictures = [image(seed, family) for seed in range(len(motion))] if len(motion) > 1 else image(0, family)
    return pipe(pictures, "a red ball", motion_tokens=motion, **options).frames


def run_plain(pipe: Any, family: str, guidance_scale: float = 3.0, **changes: Any) -> torch.Tensor:
    """The same call of the diffusers pipeline itself."""
    backbone = backbone_of_pipeline(type(pipe))
    options = {
        **(backbone.call_options(pipe) if backbone.call_options else {}),
        **settings(family),
        backbone.guidance_option: guidance_scale,
        **changes,
    }
    if backbone.embed_prompts:
        options["prompt"] = ["a red ball"]
    return pipe(image=image(0, family), **options).frames


@contextmanager
def injected_by_hand(pipe: Any, made: MotionBundle, motion: torch.Tensor, calls_a_step: int) -> Iterator[list[str]]:
    """The injection as the paper writes it, by hooks of its own, in a diffusers pipeline without MotionRAG.

    Args:
        pipe: The diffusers pipeline.
        made: Gives the weights and the unconditional tokens.
        motion: `(1 l d)`.
        calls_a_step: 2 where the conditional and the unconditional pass are calls of their own, in this order; with 1
            the batch has the unconditional half first. 0 where there is no guidance.

    Yields:
        Which rows each call of a denoiser saw: "both", "cond" or "uncond".
    """
    seen: list[str] = []
    unconditional = made.unconditional_tokens[None]
    rows = {"cond": motion, "uncond": unconditional, "both": torch.cat([unconditional, motion])}
    passes = {0: ("cond",), 1: ("both",), 2: ("cond", "uncond")}[calls_a_step]

    def begin(module: torch.nn.Module, args: tuple) -> None:
        seen.append(passes[len(seen) % len(passes)])

    def add(adapter: torch.nn.Module, module: torch.nn.Module, args: tuple) -> tuple:
        hidden, heads = args[0], adapter.num_heads
        of_video = rows[seen[-1]]
        of_row = of_video.repeat_interleave(len(hidden) // len(of_video), dim=0)
        query, key, value = (
            F.linear(source, projection.weight).unflatten(-1, (heads, -1)).transpose(1, 2)
            for source, projection in ((hidden, adapter.to_q), (of_row, adapter.to_k), (of_row, adapter.to_v))
        )
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (hidden + (weights @ value).transpose(1, 2).flatten(2),)

    handles = []
    injection = made.motion_injection
    for denoiser in backbone_of_pipeline(type(pipe)).denoisers(pipe):
        handles.append(denoiser.register_forward_pre_hook(begin))
        for name, adapter in injection.sites.items():
            site = denoiser.get_submodule(name.replace("/", "."))
            handles.append(site.register_forward_pre_hook(partial(add, adapter)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
