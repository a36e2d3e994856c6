"""Decode chosen frames of a span to RGB: one function per reader, all with the same signature and the same pixels.

Each takes the file, its header, the timeline of the span and the sorted, distinct positions of the wanted
frames in it, and yields the upright pictures, uint8 `(h, w, 3)`, in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from motionrag.video.file import Timeline, VideoError, VideoInfo, open_video, seek_to

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ReadFrames = Callable[[str, VideoInfo, Timeline, np.ndarray, int], Iterator[np.ndarray]]

# In other containers decord and torchcodec fail, or count frames from another one than the first.
INDEXED_CONTAINERS = frozenset({"mp4", "mov", "matroska", "webm"})
# decord's own FFmpeg is of 2021: with other codecs it fails or hangs.
DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4"})


def read_with_pyav(
    uri: str, info: VideoInfo, timeline: Timeline, positions: np.ndarray, num_threads: int
) -> Iterator[np.ndarray]:
    """Decode with PyAV, which ships its own FFmpeg; only the groups of pictures that hold a wanted frame."""
    wanted = set(timeline.pts[positions].tolist())
    is_needed = _needed_packets(timeline, sorted(wanted))
    last_pts = None
    found = 0
    with open_video(uri) as (container, stream):
        stream.thread_type, stream.thread_count = "AUTO", num_threads
        if timeline.seek_pts is not None:
            seek_to(container, stream, timeline.seek_pts)
        for frame in _decode_packets(container, stream, is_needed):
            if frame.pts is None or (last_pts is not None and frame.pts <= last_pts):
                raise VideoError(f"{uri} has timestamps out of order; put it into a container such as MP4 first.")
            last_pts = frame.pts
            if frame.is_corrupt:
                raise VideoError(f"{uri} is damaged at {(frame.pts - timeline.origin) * timeline.tick_s:.2f} s.")
            if frame.pts in wanted:
                found += 1
                picture = frame.to_ndarray(format="rgb24")
                yield np.ascontiguousarray(np.rot90(picture, k=-info.rotation // 90))
    if found < len(wanted):
        raise VideoError(f"{uri} is damaged: decoded {found} of {len(wanted)} frames.")


def _needed_packets(timeline: Timeline, wanted_pts: list[int]) -> np.ndarray:
    """Which packets must be decoded to see the wanted frames: bool `(p,)`, in the order of the file."""
    pts = timeline.packet_pts
    ordinal_of = {int(value): ordinal for ordinal, value in enumerate(pts)}
    is_needed = np.zeros(len(pts), bool)
    if timeline.has_open_groups:
        # A decoder that starts at such a keyframe misses references and reports damage.
        is_needed[: max(ordinal_of[value] for value in wanted_pts) + 1] = True
        return is_needed
    keys = np.flatnonzero(timeline.packet_is_key)
    for value in wanted_pts:
        last_key = keys[max(0, np.searchsorted(keys, ordinal_of[value], side="right") - 1)] if len(keys) else 0
        is_needed[last_key : ordinal_of[value] + 1] = True
    return is_needed


def _decode_packets(container: InputContainer, stream: VideoStream, is_needed: np.ndarray) -> Iterator[VideoFrame]:
    """Feed the decoder the needed packets only, emptying it at every gap."""
    was_needed = False
    last_needed = int(np.flatnonzero(is_needed)[-1])
    packets = (packet for packet in container.demux(stream) if packet.size)
    for needed, packet in zip(is_needed[: last_needed + 1], packets, strict=False):
        if needed:
            yield from stream.decode(packet)
        elif was_needed:
            yield from stream.decode(None)
            stream.codec_context.flush_buffers()
        was_needed = bool(needed)
    yield from stream.decode(None)


def read_with_decord(
    uri: str, info: VideoInfo, timeline: Timeline, positions: np.ndarray, num_threads: int
) -> Iterator[np.ndarray]:
    """Decode with decord: unmaintained, able to hang, and silent about damage it can conceal."""
    import decord

    if not decord_reads(info, timeline):
        raise VideoError(f"{uri} is not for decord ({info.codec} in {info.container}); use reader='auto'.")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # fault_tol: with a larger share of unreadable frames decord raises, where it would repeat the last good one.
        reader = decord.VideoReader(uri, num_threads=num_threads, fault_tol=1e-6)
        stored_s = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        wanted_s = timeline.pts[positions] * timeline.tick_s
        indices = np.abs(stored_s[None, :] - wanted_s[:, None]).argmin(axis=1)
        pictures = reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError) as error:
        raise VideoError(f"{uri} cannot be decoded by decord: {str(error).strip().splitlines()[0]}") from error
    if np.abs(stored_s[indices] - wanted_s).max() > 0.5 / info.fps:
        raise VideoError(f"{uri} is damaged: decord finds only {len(stored_s)} frames.")
    yield from pictures


def decord_reads(info: VideoInfo, timeline: Timeline) -> bool:
    """Whether decord is known to give the right frames: see the sets above; and it turns no picture upright."""
    return (
        info.codec in DECORD_CODECS
        and _has_index(info)
        and info.rotation == 0
        and timeline.is_constant_rate
        and timeline.origin == 0
        and not timeline.has_open_groups
    )


def read_with_torchcodec(
    uri: str, info: VideoInfo, timeline: Timeline, positions: np.ndarray, num_threads: int
) -> Iterator[np.ndarray]:
    """Decode with torchcodec, which turns frames upright by itself since 0.11."""
    from torchcodec.decoders import VideoDecoder

    if not _has_index(info):
        raise VideoError(f"{uri} is not for torchcodec ({info.container}); use reader='auto'.")

    # Half a tick later, so that rounding cannot ask for the frame before.
    seconds = (timeline.pts[positions] + 0.5) * timeline.tick_s
    try:
        decoder = VideoDecoder(uri, dimension_order="NHWC", num_ffmpeg_threads=num_threads)
        yield from decoder.get_frames_played_at(seconds.tolist()).data.numpy()
    except (RuntimeError, IndexError) as error:
        raise VideoError(f"{uri} cannot be decoded by torchcodec: {str(error).strip().splitlines()[0]}") from error


def _has_index(info: VideoInfo) -> bool:
    return not INDEXED_CONTAINERS.isdisjoint(info.container.split(","))


READERS: dict[str, ReadFrames] = {
    "torchcodec": read_with_torchcodec,
    "decord": read_with_decord,
    "pyav": read_with_pyav,
}

_PACKAGES = {"torchcodec": "torchcodec", "decord": "decord", "pyav": "av", "auto": "av"}


def require_reader(reader: str) -> None:
    """Make sure that a reader exists and is installed, before any file is blamed.

    Args:
        reader: Name of a reader, or `auto`.

    Raises:
        ValueError: If there is no such reader, or its package is missing.
    """
    if reader not in _PACKAGES:
        raise ValueError(f"There is no video reader {reader!r}; choose from auto, {', '.join(READERS)}.")
    if find_spec(_PACKAGES[reader]) is None:
        raise ValueError(f"The video reader {reader!r} is not installed: pip install {_PACKAGES[reader]}")
