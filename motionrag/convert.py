"""Key maps from the published MotionRAG and MotionPro checkpoints to this package's modules.

Published state dicts go in, ours come out, to be loaded strictly. Every function takes keys with or without the
prefixes of the published files, names what it does not know, and never guesses a missing tensor. How the published
code and this one differ is listed in `docs/parity.md`; `conversion.py` makes a whole bundle of published files.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrag.backbones import BACKBONES
from motionrag.convert_motionpro import modulation, svd_unet
from motionrag.key_maps import StateDict, refuse, report_left_out

__all__ = [
    "ADAPTER_KEY",
    "StateDict",
    "cama",
    "injection",
    "load_published",
    "modulation",
    "published_prefix",
    "resampler",
    "svd_unet",
]

_RESAMPLER_KEYS = (
    (r"proj_in\.(weight|bias)", r"proj_in.\1"),
    (r"proj_out\.(weight|bias)", r"proj_out.\1"),
    (r"norm_out\.(weight|bias)", r"norm_out.\1"),
    (r"layers\.(\d+)\.0\.norm1\.(weight|bias)", r"layers.\1.attention.norm_features.\2"),
    (r"layers\.(\d+)\.0\.norm2\.(weight|bias)", r"layers.\1.attention.norm_queries.\2"),
    (r"layers\.(\d+)\.0\.(to_q|to_kv|to_out)\.weight", r"layers.\1.attention.\2.weight"),
    (r"layers\.(\d+)\.1\.0\.(weight|bias)", r"layers.\1.feed_forward.norm.\2"),
    (r"layers\.(\d+)\.1\.1\.weight", r"layers.\1.feed_forward.up.weight"),
    (r"layers\.(\d+)\.1\.3\.weight", r"layers.\1.feed_forward.down.weight"),
)
# A resampler inside a larger published file stands under one of these.
_RESAMPLER_PREFIXES = (
    "condition_transformer.vision_proj.",
    "condition_transformer.condition_proj.",
    "action_proj_model.",
    "vision_proj.",
    "condition_proj.",
)
ADAPTER_KEY = re.compile(r"(?P<attention>(?:.+\.)?)processor\.(?P<projection>to_[qkv])_ip\.0\.weight")


def load_published(path: str | Path) -> StateDict:
    """Read a published checkpoint without running any code from it.

    Tensors are mapped, not read: they take memory when they are used, and the file must not change meanwhile.

    Args:
        path: A `.ckpt`, `.pt`, `.pth` or `.bin` file (read with `weights_only=True`) or a `.safetensors` file.

    Returns:
        A flat state dict with the published names; wrappers (`state_dict`, `{'module': {'module.…'}}`) are removed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, would run code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch and safetensors raise many kinds, among them pickle's own
        raise ValueError(
            f"{path} cannot be read as tensors alone: it is damaged, or it is a pickle that would run code ({error})."
        ) from error
    for wrapper in ("state_dict", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, optionally under 'state_dict' or 'module'."
        )
    if content and all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def resampler(state: Mapping[str, Tensor]) -> StateDict:
    """Convert a published resampler (`motion_proj.ckpt`, or one inside another file).

    The variants with several frames of queries or a class token have the same keys: all their queries come out in
    order, the class token's first.

    Args:
        state: Published state dict.

    Returns:
        State dict of `motionrag.models.Resampler`.

    Raises:
        ValueError: If keys are missing or unknown, or the file holds several resamplers.
    """
    prefixes = [prefix for prefix in _RESAMPLER_PREFIXES if any(key.startswith(prefix) for key in state)]
    if len(prefixes) > 1:
        raise ValueError(f"The file holds several resamplers, under {', '.join(prefixes)}; pass the keys of one.")
    if prefixes:
        inside, outside = _split(state, prefixes[0])
        report_left_out("resampler", outside)
        state = inside
    converted: StateDict = {}
    unknown = []
    for key, value in state.items():
        if key == "latents":
            converted["queries"] = value.squeeze(0)
            continue
        for pattern, replacement in _RESAMPLER_KEYS:
            if re.fullmatch(pattern, key):
                converted[re.sub(pattern, replacement, key)] = value
                break
        else:
            unknown.append(key)
    refuse("resampler", unknown=unknown, missing=[] if "queries" in converted else ["latents"])
    return converted


