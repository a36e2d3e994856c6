"""Motion injection: decoupled cross-attention from a block's attention output to the motion tokens (MotionRAG, 3.4).

At every site, with h the attention's own output (heads merged, before the output projection) and m the motion tokens:

    h ← h + scale · Attention(query = Wq h, key = Wk m, value = Wv m)

The query comes from the attention's output, not from the block's input. Keys and values depend on the tokens alone
and are computed once per condition. See `docs/parity.md` for how this relates to the published processors.

Shapes: b videos, f frames (SVD folds them into the batch), n positions, l motion tokens, h heads, c channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.adapters.injection import Attachment, leaf
from motionrag.backbones import backbone_of_denoiser


class MotionAttention(nn.Module):
    """The three projections of one site; no biases, no norms, no rotary embedding.

    `to_v` starts at zero, so a fresh adapter changes nothing.
    """

    def __init__(self, *, hidden_dim: int, token_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.to_k = nn.Linear(token_dim, hidden_dim, bias=False)
        self.to_v = nn.Linear(token_dim, hidden_dim, bias=False)
        nn.init.zeros_(self.to_v.weight)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project motion tokens `(b l token_dim)` to keys and values `(b h l c)`."""
        tokens = tokens.to(self.to_k.weight.dtype)
        key, value = (
            rearrange(projection(tokens), "b l (h c) -> b h l c", h=self.num_heads)
            for projection in (self.to_k, self.to_v)
        )
        return key, value

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from `hidden` `(b·f n h·c)` to the motion of its video; frames of a video share their tokens."""
        videos = key.shape[0]
        query = self.to_q(hidden.to(self.to_q.weight.dtype))
        query = rearrange(query, "(b f) n (h c) -> b h (f n) c", b=videos, h=self.num_heads)
        motion = F.scaled_dot_product_attention(query, key.to(query), value.to(query))
        return rearrange(motion, "b h (f n) c -> (b f) n (h c)", n=hidden.shape[1]).to(hidden.dtype)


@dataclass(frozen=True)
class InjectedEffect:
    """How strongly the injection changed the backbone's activations.

    Attributes:
        mean: Mean over sites of ‖scale · motion‖ / ‖attention output‖; 0 means that nothing was injected.
        per_site: The same for every site.
    """

    mean: float
    per_site: dict[str, float]


@dataclass
class Condition:
    """What the hooks read during a call: motion tokens, scale, and what follows from them alone.

    Attributes:
        tokens: `(b l d)`.
        scale: One number, or one per row of `tokens` as a tensor `(b)`.
        keys_values: Per site, keys and values `(b h l c)`; empty while gradients are recorded.
        norms: Per site, squared norms of the injected term and of the attention output, summed over calls.
    """

    tokens: Tensor
    scale: float | Tensor
    keys_values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_off(self) -> bool:
        """True if nothing is to be injected at all."""
        return not isinstance(self.scale, Tensor) and self.scale == 0

    def scale_for(self, hidden: Tensor) -> float | Tensor:
        """The scale as something that multiplies hidden states `(b·f n d)`."""
        if not isinstance(self.scale, Tensor):
            return self.scale
        frames = hidden.shape[0] // self.tokens.shape[0]
        return rearrange(self.scale.to(hidden).repeat_interleave(frames), "b -> b 1 1")

    def effect(self) -> InjectedEffect:
        """Report how much was injected since the condition was set (measured without gradients only)."""
        per_site = {}
        for site, (motion, attention) in self.norms.items():
            per_site[site] = float((motion / attention.clamp_min(1e-30)).sqrt())
        return InjectedEffect(mean=sum(per_site.values()) / max(1, len(per_site)), per_site=per_site)


class AttentionInjection(nn.Module):
    """Attention adapters for the sites of one backbone. Constructing it touches nothing.

    Args:
        sites: Site → (hidden_dim, num_heads). Use `for_model` to read them off a model.
        token_dim: Channels of the motion tokens.
    """

    def __init__(self, sites: dict[str, tuple[int, int]], *, token_dim: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        # A module name may not hold dots; nor may a path hold slashes.
        self.sites = nn.ModuleDict(
            {
                site.replace(".", "/"): MotionAttention(hidden_dim=hidden, token_dim=token_dim, num_heads=heads)
                for site, (hidden, heads) in sites.items()
            }
        )
        self._attachment = Attachment()
        self._condition: Condition | None = None

    @classmethod
    def for_model(
        cls, model: nn.Module, token_dim: int = 1024, sites: Sequence[str] | None = None
    ) -> "AttentionInjection":
        """Build an adapter that fits a model, without touching the model.

        Args:
            model: The backbone's denoiser (transformer or UNet).
            token_dim: Channels of the motion tokens.
            sites: Attention output projections (`transformer_blocks.0.attn1.to_out.0`) or their attentions
                (`transformer_blocks.0.attn1`); None takes all sites of the backbone's family.

        Returns:
            The adapter, not attached, on the CPU in float32; it changes nothing until it is trained or loaded.

        Raises:
            ValueError: If a site is not an attention of this model, or the family is unknown and `sites` is None.
        """
        if sites is None:
            sites = backbone_of_denoiser(model).sites(model)
        if not sites:
            raise ValueError(f"{type(model).__name__} offers no site for motion injection; name some in `sites`.")
        sizes = {}
        for site in sites:
            path = site if site.endswith("to_out.0") else f"{site}.to_out.0".lstrip(".")
            projection = leaf(model, path)
            attention = leaf(model, path.removesuffix("to_out.0").removesuffix("."))
            if not hasattr(attention, "heads") or not hasattr(projection, "in_features"):
                raise ValueError(f"{site!r} is not an attention of diffusers with `heads` and `to_out[0]`.")
            sizes[path] = (cast(int, projection.in_features), cast(int, attention.heads))
        return cls(sizes, token_dim=token_dim)

    @property
    def site_names(self) -> list[str]:
        """Paths of the sites, in the order of the backbone's modules."""
        return [name.replace("/", ".") for name in self.sites]

    def config(self) -> dict[str, Any]:
        """Arguments that build this adapter again, as JSON values.

        Returns:
            Keyword arguments of the class.
        """
        sites = {
            site: [self._adapter(site).to_q.in_features, self._adapter(site).num_heads] for site in self.site_names
        }
        return {"sites": sites, "token_dim": self.token_dim}

    @property
    def is_attached(self) -> bool:
        """True between `attach` and `detach`."""
        return self._attachment.model is not None

    def attach(self, model: nn.Module) -> None:
        """Put the adapter at its sites. Until a condition is set, the model's outputs stay bit-identical.

        Args:
            model: The denoiser that the adapter was built for.

        Raises:
            RuntimeError: If the adapter is attached already.
            ValueError: If a site is missing or has another width.
        """
        for site in self.site_names:
            width = getattr(leaf(model, site), "in_features", None)
            expected = self._adapter(site).to_q.in_features
            if width != expected:
                raise ValueError(
                    f"The layer at {site} has {width} input channels, the adapter expects {expected}; "
                    "it was made for another model."
                )
        self._attachment.attach(model, {site: partial(self._inject, site) for site in self.site_names})

    def reattach(self, model: nn.Module | None = None) -> None:
        """Move the adapter to the layers that stand at its sites now, after LoRA or the like has wrapped them.

        Args:
            model: Another model to move to; None stays with this one.

        Raises:
            RuntimeError: If the adapter is not attached, or carries a condition that another call is using.
            ValueError: If a site is missing now or has another width; the adapter is detached then.
        """
        current = self._attachment.model
        if current is None:
            raise RuntimeError("The adapter is not attached to a model; call attach(model).")
        self._refuse_second_condition()
        model = current if model is None else model
        if model is not current or self._attachment.is_bypassed():
            self.detach()
            self.attach(model)

    def detach(self) -> None:
        """Take the adapter away; the model is as before, bit for bit."""
        self._attachment.detach()
        self._condition = None

    @contextmanager
    def condition(self, tokens: Tensor, scale: float | Tensor = 1.0) -> Iterator[Condition]:
        """Inject motion tokens into every call of the model inside the block; removed also on an error.

        In training with Lightning, where the backward pass runs after `training_step` has returned and gradient
        checkpointing runs the forward pass again, use `set_condition` and `clear_condition` instead.

        Args:
            tokens: Motion tokens `(b l d)`. When guidance batches two passes, the unconditional rows come first.
                The model's batch must be a multiple of b: consecutive rows (frames) share a row of tokens.
            scale: Strength; 0 equals the plain model. A tensor `(b)` gives every row its own.

        Yields:
            The condition; its `effect()` tells how much was injected.
        """
        condition = self.set_condition(tokens, scale)
        try:
            yield condition
        finally:
            self.clear_condition()

    def set_condition(self, tokens: Tensor, scale: float | Tensor = 1.0) -> Condition:
        """Inject motion tokens into every following call, until `clear_condition`.

        Args:
            tokens: As in `condition`.
            scale: As in `condition`.

        Returns:
            The condition; its `effect()` tells how much was injected.

        Raises:
            RuntimeError: If the adapter is not attached, was bypassed since, or has a condition already.
            ValueError: If the tokens or the scale have a wrong shape or hold NaN or infinity.
        """
        self._attachment.check()
        self._refuse_second_condition()
        if tokens.ndim != 3 or tokens.shape[-1] != self.token_dim or tokens.numel() == 0:
            raise ValueError(f"Motion tokens must be (b, l, {self.token_dim}), got {tuple(tokens.shape)}.")
        if not torch.isfinite(tokens).all():
            raise ValueError("The motion tokens hold NaN or infinity; reindex the database that they come from.")
        if isinstance(scale, Tensor) and scale.shape != tokens.shape[:1]:
            raise ValueError(f"A scale per row must be ({tokens.shape[0]},), got {tuple(scale.shape)}.")
        if not torch.isfinite(torch.as_tensor(scale)).all():
            raise ValueError(f"The scale of the injection must be finite, got {scale}.")
        condition = Condition(tokens=tokens, scale=scale)
        if not torch.is_grad_enabled() and not condition.is_off:
            condition.keys_values = {site: self._adapter(site).keys_values(tokens) for site in self.site_names}
        self._condition = condition
        return condition

    def clear_condition(self) -> None:
        """Stop injecting. Does nothing when no condition is set."""
        self._condition = None

    def _adapter(self, site: str) -> MotionAttention:
        return self.sites[site.replace(".", "/")]  # type: ignore[return-value]

    def _refuse_second_condition(self) -> None:
        if self._condition is not None:
            raise RuntimeError("The adapter already carries a condition: another call is using it. Clear it first.")

    def _inject(self, site: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the output projection: add the motion term to its input."""
        condition = self._condition
        if condition is None or condition.is_off:
            return None
        hidden: Tensor = args[0]
        if hidden.shape[0] % condition.tokens.shape[0]:
            raise ValueError(
                f"The model runs on a batch of {hidden.shape[0]} at {site}, but there are motion tokens for "
                f"{condition.tokens.shape[0]} rows; with guidance, pass unconditional tokens first, then the others."
            )
        adapter = self._adapter(site)
        # While gradients are recorded, keys and values belong to the graph of this very forward pass.
        cached = None if torch.is_grad_enabled() else condition.keys_values.get(site)
        key, value = cached or adapter.keys_values(condition.tokens)
        motion = condition.scale_for(hidden) * adapter(hidden, key, value)
        if not torch.is_grad_enabled():
            norms = torch.stack([motion.float().square().sum(), hidden.float().square().sum()])
            condition.norms[site] = condition.norms[site] + norms if site in condition.norms else norms
        return (hidden + motion, *args[1:])
