"""Small video files with moving content, written by the tests that need them. No test lives here."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TICKS_PER_SECOND = 1000


def moving_frames(num_frames: int = 24, size: tuple[int, int] = (64, 48), *, seed: int = 0) -> np.ndarray:
    """A bright square that moves to the right over a sliding pattern: uint8 `(t, h, w, 3)`, no frame twice.

    Args:
        num_frames: frames to draw.
        size: width and height in pixels.
        seed: another seed gives another pattern and colour.
    """
    width, height = size
    generator = np.random.default_rng(seed)
    phase, colour = generator.uniform(0, 6.28, 3), generator.integers(120, 256, 3)
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    side = max(2, min(size) // 3)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        frames[index] = 100 + 60 * np.sin(x / 9 + index / 3 + phase) * np.cos(y / 7)
        left = round((width - side) * index / max(1, num_frames - 1))
        frames[index, height // 3 : height // 3 + side, left : left + side] = colour
    return frames


def make_video(
    path: str | os.PathLike[str],
    num_frames: int = 24,
    size: tuple[int, int] = (64, 48),
    fps: int = 8,
    codec: str = "libx264",
    *,
    times: Sequence[float] | None = None,
    frames: np.ndarray | None = None,
    options: dict[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """Write a video file with PyAV and return its path.

    Args:
        path: where; the suffix chooses the container.
        num_frames: length in frames.
        size: width and height in pixels, even.
        fps: frames per second.
        codec: FFmpeg's name of the encoder.
        times: presentation time of each frame in seconds, for a varying frame rate; default: every 1 / fps.
        frames: the pictures, uint8 `(t, h, w, 3)`, in place of `moving_frames`.
        options: encoder options, such as `{"g": "4"}`.
        seed: passed to `moving_frames`.
    """
    frames = moving_frames(num_frames, size, seed=seed) if frames is None else frames
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, TICKS_PER_SECOND)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * TICKS_PER_SECOND), Fraction(1, TICKS_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def make_audio(path: str | os.PathLike[str], seconds: float = 0.5) -> Path:
    """Write a file that holds sound and no video."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = np.sin(np.arange(int(8000 * seconds)) / 5).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def set_rotation(path: str | os.PathLike[str], degrees: int) -> None:
    """Write a display rotation (90, 180 or 270 degrees clockwise) into the track header of an MP4 file."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    content = bytearray(Path(path).read_bytes())
    # ISO 14496-12, 8.3.2: in version 0 of `tkhd` the 3x3 matrix starts 44 bytes after the four letters.
    start = content.index(b"tkhd") + 44
    for offset, value in ((0, cosine), (4, sine), (12, -sine), (16, cosine)):
        content[start + offset : start + offset + 4] = (value << 16).to_bytes(4, "big", signed=True)
    Path(path).write_bytes(content)
