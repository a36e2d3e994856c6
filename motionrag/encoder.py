"""The motion encoder: frozen encoders and resamplers together, from pixels and words to what a database stores.

    16 frames   → video encoder → motion resampler  → motion tokens  → their mean  → "motion" embedding
    first frame → image encoder → context resampler → context tokens
    first frame → open_clip image tower             → "image" embedding
    caption     → sentence encoder                  → "text" embedding

Every part is loaded when it is first needed: a text search loads the sentence encoder and nothing else.

Shapes: b batch, t frames, c channels, h w pixels, l tokens, d width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.bundle import EMBEDDED, POCKET, EncoderSource, MotionBundle
from motionrag.encoders import CLIPEncoder, DINOv2Encoder, SentenceEncoder, VideoMAEEncoder
from motionrag.encoders.preprocessing import frames_to_tensor
from motionrag.models import Resampler

RetrievalKey = Literal["text", "image", "motion"]
RETRIEVAL_KEYS: tuple[RetrievalKey, ...] = get_args(RetrievalKey)


@dataclass(frozen=True)
class EncodedClips:
    """What a database stores of a batch of clips; float32, on the CPU.

    Attributes:
        motion_tokens: `(b l d)`.
        context_tokens: `(b l d)`.
        image: Retrieval embedding of the first frame, `(b e)`, L2-normalised.
        motion: Retrieval embedding of the motion, `(b d)`, L2-normalised.
    """

    motion_tokens: Tensor
    context_tokens: Tensor
    image: Tensor
    motion: Tensor


class MotionEncoder:
    """Frozen encoders and resamplers of one bundle.

    Args:
        bundle: Gives the resamplers and names the frozen encoders.
        source: What a database writes down to open this encoder again: "pocket", "pocket-control", a folder or a
            hub id.
        text_encoder: Another sentence encoder than the bundle's, as hub id or folder; retrieval by text then follows
            it, motion and context tokens stay the same.
        device: Where to run.
        dtype: Working precision of the networks; results are float32.
    """

    def __init__(
        self,
        bundle: MotionBundle,
        *,
        source: str | None = None,
        text_encoder: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.bundle = bundle
        self.source = source
        self.text_source = text_encoder
        self.device = torch.device(device)
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = POCKET,
        *,
        text_encoder: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **hub_options: Any,
    ) -> "MotionEncoder":
        """Open the encoder of a bundle.

        Args:
            source: "pocket", "pocket-control", a bundle folder or a hub id.
            text_encoder: Sentence encoder to use in place of the bundle's: hub id or folder.
            device: Where to run.
            dtype: Working precision of the networks.
            **hub_options: Passed on to the download, for example `revision`.

        Returns:
            The encoder; parts are loaded when they are first used.

        Raises:
            FileNotFoundError: If there is no such bundle.
        """
        bundle = MotionBundle.from_pretrained(source, **hub_options)
        return cls(
            bundle,
            source=_lasting(source),
            text_encoder=None if text_encoder is None else _lasting(text_encoder),
            device=device,
            dtype=dtype,
        )

    @cached_property
    def video_encoder(self) -> VideoMAEEncoder:
        """Clips → motion features."""
        return self._place(VideoMAEEncoder.from_pretrained(self._source("video")))

    @cached_property
    def image_encoder(self) -> DINOv2Encoder:
        """First frames → context features."""
        return self._place(DINOv2Encoder.from_pretrained(self._source("image")))

    @cached_property
    def clip_encoder(self) -> CLIPEncoder:
        """Images → retrieval embeddings."""
        entry = self._entry("clip")
        # With a tag of weights, the source is the name of an architecture.
        source = self._source("clip") if entry.pretrained is None else entry.source
        return self._place(CLIPEncoder.from_pretrained(source, entry.pretrained))

    @cached_property
    def text_encoder(self) -> SentenceEncoder:
        """Captions and prompts → retrieval embeddings."""
        return self._place(SentenceEncoder.from_pretrained(self.text_source or self._source("text")))

    @cached_property
    def motion_resampler(self) -> Resampler:
        """Motion features → motion tokens."""
        return self._place(self.bundle.motion_resampler)

    @cached_property
    def context_resampler(self) -> Resampler:
        """Context features → context tokens."""
        return self._place(self.bundle.context_resampler)

    @property
    def num_tokens(self) -> int:
        """Motion tokens of a clip, and as many context tokens."""
        return int(self.bundle.config.parts["motion_resampler"]["num_queries"])

    @property
    def token_dim(self) -> int:
        """Channels of a token."""
        return int(self.bundle.config.parts["motion_resampler"]["output_dim"])

    @property
    def num_frames(self) -> int:
        """Frames that are sampled from a clip."""
        return self.video_encoder.num_frames

    def embedding_dim(self, key: RetrievalKey) -> int:
        """Width of a retrieval embedding.

        Args:
            key: "text", "image" or "motion".

        Returns:
            The number of channels.
        """
        if key == "motion":
            return self.token_dim
        return self.text_encoder.embedding_dim if key == "text" else self.clip_encoder.embedding_dim

    def fingerprint(self, what: str) -> str:
        """Hash of the weights and preprocessing behind one kind of stored numbers.

        Args:
            what: "motion_tokens", "context_tokens", or the retrieval key "text", "image" or "motion".

        Returns:
            32 hexadecimal characters; the same on every device and in every precision.
        """
        if what == "text":
            return self.text_encoder.fingerprint
        if what == "image":
            return self.clip_encoder.fingerprint
        if what in ("motion_tokens", "motion"):  # the motion embedding follows from the tokens
            return self._token_fingerprint(self.video_encoder.fingerprint, "motion_resampler")
        if what == "context_tokens":
            return self._token_fingerprint(self.image_encoder.fingerprint, "context_resampler")
        raise ValueError(f"There is no fingerprint of {what!r}.")

    def encode_frames(self, clips: Sequence[np.ndarray]) -> EncodedClips:
        """Encode decoded clips, which may differ in size.

        Args:
            clips: Each `(t h w 3)` uint8, t = `num_frames`.

        Returns:
            Tokens and embeddings.
        """
        videos = [frames_to_tensor(frames) for frames in clips]
        motion_tokens = self.encode_motion(videos)
        images = [video[0] for video in videos]
        return EncodedClips(
            motion_tokens=motion_tokens,
            context_tokens=self.encode_context(images),
            image=self.embed_images(images),
            motion=pool_motion(motion_tokens),
        )

    @torch.no_grad()
    def encode_motion(self, videos: Sequence[Tensor]) -> Tensor:
        """Motion tokens of clips.

        Args:
            videos: Each `(t c h w)` in [-1, 1], t = `num_frames`.

        Returns:
            `(b l d)` float32 on the CPU.

        Raises:
            ValueError: If a clip has another number of frames.
        """
        for video in videos:
            if video.ndim != 4 or len(video) != self.num_frames:
                raise ValueError(
                    f"The video encoder reads {self.num_frames} frames (t c h w) of a clip, got {tuple(video.shape)}."
                )
        pixels = torch.cat([self.video_encoder.preprocess(video[None]) for video in videos])
        return self.motion_resampler(self.video_encoder.encode(pixels)).float().cpu()

    @torch.no_grad()
    def encode_context(self, images: Sequence[Tensor]) -> Tensor:
        """Context tokens of images.

        Args:
            images: Each `(c h w)` in [-1, 1].

        Returns:
            `(b l d)` float32 on the CPU.
        """
        pixels = torch.cat([self.image_encoder.preprocess(image[None]) for image in images])
        return self.context_resampler(self.image_encoder.encode(pixels)).float().cpu()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> Tensor:
        """Retrieval embeddings of images.

        Args:
            images: Each `(c h w)` in [-1, 1].

        Returns:
            `(b e)` float32 on the CPU, L2-normalised.
        """
        pixels = torch.cat([self.clip_encoder.preprocess(image[None]) for image in images])
        return self.clip_encoder.encode(pixels).float().cpu()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Retrieval embeddings of captions or prompts.

        Args:
            texts: Any number of sentences.

        Returns:
            `(b e)` float32 on the CPU, L2-normalised.
        """
        return self.text_encoder.encode_text(texts).float().cpu()

    def to(self, device: torch.device | str) -> "MotionEncoder":
        """Move the parts that are loaded, and those that will be.

        Args:
            device: Where to run.

        Returns:
            This encoder.
        """
        self.device = torch.device(device)
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(self.device)
        return self

    def _entry(self, name: str) -> EncoderSource:
        try:
            return self.bundle.config.encoders[name]
        except KeyError:
            known = ", ".join(self.bundle.config.encoders) or "none"
            raise ValueError(f"The bundle names no {name} encoder (it names {known}); add it to config.json.") from None

    def _source(self, name: str) -> str:
        return self.bundle.path_or_id(self._entry(name).source)

    def _place(self, module: Any) -> Any:
        return module.to(device=self.device, dtype=self.dtype)

    def _token_fingerprint(self, encoder: str, resampler: str) -> str:
        return hashlib.sha256(f"{encoder}+{self.bundle.part_fingerprint(resampler)}".encode()).hexdigest()[:32]


def pool_motion(motion_tokens: Tensor) -> Tensor:
    """The motion embedding: the mean of the motion tokens, L2-normalised.

    Args:
        motion_tokens: `(b l d)`.

    Returns:
        `(b d)`.
    """
    return F.normalize(motion_tokens.float().mean(dim=1), dim=-1)


def _lasting(source: str | Path) -> str:
    """A source that means the same from any working folder."""
    return str(Path(source).resolve()) if str(source) not in EMBEDDED and Path(source).is_dir() else str(source)
