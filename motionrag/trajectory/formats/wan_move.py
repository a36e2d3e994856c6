"""Wan-Move's pair of files: `…tracks.npy` `(1, t, n, 2)` in pixels and `…visibility.npy` `(1, t, n)`.

Neither says how large the image is. The second file lies beside the first, with "visibility" for "tracks" in its name.
"""

from pathlib import Path

import numpy as np
from einops import rearrange

from motionrag.trajectory.formats.files import Canvas, build_tracks, canvas_of
from motionrag.trajectory.tracks import Tracks

FPS = 16


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read both files; `canvas` is the image's height and width."""
    beside = visibility_path(path)
    if not beside.is_file():
        raise ValueError(f"{path} needs its visibility in {beside.name} beside it.")
    points, visible = _load(path), _load(beside)
    if points.ndim != 4 or points.shape[0] != 1 or points.shape[3] != 2:
        raise ValueError(f"{path} holds {points.shape}; Wan-Move's tracks are (1, t, n, 2).")
    if visible.size != points[..., 0].size or visible.shape[:3] != points.shape[:3]:
        raise ValueError(f"{beside} holds {visible.shape}; for these tracks it must be {points.shape[:3]}.")
    size = canvas_of(path, canvas, None)
    seen = visible.reshape(points.shape[:3]) > 0.5
    return build_tracks(
        path, list(rearrange(points, "1 t n xy -> n t xy")), size, visible=rearrange(seen, "1 t n -> n t"), fps=FPS
    )


def write(path: Path, tracks: Tracks) -> None:
    """Write both files; tracks without visibility are visible."""
    points = np.array([way.points for way in tracks.trajectories], np.float32)
    visible = np.ones(points.shape[:2], bool) if tracks.visible is None else np.array(tracks.visible, bool)
    np.save(path, rearrange(points, "n t xy -> 1 t n xy"))
    np.save(visibility_path(path), rearrange(visible, "n t -> 1 t n"))


def visibility_path(path: Path) -> Path:
    """The second file's name.

    Args:
        path: the file of the tracks.

    Returns:
        The file of the visibility.

    Raises:
        ValueError: if "tracks" or "track" is no part of the name.
    """
    for word in ("tracks", "track"):
        if word in path.stem:
            return path.with_name(path.name.replace(word, "visibility"))
    raise ValueError(f"{path} needs 'tracks' in its name, for the visibility lies beside it as 'visibility'.")


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no plain npy file ({error}).") from error
