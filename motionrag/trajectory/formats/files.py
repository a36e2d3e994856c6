"""What the readers of track files share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from motionrag.trajectory.region import RegionTrajectory
from motionrag.trajectory.tracks import Tracks

Canvas = tuple[int, int] | None
"""Height and width that the points were drawn on, or None if the caller does not say."""


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.

    Returns:
        What it holds.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error


def canvas_of(path: Path, said: Canvas, found: Canvas) -> tuple[int, int]:
    """The canvas, from the caller or the file.

    Args:
        path: the file, for the message.
        said: what the caller says, or None.
        found: what the file says, or None.

    Returns:
        Height and width.

    Raises:
        ValueError: if neither says it, or they differ.
    """
    if said is None and found is None:
        raise ValueError(f"{path} does not say how large its canvas is; give height and width (--canvas).")
    if said is not None and found is not None and said != found:
        raise ValueError(
            f"{path} is drawn on {found[1]}x{found[0]} pixels, not {said[1]}x{said[0]}; leave the canvas "
            "out: Tracks.resized brings them to an image."
        )
    return said or found  # type: ignore[return-value]


def build_tracks(
    path: Path, tracks: Sequence[Any], canvas: tuple[int, int], *, visible: Any = None, fps: float | None = None
) -> Tracks:
    """Tracks from lists of points in pixels.

    Args:
        path: the file, for the message.
        tracks: the points of each track, `(n, 2)`.
        canvas: height and width.
        visible: as in `Tracks`.
        fps: as in `Tracks`.

    Returns:
        The tracks; they may leave the image, as recorded ones do.

    Raises:
        ValueError: names the file and the track that is wrong.
    """
    ways = []
    for index, points in enumerate(tracks):
        try:
            ways.append(RegionTrajectory(points, may_leave=True))
        except ValueError as error:
            raise ValueError(f"{path}, track {index}: {error}") from error
    if not ways:
        raise ValueError(f"{path} holds no track.")
    return Tracks(ways, height=canvas[0], width=canvas[1], visible=visible, fps=fps)