def cama(state: Mapping[str, Tensor], *, sos_token: Tensor | None = None) -> dict[str, StateDict]:
    """Convert a published condition transformer (`motion_transformer.ckpt`).

    The published training neither trains nor saves `sos_token`, so a file may lack it. Nothing can restore it: pass
    the one to use, or zeros, knowingly.

    Args:
        state: Published state dict.
        sos_token: `(l d)` or `(1 l d)`; used when the file has none.

    Returns:
        State dicts under "cama", "context_resampler" and, when the file holds it, "motion_resampler".

    Raises:
        ValueError: If keys are missing or unknown, or there is no `sos_token` in the file and none is passed.
    """
    state, outside = _split(state, "condition_transformer.")
    if state:
        report_left_out("condition transformer", outside)
    else:
        state = outside
    transformer, rest = _split(state, "transformer.")
    context, rest = _split(rest, "condition_proj.")
    motion, rest = _split(rest, "vision_proj.")
    encoders = [key for key in rest if key.startswith(("condition_model.", "vision_model."))]
    report_left_out("condition transformer", encoders)
    rest = {key: value for key, value in rest.items() if key not in encoders}

    token = rest.pop("sos_token", sos_token)
    missing = [name for name, part in (("transformer.*", transformer), ("condition_proj.*", context)) if not part]
    refuse("condition transformer", unknown=rest, missing=missing)
    if token is None:
        raise ValueError(
            "The checkpoint holds no 'sos_token' (the published training does not save it); "
            "pass sos_token=…, for example torch.zeros(25, 1024), to choose one."
        )
    converted = {
        "cama": {
            "sos_token": token.reshape(token.shape[-2:]),
            **{f"transformer.{k}": v for k, v in transformer.items()},
        },
        "context_resampler": resampler(context),
    }
    if motion:
        converted["motion_resampler"] = resampler(motion)
    return converted


def injection(state: Mapping[str, Tensor], backbone: str) -> StateDict:
    """Convert a published attention adapter (`Motion-Adapter.ckpt`).

    Args:
        state: Published state dict. A stage-1 file also holds the resampler (`action_proj_model.*`), a full module
            its own backbone; both are reported in the log and left out.
        backbone: "cogvideox" or "svd".

    Returns:
        State dict of `motionrag.adapters.AttentionInjection`.

    Raises:
        ValueError: If the backbone or a key is unknown, nothing was published for that backbone, or a site lacks one
            of its three projections.
    """
    prefix = published_prefix(backbone)
    published = {each.published_prefix for each in BACKBONES.values() if each.published_prefix is not None}
    other_prefixes = tuple(published - {prefix})
    converted: StateDict = {}
    known_parts, unknown = [], []
    for key, value in state.items():
        match = ADAPTER_KEY.fullmatch(key.removeprefix(prefix))
        if match and not key.startswith(other_prefixes):
            site = f"{match['attention']}to_out.0".replace(".", "/")
            converted[f"sites.{site}.{match['projection']}.weight"] = value
        elif key.startswith(("action_proj_model.", "condition_transformer.")) or (
            key.startswith(prefix) and ".processor." not in key
        ):
            known_parts.append(key)
        else:
            unknown.append(key)
    report_left_out("attention adapter", known_parts)
    sites = sorted({key.rpartition(".to_")[0] for key in converted})
    missing = [
        f"{site.removeprefix('sites.').replace('/', '.')}: {projection}"
        for site in sites
        for projection in ("to_q", "to_k", "to_v")
        if f"{site}.{projection}.weight" not in converted
    ]
    refuse("attention adapter", unknown=unknown, missing=missing if sites else ["processor.to_q_ip.0.weight, …"])
    return converted


def published_prefix(backbone: str) -> str:
    """What the denoiser's keys begin with in the published files of a backbone.

    Args:
        backbone: "cogvideox" or "svd".

    Returns:
        The prefix, with its dot.

    Raises:
        ValueError: If there is no such backbone, or nothing was published for it.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"Unknown backbone {backbone!r}; known are {', '.join(BACKBONES)}.")
    prefix = BACKBONES[backbone].published_prefix
    if prefix is None:
        available = ", ".join(name for name, each in BACKBONES.items() if each.published_prefix is not None)
        raise ValueError(
            f"No MotionRAG weights were published for {backbone}, so there is nothing to convert; "
            f"there are some for {available}."
        )
    return prefix


def _split(state: Mapping[str, Tensor], prefix: str) -> tuple[StateDict, StateDict]:
    """Divide a state dict into the part under a prefix (prefix removed) and the rest."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inside, {key: value for key, value in state.items() if not key.startswith(prefix)}
