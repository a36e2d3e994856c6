"""Frozen, pretrained encoders: pixels and texts in, features and embeddings out.

Each file holds one encoder with its preprocessing and its fingerprint. The libraries behind them are imported when an
encoder is made, not here.
"""

from motionrag.encoders.clip import CLIPEncoder
from motionrag.encoders.dinov2 import DINOv2Encoder
from motionrag.encoders.text import SentenceEncoder
from motionrag.encoders.videomae import VideoMAEEncoder

__all__ = ["CLIPEncoder", "DINOv2Encoder", "SentenceEncoder", "VideoMAEEncoder"]
