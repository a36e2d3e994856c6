"""Writes clips of the world as a folder of videos with their captions, to be looked at and indexed like any other."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from motionrag.pocket.world import FPS, Domain, WorldClip, sample_clip
from motionrag.video import write_video

CAPTIONS = "captions.csv"
COLUMNS = ("file_name", "caption", "family", "licence", "parameters")
LICENCE = "Apache-2.0"
TRUTH = ("tracks", "visible", "masks", "flow", "flow_visible")


def write_clips(folder: str | Path, clips: Iterable[tuple[str, WorldClip]], *, truth: bool = False) -> Path:
    """Write clips and their captions. The captions come last: a folder that has them is complete.

    Args:
        folder: Made if it does not exist.
        clips: Names without suffix, and clips.
        truth: Whether to write `NAME.npz` beside each video, with the arrays `tracks`, `visible`, `masks`, `flow` and
            `flow_visible` of `WorldClip`.

    Returns:
        The CSV file with the columns `file_name`, `caption`, `family`, `licence` and `parameters`, which is JSON.

    Raises:
        FileExistsError: If the folder holds captions already; they would no longer fit its videos.
    """
    folder = Path(folder)
    table = folder / CAPTIONS
    if table.exists():
        raise FileExistsError(f"{folder} holds {CAPTIONS} already; choose another folder or delete this one.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, clip in clips:
        write_video(folder / f"{name}.mp4", clip.frames, FPS, full_colour=True)
        if truth:
            np.savez_compressed(folder / f"{name}.npz", **{field: getattr(clip, field) for field in TRUTH})
        rows.append((f"{name}.mp4", clip.caption, clip.family, LICENCE, json.dumps(clip.parameters)))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return table


def render_domain(folder: str | Path, domain: Domain, count: int, *, seed: int = 0, truth: bool = False) -> Path:
    """Draw clips of a domain and write them.

    Args:
        folder: Made if it does not exist.
        domain: What the clips are of.
        count: How many clips.
        seed: Clip i of a seed is always the same, whatever the count.
        truth: As in `write_clips`.

    Returns:
        The CSV file, as of `write_clips`.
    """
    name = domain.verb.removesuffix("s")
    clips = ((f"{name}_{i:04}", sample_clip(domain, (seed, i), truth=truth)) for i in tqdm(range(count), "render"))
    return write_clips(folder, clips, truth=truth)
