"""The model card of a bundle: what is in it, what it pulls, under which licences, how it is used.

Cards are written when bundles are saved. A card without the mark is somebody's own and is never touched.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from motionrag.encoders.fingerprint import fingerprint

if TYPE_CHECKING:
    from motionrag.bundle import BundleConfig

CARD = "README.md"
_MARK = "# Written by motionrag. While this line stands, saving the bundle renews the file."
# Licences that the hub knows by an id; for all others it wants "other" and a name.
_HUB_LICENCES = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "mit")


def has_own_card(folder: Path) -> bool:
    """Whether a folder has a card that somebody wrote, or claimed by removing the mark.

    Args:
        folder: Of a bundle, or of a copy of its card.

    Returns:
        True if there is one.
    """
    card = folder / CARD
    return card.is_file() and _MARK not in card.read_text(encoding="utf-8")


def model_card(config: "BundleConfig", parts: Mapping[str, nn.Module], *, hub_base_model: str | None) -> str:
    """Describe a bundle.

    Args:
        config: Of the bundle.
        parts: All its parts, as they are saved.
        hub_base_model: Hub id of the base model; None if it is a folder.

    Returns:
        Markdown, with the metadata that the hub reads in front.
    """
    sizes = [
        (f"`{name}`", *_size(part), f"`{fingerprint(name, config.parts[name], part)}`") for name, part in parts.items()
    ]
    pulled = [
        ("base model", config.base_model, config.base_model_licence or "not stated"),
        *((f"{name} encoder", each.source, each.licence or "not stated") for name, each in config.encoders.items()),
    ]
    lent = f"\nEncoders, resamplers and CAMA that it has not come from another bundle: `{config.shared}`.\n"
    return f"""---
{_MARK}
{_metadata(config, hub_base_model)}
---

# Motion bundle for {hub_base_model or config.backbone}

{"" if config.trained else "**Untrained:** these are random weights, to train from. "}The parts
that [MotionRAG](https://arxiv.org/abs/2509.26391) adds to a frozen image-to-video model of the family
{config.backbone}, for the library motionrag.

{_table(("part", "parameters", "precision", "fingerprint"), sizes)}
{lent if config.shared else ""}
Licence of the parts: {config.licence or "not stated"}. They work with these frozen weights, which have licences of
their own and are in this folder only where they are named by a path in it:

{_table(("for", "weights", "licence"), pulled)}

```
{_usage(parts)}
```

BUNDLE is this folder or its hub id.
"""


def _metadata(config: "BundleConfig", hub_base_model: str | None) -> str:
    """YAML; every value is JSON, which YAML contains."""
    known = config.licence.lower() if config.licence.lower() in _HUB_LICENCES else None
    fields = {
        "license": known or ("other" if config.licence else "unknown"),
        "license_name": None if known else config.licence,
        "library_name": "motionrag",
        "pipeline_tag": "image-to-video",
        "base_model": hub_base_model,
        "base_model_relation": hub_base_model and "adapter",
        "tags": ["motionrag", config.backbone],
    }
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items() if value)


def _usage(parts: Mapping[str, nn.Module]) -> str:
    """Commands for what the bundle can do."""
    lines = []
    if "motion_injection" in parts:
        lines += [
            "motionrag index clips/ --encoder BUNDLE --out DB",
            'motionrag generate image.png --prompt "what happens" --backbone BUNDLE --database DB --out video.mp4',
        ]
    if "feature_modulation" in parts:
        lines.append("motionrag generate image.png --trajectories ways.json --backbone BUNDLE --out video.mp4")
    return "\n".join(lines) or "motionrag info BUNDLE"


def _size(part: nn.Module) -> tuple[str, str]:
    """Number of parameters and their precision, in words."""
    tensors = list(part.state_dict().values())
    count = sum(tensor.numel() for tensor in tensors)
    return f"{count:,}".replace(",", " "), ", ".join(sorted({str(each.dtype).split(".")[1] for each in tensors}))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
