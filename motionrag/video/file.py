"""What a video file says about itself: its header (`probe`) and the times of its frames (`read_timeline`).

Nothing here turns pictures into arrays; that is `readers.py`. Only PyAV is used, whichever reader decodes.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# 16 frames of 8K are 1.7 GB; a header that asks for more is taken for a mistake or an attack.
MAX_SIDE = 8192
MAX_PIXELS = 8192 * 4320
# Wider than any film; a 10 000 x 10 header is refused before a frame is decoded.
MAX_ASPECT = 20
# Manifests round times to milliseconds, so a frame this close before a limit counts as on it.
TIME_TOLERANCE_S = 0.001


class VideoError(ValueError):
    """A video that cannot be read or written, in one sentence that names the file and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """The header of a video file.

    Attributes:
        container: FFmpeg's names of the format, such as `mov,mp4,m4a,3gp,3g2,mj2`.
        codec: FFmpeg's name, such as `h264` or `av1`.
        width: pixels, upright (after `rotation`); non-square pixels are not stretched.
        height: pixels, upright.
        fps: average frames per second.
        duration_s: seconds, or None where the file does not say.
        num_frames: frames as stated by the file, or None where it does not say.
        rotation: degrees clockwise by which stored frames are turned to stand upright: 0, 90, 180 or 270.
    """

    container: str
    codec: str
    width: int
    height: int
    fps: float
    duration_s: float | None
    num_frames: int | None
    rotation: int


@dataclass(frozen=True)
class Timeline:
    """The frames of a span in order of presentation, and the packets that must be decoded to see them.

    Attributes:
        pts: presentation times of the frames in the span, in ticks, rising: int64 `(t,)`.
        tick_s: seconds per tick.
        origin: ticks at which the video starts.
        last_duration_s: how long the last frame of the span stays, seconds.
        seek_pts: where reading starts: ticks, or None for the beginning of the file.
        packet_pts: ticks of every packet read, in the order of the file: int64 `(p,)`.
        packet_is_key: whether decoding can start at the packet: bool `(p,)`.
    """

    pts: np.ndarray
    tick_s: float
    origin: int
    last_duration_s: float
    seek_pts: int | None
    packet_pts: np.ndarray
    packet_is_key: np.ndarray

    @property
    def times_s(self) -> np.ndarray:
        """Seconds from the first frame of the file: float64 `(t,)`."""
        return (self.pts - self.origin) * self.tick_s

    @property
    def is_constant_rate(self) -> bool:
        """Whether all frames last equally long, up to the rounding of the container's clock."""
        intervals = np.diff(self.pts)
        usual = np.median(intervals)
        return bool(np.all(np.abs(intervals - usual) <= max(2, 0.1 * usual)))

    @property
    def has_open_groups(self) -> bool:
        """Whether a picture is shown before the keyframe that precedes it in the file, as x265 arranges."""
        return _has_open_groups(self.packet_pts, self.packet_is_key)


