"""Runs a training config: `motionrag train --config configs/…`.

A config is Lightning's: `model`, `data` and `trainer`, each checked against the real signatures before anything runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI

LAST = "last.ckpt"


def read_config(config: str | Path, overrides: Sequence[str] = ()) -> LightningCLI:
    """Read a config and build what it names: module, data and trainer.

    Args:
        config: YAML file.
        overrides: Further arguments, such as `--trainer.max_steps=100`; they win over the file.

    Returns:
        An object with `model`, `datamodule` and `trainer`.
    """
    return LightningCLI(
        args=["--config", str(config), *overrides],
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
    )


def train(config: str | Path, *, resume: bool = False, overrides: Sequence[str] = ()) -> lightning.LightningModule:
    """Train by a config.

    Args:
        config: YAML file.
        resume: Continue from the last checkpoint of the same config, if there is one.
        overrides: Further arguments, such as `--trainer.devices=2`.

    Returns:
        The trained module.
    """
    cli = read_config(config, overrides)
    folder = Path(cli.trainer.default_root_dir)
    last = folder / LAST
    if not any(isinstance(each, ModelCheckpoint) and each.save_last for each in _callbacks(cli.trainer)):
        raise ValueError(f"{config}: without a ModelCheckpoint with save_last nothing could be resumed; add one.")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(last) if resume and last.exists() else None)
    return cli.model


def _callbacks(trainer: Any) -> list[Any]:
    return list(trainer.callbacks)
