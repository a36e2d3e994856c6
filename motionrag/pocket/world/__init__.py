"""A small world with real dynamics: 64×64 pixels, 17 frames, 8 frames per second, deterministic by seed.

A still image does not tell how its objects will move: that is the point. A *domain* pairs the looks of its scenes with
one dynamics and a made-up verb, so that only its clips can say what the verb means. Reading order: `scene.py` (what
is there), `dynamics.py` (how it moves), `render.py` (pixels and ground truth), `domains.py` (which clips exist),
`drags.py` (clips in which every thing goes its own way).
"""

from motionrag.pocket.world.domains import (
    Domain,
    domain,
    named_domain,
    same_start,
    sample_clip,
    training_caption,
    training_clip,
    training_scene,
)
from motionrag.pocket.world.drags import drag_clip
from motionrag.pocket.world.dynamics import FAMILIES, HELD_OUT_FAMILIES, TRAINED_FAMILIES, Dynamics
from motionrag.pocket.world.render import FPS, NUM_FRAMES, SIZE, WorldClip, render
from motionrag.pocket.world.scene import Backdrop, Scene, Style, Thing

__all__ = [
    "FAMILIES",
    "FPS",
    "HELD_OUT_FAMILIES",
    "NUM_FRAMES",
    "SIZE",
    "TRAINED_FAMILIES",
    "Backdrop",
    "Domain",
    "Dynamics",
    "Scene",
    "Style",
    "Thing",
    "WorldClip",
    "domain",
    "drag_clip",
    "named_domain",
    "render",
    "same_start",
    "sample_clip",
    "training_caption",
    "training_clip",
    "training_scene",
]
