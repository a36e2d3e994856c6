"""Feature modulation: drawn trajectories steer a frozen SVD UNet (MotionPro).

In the first spatial residual block of every level, on the way down and on the way up, with h the output of the block's
first convolution, before the time embedding is added, and γ, β from the level's trajectory feature:

    h ← h + scale · (norm(h) · γ + β)

Zero displacement is not "off" (the encoder has biases): off means detached, or scale 0. Everything but norm(h) follows
from the flow alone and is computed once per condition; while gradients are recorded, once per call of the UNet.

Shapes: b videos, f frames, c channels, h w pixels. The UNet folds videos and frames into its batch, frames innermost,
and guidance puts the unconditional videos first: its batch is a whole number of times our (b f).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from motionrag.adapters.injection import WHOLE_MODEL, Adapter, leaf, uncompiled
from motionrag.models.trajectory_encoder import STEM_FACTOR, SpatioTemporalConvolution, TrajectoryEncoder

NORM_GROUPS = 32
PUBLISHED_EPS = 1e-5


class LayerModulation(nn.Module):
    """Turns a trajectory feature into γ and β for one layer; both start at zero, so a fresh one changes nothing.

    Args:
        feature_channels: Of the trajectory feature.
        channels: Of the layer's output, a multiple of 32.
    """

    def __init__(self, *, feature_channels: int, channels: int) -> None:
        super().__init__()
        sizes = {"in_channels": feature_channels, "mid_channels": channels // 4, "out_channels": channels}
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=PUBLISHED_EPS)
        self.gamma = SpatioTemporalConvolution(**sizes)
        self.beta = SpatioTemporalConvolution(**sizes)
        for convolution in (self.gamma, self.beta):
            nn.init.zeros_(convolution.temporal.weight)
            nn.init.zeros_(cast(Tensor, convolution.temporal.bias))

    def gamma_beta(self, feature: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Compute what the layer's output is modulated with.

        Args:
            feature: `(b f c h w)`.
            scale: One number, or one per video `(b)`.

        Returns:
            γ and β, times the scale, each `(b·f c h w)`.
        """
        if isinstance(scale, Tensor):
            scale = rearrange(scale.to(feature), "b -> b 1 1 1 1")
        gamma, beta = (
            rearrange(convolution(feature) * scale, "b f c h w -> (b f) c h w")
            for convolution in (self.gamma, self.beta)
        )
        return gamma, beta

    def forward(self, hidden: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Modulate `hidden` `(g·n c h w)` by γ and β `(n c h w)`, the same for each of g guidance passes."""
        normed = rearrange(self.norm(hidden.to(gamma.dtype)), "(g n) c h w -> g n c h w", n=len(gamma))
        change = rearrange(normed * gamma + beta, "g n c h w -> (g n) c h w")
        return hidden + change.to(hidden.dtype)


@dataclass
class FlowCondition:
    """What the hooks read during a call: flow, scale, and what follows from them alone.

    Attributes:
        flow: `(b f 3 h w)`.
        scale: One number, or one per video as a tensor `(b)`.
        features: One per level while a call computes γ and β from them.
        prepared: Per site, γ and β; empty while gradients are recorded.
    """

    flow: Tensor
    scale: float | Tensor
    features: list[Tensor] | None = None
    prepared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_off(self) -> bool:
        """True if nothing is to be changed at all."""
        return not isinstance(self.scale, Tensor) and self.scale == 0


class FeatureModulation(Adapter[FlowCondition]):
    """The trajectory adapter for one SVD UNet. Constructing it touches nothing.

    Args:
        sites: Path of a layer → (its output channels, level of the feature it takes). Use `for_model` to read them
            off a UNet.
        channels: Of the finest trajectory feature.
        level_multipliers: Of the trajectory encoder.

    Attributes:
        encoder: The `TrajectoryEncoder`.
        sites: One `LayerModulation` per layer.

    Raises:
        ValueError: If a layer's width is no multiple of 32, or it takes a level that the encoder does not have.
    """

    def __init__(self, sites: Mapping[str, Sequence[int]], *, channels: int, level_multipliers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = TrajectoryEncoder(channels=channels, level_multipliers=level_multipliers)
        layers: dict[str, nn.Module] = {}
        self._levels: dict[str, int] = {}
        for site, (width, level) in sites.items():
            if width % NORM_GROUPS or level not in range(len(level_multipliers)):
                raise ValueError(
                    f"{site} has {width} channels and takes level {level}; feature modulation needs a multiple of "
                    f"{NORM_GROUPS} and one of {len(level_multipliers)} levels."
                )
            self._levels[site] = level
            # A module name may not hold dots.
            layers[site.replace(".", "/")] = LayerModulation(
                feature_channels=channels * level_multipliers[level], channels=width
            )
        self.sites = nn.ModuleDict(layers)

    @classmethod
    def for_model(cls, unet: nn.Module, flow_scale: int = 1) -> "FeatureModulation":
        """Build an adapter that fits a UNet, without touching the UNet.

        Args:
            unet: diffusers' `UNetSpatioTemporalConditionModel`.
            flow_scale: How many times narrower the trajectory features are than the UNet's levels.

        Returns:
            The adapter, not attached, on the CPU in float32; it changes nothing until it is trained or loaded.

        Raises:
            ValueError: If the model is of another family, or its widths do not fit.
        """
        widths = getattr(getattr(unet, "config", None), "block_out_channels", None)
        if widths is None or not hasattr(unet, "down_blocks") or not hasattr(unet, "up_blocks"):
            raise ValueError(
                f"Feature modulation fits diffusers' UNetSpatioTemporalConditionModel, not {type(unet).__name__}."
            )
        if any(width % widths[0] for width in widths) or widths[0] % flow_scale:
            raise ValueError(
                f"The UNet's levels have {list(widths)} channels: feature modulation needs multiples of the first, "
                f"and that one a multiple of flow_scale {flow_scale}."
            )
        levels = range(len(widths))
        down = {f"down_blocks.{level}.resnets.0.spatial_res_block.conv1": level for level in levels}
        # The deepest level comes first on the way up.
        up = {f"up_blocks.{level}.resnets.0.spatial_res_block.conv1": len(widths) - 1 - level for level in levels}
        sites = {site: (_output_channels(leaf(unet, site)), level) for site, level in (down | up).items()}
        return cls(sites, channels=widths[0] // flow_scale, level_multipliers=[width // widths[0] for width in widths])

    @property
    def site_names(self) -> list[str]:
        """Paths of the sites, those on the way down first."""
        return list(self._levels)

    def config(self) -> dict[str, Any]:
        """Arguments that build this adapter again, as JSON values.

        Returns:
            Keyword arguments of the class.
        """
        sites = {site: [self._layer(site).norm.num_channels, level] for site, level in self._levels.items()}
        return {
            "sites": sites,
            "channels": self.encoder.channels,
            "level_multipliers": list(self.encoder.level_multipliers),
        }

    def attach(self, unet: nn.Module) -> None:
        """Put the adapter at its sites. Until a condition is set, the UNet's outputs stay bit-identical.

        Args:
            unet: The UNet that the adapter was built for.

        Raises:
            RuntimeError: If the adapter is attached already.
            ValueError: If a site is missing or has another width.
        """
        for site in self.site_names:
            width, expected = _output_channels(leaf(unet, site)), self._layer(site).norm.num_channels
            if width != expected:
                raise ValueError(
                    f"The layer at {site} has {width} output channels, the adapter expects {expected}; "
                    "it was made for another model."
                )
        self._attachment.attach([unet], [WHOLE_MODEL, *self.site_names], self._place_hooks)

    def reattach(self, unet: nn.Module | None = None) -> None:
        """Move the adapter to the layers that stand at its sites now, after LoRA or the like has wrapped them.

        Args:
            unet: Another UNet to move to; None stays with this one.

        Raises:
            RuntimeError: If the adapter is not attached, or carries a condition that another call is using.
            ValueError: If a site is missing now or has another width; the adapter is detached then.
        """
        if not self.is_attached:
            raise RuntimeError("The adapter is not attached to a model; call attach(unet).")
        self._refuse_second_condition()
        (current,) = self._attachment.models
        unet = current if unet is None else unet
        if not self._attachment.stands_on([unet]):
            self.detach()
            self.attach(unet)

    @contextmanager
    def condition(self, flow: Tensor, scale: float | Tensor = 1.0) -> Iterator[FlowCondition]:
        """Modulate every call of the UNet inside the block; removed also on an error.

        In training, where the backward pass may run after the block has ended and gradient checkpointing runs the
        forward pass again, use `set_condition` and `clear_condition` instead.

        Args:
            flow: `(b f 3 h w)`: displacement from frame 0 in pixels of the video, x then y, and the motion mask in
                {0, 1}. The UNet's batch must be a multiple of b: with guidance both halves take the same flow.
            scale: Strength; 0 equals the plain UNet. A tensor `(b)` gives every video its own.

        Yields:
            The condition.
        """
        condition = self.set_condition(flow, scale)
        try:
            yield condition
        finally:
            self.clear_condition()

    def set_condition(self, flow: Tensor, scale: float | Tensor = 1.0) -> FlowCondition:
        """Modulate every following call, until `clear_condition`.

        Args:
            flow: As in `condition`.
            scale: As in `condition`.

        Returns:
            The condition.

        Raises:
            RuntimeError: If the adapter is not attached, was bypassed since, or has a condition already.
            ValueError: If the flow or the scale have a wrong shape or hold NaN or infinity.
        """
        self._attachment.check()
        self._refuse_second_condition()
        self._check_flow(flow)
        if isinstance(scale, Tensor) and scale.shape != flow.shape[:1]:
            raise ValueError(f"A scale per video must be ({len(flow)},), got {tuple(scale.shape)}.")
        if not torch.isfinite(torch.as_tensor(scale)).all():
            raise ValueError(f"The scale of the modulation must be finite, got {scale}.")
        condition = FlowCondition(flow, scale)
        if not torch.is_grad_enabled() and not condition.is_off:
            features = self._encode(condition)
            condition.prepared = {site: self._gamma_beta(site, condition, features) for site in self.site_names}
        self._condition = condition
        return condition

    def _layer(self, site: str) -> LayerModulation:
        return cast(LayerModulation, self.sites[site.replace(".", "/")])

    def _check_flow(self, flow: Tensor) -> None:
        if flow.ndim != 5 or flow.shape[2] != 3 or flow.numel() == 0:
            raise ValueError(
                f"The flow must be (b, f, 3, h, w): displacement in x and y, and motion mask; got {tuple(flow.shape)}."
            )
        height, width = flow.shape[-2:]
        step = self.encoder.size_step
        if height % step or width % step:
            raise ValueError(
                f"Height and width of the flow must be multiples of {step}, got {height}×{width}; "
                "resize the picture first and draw the trajectories on that."
            )
        if not torch.isfinite(flow).all():
            raise ValueError(
                "The flow holds NaN or infinity; look for them in the trajectories that it was drawn from."
            )

    def _encode(self, condition: FlowCondition) -> list[Tensor]:
        return self.encoder(condition.flow.to(next(self.encoder.parameters())))

    def _gamma_beta(self, site: str, condition: FlowCondition, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self._layer(site).gamma_beta(features[self._levels[site]], condition.scale)

    def _place_hooks(self, unet: nn.Module, site: str) -> list[RemovableHandle]:
        if site == WHOLE_MODEL:
            return [uncompiled(unet).register_forward_pre_hook(self._begin_call, with_kwargs=True)]
        return [leaf(unet, site).register_forward_hook(partial(self._modulate, site))]

    def _begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the UNet: does the flow fit its sample `(b f c h w)`? A layer does not see what is a frame."""
        condition = self._condition
        if condition is None or condition.is_off:
            return
        sample: Tensor = args[0] if args else kwargs["sample"]
        videos, frames, _, height, width = condition.flow.shape
        if sample.shape[1] != frames:
            raise ValueError(
                f"The UNet runs on {sample.shape[1]} frames, but the flow has {frames}; draw it for as many."
            )
        if len(sample) % videos:
            raise ValueError(
                f"The UNet runs on a batch of {len(sample)}, but there is flow for {videos} videos; pass one flow per "
                "video, which both halves of guidance share."
            )
        if (height, width) != (STEM_FACTOR * sample.shape[3], STEM_FACTOR * sample.shape[4]):
            raise ValueError(
                f"The flow is {height}×{width}, but the UNet makes {STEM_FACTOR * sample.shape[3]}×"
                f"{STEM_FACTOR * sample.shape[4]} pixels; draw it at the size of the video."
            )
        if torch.is_grad_enabled() or not condition.prepared:
            condition.features = self._encode(condition)

    def _modulate(self, site: str, layer: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
        """Hook of a layer: modulate its output."""
        condition = self._condition
        if condition is None or condition.is_off:
            return None
        if condition.prepared and not torch.is_grad_enabled():
            gamma, beta = condition.prepared[site]
        else:
            gamma, beta = self._gamma_beta(site, condition, self._features_in_call(condition))
        return self._layer(site)(hidden, gamma, beta)

    def _features_in_call(self, condition: FlowCondition) -> list[Tensor]:
        """The features of this very forward pass."""
        features = condition.features
        if features is None:
            return self._encode(condition)
        if not torch.is_grad_enabled() and features[0].requires_grad:
            # Reentrant checkpointing: this pass runs without gradients and again in backward, block by block, each a
            # graph of its own. None of them may reach into another's, so each layer encodes for itself from here on.
            condition.features = None
        return features


@contextmanager
def published_group_norm(unet: nn.Module) -> Iterator[None]:
    """Run a UNet with the GroupNorm epsilon that the published MotionPro network has.

    Its residual blocks and its last norm use 1e-5 where diffusers' SVD uses 1e-6 in some; the attentions agree. The
    outputs are 6e-5 apart as shipped and 5e-6 apart inside this block.

    Args:
        unet: diffusers' `UNetSpatioTemporalConditionModel`; as before afterwards.

    Yields:
        Nothing.
    """
    norms = [
        module
        for path, module in unet.named_modules()
        if isinstance(module, nn.GroupNorm) and ".attentions." not in f".{path}."
    ]
    before = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps = PUBLISHED_EPS
        yield
    finally:
        for norm, eps in zip(norms, before, strict=True):
            norm.eps = eps


def _output_channels(layer: nn.Module) -> int:
    """Output channels of a convolution, also of one that PEFT has wrapped, which calls them features."""
    return cast(int, layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)
