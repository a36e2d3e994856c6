"""The recipe: every step from nothing to the pocket's weights, in one restartable command.

    motionrag pocket train

Each step is a config of `configs/pocket`, run by the same training code as the real sizes. A step that is done is not
run again; one that was killed continues from its last checkpoint. What is trained lies in `outputs/pocket/weights` in
float32; `pack` writes it into the package in float16. The model card beside the weights is written by hand.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from motionrag.bundle import MotionBundle
from motionrag.encoder import MotionEncoder
from motionrag.pocket.initialise import initialise

WORK = Path("outputs/pocket")
WEIGHTS = WORK / "weights"
PACKAGE = Path(__file__).parent / "weights"
# In this order: an encoder is frozen before anything learns from its features.
TRAININGS = (
    "autoencoder",
    "backbone",
    "video_encoder",
    "injection",
    "image_encoder",
    "retrieval_encoder",
    "adaptation",
)
SIZE_LIMIT = 25_000_000  # bytes

logger = logging.getLogger(__name__)


def train_pocket(
    configs: str | Path = "configs/pocket", *, only: Sequence[str] = (), from_shipped: bool = False
) -> dict[str, float]:
    """Run the steps that are not done yet, then pack the weights.

    Args:
        configs: Folder of the trainings' configs, which name `outputs/pocket`.
        only: Steps to run; none: all.
        from_shipped: Begin with the weights of the package instead of random ones, to train a step further or anew.

    Returns:
        Step → seconds, as measured when it ran.

    Raises:
        ValueError: If there is no such step.
    """
    from motionrag.training import train

    def training(name: str) -> Callable[[], object]:
        return lambda: train(Path(configs) / f"{name}.yaml", resume=True)

    steps: dict[str, Callable[[], object]] = {
        "initialise": lambda: pack(PACKAGE, WEIGHTS, dtype=torch.float32) if from_shipped else initialise(WEIGHTS),
        **{name: training(name) for name in TRAININGS},
        "pack": lambda: pack(WEIGHTS, PACKAGE),
    }
    unknown = set(only) - steps.keys()
    if unknown:
        raise ValueError(f"There is no step {', '.join(sorted(unknown))}; the steps are {', '.join(steps)}.")
    record = _Record(WORK / "done.json")
    for name in only or steps:
        if name in record.seconds and name not in only:
            continue
        logger.warning("%s begins", name)
        since = time.monotonic()
        steps[name]()
        record.add(name, time.monotonic() - since)
    return record.seconds


class _Record:
    """Which steps are done and how long they took; an interrupted step counts its last run only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add(self, step: str, seconds: float) -> None:
        self.seconds[step] = round(seconds, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")


def pack(source: str | Path, target: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write the trained weights in another precision, marked as trained; unconditional tokens follow from the result.

    Args:
        source: Folder of the weights.
        target: Folder that is shipped; what was there is replaced file by file.
        dtype: float16 to ship them, float32 to train them further.

    Raises:
        ValueError: If the result in float16 is larger than what a package may carry.
    """
    import dataclasses

    import diffusers

    source, target = Path(source), Path(target)
    bundle = MotionBundle.from_pretrained(source)
    encoder = MotionEncoder(bundle)
    base = bundle.path_or_id(bundle.config.base_model)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, dtype=dtype)
    pipeline.save_pretrained(target / bundle.config.base_model)
    parts: dict[str, Any] = {name: getattr(bundle, name).to(dtype) for name in bundle.config.parts}
    for name, entry in bundle.config.encoders.items():
        part = getattr(encoder, f"{name}_encoder")
        part.to(dtype).save_pretrained(target / entry.source)
    video = encoder.video_encoder.float()  # the values that were written
    with torch.no_grad():
        tokens = parts["motion_resampler"].float()(video.grey_features())[0].to(dtype)
    parts["motion_resampler"].to(dtype)
    config = dataclasses.replace(bundle.config, trained=True)
    MotionBundle(config, unconditional_tokens=tokens, **parts).save_pretrained(target)
    for file in target.rglob("tokenizer.json"):  # written with a line for every word
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if dtype == torch.float16 and size > SIZE_LIMIT:
        raise ValueError(f"{target} holds {size / 1e6:.1f} MB, more than the {SIZE_LIMIT / 1e6:.0f} MB that ship.")
