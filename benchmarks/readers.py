"""`python benchmarks/readers.py CLIPS`: PyAV against decord on the same clips, in time, pixels and reported damage.

Each clip is read by both in turn (16 frames, one thread, as in a decoding process); the figures are the median of
decord's time over PyAV's, whether all pixels are equal, and how many single flipped bits each of them reports.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from motionrag.database.sources import list_clips
from motionrag.video import Clip, VideoError, read_clip

READERS = ("pyav", "decord")


def main() -> None:
    """Print one line for each of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips")
    parser.add_argument("--flips", type=int, default=60)
    options = parser.parse_args()
    clips = list_clips(options.clips).clips

    ratios, equal = [], True
    for clip in clips:
        seconds, frames = {}, {}
        for reader in READERS:
            read_clip(clip, reader=reader, in_worker=True)  # fills caches
            start = time.perf_counter()
            frames[reader] = read_clip(clip, reader=reader, in_worker=True).frames
            seconds[reader] = time.perf_counter() - start
        ratios.append(seconds["decord"] / seconds["pyav"])
        equal &= np.array_equal(frames["pyav"], frames["decord"])
    print(f"time of decord / time of PyAV: {statistics.median(ratios):.2f} (median of {len(clips)} clips)")
    print(f"all pixels equal: {equal}")

    chance = random.Random(0)
    reported = dict.fromkeys(READERS, 0)
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder) / "damaged.mp4"
        for _ in range(options.flips):
            content = bytearray(Path(chance.choice(clips).uri).read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            damaged.write_bytes(content)
            for reader in READERS:
                try:
                    read_clip(Clip(str(damaged)), reader=reader, in_worker=True)
                except VideoError:
                    reported[reader] += 1
    print(f"flipped bits reported, of {options.flips}: {reported}")


if __name__ == "__main__":
    main()
