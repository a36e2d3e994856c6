"""MC-Bench in the pocket's world: scenes whose true ways are known, to try the evaluation without any download.

Each drag is the true way of one pixel of a thing, so the true video should score the tracker's own error, and a still
one the length of the drags.
"""

import json
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from motionrag.evaluation.mc_bench_items import IMAGE, POINTS, POINTS_OF_EVALUATOR
from motionrag.pocket.world import FAMILIES, FPS, WorldClip, domain, sample_clip
from motionrag.trajectory import RegionTrajectory, draw_trajectories
from motionrag.video import write_video

BRUSH, PICTURE = "first_frame_mask.png", "user_drag.png"
_FRAMES = 16
_LEAST = 2.0  # pixels that a drag must cover at least, on the mean


def write_pocket_bench(folder: str | Path, *, items: int = 12, seed: int = 0) -> tuple[Path, Path]:
    """Write scenes as MC-Bench, and their true videos as if they had been generated.

    Args:
        folder: Gets `bench/pocket/ITEM/` and `videos/pocket/ITEM.mp4`.
        items: How many.
        seed: Item i of a seed is always the same, whatever the number.

    Returns:
        The folders `bench` and `videos`, for `evaluate_mc_bench`.

    Raises:
        FileExistsError: If the folder holds a benchmark already.
    """
    bench, videos = Path(folder) / "bench", Path(folder) / "videos"
    if bench.exists():
        raise FileExistsError(f"{folder} holds a benchmark already; choose another folder or delete this one.")
    (videos / "pocket").mkdir(parents=True)
    families = list(FAMILIES)
    written = 0
    for attempt in count():
        if written == items:
            break
        family = families[attempt % len(families)]
        clip = sample_clip(domain((seed, attempt), family=family), (seed, attempt, 1))
        drags = _true_ways(clip)
        if drags:
            name = f"{family}_{written:04}"
            _write_item(bench / "pocket" / name, clip, drags)
            write_video(videos / "pocket" / f"{name}.mp4", clip.frames[:_FRAMES], FPS, full_colour=True)
            written += 1
    return bench, videos


def _true_ways(clip: WorldClip) -> list[list[list[float]]]:
    """For each thing the way of its pixel nearest the centre, if it moves and is seen in all frames."""
    ways = []
    for index, centre in enumerate(clip.tracks[:, 0]):
        rows, columns = np.nonzero((clip.masks[0] == index + 1) & clip.flow_visible[:_FRAMES].all(0))
        if not len(rows):
            continue
        nearest = np.hypot(columns + 0.5 - centre[0], rows + 0.5 - centre[1]).argmin()
        row, column = rows[nearest], columns[nearest]
        moved = clip.flow[:_FRAMES, row, column]
        if np.linalg.norm(moved, axis=-1).mean() >= _LEAST:
            ways.append(np.round(moved + np.array([column, row]), 3).tolist())
    return ways


def _write_item(folder: Path, clip: WorldClip, drags: list[list[list[float]]]) -> None:
    folder.mkdir(parents=True)
    image = Image.fromarray(clip.frames[0])
    image.save(folder / IMAGE)
    # Wherever a thing is in any frame.
    brush = (clip.masks[:_FRAMES] > 0).any(0).astype(np.uint8) * 255
    Image.fromarray(np.stack([brush] * 3, axis=-1)).save(folder / BRUSH)
    draw_trajectories(image, [RegionTrajectory(drag, may_leave=True) for drag in drags]).save(folder / PICTURE)
    for name in (POINTS, POINTS_OF_EVALUATOR):
        (folder / name).write_text(json.dumps({"traj_key_points": drags}), encoding="utf-8")
