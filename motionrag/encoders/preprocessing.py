"""Pixels on their way into an encoder: reading, resizing, cropping and normalising, as pure functions on tensors.

It knows no encoder and holds no settings: sizes and statistics come from each encoder's own configuration. Images
between functions are float32; `[-1, 1]` outside the encoders, `[0, 1]` inside, until `normalise`.

Shapes: b batch, t frames, c channels, h w pixels; `...` any leading dimensions.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from einops import pack, rearrange, unpack
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

ResizeMode = Literal["bilinear", "bicubic"]
ImageLike = Image.Image | str | os.PathLike[str] | np.ndarray

ACCEPTED_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow formats that are opened; the others (PDF, EPS, PSD, …) are parsers an image needs no trust in."""

MAX_IMAGE_PIXELS = 8192 * 8192
"""Largest image that is decoded, in pixels: 192 MiB as RGB."""

_PIXEL_LIMIT = 1.5
# Wider than [-1, 1]: a caller's bicubic resize overshoots by a few tenths. [0, 255] is caught all the same.

_DECODING_ERRORS = (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error)
# What Pillow's decoders raise on damaged data, depending on the format and the place.


def check_pixels(pixels: Tensor, *, layout: str) -> None:
    """Refuse what no encoder can read: a wrong layout, integers, NaN, values far outside [-1, 1].

    Args:
        pixels: What the caller passed as images or video.
        layout: The expected dimensions, `"b c h w"` or `"b t c h w"`.

    Raises:
        ValueError: If the tensor is not floating, has other dimensions, is empty, has not 3 channels, is not finite,
            or lies outside [-1, 1] by more than a resize can cause.
    """
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(
            f"pixels must be a floating-point tensor in [-1, 1], got {found}; "
            "convert uint8 frames with frames_to_tensor, images with image_to_tensor"
        )
    if pixels.ndim != len(layout.split()) or pixels.shape[-3] != 3 or pixels.numel() == 0:
        raise ValueError(f"pixels must be ({layout}) with c = 3 and nothing empty, got {tuple(pixels.shape)}")
    low, high = (bound.item() for bound in pixels.aminmax())
    # One pass and one synchronisation: a NaN anywhere comes through aminmax and fails both comparisons.
    if not (low >= -_PIXEL_LIMIT and high <= _PIXEL_LIMIT):
        raise ValueError(f"pixels must be finite and in [-1, 1], got values from {low:g} to {high:g}")


def resize(images: Tensor, size: tuple[int, int], mode: ResizeMode) -> Tensor:
    """Resize images to an exact size, with antialiasing.

    Args:
        images: `(... c h w)`, float32 in [0, 1].
        size: Height and width in pixels.
        mode: Interpolation. Bicubic is clamped to [0, 1]: it overshoots at edges, and so do the libraries' own
            8-bit paths, which clip.

    Returns:
        Images `(... c *size)` in [0, 1].
    """
    if tuple(images.shape[-2:]) == size:
        return images
    flat, leading = pack([images], "* c h w")
    resized = F.interpolate(flat, size=size, mode=mode, antialias=True, align_corners=False)
    if mode == "bicubic":
        resized = resized.clamp(0, 1)
    [unpacked] = unpack(resized, leading, "* c h w")
    return unpacked


def resize_shorter_side(images: Tensor, size: int, mode: ResizeMode) -> Tensor:
    """Resize images so that the shorter side is `size`, keeping the aspect ratio.

    The longer side is rounded down, as in transformers (`get_resize_output_image_size`) and torchvision.

    Args:
        images: `(... c h w)`, float32 in [0, 1].
        size: The new length of the shorter side in pixels.
        mode: Interpolation.

    Returns:
        Images `(... c h w)` in [0, 1] with `min(h, w) == size`.
    """
    height, width = images.shape[-2:]
    if height <= width:
        return resize(images, (size, int(size * width / height)), mode)
    return resize(images, (int(size * height / width), size), mode)


def center_crop(
    images: Tensor,
    size: tuple[int, int],
    *,
    odd_margin: Literal["down", "even"] = "down",
    fill: float = 0.0,
) -> Tensor:
    """Cut the centre out of images, padding first where they are smaller.

    Args:
        images: `(... c h w)`.
        size: Height and width in pixels.
        odd_margin: Where the cut starts when the margin is odd: half of it rounded `"down"` (transformers) or to the
            `"even"` neighbour (torchvision, and with it open_clip). They differ by a pixel for every other odd margin.
        fill: Value of padded pixels; 0 in [0, 1] is black, as in the libraries.

    Returns:
        Images `(... c *size)`.
    """
    height, width = images.shape[-2:]
    missing_height, missing_width = max(size[0] - height, 0), max(size[1] - width, 0)
    if missing_height or missing_width:
        top, left = missing_height // 2, missing_width // 2
        images = F.pad(images, (left, missing_width - left, top, missing_height - top), value=fill)
        height, width = images.shape[-2:]
    half = int if odd_margin == "down" else round
    top, left = half((height - size[0]) / 2), half((width - size[1]) / 2)
    return images[..., top : top + size[0], left : left + size[1]]


