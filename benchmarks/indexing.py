"""`python benchmarks/indexing.py CLIPS --captions CLIPS.csv`: indexing against decoding alone and encoding alone.

All three run on the same clips in turn, several times; the figures are medians in clips per second of wall time. The
best that indexing can reach is the slower of the other two, since decoding goes on while the encoders work.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from motionrag.database import MotionDatabase
from motionrag.database.build import ENCODE_BATCH
from motionrag.database.sources import list_clips
from motionrag.decoding import decode_clips
from motionrag.encoder import MotionEncoder
from motionrag.video import DecodedClip


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Print one line for each of the three, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips")
    parser.add_argument("--captions")
    parser.add_argument("--encoder", default="pocket")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    clips = list_clips(options.clips, captions=options.captions).clips
    encoder = MotionEncoder.from_pretrained(options.encoder)
    decoded = [
        result.frames
        for _, result in decode_clips(clips, num_workers=options.workers)
        if isinstance(result, DecodedClip)
    ]

    def decode() -> None:
        for _ in decode_clips(clips, num_workers=options.workers):
            pass

    def encode() -> None:
        for start in range(0, len(decoded), ENCODE_BATCH):
            encoder.encode_frames(decoded[start : start + ENCODE_BATCH])

    def index() -> None:
        with tempfile.TemporaryDirectory() as folder:
            database = MotionDatabase.create(Path(folder) / "db", encoder=encoder)
            report = database.add(options.clips, captions=options.captions, num_workers=options.workers, progress=False)
            assert report.added == len(decoded)

    encode()  # the first call loads the encoders
    times: dict[str, list[float]] = {"decode": [], "encode": [], "index": []}
    for _ in range(options.repeats):
        for name, action in (("decode", decode), ("encode", encode), ("index", index)):
            times[name].append(seconds(action))
    rates = {name: len(decoded) / statistics.median(values) for name, values in times.items()}
    for name, rate in rates.items():
        print(f"{name:8} {rate:7.1f} clips/s")
    print(f"index / slower of decode and encode: {rates['index'] / min(rates['decode'], rates['encode']):.2f}")


if __name__ == "__main__":
    main()
