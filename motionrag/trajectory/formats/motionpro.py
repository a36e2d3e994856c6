"""MotionPro's JSON and the folders of MC-Bench.

`meta_data.json` is `{"traj_key_points": [[[x, y], …], …]}`: key points of each drag, in pixels of `first_frame.png`
beside it. `first_frame_mask.png` is the brush.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motionrag.trajectory.formats.files import Canvas, build_tracks, canvas_of, load_json
from motionrag.trajectory.mask import read_mask
from motionrag.trajectory.tracks import Tracks

if TYPE_CHECKING:
    from torch import Tensor

KEY = "traj_key_points"
IMAGE, BRUSH, POINTS = "first_frame.png", "first_frame_mask.png", "meta_data.json"


@dataclass(frozen=True)
class BenchItem:
    """One item of MC-Bench.

    Args:
        name: category and folder, `Fine_grained_control/dog_head_0001`.
        image: the first frame's file.
        tracks: the drags, on the canvas of the image.
        brush: `(h, w)`, float32, 1 where the picture may move.
    """

    name: str
    image: Path
    tracks: Tracks
    brush: "Tensor"


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read the file; without `canvas` the image beside it says the size."""
    content = load_json(path)
    tracks = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(tracks, list):
        raise ValueError(f"{path} has no list {KEY!r}; MotionPro's JSON is {{{KEY!r}: [[[x, y], …], …]}}.")
    image = path.with_name(IMAGE)
    size = canvas_of(path, canvas, _image_size(image) if image.is_file() else None)
    return build_tracks(path, tracks, size)


def write(path: Path, tracks: Tracks) -> None:
    """Write the points as they are; the format has no place for canvas and visibility."""
    path.write_text(json.dumps({KEY: [_plain(way.points) for way in tracks.trajectories]}), encoding="utf-8")


def bench_items(root: str | os.PathLike[str]) -> list[BenchItem]:
    """Read MC-Bench: folders `category/item`, in sorted order; other files in between are passed over.

    Args:
        root: the folder of the categories.

    Returns:
        The items.

    Raises:
        ValueError: names the item that lacks a file or whose brush has another size; or if there is no item.
    """
    folders = sorted(folder for folder in Path(root).glob("*/*") if folder.is_dir())
    if not folders:
        raise ValueError(f"{root} holds no MC-Bench item; these are folders category/item with a {POINTS}.")
    return [_item(folder) for folder in folders]


def _item(folder: Path) -> BenchItem:
    missing = [name for name in (IMAGE, BRUSH, POINTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    tracks = read(folder / POINTS, None)
    brush = read_mask(folder / BRUSH, height=tracks.height, width=tracks.width)
    return BenchItem(f"{folder.parent.name}/{folder.name}", folder / IMAGE, tracks, brush)


def _image_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}).") from error


def _plain(points: tuple[tuple[float, float], ...]) -> list[list[float]]:
    return [[int(value) if value.is_integer() else value for value in point] for point in points]
