"""`Clip`, a span of a video file, and `read_clip`, a few evenly spaced frames of it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from motionrag.video.file import Timeline, VideoError, VideoInfo, probe, read_timeline
from motionrag.video.readers import READERS, require_reader

_DISTRIBUTIONS = {"torchcodec": "torchcodec", "decord": "decord", "pyav": "av"}


@dataclass(frozen=True)
class Clip:
    """A span of a video file. Reading it takes `read_clip`; making one touches no file.

    Attributes:
        uri: path of the video file; any `os.PathLike` is accepted and kept as a string.
        start_s: start of the span in seconds from the first frame.
        end_s: end of the span in seconds, exclusive; None for the end of the file.
        caption: what happens in the clip.
        licence: terms under which the clip may be used.
        source: where the clip comes from; clips cut from one video share it.
        metadata: anything else that is known of the clip; left out of equality and hash.
    """

    uri: str
    start_s: float = 0.0
    end_s: float | None = None
    caption: str = ""
    licence: str = ""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", os.fspath(self.uri))
        object.__setattr__(self, "caption", self.caption.strip())  # blank is as good as none
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise ValueError(f"start_s of {self.uri} is {self.start_s}; it must be zero or more seconds.")
        if self.end_s is not None and not (math.isfinite(self.end_s) and self.end_s > self.start_s):
            raise ValueError(
                f"end_s of {self.uri} is {self.end_s}; it must be greater than start_s ({self.start_s}) or None."
            )


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """Frames of a clip, and what is to be known of how they were read.

    Attributes:
        frames: uint8 `(t, h, w, 3)` RGB, upright.
        fps: average frames per second of the file in the span, not of `frames`.
        num_frames: frames that the file shows in the span.
        start_s: time of the first frame of the span, seconds.
        end_s: time at which the last frame of the span ends, seconds.
        width: pixels.
        height: pixels.
        short: the span has fewer frames than were asked for, so some are repeated.
        still_share: share of neighbours in `frames` that are equal, 0 to 1, repeats of `short` clips not
            counted: 1 is a frozen picture.
        reader: name and version of the reader, such as `pyav 18.1.0`.
    """

    frames: np.ndarray
    fps: float
    num_frames: int
    start_s: float
    end_s: float
    width: int
    height: int
    short: bool
    still_share: float
    reader: str


def sample_indices(num_frames: int, count: int = 16) -> np.ndarray:
    """Positions of `count` evenly spaced frames, first and last included; short clips repeat frames.

    Args:
        num_frames: frames to choose from.
        count: frames wanted.

    Returns:
        Rising positions, int64 `(count,)`: `linspace(0, num_frames - 1, count)`, halves rounded to even.

    Raises:
        ValueError: if either number is less than one.
    """
    if num_frames < 1 or count < 1:
        raise ValueError(f"Cannot sample {count} of {num_frames} frames; both numbers must be at least 1.")
    # In whole numbers, for in floating point a half may come out a little more or less than one.
    steps = max(1, count - 1)
    whole, rest = np.divmod(np.arange(count, dtype=np.int64) * (num_frames - 1), steps)
    return whole + ((2 * rest > steps) | ((2 * rest == steps) & (whole % 2 == 1)))


def read_clip(clip: Clip, *, num_frames: int = 16, reader: str = "auto", in_worker: bool = False) -> DecodedClip:
    """Decode evenly spaced frames of a clip.

    Frames shown in [start_s, end_s) are sampled by index, or by time where the frame rate varies. A span that
    reaches past the end of the file ends there.

    Args:
        clip: what to read.
        num_frames: frames to sample.
        reader: `pyav`, `decord`, `torchcodec`, or `auto`, which means PyAV: it is as fast as decord, reads every
            format, and reports damage that the other two conceal. decord can hang for ever: ask for it only in a
            process that may be killed, as `decode_clips` does.
        in_worker: this process is one of many: decode in one thread.

    Returns:
        The frames and how they were read.

    Raises:
        VideoError: if the file is missing, no video, damaged, cut short, or shows fewer than two frames in the
            span.
        ValueError: if there is no reader of that name.
    """
    require_reader(reader)
    info = probe(clip.uri)
    timeline = read_timeline(clip.uri, clip.start_s, clip.end_s)
    # A clip shorter than asked for repeats frames: decode each once.
    positions, repeats = np.unique(_sample_positions(timeline, num_frames), return_counts=True)
    chosen = "pyav" if reader == "auto" else reader
    num_threads = 1 if in_worker else 0  # 0: as many as the reader likes
    pictures = list(READERS[chosen](clip.uri, info, timeline, positions, num_threads))
    _require_equal_sizes(pictures, info, clip.uri)
    still = [np.array_equal(*pair) for pair in pairwise(pictures)]
    return DecodedClip(
        frames=np.repeat(np.stack(pictures), repeats, axis=0),
        fps=_average_fps(info, timeline),
        num_frames=len(timeline.pts),
        start_s=float(timeline.times_s[0]),
        end_s=float(timeline.times_s[-1]) + timeline.last_duration_s,
        width=info.width,
        height=info.height,
        short=len(timeline.pts) < num_frames,
        still_share=float(np.mean(still)) if still else 0.0,
        reader=f"{chosen} {version(_DISTRIBUTIONS[chosen])}",
    )


def _sample_positions(timeline: Timeline, count: int) -> np.ndarray:
    if timeline.is_constant_rate:
        return sample_indices(len(timeline.pts), count)
    wanted = np.linspace(timeline.pts[0], timeline.pts[-1], count)
    return np.abs(timeline.pts[None, :] - wanted[:, None]).argmin(axis=1)


def _average_fps(info: VideoInfo, timeline: Timeline) -> float:
    """The header's exact rate, unless the frames of the span contradict it, as in files of varying rate."""
    num_intervals = len(timeline.pts) - 1
    measured_s = float(timeline.times_s[-1] - timeline.times_s[0])
    if abs(num_intervals / info.fps - measured_s) <= 2 * timeline.tick_s:
        return info.fps
    return num_intervals / measured_s


def _require_equal_sizes(pictures: list[np.ndarray], info: VideoInfo, uri: str) -> None:
    expected = (info.height, info.width, 3)
    for picture in pictures:
        if picture.shape != expected:
            height, width = picture.shape[:2]
            raise VideoError(f"{uri} changes its size from {info.width} x {info.height} to {width} x {height}.")
