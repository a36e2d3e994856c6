"""Track files of other tools, read and written. One file each; `read_tracks` and `write_tracks` choose by the name.

A reader takes a path and the canvas (height, width) or None, a writer takes a path and tracks.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from motionrag.trajectory.formats import ati, kjnodes, motionpro, own, svg, tora, wan_move
from motionrag.trajectory.formats.files import Canvas, load_json
from motionrag.trajectory.formats.motionpro import BenchItem, bench_items
from motionrag.trajectory.tracks import Tracks


@dataclass(frozen=True)
class Format:
    """A format of track files.

    Args:
        suffix: how its files end.
        read: reads a file, given the canvas or None.
        write: writes a file.
        frames: how many points each track must have; 0 for the same number in all tracks, None for any number.
    """

    suffix: str
    read: Callable[[Path, Canvas], Tracks]
    write: Callable[[Path, Tracks], None]
    frames: int | None


FORMATS: dict[str, Format] = {
    "json": Format(".json", own.read, own.write, None),
    "kjnodes": Format(".json", kjnodes.read, kjnodes.write, 0),
    "motionpro": Format(".json", motionpro.read, motionpro.write, None),
    "tora": Format(".txt", tora.read, tora.write, None),
    "ati": Format(".pth", ati.read, ati.write, ati.FRAMES),
    "wan-move": Format(".npy", wan_move.read, wan_move.write, 0),
    "svg": Format(".svg", svg.read, svg.write, None),
}


def read_tracks(
    path: str | os.PathLike[str],
    *,
    height: int | None = None,
    width: int | None = None,
    format: str | None = None,
) -> Tracks:
    """Read tracks from a file.

    Args:
        path: the file.
        height: rows of the canvas that the points were drawn on; needed where the file does not say it (KJNodes, ATI,
            Wan-Move, and MotionPro without its `first_frame.png`).
        width: columns of that canvas.
        format: a name out of `FORMATS`; None to go by the suffix, and for JSON by the content.

    Returns:
        The tracks, in pixels of the canvas; `resized` brings them to your image.

    Raises:
        ValueError: says what is wrong with the file, and where; or that the canvas is missing or another one.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ValueError("Give both height and width of the canvas, or neither.")
    canvas = None if height is None or width is None else (height, width)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; read_tracks reads {_known()}.")
    return _format(format or _guess(path)).read(path, canvas)


def write_tracks(
    path: str | os.PathLike[str],
    tracks: Tracks,
    *,
    num_frames: int | None = None,
    format: str | None = None,
) -> None:
    """Write tracks to a file.

    Args:
        path: the file; an old one is replaced. Wan-Move writes a second one with the visibility beside it.
        tracks: the tracks.
        num_frames: points of each track, for KJNodes and Wan-Move, which want one a frame; None to keep the points.
            ATI always gets 121.
        format: a name out of `FORMATS`; None to go by the suffix (`.json` is then this project's own).

    Raises:
        ValueError: if the format is unknown, cannot hold these tracks, or needs `num_frames`.
    """
    path = Path(path)
    suffixes = {entry.suffix: name for name, entry in reversed(FORMATS.items())}
    chosen = _format(format or suffixes.get(path.suffix.lower(), path.suffix))
    if path.suffix.lower() != chosen.suffix:
        raise ValueError(f"{path} must end in {chosen.suffix} for this format.")
    frames = num_frames or chosen.frames
    if chosen.frames and frames != chosen.frames:
        raise ValueError(f"{path}: this format holds {chosen.frames} points a track; leave num_frames out.")
    if frames:
        tracks = tracks.per_frame(frames)
    elif chosen.frames == 0 and len({len(way.points) for way in tracks.trajectories}) > 1:
        raise ValueError(f"{path}: this format wants one point a frame in every track; give num_frames.")
    chosen.write(path, tracks)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no known format of tracks; use {_known()}.")
    return FORMATS[name]


def _known() -> str:
    return ", ".join(f"{name} ({entry.suffix})" for name, entry in FORMATS.items())


def _guess(path: Path) -> str:
    names = [name for name, entry in FORMATS.items() if entry.suffix == path.suffix.lower()]
    if len(names) == 1:
        return names[0]
    if not names:
        return path.suffix
    content = load_json(path)
    if isinstance(content, dict):
        return "motionpro" if motionpro.KEY in content else "json"
    return "kjnodes"


__all__ = ["FORMATS", "BenchItem", "Format", "bench_items", "read_tracks", "write_tracks"]
