"""The mechanism of every adapter: hooks at named leaves of a frozen model. It does not know what they compute.

A site is the path of a leaf layer. The hooks sit outside the backbone's state dict, so its keys, LoRA files,
quantisation and offloading are untouched, and removing them gives back bit-identical outputs. Being *inside* the
block, they are simply not called when a cache skips it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

WHOLE_MODEL = ""
"""The site of the denoiser itself, whose hooks see a call begin and end."""

C = TypeVar("C")
PlaceHooks = Callable[[nn.Module, str], list[RemovableHandle]]

ORDER = "load → LoRA → attach → offload, cast or cache → compile"


def leaf(model: nn.Module, site: str) -> nn.Module:
    """Look up the layer at a site.

    Args:
        model: The backbone's denoiser.
        site: Path of the layer, such as `transformer_blocks.0.attn1.to_out.0`.

    Returns:
        The layer.

    Raises:
        ValueError: If there is no such layer; the closest names are given.
    """
    try:
        return model.get_submodule(site)
    except AttributeError:
        paths = [path for path, _ in model.named_modules() if path]
        close = ", ".join(get_close_matches(site, paths, n=3)) or "none"
        raise ValueError(f"{type(model).__name__} has no layer at {site!r}; close names: {close}.") from None


class Attachment:
    """The hooks that one adapter has placed on the denoisers of one pipeline.

    Kept in a plain object, so that torch does not take the backbone for a child of the adapter.

    Args:
        on_pass: Called with the name of a pass when a pipeline begins it; an error it raises ends the pipeline's call.
            None for an adapter that need not know.

    Attributes:
        guidance_pass: While a pipeline runs the two passes of guidance as two calls (Wan), "uncond" or "cond".
    """

    def __init__(self, on_pass: Callable[[str], None] | None = None) -> None:
        self.on_pass = on_pass
        self._models: tuple[nn.Module, ...] = ()
        self._leaves: dict[tuple[int, str], nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self.guidance_pass: str | None = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models that carry the hooks; none, one, or two experts of a pipeline."""
        return self._models

    def attach(self, models: Sequence[nn.Module], sites: Iterable[str], place: PlaceHooks) -> None:
        """Place hooks at every site; on an error none stays. Compiled models are compiled anew.

        Args:
            models: The backbone's denoisers.
            sites: Paths of leaf layers; every model has all of them.
            place: Called with model and site; places hooks and returns their handles.

        Raises:
            RuntimeError: If these hooks are on a model already.
            ValueError: If a site does not exist.
        """
        if self._models:
            name = type(self._models[0]).__name__
            raise RuntimeError(f"The adapter is already attached to a {name}; detach it first.")
        sites = list(sites)
        leaves = {(number, site): leaf(model, site) for number, model in enumerate(models) for site in sites}
        self._handles = [handle for model in models for site in sites for handle in place(model, site)]
        self._leaves, self._models = leaves, tuple(models)
        for model in models:
            self._follow_passes(model)
        _compile_anew()

    def detach(self) -> None:
        """Take all hooks away. Does nothing when there are none."""
        for handle in self._handles:
            handle.remove()
        for model in self._models:
            self._follow_passes_no_more(model)
        self._models, self._leaves, self._handles = (), {}, []

    def replaced(self) -> list[str]:
        """Sites whose layer is another one now than that which carries the hooks (LoRA loaded or removed since)."""
        return [site for (number, site), layer in self._leaves.items() if leaf(self._models[number], site) is not layer]

    def stands_on(self, models: Sequence[nn.Module]) -> bool:
        """Whether the hooks are where they would be placed now.

        Args:
            models: The denoisers that shall carry them.

        Returns:
            True if these very models carry them, and no layer was replaced since.
        """
        return [*map(id, models)] == [*map(id, self._models)] and not self.replaced()

    def check(self) -> None:
        """Make sure that every hook still sits in front of the leaf that the model calls.

        Raises:
            RuntimeError: If nothing is attached, or if a leaf was wrapped or replaced since (LoRA loaded later).
        """
        if not self._models:
            raise RuntimeError(
                "The adapter is not attached to a model, so nothing would be injected; call attach(model)."
            )
        replaced = self.replaced()
        if replaced:
            raise RuntimeError(
                f"The layer at {replaced[0]} was replaced after the adapter was attached (LoRA loaded later?). "
                f"Detach, make the change, attach again; the order is {ORDER}."
            )

    def _follow_passes(self, model: nn.Module) -> None:
        """Learn the name of the pass that diffusers announces to its caches, by the model's `cache_context`.

        Set on the instance, beside diffusers' own: a hook would have to be there before the first run. All adapters of
        a model follow by the same one, so that they can come and go in any order.
        """
        model = uncompiled(model)
        if not hasattr(model, "cache_context"):  # a UNet; it runs both passes as one batch
            return
        if "cache_context" not in model.__dict__:
            model.__dict__["cache_context"] = _PassAnnouncer(cast(Any, model).cache_context)
        model.__dict__["cache_context"].followers.append(self)

    def _follow_passes_no_more(self, model: nn.Module) -> None:
        model = uncompiled(model)
        announcer = model.__dict__.get("cache_context")
        if announcer is not None:
            announcer.followers.remove(self)
            if not announcer.followers:
                del model.__dict__["cache_context"]


class Adapter(nn.Module, Generic[C]):
    """What adapters have in common: hooks on the denoisers of one pipeline, and one condition at a time.

    Args:
        on_pass: As of `Attachment`.
    """

    def __init__(self, on_pass: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self._attachment = Attachment(on_pass)
        self._condition: C | None = None

    @property
    def is_attached(self) -> bool:
        """True between `attach` and `detach`."""
        return bool(self._attachment.models)

    def detach(self) -> None:
        """Take the adapter away; the model is as before, bit for bit."""
        self._attachment.detach()
        self._condition = None

    def clear_condition(self) -> None:
        """Take the condition away. Does nothing when none is set."""
        self._condition = None

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Leave the model as it is inside the block; the condition, if there is one, holds again afterwards."""
        condition, self._condition = self._condition, None
        try:
            yield
        finally:
            self._condition = condition

    def _refuse_second_condition(self) -> None:
        if self._condition is not None:
            raise RuntimeError("The adapter already carries a condition: another call is using it. Clear it first.")


class _PassAnnouncer:
    """Stands in front of a model's `cache_context` and tells its name to attachments."""

    def __init__(self, original: Callable[..., AbstractContextManager[None]]) -> None:
        self.original = original
        self.followers: list[Attachment] = []

    @contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        followers = list(self.followers)
        before = [follower.guidance_pass for follower in followers]
        for follower in followers:
            if follower.on_pass is not None:
                follower.on_pass(name)
        for follower in followers:
            follower.guidance_pass = name
        try:
            with self.original(name, *args, **kwargs):
                yield
        finally:
            for follower, previous in zip(followers, before, strict=True):
                follower.guidance_pass = previous


def diffusers_hooks(model: nn.Module) -> set[str]:
    """Names of the hooks that diffusers itself has placed on a model and its parts, for caches, offloading and casting.

    Args:
        model: The backbone's denoiser.

    Returns:
        For example `{"faster_cache_denoiser"}`.
    """
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return {name for registry in registries if registry is not None for name in registry.hooks}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile has wrapped it: hooks of the whole model must be there.

    Args:
        model: Either.

    Returns:
        The model.
    """
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def _compile_anew() -> None:
    """Code that was compiled before does not look for new hooks: it would run on without them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
