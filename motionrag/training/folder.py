"""Clips of one's own for training: a folder or manifest, as for indexing, cut to the backbone's frames and size."""

import hashlib
import logging
import os
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from motionrag.database.sources import list_clips
from motionrag.encoders.preprocessing import center_crop, frames_to_tensor, resize
from motionrag.video import Clip, VideoError, VideoInfo, probe, read_clip

logger = logging.getLogger(__name__)


class ClipFolder(Dataset):
    """Clips of video files. Of a clip that is longer than the backbone's, the middle is taken.

    Every file is opened at the start, so that a bad one is found before hours of training. A file that turns out to
    be damaged further inside stops the training with its name; none is ever replaced by another.

    Args:
        source: Folder, manifest or video, as `motionrag index` takes it.
        captions: Manifest with captions for the folder.
        num_frames: Frames of a sample.
        height: Pixels.
        width: Pixels.
        fps: At which frames are taken, frames per second.
        leave_out_unreadable: Warn of files that cannot be opened and go on without them, instead of stopping.
    """

    def __init__(
        self,
        source: str,
        *,
        captions: str | None = None,
        num_frames: int,
        height: int,
        width: int,
        fps: float = 8.0,
        leave_out_unreadable: bool = False,
    ) -> None:
        self.num_frames, self.fps, self.size = num_frames, fps, (height, width)
        listing = list_clips(source, captions=captions)
        bad = [f"{failure.uri}: {failure.reason}" for failure in listing.failures]
        self.clips: list[Clip] = []
        self.spans: list[Clip] = []
        for clip in listing.clips:
            try:
                self.spans.append(_middle(clip, probe(clip.uri), num_frames, fps))
                self.clips.append(clip)
            except VideoError as error:
                bad.append(str(error))
        if bad:
            message = f"{len(bad)} of {len(bad) + len(self.clips)} clips of {source} cannot be read: {'; '.join(bad)}"
            if not leave_out_unreadable:
                raise ValueError(f"{message}. Remove them, or set leave_out_unreadable.")
            logger.warning("%s. They are left out.", message)
        if not self.clips:
            raise ValueError(f"{source} holds no clip to train on.")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def texts(self) -> list[str]:
        """The captions."""
        return [clip.caption for clip in self.clips]

    @property
    def sources(self) -> list[str]:
        """The video that each clip was cut from: what the manifest says, else the file."""
        return [clip.source or os.path.realpath(clip.uri) for clip in self.clips]

    @property
    def identity(self) -> str:
        """Names the samples: files by name, size and time of change, spans, captions, frames and pixels."""
        files = [(each.uri, os.stat(each.uri)) for each in self.spans]
        rows = [
            (uri, file.st_size, file.st_mtime_ns, span.start_s, span.end_s, span.caption)
            for (uri, file), span in zip(files, self.spans, strict=True)
        ]
        return hashlib.sha256(repr((rows, self.num_frames, self.fps, self.size)).encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip.

        Args:
            index: Which.

        Returns:
            `video` `(t c h w)` in [-1, 1], `caption` and `index`.
        """
        span = self.spans[index]
        frames = frames_to_tensor(read_clip(span, num_frames=self.num_frames, in_worker=True).frames)
        return {"video": _fill(frames, self.size), "caption": span.caption, "index": index}


def _middle(clip: Clip, info: VideoInfo, num_frames: int, fps: float) -> Clip:
    """The part of a clip that its frames are taken from: first and last frame lie (n - 1)/fps seconds apart."""
    end_s = clip.end_s if clip.end_s is not None else info.duration_s
    wanted_s = (num_frames - 1) / fps + 1 / info.fps  # a span ends before its last frame's successor
    if end_s is None or end_s - clip.start_s <= wanted_s:
        return clip
    frames_before = int((end_s - clip.start_s - wanted_s) / 2 * info.fps)
    start_s = clip.start_s + frames_before / info.fps
    slack_s = 1e-3 / info.fps  # so that rounding neither loses the first frame nor takes one more
    return Clip(clip.uri, max(0.0, start_s - slack_s), start_s + wanted_s - slack_s, clip.caption, source=clip.source)


def _fill(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames `(t c h w)` until they cover the size, and cut out the centre."""
    height, width = frames.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    return center_crop(resize((frames + 1) / 2, covering, "bilinear"), size) * 2 - 1
