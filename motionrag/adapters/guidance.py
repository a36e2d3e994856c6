"""Guidance of adapters: the denoiser runs again without one, and goes on in the direction in which the two differ.

With E the denoiser's output, E₋ₐ that without adapter a, and w its guidance scale:

    E ← E + Σₐ (wₐ - 1) · (E - E₋ₐ)

This is classifier-free guidance with an adapter in the place of the prompt. What else steers the call (prompt, other
adapters) is in all runs, so nothing else is strengthened. It may go together with classifier-free guidance, whose two
halves are then both guided. Neither published system has it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from motionrag.adapters.injection import WHOLE_MODEL, Adapter, Attachment, uncompiled


class AdapterGuidance:
    """A hook of whole denoisers, placed by the first call that is guided.

    It stays there and does nothing in other calls, since placing a hook compiles a compiled model anew.
    """

    def __init__(self) -> None:
        self._attachment = Attachment()
        self._scales: Mapping[Adapter[Any], float] = {}

    @contextmanager
    def guide(self, models: Sequence[nn.Module], scales: Mapping[Adapter[Any], float]) -> Iterator[None]:
        """Guide every call of the denoisers inside the block; each then runs them once more for every adapter.

        Args:
            models: The denoisers that carry the adapters.
            scales: Adapter → guidance scale: 1 changes nothing, 0 is the model without it, above 1 strengthens it.

        Yields:
            Nothing.

        Raises:
            ValueError: If a scale is not finite.
        """
        for adapter, scale in scales.items():
            if not math.isfinite(scale):
                raise ValueError(f"The guidance scale of {type(adapter).__name__} must be finite, got {scale}.")
        if not self._attachment.stands_on(models):
            self._attachment.detach()
            self._attachment.attach(models, [WHOLE_MODEL], self._place_hook)
        self._scales = {adapter: scale for adapter, scale in scales.items() if scale != 1}
        try:
            yield
        finally:
            self._scales = {}

    def detach(self) -> None:
        """Take the hook away."""
        self._attachment.detach()

    def _place_hook(self, model: nn.Module, site: str) -> list[RemovableHandle]:
        return [uncompiled(model).register_forward_hook(self._guide, with_kwargs=True)]

    def _guide(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the denoiser, whose output is a tuple or diffusers' own class, with `sample` alone."""
        if not self._scales:
            return None
        guided = output[0]
        for adapter, scale in self._scales.items():
            with adapter.silenced():
                # Not through the hooks of the whole model: this is one.
                without = cast(Any, model).forward(*args, **kwargs)[0]
            guided = guided + (scale - 1) * (output[0] - without)
        return (guided,) if isinstance(output, tuple) else type(output)(sample=guided)
