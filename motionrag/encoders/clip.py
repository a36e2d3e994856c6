"""The retrieval encoder for images and texts: open_clip puts both into one space.

It holds open_clip's own model and tokeniser, frozen, and does what open_clip's image transform does, but on tensors,
batched and on the model's device. Nothing is downloaded for a folder, and `trust_remote_code` is never passed on.

Shapes: b batch, c channels, h w pixels, d embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.encoders.fingerprint import fingerprint, tokenizer_hash
from motionrag.encoders.preprocessing import (
    ResizeMode,
    center_crop,
    check_pixels,
    normalise,
    resize,
    resize_shorter_side,
)
from motionrag.encoders.pretrained import freeze
from motionrag.encoders.text import check_texts

if TYPE_CHECKING:
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


class CLIPEncoder(nn.Module):
    """A frozen open_clip model: images and texts to L2-normalised embeddings in one space.

    Attributes:
        fingerprint: Hash of weights, preprocessing and vocabulary as given to the constructor; `.to()` does not
            change it.
        embedding_dim: Width of the embeddings.

    Args:
        model: The network, with open_clip's `preprocess_cfg` on its image tower; it is frozen in place.
        tokenizer: open_clip's tokeniser for it.
        model_config: The open_clip architecture it was built from (`embed_dim`, `vision_cfg`, `text_cfg`).

    Raises:
        ValueError: If a weight is not finite.
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        *,
        tokenizer: SimpleTokenizer | HFTokenizer,
        model_config: dict[str, Any],
    ) -> None:
        from open_clip.model import get_model_preprocess_cfg

        super().__init__()
        freeze(model, source="open_clip model")
        self.model = model
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.embedding_dim = int(model_config["embed_dim"])
        self.preprocessing: dict[str, Any] = dict(get_model_preprocess_cfg(model))
        size = self.preprocessing["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        settings = {
            "model": model_config,
            "preprocessing": self.preprocessing,
            "tokenizer": tokenizer_hash(getattr(tokenizer, "tokenizer", tokenizer)),
        }
        self.fingerprint = fingerprint("CLIPEncoder", settings, model)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | dict[str, Any],
        pretrained: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> CLIPEncoder:
        """Load an open_clip model, its preprocessing and its tokeniser.

        Args:
            source: A local folder, `"hf-hub:owner/name"`, an open_clip model name such as `"ViT-B-32"`, or an
                architecture as a dict, which gives random weights.
            pretrained: With a model name, the tag of its weights, such as `"laion2b_s34b_b79k"`.
            device: Where to run; None: the CPU.
            dtype: Working precision; None: float32.
            cache_dir: Where downloads are kept; None: the hub's own cache.

        Returns:
            The encoder.

        Raises:
            ValueError: If the weights are absent or do not fit the architecture.
        """
        if isinstance(source, dict):
            with TemporaryDirectory() as folder:  # open_clip builds from a named model or a folder only
                Path(folder, CONFIG_FILE).write_text(json.dumps({"model_cfg": source}), encoding="utf-8")
                encoder = cls._create(f"local-dir:{folder}", load_weights=False)
        elif Path(source).is_dir():
            if not Path(source, WEIGHTS_FILE).is_file():
                raise ValueError(f"{source}: {WEIGHTS_FILE} is missing; save the encoder there again")
            encoder = cls._create(f"local-dir:{source}")
        elif pretrained is None and not str(source).startswith("hf-hub:"):
            raise ValueError(f'{source} is no folder; a model name needs its weights, such as pretrained="openai"')
        else:
            encoder = cls._create(str(source), pretrained=pretrained, cache_dir=cache_dir)
        return encoder.to(device=device, dtype=dtype)

    @classmethod
    def _create(cls, name: str, *, load_weights: bool = True, **options: Any) -> CLIPEncoder:
        import open_clip

        model_config = open_clip.get_model_config(name)
        if model_config is None:
            raise ValueError(f"open_clip knows no model {name}; open_clip.list_models() names them")
        if model_config["text_cfg"].get("tokenizer_kwargs", {}).get("trust_remote_code"):
            raise ValueError(f"{name}: the configuration asks for trust_remote_code, which is never set")
        try:
            model = open_clip.create_model(
                name, load_weights=load_weights, require_pretrained=load_weights, precision="fp32", **options
            )
        except RuntimeError as error:  # open_clip loads strictly; its message names the weights
            raise ValueError(f"{name}: the weights do not fit the architecture or are absent: {error}") from error
        tokenizer = open_clip.get_tokenizer(name, cache_dir=options.get("cache_dir"))
        return cls(model, tokenizer=tokenizer, model_config=model_config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that open_clip loads too, as `local-dir:folder`.

        Args:
            folder: Created if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": self.model_config, "preprocess_cfg": self.preprocessing}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        if hasattr(self.tokenizer, "save_pretrained"):  # open_clip's SimpleTokenizer carries its vocabulary in the code
            self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The working precision."""
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> CLIPEncoder:
        """Stay in evaluation mode, whatever a surrounding module switches to."""
        return super().train(False)

    def preprocess(self, image: Tensor) -> Tensor:
        """Bring images into the shape, range and statistics that the model was trained with.

        Args:
            image: `(b c h w)`, floating, in [-1, 1].

        Returns:
            Images `(b c *size)`, float32, on the encoder's device.
        """
        pixels = self._fit((image.to(device=self.device, dtype=torch.float32) + 1) / 2)
        return normalise(pixels, self.preprocessing["mean"], self.preprocessing["std"])

    def _fit(self, pixels: Tensor) -> Tensor:
        """Resize and crop as `open_clip.transform.image_transform` does for inference."""
        mode: ResizeMode = "bilinear" if self.preprocessing["interpolation"] == "bilinear" else "bicubic"
        strategy = self.preprocessing["resize_mode"]
        if strategy == "squash":
            return resize(pixels, self.size, mode)
        if strategy == "longest":
            fitted = resize(pixels, self._kept_ratio(pixels, max), mode)
            return center_crop(fitted, self.size, odd_margin="even", fill=self.preprocessing["fill_color"] / 255)
        if self.size[0] == self.size[1]:
            return center_crop(resize_shorter_side(pixels, self.size[0], mode), self.size, odd_margin="even")
        # open_clip passes no interpolation on in this case, which leaves its default: bicubic.
        return center_crop(resize(pixels, self._kept_ratio(pixels, min), "bicubic"), self.size, odd_margin="even")

    def _kept_ratio(self, pixels: Tensor, choose: Callable[[float, float], float]) -> tuple[int, int]:
        height, width = pixels.shape[-2:]
        ratio = choose(height / self.size[0], width / self.size[1])
        return round(height / ratio), round(width / ratio)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Embed images.

        Args:
            image: `(b c h w)`, floating, in [-1, 1], any size.

        Returns:
            Embeddings `(b d)`, float32, L2-normalised.

        Raises:
            ValueError: If the images have another layout or range, or hold NaN.
        """
        check_pixels(image, layout="b c h w")
        return self.encode(self.preprocess(image))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Embed what `preprocess` gave; images of several sizes are preprocessed one by one and embedded together.

        Args:
            pixels: `(b c *size)`.

        Returns:
            Embeddings `(b d)`, float32, L2-normalised.
        """
        return F.normalize(self.model.encode_image(pixels.to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: Texts; what exceeds the model's context length is cut.

        Returns:
            Embeddings `(b d)`, float32, L2-normalised.

        Raises:
            ValueError: If `texts` is a single string, or holds anything but strings.
        """
        check_texts(texts)
        if not texts:
            return torch.empty(0, self.embedding_dim, device=self.device)
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)
