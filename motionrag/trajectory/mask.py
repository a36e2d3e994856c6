"""Motion masks from what people have: a painted picture, an array, a polygon. Masks are float32 `(h, w)`, 0 or 1."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from motionrag.trajectory.region import trajectory_list

if TYPE_CHECKING:
    from torch import Tensor


def read_mask(source: Any, *, height: int, width: int) -> "Tensor":
    """The region that may move, from a picture or an array.

    A picture with transparency is brushed where it is not fully transparent; any other picture, and an array, where
    any colour is not 0. (The released code counts an opaque alpha channel as brushed everywhere.)

    Args:
        source: file, PIL image, or array or tensor `(h, w)` or `(h, w, c)` of any number type.
        height: rows that the mask must have.
        width: columns that the mask must have.

    Returns:
        `(h, w)`, float32, 0 or 1.

    Raises:
        ValueError: if the file is no picture, or has another size; masks are not resized silently.
    """
    import torch
    from PIL import Image

    name = "the mask"
    if isinstance(source, str | os.PathLike):
        name = str(source)
        try:
            with Image.open(source) as image:
                source = image.copy()
        except OSError as error:
            raise ValueError(f"{name} cannot be read as a picture ({error}); use PNG.") from error
    brushed = _brushed_picture(source) if isinstance(source, Image.Image) else _brushed_array(source)
    if brushed.shape != (height, width):
        found = "x".join(str(side) for side in reversed(brushed.shape))
        raise ValueError(f"{name} has {found} pixels, the image {width}x{height}; resize the mask with the image.")
    return torch.from_numpy(brushed.astype(np.float32))


def polygon_mask(points: Any, *, height: int, width: int) -> "Tensor":
    """Fill a polygon.

    Args:
        points: `(n, 2)` corners in order, x then y in pixels, at least three; they may lie outside the image.
        height: rows of the image.
        width: columns of the image.

    Returns:
        `(h, w)`, float32, 1 in every pixel that the polygon or its outline touches.

    Raises:
        ValueError: for fewer than three corners, or a polygon wholly outside the image.
    """
    import torch
    from PIL import Image, ImageDraw

    corners = trajectory_list([points], height, width)[0].points
    if len(corners) < 3:
        raise ValueError(f"A polygon needs three corners; this one has {len(corners)}.")
    canvas = Image.new("1", (width, height))
    # Pillow counts pixel centres, the corners are in edges.
    ImageDraw.Draw(canvas).polygon([(x - 0.5, y - 0.5) for x, y in corners], fill=1, outline=1)
    mask = np.asarray(canvas, np.float32)
    if not mask.any():
        raise ValueError(f"The polygon lies outside the image of {width}x{height} pixels; corners are x, y in pixels.")
    return torch.from_numpy(mask)


def _brushed_picture(image: Any) -> np.ndarray:
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA")
    if transparent:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            return alpha != 0
        image = image.convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    return _brushed_array(image)


def _brushed_array(source: Any) -> np.ndarray:
    # A tensor may be on another device, or part of a graph.
    array = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    if array.ndim not in (2, 3):
        raise ValueError(f"A mask has shape (h, w) or (h, w, c), channels last; this one has {array.shape}.")
    return array != 0 if array.ndim == 2 else (array != 0).any(-1)
