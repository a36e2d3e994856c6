"""Runs a training config: `motionrag train --config configs/…`.

A config is Lightning's: `model`, `data` and `trainer`, each checked against the real signatures before anything is
loaded, rendered or run.
"""

import logging
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningCLI

logger = logging.getLogger(__name__)

# What jsonargparse says of the types that it tried; the reason stands between these lines.
_ATTEMPTS = ("Does not validate against", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")


class TrainingConfig(LightningCLI):
    """A config that fits the signatures of everything it names. `build` makes `model`, `datamodule` and `trainer`.

    Attributes:
        config: The values, defaults included.
    """

    config: Namespace

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Read the file and what overrides it.

        Args:
            parser: Knows the signatures.
            args: As on a command line.

        Raises:
            ValueError: If something does not fit; it names the key.
        """
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ValueError(_one_sentence(str(error))) from None

    def instantiate_classes(self) -> None:
        """Wait for `build`: reading a config loads no weights."""

    def build(self) -> None:
        """Make `model`, `datamodule` and `trainer`. Clips may be rendered and encoded now."""
        super().instantiate_classes()


def read_config(config: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a config and check it against the signatures of what it names.

    Args:
        config: YAML file.
        overrides: Further arguments, such as `--trainer.max_steps=100`; they win over the file.

    Returns:
        The config; nothing is built yet.

    Raises:
        ValueError: If something does not fit; it names the key.
    """
    try:
        return TrainingConfig(
            args=["--config", str(config), *overrides],
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
        )
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None


def train(config: str | Path, *, resume: bool = False, overrides: Sequence[str] = ()) -> lightning.LightningModule:
    """Train by a config.

    Args:
        config: YAML file.
        resume: Continue from the last checkpoint of the same config, if there is one.
        overrides: Further arguments, such as `--trainer.devices=2`.

    Returns:
        The trained module.

    Raises:
        ValueError: If the config does not fit, or keeps no checkpoint to resume from.
        FileExistsError: If an earlier run has left a checkpoint and `resume` is not set.
    """
    read = read_config(config, overrides)
    folder = checkpoint_folder(read.config)
    if folder is None:
        raise ValueError(
            f"{config}: without a ModelCheckpoint that has dirpath and save_last nothing could be resumed; "
            "add one to trainer.callbacks."
        )
    last = last_checkpoint(folder)
    if last is not None and not resume:
        raise FileExistsError(
            f"{folder} holds {last.name} of an earlier run; continue it with --resume, or move the folder away."
        )
    if last is None and resume:
        logger.warning("There is no checkpoint in %s to resume from: training starts anew.", folder)
    read.build()
    with warnings.catch_warnings():
        # Ours continues where it stopped: ClipDataModule keeps the position, not the loader. What is frozen stays in
        # eval mode.
        warnings.filterwarnings("ignore", ".*not resumable.*")
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", ".*across ranks is zero.*")  # a config without validation
        # Weights only: a checkpoint is a pickle.
        read.trainer.fit(
            read.model, datamodule=read.datamodule, ckpt_path=None if last is None else str(last), weights_only=True
        )
    return read.model


def checkpoint_folder(config: Namespace) -> Path | None:
    """Where a run keeps its last checkpoint.

    Args:
        config: Of a training.

    Returns:
        The folder; None if the config keeps none.
    """
    callbacks = config.trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        options = callback.get("init_args", Namespace())
        if callback.class_path.endswith("ModelCheckpoint") and options.get("save_last") and options.get("dirpath"):
            return Path(options.dirpath)
    return None


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        folder: Of a run.

    Returns:
        The newest of `last.ckpt`, `last-v1.ckpt`, …: Lightning leaves the last checkpoint of another run as it is.
        None if there is none.
    """
    found = sorted(folder.glob("last*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    return found[-1] if found else None


def _one_sentence(message: str) -> str:
    """What is wrong stands deepest in jsonargparse's tree of attempts; the path to it is kept."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(_ATTEMPTS))
