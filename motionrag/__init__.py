"""Motion-retrieval-augmented image-to-video generation (MotionRAG, arXiv 2509.26391) on frozen diffusers backbones.

The public names are imported on first use, so that `import motionrag` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Clip": "motionrag.video",
    "MotionBundle": "motionrag.bundle",
    "MotionDatabase": "motionrag.database",
    "MotionEncoder": "motionrag.encoder",
    "MotionRAGPipeline": "motionrag.pipeline",
    "Reference": "motionrag.database",
    "RegionTrajectory": "motionrag.trajectory",
}

__all__ = [
    "Clip",
    "MotionBundle",
    "MotionDatabase",
    "MotionEncoder",
    "MotionRAGPipeline",
    "Reference",
    "RegionTrajectory",
]

if TYPE_CHECKING:
    from motionrag.bundle import MotionBundle
    from motionrag.database import MotionDatabase, Reference
    from motionrag.encoder import MotionEncoder
    from motionrag.pipeline import MotionRAGPipeline
    from motionrag.trajectory import RegionTrajectory
    from motionrag.video import Clip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'motionrag' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
