"""This project's JSON: canvas, frame rate, normalised points and visibility, so that a file stands on its own.

`{"height": 320, "width": 512, "fps": 8, "tracks": [{"points": [[0.25, 0.5], …], "visible": [true, …]}, …]}`; points
are fractions of width and height, `fps` and `visible` may be missing.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from motionrag.trajectory.formats.files import Canvas, build_tracks, canvas_of, load_json
from motionrag.trajectory.tracks import Tracks


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read the file."""
    content = load_json(path)
    height, width, tracks = _parts(path, content)
    size = canvas_of(path, canvas, (height, width))
    entries = [_entry(path, index, entry) for index, entry in enumerate(tracks)]
    seen = [visible for _, visible in entries]
    if any(row is None for row in seen) and any(row is not None for row in seen):
        raise ValueError(f"{path} has 'visible' in some tracks only; give it in all or none.")
    visible = None if not seen or seen[0] is None else seen
    fps = content.get("fps")
    if fps is not None and not (isinstance(fps, int | float) and fps > 0):
        raise ValueError(f"{path} says fps {fps!r}; use a number above 0.")
    try:
        points = [np.array(points, np.float64) * (width, height) for points, _ in entries]
        return build_tracks(path, points, size, visible=visible, fps=fps)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def write(path: Path, tracks: Tracks) -> None:
    """Write everything that the tracks hold."""
    entries: list[dict[str, Any]] = []
    for index, way in enumerate(tracks.trajectories):
        entries.append({"points": [[x / tracks.width, y / tracks.height] for x, y in way.points]})
        if tracks.visible is not None:
            entries[-1]["visible"] = list(tracks.visible[index])
    content: dict[str, Any] = {"height": tracks.height, "width": tracks.width, "tracks": entries}
    if tracks.fps is not None:
        content["fps"] = tracks.fps
    path.write_text(json.dumps(content), encoding="utf-8")


def _parts(path: Path, content: Any) -> tuple[int, int, list[Any]]:
    if isinstance(content, dict):
        height, width, tracks = content.get("height"), content.get("width"), content.get("tracks")
        if isinstance(height, int) and isinstance(width, int) and isinstance(tracks, list) and min(height, width) > 0:
            return height, width, tracks
    raise ValueError(f"{path} is no track file; it needs whole numbers 'height' and 'width' and a list 'tracks'.")


def _entry(path: Path, index: int, entry: Any) -> tuple[list[Any], list[Any] | None]:
    if not isinstance(entry, dict) or not isinstance(entry.get("points"), list):
        raise ValueError(f"{path}, track {index}: a track is {{'points': [[x, y], …]}}.")
    return entry["points"], entry.get("visible")
