"""Renders a few short clips to try things on: one shape in front of a plain backdrop, with a caption.

Six motions, each with several shapes and colours; the same seed gives the same pixels. Drawn four times too large
and scaled down, so that edges are smooth.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from motionrag.video import write_video

SIZE, NUM_FRAMES, FPS = 128, 24, 8
CAPTIONS = "captions.csv"
_OVERSAMPLING = 4

COLOURS = {
    "red": (214, 64, 56),
    "blue": (58, 104, 214),
    "green": (62, 160, 84),
    "yellow": (236, 190, 52),
    "violet": (142, 84, 196),
}
BACKDROPS = ((226, 232, 238), (36, 42, 58), (206, 188, 158), (90, 122, 112))

# Time from 0 to 1 → centre x, y in units of the frame, and radius likewise.
Motion = Callable[[float], tuple[float, float, float]]
MOTIONS: dict[str, tuple[str, Motion]] = {
    "orbit": (
        "circles around the middle",
        lambda t: (0.5 + 0.3 * math.cos(math.tau * t), 0.5 + 0.3 * math.sin(math.tau * t), 0.11),
    ),
    "bounce": ("bounces on the ground", lambda t: (0.2 + 0.6 * t, 0.84 - 0.6 * abs(math.sin(2.5 * math.pi * t)), 0.11)),
    "slide": ("slides to the right", lambda t: (0.15 + 0.7 * t, 0.5, 0.11)),
    "fall": ("falls down", lambda t: (0.5, 0.13 + 0.74 * t * t, 0.11)),
    "swing": ("swings like a pendulum", lambda t: _pendulum(0.9 * math.cos(2 * math.tau * t))),
    "grow": ("grows larger and larger", lambda t: (0.5, 0.5, 0.07 + 0.3 * t)),
}


def render(motion: str, shape: str, colour: str, backdrop: int) -> np.ndarray:
    """Draw one clip.

    Args:
        motion: A key of `MOTIONS`.
        shape: "ball", "box" or "star".
        colour: A key of `COLOURS`.
        backdrop: Index into `BACKDROPS`.

    Returns:
        Frames `(t h w 3)` uint8.
    """
    _, path = MOTIONS[motion]
    frames = []
    for index in range(NUM_FRAMES):
        picture = Image.new("RGB", (SIZE * _OVERSAMPLING,) * 2, BACKDROPS[backdrop])
        x, y, radius = (value * picture.width for value in path(index / (NUM_FRAMES - 1)))
        _draw(ImageDraw.Draw(picture), shape, COLOURS[colour], x, y, radius)
        frames.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return np.stack(frames)


def caption(motion: str, shape: str, colour: str) -> str:
    """What happens in a clip, in words."""
    return f"a {colour} {shape} {MOTIONS[motion][0]}"


def render_folder(folder: str | Path) -> Path:
    """Write 18 clips, three of each motion, and their captions.

    Args:
        folder: Made if it does not exist.

    Returns:
        The CSV file with the columns `file_name`, `caption`, `motion`, `licence`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    looks = list(zip(("ball", "box", "star") * 2, COLOURS, strict=False))
    rows = []
    for number, motion in enumerate(MOTIONS):
        for take in range(3):
            shape, colour = looks[(number + 2 * take) % len(looks)]
            name = f"{motion}_{take}.mp4"
            write_video(folder / name, render(motion, shape, colour, (number + take) % len(BACKDROPS)), FPS)
            rows.append((name, caption(motion, shape, colour), motion, "Apache-2.0"))
    table = folder / CAPTIONS
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "caption", "motion", "licence"))
        writer.writerows(rows)
    return table


def _pendulum(angle: float) -> tuple[float, float, float]:
    return 0.5 + 0.6 * math.sin(angle), 0.1 + 0.6 * math.cos(angle), 0.1


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    if shape == "ball":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "box":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        points = []
        for corner in range(10):
            reach = radius * (1.3 if corner % 2 == 0 else 0.55)
            angle = math.tau * corner / 10 - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(points, fill=colour)
