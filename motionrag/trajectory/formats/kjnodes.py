"""The JSON of the SplineEditor of ComfyUI-KJNodes: `[{"x": 10, "y": 20}, …]`, or a list of such lists.

Whole pixels of the editor's mask, one point a frame. The file does not say how large the mask is.
"""

import json
from pathlib import Path
from typing import Any

from motionrag.trajectory.formats.files import Canvas, build_tracks, canvas_of, load_json
from motionrag.trajectory.tracks import Tracks


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read the file; `canvas` is the mask's height and width."""
    content = load_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} is no spline JSON, which is a list of points or a list of such lists.")
    tracks = content if content and isinstance(content[0], list) else [content] if content else []
    points = [[_point(path, index, point) for point in track] for index, track in enumerate(tracks)]
    return build_tracks(path, points, canvas_of(path, canvas, None))


def write(path: Path, tracks: Tracks) -> None:
    """Write a list of tracks, rounded to whole pixels."""
    content = [[{"x": round(x), "y": round(y)} for x, y in way.points] for way in tracks.trajectories]
    path.write_text(json.dumps(content), encoding="utf-8")


def _point(path: Path, track: int, point: Any) -> tuple[Any, Any]:
    if not (isinstance(point, dict) and "x" in point and "y" in point):
        raise ValueError(f'{path}, track {track}: a point is {{"x": …, "y": …}}; this is {point!r}.')
    return point["x"], point["y"]
