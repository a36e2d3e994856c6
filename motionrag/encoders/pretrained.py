"""Loading and freezing pretrained networks: strictly, from safetensors only, with every value finite.

Shared by the encoders that hold a transformers model. It runs nothing and preprocesses nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_strictly(
    model_class: type[PreTrainedModel],
    source: str | Path,
    *,
    unused: Sequence[str],
    **hub_kwargs: Any,
) -> Any:
    """Load a transformers model in float32 and insist that the file holds exactly this model.

    Args:
        model_class: The class to load.
        source: Hub id or local folder.
        unused: Prefixes of weights that such files hold for other uses (a classifier, a decoder); they are skipped
            and reported through `logging`.
        **hub_kwargs: Passed to the hub: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: If a weight is missing, has another shape, or is neither the model's nor in `unused`.
    """
    loaded: Any = model_class.from_pretrained(
        source,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below, with their names
        output_loading_info=True,
        **hub_kwargs,
    )
    model, report = loaded
    unexpected = {key for key in report["unexpected_keys"] if not key.startswith(tuple(unused))}
    misshapen = {key for key, *_ in report["mismatched_keys"]}
    faults = {"missing": report["missing_keys"], "of another shape": misshapen, "unexpected": unexpected}
    raise_for_keys(source, model_class.__name__, faults)
    skipped = sorted(report["unexpected_keys"])
    if skipped:
        logger.info("%s: not used by %s: %s", source, model_class.__name__, ", ".join(skipped))
    return model


def raise_for_keys(source: str | Path, name: str, faults: dict[str, set[str]]) -> None:
    """Turn keys that should not be at fault into an error.

    Args:
        source: Where the weights came from.
        name: The model class they were meant for.
        faults: Kind of fault to keys.

    Raises:
        ValueError: If there is any key; it names them all.
    """
    found = "; ".join(f"{fault}: {', '.join(sorted(keys))}" for fault, keys in faults.items() if keys)
    if found:
        raise ValueError(f"{source}: the weights are not those of a {name} ({found}); fetch or save the model again")


def read_image_processor(source: str | Path, **hub_kwargs: Any) -> dict[str, Any]:
    """Read `preprocessor_config.json` of a model.

    Args:
        source: Hub id or local folder.
        **hub_kwargs: As for `load_strictly`.

    Returns:
        The settings; empty if the model has no such file.
    """
    from transformers.utils.hub import cached_file

    path = cached_file(
        source,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def check_image_processor(config: dict[str, Any], *, resample: int, source: str | Path) -> None:
    """Refuse image-processor settings that the encoder would not follow.

    Args:
        config: What `read_image_processor` returned.
        resample: The Pillow resampling filter that the encoder implements.
        source: Named in the error.

    Raises:
        ValueError: If a step is switched off, or the filter or the rescaling is another one.
    """
    expected: dict[str, Any] = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    expected["resample"] = resample
    for field, value in expected.items():
        if config.get(field, value) != value:
            raise ValueError(f"{source}: preprocessor_config.json has {field}={config[field]}, only {value} works here")
    if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"{source}: preprocessor_config.json must rescale by 1/255, not {config['rescale_factor']}")


def freeze(model: nn.Module, *, source: object) -> None:
    """Put a network into evaluation mode, without gradients, once its values have been checked.

    Args:
        model: Changed in place.
        source: Named in the error.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: weight {name} holds NaN or infinite values; fetch the model again")
    model.eval().requires_grad_(False)