@contextmanager
def open_video(uri: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the file with PyAV; what FFmpeg raises in the block becomes a VideoError."""
    import av

    path = _local_path(uri)
    try:
        with av.open(path, metadata_errors="replace") as container:
            stream = _video_stream(container, uri)
            # Concealed damage must not pass for a picture.
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{uri} cannot be read as a video: {error.strerror}.") from error


def probe(uri: str | os.PathLike[str]) -> VideoInfo:
    """Read the header and the first frame, which carries the rotation.

    Args:
        uri: path of a local file.

    Returns:
        What the file says about itself.

    Raises:
        VideoError: for a file that is missing, empty, no video, damaged, or beyond the size limits.
    """
    uri = os.fspath(uri)
    with open_video(uri) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{uri} holds no frame.")
        duration_s = _stated_duration_s(container, stream)
        # FFmpeg counts counter-clockwise; angles other than right ones do not occur in practice.
        rotation = round(-first.rotation / 90) * 90 % 360
        width, height = (first.height, first.width) if rotation in (90, 270) else (first.width, first.height)
        return VideoInfo(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            width=width,
            height=height,
            fps=_average_fps(stream, uri),
            duration_s=duration_s,
            num_frames=stream.frames or None,
            rotation=rotation,
        )


def read_timeline(uri: str, start_s: float, end_s: float | None) -> Timeline:
    """List the frames shown in [start_s, end_s) from the packets alone: nothing is decoded, little is kept.

    Args:
        uri: path of a local file.
        start_s: seconds from the first frame of the file.
        end_s: seconds, or None for the end of the file.

    Returns:
        The frames of the span, at least two.

    Raises:
        VideoError: if the file is cut short, has no timestamps, or shows fewer than two frames in the span.
    """
    if start_s > 0:
        with suppress(_MustReadFromStart):
            return _scan(uri, start_s, end_s, seek=True)
    return _scan(uri, start_s, end_s, seek=False)


class _MustReadFromStart(Exception):
    """Decoding cannot begin where seeking ended."""


def _scan(uri: str, start_s: float, end_s: float | None, *, seek: bool) -> Timeline:
    """Demux the span, from the keyframe before it or from the start of the file."""
    end_s = math.inf if end_s is None else end_s
    with open_video(uri) as (container, stream):
        tick_s = float(stream.time_base or 0)
        origin = stream.start_time or 0
        seek_pts = origin + math.floor(start_s / tick_s) if seek else None
        if seek_pts is not None and not seek_to(container, stream, seek_pts):
            raise _MustReadFromStart
        rows, reached_end = _packet_rows(container, stream, uri, origin + end_s / tick_s)
        if not rows and not seek:
            raise VideoError(f"{uri} is cut short or empty: not one frame could be found.")
        pts, durations, is_key, is_shown = np.array(rows, np.int64).reshape(-1, 4).T
        if seek_pts is not None and not _can_start_here(pts, is_key, seek_pts):
            raise _MustReadFromStart
        if reached_end:
            _require_complete(container, stream, uri, pts, durations, end_s, whole=not seek)
        # Pictures in front of the first keyframe lean on ones that are not there.
        times = (pts - origin) * tick_s + TIME_TOLERANCE_S
        visible = is_shown.astype(bool) & (pts >= pts[np.argmax(is_key)])
        shown = np.flatnonzero(visible & (times >= start_s) & (times < end_s))
        if len(shown) < 2:
            span = f"from {start_s:g} s to " + ("its end" if end_s == math.inf else f"{end_s:g} s")
            found = "one frame" if len(shown) else "no frame"
            raise VideoError(f"{uri} shows {found} {span}; at least two are needed to see motion.")
        shown = shown[np.argsort(pts[shown])]
        usual = int(np.median(np.diff(pts[shown])))
        return Timeline(
            pts=pts[shown],
            tick_s=tick_s,
            origin=origin,
            last_duration_s=(int(durations[shown[-1]]) or usual) * tick_s,
            seek_pts=seek_pts,
            packet_pts=pts,
            packet_is_key=is_key.astype(bool),
        )


def _can_start_here(packet_pts: np.ndarray, packet_is_key: np.ndarray, wanted_pts: int) -> bool:
    starts_with_key = len(packet_pts) > 0 and packet_is_key[0] and packet_pts[0] <= wanted_pts
    return bool(starts_with_key) and not _has_open_groups(packet_pts, packet_is_key)


def _has_open_groups(packet_pts: np.ndarray, packet_is_key: np.ndarray) -> bool:
    key_pts = np.where(packet_is_key, packet_pts, np.iinfo(np.int64).min)
    return bool(np.any(packet_pts < np.maximum.accumulate(key_pts)))


def seek_to(container: InputContainer, stream: VideoStream, pts: int) -> bool:
    """Move to the keyframe at or before `pts`; False where the container cannot seek."""
    import av

    try:
        container.seek(pts, stream=stream)
    except av.FFmpegError:
        return False
    return True


def _packet_rows(
    container: InputContainer, stream: VideoStream, uri: str, end_pts: float
) -> tuple[list[tuple[int, int, bool, bool]], bool]:
    """(pts, duration, is keyframe, is shown) of the packets of the span, and whether the file ended in it."""
    rows: list[tuple[int, int, bool, bool]] = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise VideoError(f"{uri} has no timestamps; put it into a container such as MP4 first.")
        if packet.is_corrupt:
            raise VideoError(f"{uri} is damaged or cut short: only {len(rows)} frames are complete.")
        # A packet is never shown before it is decoded, so nothing of the span can follow.
        if packet.dts is not None and packet.dts >= end_pts:
            return rows, False
        rows.append((packet.pts, packet.duration or 0, packet.is_keyframe, _is_shown(packet, stream)))
    return rows, True


def _is_shown(packet: Any, stream: VideoStream) -> bool:
    # VP8 stores frames that only later ones refer to as packets of their own; RFC 6386, 9.1: bit 4 is show_frame.
    is_hidden = stream.codec_context.name == "vp8" and not bytes(packet)[0] >> 4 & 1
    return not (is_hidden or packet.is_discard)


def _require_complete(
    container: InputContainer,
    stream: VideoStream,
    uri: str,
    pts: np.ndarray,
    durations: np.ndarray,
    end_s: float,
    *,
    whole: bool,
) -> None:
    """Compare what the file holds with what its header promises, for demuxers end a cut file without a word."""
    if whole and len(pts) < stream.frames:
        raise VideoError(f"{uri} is cut short: it holds {len(pts)} of {stream.frames} frames.")
    stated_s = _stated_duration_s(container, stream)
    if stated_s is None or len(pts) < 2:
        return
    tick_s = float(stream.time_base or 0)
    # Some containers count the duration from time zero, some from the first frame: be content with either.
    reached_s = float((pts + durations).max() - min(0, stream.start_time or 0)) * tick_s
    promised_s = min(end_s, stated_s)
    if promised_s - reached_s > 2 * float(np.diff(np.sort(pts)).max()) * tick_s:
        raise VideoError(f"{uri} is cut short: it holds {reached_s:.2f} s of {stated_s:.2f} s.")


def _stated_duration_s(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds of the video stream as the header says; of the container if it holds nothing else."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Matroska and WebM: "00:00:07.500000000"; what is written otherwise says nothing.
    if stated := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, stated.groups())
        return 3600 * hours + 60 * minutes + seconds
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6
    return None


def _average_fps(stream: VideoStream, uri: str) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError(f"{uri} does not say how many frames it shows per second.")
    return float(rate)


def _video_stream(container: InputContainer, uri: str) -> VideoStream:
    from av.stream import Disposition

    # The cover picture of a song is stored as a video stream.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise VideoError(f"{uri} has no video stream, only {kinds}.")
    width, height = streams[0].codec_context.width, streams[0].codec_context.height
    if min(width, height) < 1:
        raise VideoError(f"{uri} is damaged: its header states no picture size.")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(f"{uri} is {width} x {height} pixels; the limit is {MAX_SIDE} a side, {MAX_PIXELS} in all.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise VideoError(f"{uri} is {width} x {height} pixels; the limit is {MAX_ASPECT} times wider than high.")
    return streams[0]


def _local_path(uri: str) -> str:
    if "://" in uri:
        raise VideoError(f"{uri} is not a local file; download it first.")
    try:
        status = os.stat(uri)
    except (OSError, ValueError) as error:
        raise VideoError(f"{uri} cannot be opened: {getattr(error, 'strerror', None) or error}.") from error
    # A pipe or device would be waited for without end.
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{uri} is not a regular file.")
    if not status.st_size:
        raise VideoError(f"{uri} is empty (zero bytes).")
    # FFmpeg takes the part before a colon for a protocol.
    return os.path.abspath(uri)
