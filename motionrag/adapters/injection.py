"""The mechanism of every adapter: hooks at named leaves of a frozen model. It does not know what they compute.

A site is the path of a leaf layer. The hooks sit outside the backbone's state dict, so its keys, LoRA files,
quantisation and offloading are untouched, and removing them gives back bit-identical outputs. Being *inside* the
block, they are simply not called when a cache skips it.
"""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

InputHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]

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
    """The hooks that one adapter has placed on one model.

    Kept in a plain object, so that torch does not take the backbone for a child of the adapter.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._leaves: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def model(self) -> nn.Module | None:
        """The model that carries the hooks, or None."""
        return self._model

    def attach(self, model: nn.Module, hooks: Mapping[str, InputHook]) -> None:
        """Place a hook in front of every named leaf; on an error none stays. Compiled models are compiled anew.

        Args:
            model: The backbone's denoiser.
            hooks: Site → function `(layer, arguments) -> arguments`, called before the layer.

        Raises:
            RuntimeError: If these hooks are on a model already.
            ValueError: If a site does not exist.
        """
        if self._model is not None:
            raise RuntimeError(f"The adapter is already attached to a {type(self._model).__name__}; detach it first.")
        leaves = {site: leaf(model, site) for site in hooks}
        self._handles = [leaves[site].register_forward_pre_hook(hook) for site, hook in hooks.items()]
        self._leaves, self._model = leaves, model
        if "torch._dynamo" in sys.modules:
            # Code that was compiled before does not look for new hooks: it would run on without them.
            torch.compiler.reset()

    def detach(self) -> None:
        """Take all hooks away. Does nothing when there are none."""
        for handle in self._handles:
            handle.remove()
        self._model, self._leaves, self._handles = None, {}, []

    def is_bypassed(self) -> bool:
        """Tell whether the model calls other layers now than those that carry the hooks."""
        return self._model is not None and any(
            leaf(self._model, site) is not layer for site, layer in self._leaves.items()
        )

    def check(self) -> None:
        """Make sure that every hook still sits in front of the leaf that the model calls.

        Raises:
            RuntimeError: If nothing is attached, or if a leaf was wrapped or replaced since (LoRA loaded later).
        """
        if self._model is None:
            raise RuntimeError(
                "The adapter is not attached to a model, so nothing would be injected; call attach(model)."
            )
        for site, layer in self._leaves.items():
            if leaf(self._model, site) is not layer:
                raise RuntimeError(
                    f"The layer at {site} was replaced after the adapter was attached (LoRA loaded later?). "
                    f"Detach, make the change, attach again; the order is {ORDER}."
                )
