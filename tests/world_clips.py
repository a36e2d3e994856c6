"""A folder of clips of six motion families, for tests that want different motions under plain words."""

from pathlib import Path

from motionrag.pocket.folder import write_clips
from motionrag.pocket.world import FAMILIES, Domain, Style, domain, sample_clip

CHOSEN = ("orbit", "hop", "slide", "fall", "pendulum", "grow")


def write_families(folder: Path) -> Path:
    """Three clips of each: a red ball, a blue box and a green ring; `orbit_0.mp4` shows "a red ball circles"."""
    clips = []
    for number, family in enumerate(CHOSEN):
        for take, (colour, shape) in enumerate((("red", "ball"), ("blue", "box"), ("green", "ring"))):
            dynamics = domain((number, take), family=family).dynamics
            made = Domain(FAMILIES[family].words, dynamics, Style(shapes=(shape,), colours=(colour,)))
            clips.append((f"{family}_{take}", sample_clip(made, (number, take, 1), truth=False)))
    return write_clips(folder, clips)
