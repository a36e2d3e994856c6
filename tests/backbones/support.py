"""What works with which backbone family. The tests assert every cell, and docs/backbones.md shows the same table.

A cell is "yes", "refused: …" (motionrag raises an error that says so) or "no: …" (diffusers has it not, or refuses).
Run `python -m tests.backbones.support` to write the table into docs/backbones.md.
"""

from pathlib import Path

import pytest

FAMILY_NAMES = ("CogVideoX", "SVD", "LTX", "Wan 2.1", "Wan 2.2", "Wan 5B")
NO_CACHE = "no: the UNet has no `enable_cache`"
YES = dict.fromkeys(FAMILY_NAMES, "yes")

SUPPORT: dict[str, dict[str, str]] = {
    "guidance on and off": YES,
    "`motion_guidance_scale`": YES,
    "scale 0, detaching and errors leave no trace": YES,
    "several images in a call": YES,
    "`num_videos_per_prompt`": {
        **YES,
        "CogVideoX": "no: diffusers makes one video",
        "Wan 2.1": "no: diffusers embeds one image",
    },
    "a subset of sites": YES,
    "several bundles and pipelines at once": YES,
    "a second thread in the same pipeline": dict.fromkeys(FAMILY_NAMES, "refused: making a video in another thread"),
    "bfloat16 model": YES,
    "autocast to bfloat16 and float16": YES,
    "`enable_model_cpu_offload`": YES,
    "accelerate's `cpu_offload` (sequential)": YES,
    "group offload: blocks, leaves, disk": YES,
    "`enable_layerwise_casting` to float8": YES,
    "torchao int8 weights": YES,
    "LoRA file before or after attaching": {**YES, "SVD": "no: diffusers loads no LoRA"},
    "FirstBlockCache": {**YES, "SVD": NO_CACHE},
    "MagCache": {**YES, "SVD": NO_CACHE},
    "TaylorSeer": {**YES, "SVD": NO_CACHE},
    "PyramidAttentionBroadcast, guidance off": {**YES, "SVD": NO_CACHE},
    "PyramidAttentionBroadcast, guidance on": {
        "CogVideoX": "yes",
        "SVD": NO_CACHE,
        "LTX": "yes",
        **dict.fromkeys(FAMILY_NAMES[3:], "refused: one cache for both passes"),
    },
    "FasterCache": {
        "CogVideoX": "refused: FasterCache",
        "SVD": NO_CACHE,
        "LTX": "refused: FasterCache",
        **dict.fromkeys(FAMILY_NAMES[3:], "refused: FasterCache"),
    },
    "`motion_guidance_scale` with a cache": {
        **dict.fromkeys(FAMILY_NAMES, "refused: mix up the runs"),
        "SVD": NO_CACHE,
    },
    "SeaCache (never skips in these pipelines)": {**YES, "SVD": NO_CACHE},
    "TextKVCache (made for another model, does nothing here)": {**YES, "SVD": NO_CACHE},
    "`torch.compile`, fullgraph": YES,
    "`compile_repeated_blocks`": {
        **YES,
        "CogVideoX": "no: diffusers names no repeated block",
        "SVD": "no: diffusers names no repeated block",
    },
    "`enable_parallelism`": {
        "CogVideoX": "no: diffusers has no plan for it",
        "SVD": "no: diffusers has no plan for it",
        "LTX": "refused: split over devices",
        **dict.fromkeys(FAMILY_NAMES[3:], "refused: split over devices"),
    },
}
ASSERTED: set[str] = set()
DOCUMENT = Path(__file__).parents[2] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def cells(feature: str, *, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrise a test by the cells of a row: `family` and `verdict`.

    Args:
        feature: Name of the row.
        slow: Families for which this test takes more than about ten seconds.
    """
    ASSERTED.add(feature)
    row = [
        pytest.param(family, verdict, marks=[pytest.mark.slow] if family in slow else [], id=family)
        for family, verdict in SUPPORT[feature].items()
    ]
    return pytest.mark.parametrize(("family", "verdict"), row)


def words(verdict: str) -> str:
    """What an error that refuses says."""
    return verdict.partition(": ")[2]


def table() -> str:
    """The table in Markdown."""
    lines = ["| | " + " | ".join(FAMILY_NAMES) + " |", "|---" * (1 + len(FAMILY_NAMES)) + "|"]
    lines += [
        f"| {feature} | " + " | ".join(row[name] for name in FAMILY_NAMES) + " |" for feature, row in SUPPORT.items()
    ]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A document with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