def letterbox(images: Tensor, size: int, mode: ResizeMode) -> Tensor:
    """Fit whole images into a square: longer side to `size`, black bars on the shorter one.

    Args:
        images: `(... c h w)`, float32 in [0, 1].
        size: Side of the square in pixels.
        mode: Interpolation.

    Returns:
        Images `(... c size size)` in [0, 1].
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    fitted = (max(round(height * scale), 1), max(round(width * scale), 1))
    return center_crop(resize(images, fitted, mode), (size, size))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean and divide by the standard deviation, channel by channel.

    Args:
        images: `(... c h w)` in [0, 1].
        mean: One number per channel, for pixels in [0, 1].
        std: One number per channel, for pixels in [0, 1].

    Returns:
        Images `(... c h w)`.
    """
    shift, scale = (rearrange(images.new_tensor(list(values)), "c -> c 1 1") for values in (mean, std))
    return (images - shift) / scale


def frames_to_tensor(frames: np.ndarray | Tensor) -> Tensor:
    """Turn decoded frames into a video tensor.

    Args:
        frames: `(t h w 3)`, uint8.

    Returns:
        Video `(t c h w)`, float32 in [-1, 1].

    Raises:
        ValueError: If the frames have another shape or dtype.
    """
    tensor = torch.as_tensor(frames)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
        raise ValueError(f"frames must be (t h w 3) uint8, got {tuple(tensor.shape)} {tensor.dtype}")
    return rearrange(tensor, "t h w c -> t c h w").float() / 127.5 - 1


def image_to_tensor(image: ImageLike) -> Tensor:
    """Turn an image into a tensor, converted the way diffusers does: EXIF rotation applied, then RGB.

    Alpha is dropped, palettes are looked up, of an animation the first frame is taken. 16-bit grey is scaled by its
    full range to [-1, 1], where Pillow's own conversion would clip it to white.

    Args:
        image: A PIL image, the path of a file in one of `ACCEPTED_FORMATS`, or an array: `(h w)` or
            `(h w 1 | 3 | 4)`, uint8, uint16 or float in [0, 1].

    Returns:
        Image `(c h w)`, float32 in [-1, 1], c = 3.

    Raises:
        ValueError: If the file is damaged, truncated, of another format or larger than `MAX_IMAGE_PIXELS`, or if the
            pixels have a type whose range is unknown.
    """
    if isinstance(image, np.ndarray):
        return _array_to_tensor(image)
    if isinstance(image, Image.Image):
        return _pil_to_tensor(image, name=str(getattr(image, "filename", "")) or "image")
    name = os.fspath(image)
    with open(image, "rb") as file:
        try:
            opened = Image.open(file, formats=ACCEPTED_FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{name}: {error}; the limit is {MAX_IMAGE_PIXELS} pixels") from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{name}: not an image in one of {', '.join(ACCEPTED_FORMATS)}") from error
        except _DECODING_ERRORS as error:
            raise ValueError(f"{name}: the image is damaged or truncated ({error})") from error
        return _pil_to_tensor(opened, name=name)


def _pil_to_tensor(image: Image.Image, *, name: str) -> Tensor:
    if image.width * image.height > MAX_IMAGE_PIXELS:  # known from the header: nothing is decoded yet
        raise ValueError(f"{name}: {image.width}x{image.height} pixels; the limit is {MAX_IMAGE_PIXELS}")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except _DECODING_ERRORS as error:
        raise ValueError(f"{name}: the image is damaged or truncated ({error})") from error
    if image.mode == "F":
        raise ValueError(f"{name}: floating-point images have no fixed range; pass an array in [0, 1]")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"{name}: integer pixels must fit 16 bits, got {grey.min()} to {grey.max()}")
        return _array_to_tensor(grey.astype(np.uint16))
    return _array_to_tensor(np.asarray(image.convert("RGB")))


def _array_to_tensor(array: np.ndarray) -> Tensor:
    if array.ndim == 2:
        array = rearrange(array, "h w -> h w 1")
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"an image array must be (h w) or (h w 1 | 3 | 4), got {array.shape}")
    full_range = {"uint8": 255.0, "uint16": 65535.0}.get(array.dtype.name, 1.0)
    is_float = np.issubdtype(array.dtype, np.floating)
    if full_range == 1.0 and not (is_float and array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"an image array must be uint8, uint16 or float in [0, 1], got {array.dtype} outside that")
    pixels = torch.from_numpy(array[..., :3].astype(np.float32)) / full_range
    return rearrange(pixels, "h w c -> c h w").expand(3, -1, -1).contiguous() * 2 - 1
