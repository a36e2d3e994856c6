"""Video in and out: clips, reading evenly spaced frames, writing mp4 and gif.

`clip.py` is the entrance; `file.py` is what a file says about itself, `readers.py` decodes (PyAV, decord,
torchcodec), `write.py` encodes. No torch here: a worker that decodes must start at once.
"""

from motionrag.video.clip import Clip, DecodedClip, read_clip, sample_indices
from motionrag.video.file import VideoError, VideoInfo, probe
from motionrag.video.readers import require_reader
from motionrag.video.write import write_video

__all__ = [
    "Clip",
    "DecodedClip",
    "VideoError",
    "VideoInfo",
    "probe",
    "read_clip",
    "require_reader",
    "sample_indices",
    "write_video",
]
