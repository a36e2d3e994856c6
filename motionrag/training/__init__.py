"""Training: one thin LightningModule per stage and one data module. The only place that imports Lightning.

`motionrag train --config configs/…` runs it; DESIGN of the stages: `docs/training.md`.
"""

from motionrag.training.adaptation import AdaptationTraining, RetrievedReferences
from motionrag.training.autoencoder import AutoencoderTraining
from motionrag.training.data import ClipDataModule
from motionrag.training.diffusion import BackboneTraining, InjectionTraining
from motionrag.training.encoded import EncodedClips
from motionrag.training.encoders import ImageEncoderTraining, RetrievalEncoderTraining, VideoEncoderTraining
from motionrag.training.run import read_config, train

__all__ = [
    "AdaptationTraining",
    "AutoencoderTraining",
    "BackboneTraining",
    "ClipDataModule",
    "EncodedClips",
    "ImageEncoderTraining",
    "InjectionTraining",
    "RetrievalEncoderTraining",
    "RetrievedReferences",
    "VideoEncoderTraining",
    "read_config",
    "train",
]
