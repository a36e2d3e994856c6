"""ATI's `.pth` files: `torch.save` of the bytes of an npz file with `array`, float32 `(n, 121, 1, 3)`.

The last axis is x, y, visible (1 or 0), all times 8; x and y in pixels of an image that the file does not name.
"""

import io
from pathlib import Path

import numpy as np
from einops import rearrange

from motionrag.trajectory.formats.files import Canvas, build_tracks, canvas_of
from motionrag.trajectory.tracks import Tracks

FRAMES, SCALE, FPS = 121, 8, 24


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read the file without running any code in it; `canvas` is the image's height and width."""
    array = _array(path)
    if array.ndim != 4 or array.shape[1:] != (FRAMES, 1, 3):
        raise ValueError(f"{path} holds an array {array.shape}; ATI's tracks are (n, {FRAMES}, 1, 3).")
    values = rearrange(array.astype(np.float64) / SCALE, "n t 1 c -> n t c")
    size = canvas_of(path, canvas, None)
    return build_tracks(path, list(values[..., :2]), size, visible=values[..., 2] > 0.5, fps=FPS)


def write(path: Path, tracks: Tracks) -> None:
    """Write tracks of 121 points."""
    import torch

    points = np.array([way.points for way in tracks.trajectories], np.float32)
    visible = np.ones(points.shape[:2]) if tracks.visible is None else np.array(tracks.visible)
    array = np.concatenate([points, visible[..., None]], -1, dtype=np.float32) * SCALE
    data = io.BytesIO()
    np.savez_compressed(data, array=rearrange(array, "n t c -> n t 1 c"))
    torch.save(data.getvalue(), path)


def _array(path: Path) -> np.ndarray:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return np.asarray(archive["array"])
    # Whatever torch, zip or numpy find wrong with a damaged or foreign file.
    except Exception as error:
        raise ValueError(f"{path} is no ATI file, a torch file with the bytes of an npz with 'array'.") from error
