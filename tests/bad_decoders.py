"""Decode functions that misbehave, for tests of the processes that run them. No test lives here."""

import ctypes
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from motionrag.video import Clip, DecodedClip, read_clip


def tell_process(clip: Clip, num_frames: int) -> DecodedClip:
    """Read, and give the process id as the reader."""
    return replace(read_clip(clip, num_frames=num_frames, in_worker=True), reader=str(os.getpid()))


def misbehave(clip: Clip, num_frames: int) -> DecodedClip:
    """Do what the caption says, or read."""
    if clip.caption == "hang":
        # PyDLL keeps the interpreter lock: nothing in this process can run, as when decord hangs.
        ctypes.PyDLL(None).sleep(120)
    elif clip.caption == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif clip.caption == "exit":
        os._exit(3)
    elif clip.caption == "memory":
        np.empty(2**56, np.uint8)
    elif clip.caption == "bug":
        raise KeyError("a fault of the decoder")
    elif clip.caption == "slow":
        time.sleep(0.6)
    return tell_process(clip, num_frames)


def note_process_and_hang(clip: Clip, num_frames: int) -> DecodedClip:
    """Write the process id beside the clip and hold the interpreter lock."""
    Path(clip.uri + ".pid").write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(120)
    return tell_process(clip, num_frames)
