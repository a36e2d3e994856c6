"""Motion injection: decoupled cross-attention from a block's attention output to the motion tokens (MotionRAG, 3.4).

At every site, with h the attention's own output (heads merged, before the output projection) and m the motion tokens:

    h ← h + scale · Attention(query = Wq h, key = Wk m, value = Wv m)

The query comes from the attention's output, not from the block's input. See `docs/parity.md` for how this relates to
the published processors. Training computes the term as it stands there. Without gradients the same numbers cost less:

- Keys and values depend on the tokens alone and are computed once per condition, the scale with them.
- The query projection is folded into the keys where that saves work, q·k = h·(Wqᵀ k): in CogVideoX-5B a product with
  1200 columns (48 heads × 25 tokens) in place of 3072.
- A cross-attention that sees a single context token (SVD) gives the same at every position: it runs at one of them.

Shapes: b videos, f frames (SVD folds them into the batch), n positions, l motion tokens, h heads, c channels of a head.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from motionrag.adapters.injection import Adapter, diffusers_hooks, leaf
from motionrag.backbones import backbone_of_denoiser

NUM_MEASURED = 128  # positions, at least, from which the size of the effect is measured


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

    def folds(self, num_tokens: int) -> bool:
        """Tell whether folding the query projection into the keys saves work: a position then costs d·h·l, not d·d."""
        return self.num_heads * num_tokens < self.to_q.in_features

    def folded_keys(self, key: Tensor) -> Tensor:
        """Keys `(b h l c)` with the query projection and 1/√c in them, `(b d h·l)`: q·k = h·(Wqᵀ k).

        What all keys of a head have in common is taken out. Attention does not notice, and the scores, which half
        precision rounds, get smaller.
        """
        key = key.float()
        key = (key - key.mean(dim=2, keepdim=True)) / math.sqrt(key.shape[-1])
        weight = rearrange(self.to_q.weight.float(), "(h c) d -> h c d", h=self.num_heads)
        folded = torch.einsum("h c d, b h l c -> b d h l", weight, key)
        return rearrange(folded, "b d h l -> b d (h l)").to(self.to_q.weight.dtype)

    def attend_folded(self, hidden: Tensor, folded_key: Tensor, value: Tensor) -> Tensor:
        """The same as `forward`, from what `folded_keys` gave."""
        positions = rearrange(hidden, "(b f) n d -> b (f n) d", b=folded_key.shape[0])
        scores = positions.to(folded_key.dtype) @ folded_key
        # The softmax in float32 is more exact, and on CPUs faster than in half precision.
        weights = rearrange(scores, "b n (h l) -> b n h l", h=self.num_heads).softmax(dim=-1, dtype=torch.float32)
        motion = rearrange(weights.to(scores), "b n h l -> b h n l") @ value.to(scores)
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

    @classmethod
    def mean_of(cls, effects: Sequence["InjectedEffect"]) -> "InjectedEffect":
        """The mean over calls; one in which nothing was injected counts as 0.

        Args:
            effects: At least one.

        Returns:
            Mean for each site and over all.
        """
        sites = {site: None for effect in effects for site in effect.per_site}
        per_site = {site: sum(effect.per_site.get(site, 0.0) for effect in effects) / len(effects) for site in sites}
        return cls(mean=sum(effect.mean for effect in effects) / len(effects), per_site=per_site)


@dataclass(frozen=True)
class _Prepared:
    """What a site computes once for a condition.

    Attributes:
        key: `(b h l c)`, or folded `(b d h·l)`.
        value: `(b h l c)`, times the scale.
        is_folded: Which of both the key is.
    """

    key: Tensor
    value: Tensor
    is_folded: bool

    def rows(self, chosen: slice) -> "_Prepared":
        return _Prepared(self.key[chosen], self.value[chosen], self.is_folded)


@dataclass
class Condition:
    """What the hooks read during a call: motion tokens, scale, and what follows from them alone.

    Attributes:
        tokens: `(b l d)`.
        scale: One number, or one per row of `tokens` as a tensor `(b)`.
        reaches_every_row: False if a row has scale 0, which stays bit-identical to the plain model.
        prepared: Per site, what is computed once; empty while gradients are recorded.
        norms: Per site, squared norms of the injected term and of the attention output, summed over calls; of some
            positions where there are many.
        num_positions: Positions of the cross-attention that runs at one of them now; 1 outside of it.
        is_guided: True if the first half of the rows is known to be the unconditional one.
        is_one_generation: True if the backbone's context stays the same while the condition holds.
        constants: Per site, what then enters the output projection at every step.
    """

    tokens: Tensor
    scale: float | Tensor
    reaches_every_row: bool = True
    prepared: dict[str, _Prepared] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    num_positions: int = 1
    is_guided: bool = False
    is_one_generation: bool = False
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_off(self) -> bool:
        """True if nothing is to be injected at all."""
        return not isinstance(self.scale, Tensor) and self.scale == 0

    def scaled(self, value: Tensor) -> Tensor:
        """Values `(b h l c)` times the scale of their row."""
        scale = self.scale
        return value * (rearrange(scale.to(value), "b -> b 1 1 1") if isinstance(scale, Tensor) else scale)

    def rows_of(self, batch: int, guidance_pass: str | None) -> slice | None:
        """Rows of the tokens that belong to a call of the model.

        Args:
            batch: Of the hidden states, frames included.
            guidance_pass: "uncond" and "cond" where guidance is two calls: the first and the second half of the rows.

        Returns:
            All, or one half; None if they do not fit.
        """
        rows = len(self.tokens)
        if guidance_pass in ("uncond", "cond") and (self.is_guided or rows == 2 * batch):
            half = rows // 2
            chosen = {"uncond": slice(0, half), "cond": slice(half, rows)}[guidance_pass]
            return None if batch % half else chosen
        return None if batch % rows else slice(None)

    def effect(self) -> InjectedEffect:
        """Report how much was injected since the condition was set (measured without gradients only)."""
        per_site = {}
        for site, (motion, attention) in self.norms.items():
            per_site[site] = float((motion / attention.clamp_min(1e-30)).sqrt())
        return InjectedEffect(mean=sum(per_site.values()) / max(1, len(per_site)), per_site=per_site)


class AttentionInjection(Adapter[Condition]):
    """Attention adapters for the sites of one backbone. Constructing it touches nothing.

    Args:
        sites: Site → (hidden_dim, num_heads). Use `for_model` to read them off a model.
        token_dim: Channels of the motion tokens.

    Attributes:
        takes_shortcuts: False computes the term as it is written, also without gradients.
    """

    def __init__(self, sites: dict[str, tuple[int, int]], *, token_dim: int) -> None:
        super().__init__(self._check_pass)
        self.token_dim = token_dim
        # A module name may not hold dots; nor may a path hold slashes.
        self.sites = nn.ModuleDict(
            {
                site.replace(".", "/"): MotionAttention(hidden_dim=hidden, token_dim=token_dim, num_heads=heads)
                for site, (hidden, heads) in sites.items()
            }
        )
        self.takes_shortcuts = True

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
            attention = _attention_of(model, path)
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

    def paths(self, num_tokens: int) -> dict[str, int]:
        """How the term is computed without gradients.

        Args:
            num_tokens: Motion tokens of a video.

        Returns:
            "one position" (a cross-attention of the attached model that may run at one position, if it sees a single
            context token), "folded" or "plain" → number of sites.
        """
        counts: Counter[str] = Counter()
        for site in self.site_names:
            if self.takes_shortcuts and any(
                _is_pointwise_cross_attention(_attention_of(model, site)) for model in self._attachment.models
            ):
                counts["one position"] += 1
            else:
                counts["folded" if self.takes_shortcuts and self._adapter(site).folds(num_tokens) else "plain"] += 1
        return dict(counts)

    def attach(self, *models: nn.Module) -> None:
        """Put the adapter at its sites. Until a condition is set, the model's outputs stay bit-identical.

        Args:
            *models: The denoiser that the adapter was built for; two where a pipeline has two experts (Wan 2.2).

        Raises:
            RuntimeError: If the adapter is attached already.
            ValueError: If a site is missing or has another width.
        """
        for model in models:
            for site in self.site_names:
                width = getattr(leaf(model, site), "in_features", None)
                expected = self._adapter(site).to_q.in_features
                if width != expected:
                    raise ValueError(
                        f"The layer at {site} has {width} input channels, the adapter expects {expected}; "
                        "it was made for another model."
                    )
        self._attachment.attach(models, self.site_names, self._place_hooks)

    def reattach(self, *models: nn.Module) -> None:
        """Move the adapter to the layers that stand at its sites now, after LoRA or the like has wrapped them.

        Args:
            *models: Other models to move to; none stays with these.

        Raises:
            RuntimeError: If the adapter is not attached, or carries a condition that another call is using.
            ValueError: If a site is missing now or has another width; the adapter is detached then.
        """
        current = self._attachment.models
        if not current:
            raise RuntimeError("The adapter is not attached to a model; call attach(model).")
        self._refuse_second_condition()
        models = models or current
        if not self._attachment.stands_on(models):
            self.detach()
            self.attach(*models)

    @contextmanager
    def condition(
        self,
        tokens: Tensor,
        scale: float | Tensor = 1.0,
        *,
        is_guided: bool = False,
        is_one_generation: bool = False,
    ) -> Iterator[Condition]:
        """Inject motion tokens into every call of the model inside the block; removed also on an error.

        In training with Lightning, where the backward pass runs after `training_step` has returned and gradient
        checkpointing runs the forward pass again, use `set_condition` and `clear_condition` instead.

        Args:
            tokens: Motion tokens `(b l d)`. When guidance batches two passes, the unconditional rows come first.
                The model's batch must be a multiple of b: consecutive rows (frames) share a row of tokens.
            scale: Strength; 0 equals the plain model. A tensor `(b)` gives every row its own.
            is_guided: Says that the first half of the rows is the unconditional one. Needed only where guidance is two
                calls (Wan) with several videos for a row of tokens; otherwise the number of rows tells.
            is_one_generation: Says that the backbone's image embedding stays the same while the condition holds, as in
                a call of a diffusers pipeline: what SVD's cross-attentions give is then computed once.

        Yields:
            The condition; its `effect()` tells how much was injected.
        """
        condition = self.set_condition(tokens, scale, is_guided=is_guided, is_one_generation=is_one_generation)
        try:
            yield condition
        finally:
            self.clear_condition()

    def set_condition(
        self,
        tokens: Tensor,
        scale: float | Tensor = 1.0,
        *,
        is_guided: bool = False,
        is_one_generation: bool = False,
    ) -> Condition:
        """Inject motion tokens into every following call, until `clear_condition`.

        Args:
            tokens: As in `condition`.
            scale: As in `condition`.
            is_guided: As in `condition`.
            is_one_generation: As in `condition`.

        Returns:
            The condition; its `effect()` tells how much was injected.

        Raises:
            RuntimeError: If the adapter is not attached, was bypassed since, or has a condition already.
            ValueError: If the tokens or the scale have a wrong shape or hold NaN or infinity.
        """
        self._attachment.check()
        self._refuse_second_condition()
        if is_guided and len(tokens) % 2:
            raise ValueError(f"With guidance, half of the rows are unconditional tokens; got {len(tokens)} rows.")
        if tokens.ndim != 3 or tokens.shape[-1] != self.token_dim or tokens.numel() == 0:
            raise ValueError(f"Motion tokens must be (b, l, {self.token_dim}), got {tuple(tokens.shape)}.")
        if not torch.isfinite(tokens).all():
            raise ValueError("The motion tokens hold NaN or infinity; reindex the database that they come from.")
        if isinstance(scale, Tensor) and scale.shape != tokens.shape[:1]:
            raise ValueError(f"A scale per row must be ({tokens.shape[0]},), got {tuple(scale.shape)}.")
        if not torch.isfinite(torch.as_tensor(scale)).all():
            raise ValueError(f"The scale of the injection must be finite, got {scale}.")
        reaches_every_row = bool((torch.as_tensor(scale) != 0).all())
        condition = Condition(
            tokens,
            scale,
            reaches_every_row=reaches_every_row,
            is_guided=is_guided,
            is_one_generation=is_one_generation,
        )
        if not torch.is_grad_enabled() and not condition.is_off:
            condition.prepared = {site: self._prepare(site, condition) for site in self.site_names}
        self._condition = condition
        return condition

    def _adapter(self, site: str) -> MotionAttention:
        return self.sites[site.replace(".", "/")]  # type: ignore[return-value]

    def _check_pass(self, name: str) -> None:
        """Refuse a cache of diffusers that would hand what one pass of guidance computed to the other."""
        if name != "uncond" or self._condition is None:
            return
        if any("pyramid_attention_broadcast" in diffusers_hooks(model) for model in self._attachment.models):
            raise ValueError(
                "PyramidAttentionBroadcast keeps one cache for both passes of guidance, but this pipeline runs them as "
                "two calls; turn the cache off with disable_cache(), or guidance with guidance_scale=1."
            )

    def _prepare(self, site: str, condition: Condition) -> _Prepared:
        adapter = self._adapter(site)
        key, value = adapter.keys_values(condition.tokens)
        is_folded = self.takes_shortcuts and adapter.folds(condition.tokens.shape[1])
        return _Prepared(adapter.folded_keys(key) if is_folded else key, condition.scaled(value), is_folded)

    def _place_hooks(self, model: nn.Module, site: str) -> list[RemovableHandle]:
        handles = [leaf(model, site).register_forward_pre_hook(partial(self._inject, site))]
        attention = _attention_of(model, site)
        if _is_pointwise_cross_attention(attention):
            handles.append(attention.register_forward_pre_hook(self._narrow, with_kwargs=True))
            handles.append(attention.register_forward_hook(self._widen))
        return handles

    def _narrow(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of a cross-attention: with one context token, one position stands for all."""
        condition = self._condition
        if condition is None:
            return None
        condition.num_positions = 1
        hidden, context = args[0], kwargs.get("encoder_hidden_states")
        is_prepared = bool(condition.prepared) and not torch.is_grad_enabled()
        is_constant = hidden.ndim == 3 and context is not None and context.shape[1] == 1
        is_masked = kwargs.get("attention_mask") is not None
        if not (self.takes_shortcuts and is_prepared and is_constant and condition.reaches_every_row) or is_masked:
            return None
        condition.num_positions = hidden.shape[1]
        return (hidden[:, :1], *args[1:]), kwargs

    def _widen(self, attention: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Hook of a cross-attention that `_narrow` has let run at one position."""
        condition = self._condition
        if condition is None or condition.num_positions == 1:
            return None
        num_positions, condition.num_positions = condition.num_positions, 1
        return output.expand(-1, num_positions, -1)

    def _inject(self, site: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the output projection: add the motion term to its input."""
        condition = self._condition
        if condition is None or condition.is_off:
            return None
        hidden: Tensor = args[0]
        rows = condition.rows_of(hidden.shape[0], self._attachment.guidance_pass)
        if rows is None:
            raise ValueError(
                f"The model runs on a batch of {hidden.shape[0]} at {site}, but there are motion tokens for "
                f"{condition.tokens.shape[0]} rows; with guidance, pass unconditional tokens first, then the others."
            )
        # Compiled code may own the memory of what it computed, and use it again.
        keeps = condition.is_one_generation and condition.num_positions > 1 and not torch.compiler.is_compiling()
        if keeps and site in condition.constants:
            return (condition.constants[site], *args[1:])
        adapter = self._adapter(site)
        # While gradients are recorded, keys and values belong to the graph of this very forward pass.
        prepared = None if torch.is_grad_enabled() else condition.prepared.get(site)
        if prepared is None:
            key, value = adapter.keys_values(condition.tokens)
            prepared = _Prepared(key, condition.scaled(value), is_folded=False)
        prepared = prepared.rows(rows)
        attend = adapter.attend_folded if prepared.is_folded else adapter
        motion = attend(hidden, prepared.key, prepared.value)
        if not torch.is_grad_enabled():
            norms = torch.stack([_squared_norm(motion), _squared_norm(hidden)])
            condition.norms[site] = condition.norms[site] + norms if site in condition.norms else norms
        injected = hidden + motion
        if keeps:
            condition.constants[site] = injected
        return (injected, *args[1:])


def _squared_norm(hidden: Tensor) -> Tensor:
    """Of `(b n d)`, from every k-th position where there are many: exact would cost a fifth of the injection."""
    return hidden[:, :: max(1, hidden.shape[1] // NUM_MEASURED)].float().square().sum()


def _attention_of(model: nn.Module, site: str) -> nn.Module:
    """The attention whose output projection stands at a site."""
    return leaf(model, site.removesuffix("to_out.0").removesuffix("."))


def _is_pointwise_cross_attention(attention: nn.Module) -> bool:
    """True for diffusers' plain cross-attention, whose positions do not mix."""
    return (
        type(attention).__name__ == "Attention"
        and bool(getattr(attention, "is_cross_attention", False))
        and all(getattr(attention, name, None) is None for name in ("group_norm", "spatial_norm", "add_k_proj"))
        and not getattr(attention, "residual_connection", False)
    )
