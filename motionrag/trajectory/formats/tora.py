"""Tora's text files: a line `x,y` for each point, one track, on a canvas of 256×256 pixels."""

from pathlib import Path

from motionrag.trajectory.formats.files import Canvas, build_tracks
from motionrag.trajectory.tracks import Tracks

SIDE = 256


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read the file; `canvas` stands in for 256×256 if the file was drawn on another one."""
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            x, y = line.split(",")
            points.append((float(x), float(y)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: a point is x,y; this is {line[:40]!r}.") from error
    return build_tracks(path, [points] if points else [], canvas or (SIDE, SIDE))


def write(path: Path, tracks: Tracks) -> None:
    """Write one track, stretched to Tora's canvas."""
    if len(tracks.trajectories) != 1:
        raise ValueError(f"{path}: a Tora file holds one track, these are {len(tracks.trajectories)}; write one each.")
    points = tracks.resized(height=SIDE, width=SIDE).trajectories[0].points
    path.write_text("".join(f"{x:.12g},{y:.12g}\n" for x, y in points), encoding="utf-8")
