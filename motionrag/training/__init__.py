"""Training: one thin LightningModule per stage and one data module. The only place that imports Lightning.

`motionrag train --config configs/…` runs it; DESIGN of the stages: `docs/training.md`.
"""

from motionrag.training.adaptation import AdaptationTraining, DatabaseReferences, RetrievedReferences
from motionrag.training.autoencoder import AutoencoderTraining
from motionrag.training.control import ControlTraining
from motionrag.training.data import ClipDataModule
from motionrag.training.diffusion import BackboneTraining, InjectionTraining
from motionrag.training.encoded import EncodedClips
from motionrag.training.encoders import ImageEncoderTraining, RetrievalEncoderTraining, VideoEncoderTraining
from motionrag.training.folder import ClipFolder
from motionrag.training.joint import JointTraining, ReferencedClips
from motionrag.training.run import read_config, train
from motionrag.training.validation_clips import ValidationClips

__all__ = [
    "AdaptationTraining",
    "AutoencoderTraining",
    "BackboneTraining",
    "ClipDataModule",
    "ClipFolder",
    "ControlTraining",
    "DatabaseReferences",
    "EncodedClips",
    "ImageEncoderTraining",
    "InjectionTraining",
    "JointTraining",
    "ReferencedClips",
    "RetrievalEncoderTraining",
    "RetrievedReferences",
    "ValidationClips",
    "VideoEncoderTraining",
    "read_config",
    "train",
]
