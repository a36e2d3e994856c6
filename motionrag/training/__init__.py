"""Training: one thin LightningModule per stage and one data module. The only place that imports Lightning.

`motionrag train --config configs/…` runs it; DESIGN of the stages: `docs/training.md`.
"""

from motionrag.training.autoencoder import AutoencoderTraining
from motionrag.training.data import ClipDataModule
from motionrag.training.run import read_config, train

__all__ = ["AutoencoderTraining", "ClipDataModule", "read_config", "train"]
