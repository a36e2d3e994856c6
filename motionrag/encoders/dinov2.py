"""The image encoder: DINOv2 turns the first frame of a clip, or the query image, into context features.

It holds transformers' own model, frozen, and does what its image processor does, but on tensors, batched and on the
model's device. The context resampler comes after it.

Shapes: b batch, c channels (or width, after the model), h w pixels, l positions, the class token first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from motionrag.encoders.fingerprint import fingerprint
from motionrag.encoders.preprocessing import center_crop, check_pixels, normalise, resize_shorter_side
from motionrag.encoders.pretrained import check_image_processor, freeze, load_strictly, read_image_processor

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2Model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_SIZE = 256
CROP_SIZE = 224
# The published facebook/dinov2-* preprocessor_config.json; used where a model comes without one.

_PIL_BICUBIC = 3
_OTHER_HEADS = ("classifier.",)
_ARCHITECTURE = ("hidden_act", "image_size", "layer_norm_eps", "num_attention_heads", "patch_size")
# Settings of the model that change its output and that no weight shows.


class DINOv2Encoder(nn.Module):
    """A frozen DINOv2 from pixels in [-1, 1] to `last_hidden_state`, class token included.

    Images are resized (shorter side, bicubic, antialiased), cropped at the centre and normalised.

    Attributes:
        fingerprint: Hash of weights and preprocessing as given to the constructor; `.to()` does not change it.

    Args:
        model: The network; it is frozen in place.
        image_mean: Per channel, for pixels in [0, 1].
        image_std: Per channel, for pixels in [0, 1].
        resize_size: New length of the shorter side, in pixels.
        crop_size: Side of the square that the model sees, in pixels; a multiple of its patch size. It may differ
            from the size the model was trained at: the model interpolates its position codes.

    Raises:
        ValueError: If the crop is no multiple of the patch size, or a weight is not finite.
    """

    def __init__(
        self,
        model: "Dinov2Model",
        *,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        resize_size: int = RESIZE_SIZE,
        crop_size: int = CROP_SIZE,
    ) -> None:
        super().__init__()
        patch_size: Any = model.config.patch_size
        if crop_size % patch_size:
            raise ValueError(f"crop_size {crop_size} is not a multiple of the patch size {patch_size}")
        freeze(model, source="DINOv2 model")
        self.model = model
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.resize_size, self.crop_size = resize_size, crop_size
        settings = {
            "crop_size": crop_size,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "model": {name: getattr(model.config, name) for name in _ARCHITECTURE},
            "resize_size": resize_size,
        }
        self.fingerprint = fingerprint("DINOv2Encoder", settings, model)

    @classmethod
    def from_pretrained(
        cls,
        source: "str | Path | Dinov2Config",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub_kwargs: Any,
    ) -> "DINOv2Encoder":
        """Load a DINOv2 model and its preprocessing.

        Args:
            source: Hub id, local folder, or a config, which gives random weights and takes images at the config's
                own size.
            device: Where to run; None: the CPU.
            dtype: Working precision; None: float32.
            **hub_kwargs: Passed to the hub: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`.

        Returns:
            The encoder.

        Raises:
            ValueError: If weights are missing or unexpected, or the preprocessing cannot be followed.
        """
        from transformers import Dinov2Config, Dinov2Model

        if isinstance(source, Dinov2Config):
            size: Any = source.image_size
            return cls(Dinov2Model(source), resize_size=size, crop_size=size).to(device=device, dtype=dtype)
        model = load_strictly(Dinov2Model, source, unused=_OTHER_HEADS, **hub_kwargs)
        processor = read_image_processor(source, **hub_kwargs)
        check_image_processor(processor, resample=_PIL_BICUBIC, source=source)
        encoder = cls(
            model,
            image_mean=processor.get("image_mean", IMAGENET_MEAN),
            image_std=processor.get("image_std", IMAGENET_STD),
            **_sizes(processor, source),
        )
        return encoder.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary transformers folder: config, safetensors, `preprocessor_config.json`.

        Args:
            folder: Created if it does not exist.
        """
        from transformers import BitImageProcessor

        self.model.save_pretrained(folder)
        BitImageProcessor(
            size={"shortest_edge": self.resize_size},
            crop_size={"height": self.crop_size, "width": self.crop_size},
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

    def train(self, mode: bool = True) -> "DINOv2Encoder":
        """Stay in evaluation mode, whatever a surrounding module switches to."""
        return super().train(False)

    def preprocess(self, image: Tensor) -> Tensor:
        """Bring images into the shape, range and statistics that the model was trained with.

        Args:
            image: `(b c h w)`, floating, in [-1, 1].

        Returns:
            Images `(b c crop_size crop_size)`, float32, on the encoder's device.
        """
        pixels = (image.to(device=self.device, dtype=torch.float32) + 1) / 2
        pixels = resize_shorter_side(pixels, self.resize_size, "bicubic")
        return normalise(center_crop(pixels, (self.crop_size, self.crop_size)), self.image_mean, self.image_std)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: `(b c h w)`, floating, in [-1, 1], any size.

        Returns:
            Context features `(b l c)` in the working precision: `last_hidden_state`, the class token first.

        Raises:
            ValueError: If the images have another layout or range, or hold NaN.
        """
        check_pixels(image, layout="b c h w")
        return self.encode(self.preprocess(image))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode what `preprocess` gave; images of several sizes are preprocessed one by one and encoded together.

        Args:
            pixels: `(b c crop_size crop_size)`.

        Returns:
            Context features `(b l c)`.
        """
        features: Tensor = self.model(pixels.to(self.dtype)).last_hidden_state
        return features


def _sizes(processor: dict[str, Any], source: str | Path) -> dict[str, int]:
    size = processor.get("size", {"shortest_edge": RESIZE_SIZE})
    crop = processor.get("crop_size", {"height": CROP_SIZE, "width": CROP_SIZE})
    if set(size) != {"shortest_edge"} or crop["height"] != crop["width"]:
        raise ValueError(
            f"{source}: preprocessor_config.json must resize the shorter side and crop a square, "
            f"got size={size} and crop_size={crop}"
        )
    return {"resize_size": size["shortest_edge"], "crop_size": crop["height"]}
