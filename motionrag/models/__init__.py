"""The small trained networks of MotionRAG: torch and einops only; they know no video, database or backbone."""

from motionrag.models.cama import CAMA, cama_loss
from motionrag.models.resampler import Resampler
from motionrag.models.trajectory_encoder import TrajectoryEncoder

__all__ = ["CAMA", "Resampler", "TrajectoryEncoder", "cama_loss"]
