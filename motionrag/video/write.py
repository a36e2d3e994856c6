"""Write frames to an MP4 or GIF file, at exactly their size and frame rate. Reading is in `clip.py`."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from motionrag.video.file import VideoError

if TYPE_CHECKING:
    from PIL.Image import Image


def write_video(
    path: str | os.PathLike[str], frames: "np.ndarray | Sequence[Image]", fps: float, *, full_colour: bool = False
) -> Path:
    """Write a video under a temporary name and rename it, so that a reader never meets half a file.

    MP4 is H.264 at a visually lossless rate: 4:2:0 colour, which every player shows, or 4:4:4 if a side is odd,
    for 4:2:0 would have to change the size. GIF has up to 256 colours a frame, and its clock counts 1/100 s.

    Args:
        path: the file to write, `.mp4` or `.gif`; its folder must exist, an old file is replaced.
        frames: uint8 `(t, h, w, 3)`, or float `(t, h, w, 3)` in [0, 1], or PIL images of one size.
        fps: frames per second.
        full_colour: MP4 in 4:4:4 at a higher rate, for pictures so small that half the resolution of colour shows.
            Browsers and FFmpeg play it, Apple's players do not. GIF is what it is.

    Returns:
        The path.

    Raises:
        VideoError: for another suffix, another shape, or values out of range; or if the encoder or the disk refuses.
    """
    import av

    path = Path(path)
    writers: dict[str, Callable[[Path, np.ndarray, float], None]] = {
        ".mp4": partial(_write_mp4, full_colour=full_colour),
        ".gif": _write_gif,
    }
    if path.suffix.lower() not in writers:
        raise VideoError(f"{path} has the suffix {path.suffix!r}; write_video knows {' and '.join(writers)}.")
    if not (np.isfinite(fps) and fps > 0):
        raise VideoError(f"{path} cannot be written at {fps} frames per second; use a number above 0.")
    pictures = _to_uint8(frames, path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writers[path.suffix.lower()](temporary, pictures, fps)
        os.replace(temporary, path)
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _to_uint8(frames: "np.ndarray | Sequence[Image]", path: Path) -> np.ndarray:
    if not isinstance(frames, np.ndarray):
        sizes = sorted({image.size for image in frames})
        if len(sizes) != 1:
            raise VideoError(f"{path} needs one or more images of one size; these are {sizes}.")
        frames = np.stack([np.asarray(image.convert("RGB")) for image in frames])
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise VideoError(f"{path} needs frames of shape (t, h, w, 3); these are {frames.shape}.")
    if frames.dtype == np.uint8:
        return frames
    # The comparison is false for NaN too.
    if not np.issubdtype(frames.dtype, np.floating) or not (frames.min() >= 0 and frames.max() <= 1):
        raise VideoError(f"{path} needs uint8 frames or floats in [0, 1]; these are {frames.dtype} of another range.")
    return (frames * 255).round().astype(np.uint8)


def _write_mp4(path: Path, pictures: np.ndarray, fps: float, *, full_colour: bool) -> None:
    import av

    height, width = pictures.shape[1:3]
    rate = "8" if full_colour else "15"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        # With several threads, and on AVX-512 with mbtree, x264 writes other bytes for the same frames from run to run.
        options = {"crf": rate, "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if full_colour or width % 2 or height % 2 else "yuv420p"
        # What swscale computes unless told otherwise; written down, so that players do not guess by size.
        stream.codec_context.colorspace = 6  # BT.601
        stream.codec_context.color_range = 1  # limited
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, pictures: np.ndarray, fps: float) -> None:
    # Pillow picks the colours; its own GIF writer drops frames equal to the one before, FFmpeg's does not.
    import av
    from PIL import Image

    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "pal8"
        for picture in pictures:
            image = Image.fromarray(picture).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
            colours = np.zeros((256, 4), np.uint8)
            rgb = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            # FFmpeg's palette is 0xAARRGGBB in memory order a, r, g, b.
            colours[: len(rgb), 0], colours[: len(rgb), 1:] = 255, rgb
            # PyAV's annotations leave out its (indices, palette) form of pictures.
            frame = av.VideoFrame.from_ndarray((np.asarray(image), colours), format="pal8")  # type: ignore[arg-type]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
