"""The video encoder: VideoMAE turns 16 frames into motion features.

It holds transformers' own model, frozen, and prepares the pixels on the model's device. It reads no files of its own
and knows nothing of tokens: the motion resampler comes after it.

Shapes: b batch, t frames, c channels (or width, after the model), h w pixels, l positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from motionrag.encoders.fingerprint import fingerprint
from motionrag.encoders.preprocessing import center_crop, check_pixels, letterbox, normalise, resize_shorter_side
from motionrag.encoders.pretrained import check_image_processor, freeze, load_strictly, read_image_processor

if TYPE_CHECKING:
    from transformers import VideoMAEConfig, VideoMAEModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PIL_BILINEAR = 2
_OTHER_HEADS = ("classifier.", "fc_norm.", "decoder.", "encoder_to_decoder.", "mask_token")
# What VideoMAEForVideoClassification and VideoMAEForPreTraining keep beside the encoder.

_ARCHITECTURE = (
    "hidden_act",
    "image_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_frames",
    "patch_size",
    "tubelet_size",
    "use_mean_pooling",
)
# Settings of the model that change its output and that no weight shows.


class VideoMAEEncoder(nn.Module):
    """A frozen VideoMAE from pixels in [-1, 1] to `last_hidden_state`.

    Frames are resized (shorter side, bilinear, antialiased), cropped at the centre and normalised. `fit="letterbox"`
    keeps the whole frame between black bars instead: a centre crop never sees the sides of a wide clip, but it is
    what the published tokens were made with.

    Attributes:
        fingerprint: Hash of weights and preprocessing as given to the constructor; `.to()` does not change it.

    Args:
        model: The network; it is frozen in place.
        image_mean: Per channel, for pixels in [0, 1].
        image_std: Per channel, for pixels in [0, 1].
        size: Side of the square that the model sees, in pixels.
        fit: How frames of another shape are made square.

    Raises:
        ValueError: If the model was built for another size, or a weight is not finite.
    """

    def __init__(
        self,
        model: "VideoMAEModel",
        *,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        size: int = 224,
        fit: Literal["crop", "letterbox"] = "crop",
    ) -> None:
        super().__init__()
        if fit not in ("crop", "letterbox"):
            raise ValueError(f'fit must be "crop" or "letterbox", got {fit!r}')
        if model.config.image_size != size:
            raise ValueError(
                f"the model was built for {model.config.image_size} pixels, the preprocessing gives {size}"
            )
        freeze(model, source="VideoMAE model")
        self.model = model
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.size = size
        self.fit = fit
        settings = {
            "fit": fit,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "model": {name: getattr(model.config, name) for name in _ARCHITECTURE},
            "size": size,
        }
        self.fingerprint = fingerprint("VideoMAEEncoder", settings, model)

    @classmethod
    def from_pretrained(
        cls,
        source: "str | Path | VideoMAEConfig",
        *,
        fit: Literal["crop", "letterbox"] = "crop",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub_kwargs: Any,
    ) -> "VideoMAEEncoder":
        """Load a VideoMAE model and its preprocessing.

        Args:
            source: Hub id, local folder, or a config, which gives random weights. A fine-tuned classifier or a
                pretraining checkpoint serves as well: its encoder is taken.
            fit: How frames of another shape are made square.
            device: Where to run; None: the CPU.
            dtype: Working precision; None: float32.
            **hub_kwargs: Passed to the hub: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`.

        Returns:
            The encoder.

        Raises:
            ValueError: If weights are missing or unexpected, or the preprocessing cannot be followed.
        """
        from transformers import VideoMAEConfig, VideoMAEModel

        if isinstance(source, VideoMAEConfig):
            image_size: Any = source.image_size
            return cls(VideoMAEModel(source), size=image_size, fit=fit).to(device=device, dtype=dtype)
        model = load_strictly(VideoMAEModel, source, unused=_OTHER_HEADS, **hub_kwargs)
        processor = read_image_processor(source, **hub_kwargs)
        check_image_processor(processor, resample=_PIL_BILINEAR, source=source)
        encoder = cls(
            model,
            image_mean=processor.get("image_mean", IMAGENET_MEAN),
            image_std=processor.get("image_std", IMAGENET_STD),
            size=_square_size(processor, default=model.config.image_size, source=source),
            fit=fit,
        )
        return encoder.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary transformers folder: config, safetensors, `preprocessor_config.json`.

        `fit` is not part of that format: pass it again when loading.

        Args:
            folder: Created if it does not exist.
        """
        from transformers import VideoMAEImageProcessor

        self.model.save_pretrained(folder)
        VideoMAEImageProcessor(
            size={"shortest_edge": self.size},
            crop_size={"height": self.size, "width": self.size},
            image_mean=list(self.image_mean),
            image_std=list(self.image_std),
        ).save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The working precision."""
        return self.model.dtype

    @property
    def num_frames(self) -> int:
        """Frames that a clip must have."""
        return int(self.model.config.num_frames)

    def train(self, mode: bool = True) -> "VideoMAEEncoder":
        """Stay in evaluation mode, whatever a surrounding module switches to."""
        return super().train(False)

    def preprocess(self, video: Tensor) -> Tensor:
        """Bring a video into the shape, range and statistics that the model was trained with.

        Args:
            video: `(b t c h w)`, floating, in [-1, 1].

        Returns:
            Video `(b t c size size)`, float32, on the encoder's device.
        """
        pixels = (video.to(device=self.device, dtype=torch.float32) + 1) / 2
        if self.fit == "letterbox":
            pixels = letterbox(pixels, self.size, "bilinear")
        else:
            pixels = center_crop(resize_shorter_side(pixels, self.size, "bilinear"), (self.size, self.size))
        return normalise(pixels, self.image_mean, self.image_std)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Encode clips.

        Args:
            video: `(b t c h w)`, floating, in [-1, 1], any size; t is the model's number of frames.

        Returns:
            Motion features `(b l c)` in the working precision: `last_hidden_state` as the model gives it (fine-tuned
            checkpoints with mean pooling have no final LayerNorm).

        Raises:
            ValueError: If the video has another layout, number of frames or range, or holds NaN.
        """
        check_pixels(video, layout="b t c h w")
        if video.shape[1] != self.num_frames:
            raise ValueError(f"a clip must have {self.num_frames} frames, got {video.shape[1]}; sample them first")
        return self.encode(self.preprocess(video))

    def grey_features(self) -> Tensor:
        """Features of a clip in which nothing is to be seen: grey, 0 in [-1, 1].

        Returns:
            `(1 l c)`.
        """
        return self(torch.zeros(1, self.num_frames, 3, self.size, self.size))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode what `preprocess` gave; clips of several sizes are preprocessed one by one and encoded together.

        Args:
            pixels: `(b t c size size)`.

        Returns:
            Motion features `(b l c)`.
        """
        features: Tensor = self.model(pixels.to(self.dtype)).last_hidden_state
        return features


def _square_size(processor: dict[str, Any], *, default: int, source: str | Path) -> int:
    size = processor.get("size", default)
    if isinstance(size, dict):
        size = size.get("shortest_edge")
    crop = processor.get("crop_size", {"height": size, "width": size})
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    if size is None or crop != {"height": size, "width": size}:
        raise ValueError(
            f"{source}: preprocessor_config.json must resize the shorter side to the size of a square crop, "
            f"got size={processor.get('size')} and crop_size={processor.get('crop_size')}"
        )
    return int(size)
