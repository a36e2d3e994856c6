"""Running a diffusers pipeline with motion and control switched on for one call alone.

The adapters sit at the denoisers; here they get their conditions, on the right device and in the right precision, and
lose them when the call ends, also by an error. What diffusers offers and motion cannot be right under is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from motionrag.adapters import (
    AdapterGuidance,
    AttentionInjection,
    FeatureModulation,
    InjectedEffect,
    published_group_norm,
)
from motionrag.adapters.injection import diffusers_hooks
from motionrag.backbones import Backbone


@dataclass(frozen=True)
class Steering:
    """What steers the videos of a call, beside images and prompts.

    Attributes:
        motion_tokens: `(b l d)`, or None for no injection at all.
        motion_scales: Strength of the injection, one for each video.
        motion_guidance_scale: Guidance of the injection, off at 1.
        flow: `(b f 3 h w)`, displacement from frame 0 and motion mask, or None for no modulation.
        control_scale: Strength of the modulation.
        control_guidance_scale: Guidance of the modulation, off at 1.
    """

    motion_tokens: Tensor | None
    motion_scales: Sequence[float]
    motion_guidance_scale: float = 1.0
    flow: Tensor | None = None
    control_scale: float = 1.0
    control_guidance_scale: float = 1.0

    def of(self, index: int) -> "Steering":
        """The part of one video."""
        one = slice(index, index + 1)
        is_still = self.motion_tokens is None or self.motion_scales[index] == 0
        return replace(
            self,
            motion_tokens=None if is_still else self.motion_tokens[one],  # type: ignore[index]
            motion_scales=self.motion_scales[one],
            flow=None if self.flow is None else self.flow[one],
        )


class SteeredPipeline:
    """A diffusers pipeline and the adapters at its denoisers.

    Args:
        pipeline: The diffusers pipeline.
        backbone: Its family.
        injection: Brings in motion tokens; attached here.
        modulation: Follows trajectories; attached here. None where the bundle has none.
        unconditional_tokens: Gives `(l d)`, the motion tokens of the unconditional half of guidance.
        has_published_norm: Whether the denoiser was trained by MotionPro, with other norms than diffusers'.
    """

    def __init__(
        self,
        pipeline: Any,
        backbone: Backbone,
        *,
        injection: AttentionInjection | None,
        modulation: FeatureModulation | None,
        unconditional_tokens: Callable[[], Tensor],
        has_published_norm: bool = False,
    ) -> None:
        self.pipeline, self.backbone = pipeline, backbone
        self.injection, self.modulation = injection, modulation
        self.unconditional_tokens = unconditional_tokens
        self.has_published_norm = has_published_norm
        self._guidance = AdapterGuidance()
        self._lock = Lock()
        if injection is not None:
            injection.attach(*self.denoisers)
        try:
            if modulation is not None:
                modulation.attach(*self.denoisers)
        except Exception:  # it was made for another model: leave no hook behind
            if injection is not None:
                injection.detach()
            raise

    @property
    def denoisers(self) -> list[Any]:
        """The networks that carry the adapters."""
        return self.backbone.denoisers(self.pipeline)

    def __call__(
        self, pictures: list[Image.Image], prompts: list[str], steering: Steering, options: Mapping[str, Any]
    ) -> tuple[Any, InjectedEffect]:
        """Make videos.

        Args:
            pictures: First frames.
            prompts: One for each.
            steering: Motion and control.
            options: Arguments of the diffusers pipeline.

        Returns:
            Frames as diffusers gives them, and how much motion was injected.

        Raises:
            RuntimeError: If another thread is making a video with this pipeline.
            ValueError: If a feature of diffusers is switched on under which motion cannot be right.
        """
        with self._alone():
            is_batch = self.backbone.takes_batches and len({picture.size for picture in pictures}) == 1
            if len(pictures) > 1 and not is_batch:
                return self._in_turn(pictures, prompts, steering, options)
            return self._together(pictures, prompts, steering, options)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time: the diffusers pipeline and the adapters hold the state of a call."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("This pipeline is making a video in another thread; wait for it, or load a second one.")
        try:
            yield
        finally:
            self._lock.release()

    def _together(
        self, pictures: list[Image.Image], prompts: list[str], steering: Steering, options: Mapping[str, Any]
    ) -> tuple[Any, InjectedEffect]:
        # A single image goes in alone, so that diffusers' own rules for it apply.
        call = {"image": pictures if len(pictures) > 1 else pictures[0], **options}
        if self.backbone.embed_prompts:
            call["prompt"] = prompts
        for denoiser in self.denoisers:
            if hasattr(denoiser, "_reset_stateful_cache"):  # diffusers leaves it full when a call ends in an error
                denoiser._reset_stateful_cache()
        effect = InjectedEffect(mean=0.0, per_site={})
        with ExitStack() as conditions:
            if self.has_published_norm:
                conditions.enter_context(published_group_norm(self.denoisers[0]))
            if steering.flow is not None:
                self._modulate(conditions, steering.flow, steering.control_scale)
            self._guide(conditions, steering)
            if steering.motion_tokens is None:
                return self.pipeline(**call).frames, effect
            is_guided = options[self.backbone.guidance_option] > 1
            condition = self._inject(conditions, steering.motion_tokens, steering.motion_scales, is_guided)
            frames = self.pipeline(**call).frames
            return frames, condition.effect()

    def _inject(self, conditions: ExitStack, tokens: Tensor, scales: Sequence[float], is_guided: bool) -> Any:
        assert self.injection is not None  # noqa: S101 - motion was refused before without it
        for denoiser in self.denoisers:
            _refuse_what_cannot_be_right(denoiser)
        stored: torch.dtype = self.denoisers[0].dtype
        # Layerwise casting stores one byte a number and computes in more; float32 is then always right.
        device = self._prepare(self.injection, stored if stored.itemsize > 1 else torch.float32)
        tokens, scale = tokens.to(device), torch.tensor(scales, device=device)
        if is_guided:  # two passes, the unconditional rows first
            tokens = torch.cat([self.unconditional_tokens().to(tokens).expand_as(tokens), tokens])
            scale = scale.repeat(2)
        return conditions.enter_context(
            self.injection.condition(tokens, scale, is_guided=is_guided, is_one_generation=True)
        )

    def _modulate(self, conditions: ExitStack, flow: Tensor, scale: float) -> None:
        assert self.modulation is not None  # noqa: S101 - control was refused before without it
        # Half precision would round displacements to whole pixels and more; the networks run once a generation.
        device = self._prepare(self.modulation, torch.float32)
        conditions.enter_context(self.modulation.condition(flow.to(device), scale))

    def _guide(self, conditions: ExitStack, steering: Steering) -> None:
        scales: dict[Any, float] = {}
        if steering.motion_tokens is not None:
            scales[self.injection] = steering.motion_guidance_scale
        if steering.flow is not None:
            scales[self.modulation] = steering.control_guidance_scale
        if all(scale == 1 for scale in scales.values()):
            return
        for denoiser in self.denoisers:
            _refuse_caches(denoiser)
        conditions.enter_context(self._guidance.guide(self.denoisers, scales))

    def _prepare(self, adapter: AttentionInjection | FeatureModulation, dtype: torch.dtype) -> torch.device:
        """Bring an adapter to where its denoisers run."""
        adapter.reattach(*self.denoisers)  # LoRA may have come or gone, the denoiser may be another
        device: torch.device = self.pipeline._execution_device
        adapter.to(device=device, dtype=dtype)
        return device

    def _in_turn(
        self, pictures: list[Image.Image], prompts: list[str], steering: Steering, options: Mapping[str, Any]
    ) -> tuple[Any, InjectedEffect]:
        """One call of the diffusers pipeline for each image, where it takes one at a time, or sizes differ (SVD)."""
        frames, effects = [], []
        for index, picture in enumerate(pictures):
            own = {name: _own(options[name], index) for name in ("generator", "negative_prompt") if name in options}
            made, effect = self._together([picture], [prompts[index]], steering.of(index), {**options, **own})
            frames.append(made)
            effects.append(effect)
        return _joined(frames), InjectedEffect.mean_of(effects)


def _refuse_what_cannot_be_right(denoiser: Any) -> None:
    """Features of diffusers under which motion would reach the wrong rows, or has never been seen to be right."""
    name = type(denoiser).__name__
    if "faster_cache_denoiser" in diffusers_hooks(denoiser):
        raise ValueError(
            f"FasterCache runs {name} without the unconditional half of guidance in some steps, so motion would reach "
            "the wrong half; call disable_cache() on it, or enable FirstBlockCache in its place."
        )
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ValueError(
            f"{name} is split over devices by enable_parallelism, with which motion injection has not been tested; "
            "load the pipeline again without it."
        )


_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast")
"""In the names of the hooks that diffusers' caches place, by `enable_cache` or by functions of their own."""


def _refuse_caches(denoiser: Any) -> None:
    """A cache takes the run without an adapter, which guidance of it makes in every step, for the next step."""
    if any(mark in hook for hook in diffusers_hooks(denoiser) for mark in _CACHES):
        raise ValueError(
            f"A cache of diffusers is enabled on {type(denoiser).__name__}, which would mix up the runs that guidance "
            "of motion or control makes in each step; disable it, or pass motion_guidance_scale=1 and "
            "control_guidance_scale=1."
        )


def _own(option: Any, index: int) -> Any:
    """What one image of several gets of an option that may be a list."""
    return option[index] if isinstance(option, list) else option


def _joined(videos: list[Any]) -> Any:
    """Batches of one video as one batch: lists, arrays or tensors."""
    if isinstance(videos[0], Tensor):
        return torch.cat(videos)
    if isinstance(videos[0], np.ndarray):
        return np.concatenate(videos)
    return [video for batch in videos for video in batch]
