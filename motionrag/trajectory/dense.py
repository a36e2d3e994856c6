"""Dense flow from point tracks, and the sum of object and camera motion. Displacements count from frame 0."""

from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange

if TYPE_CHECKING:
    from torch import Tensor


def flow_from_tracks(tracks: Any, visible: Any, *, height: int, width: int) -> "tuple[Tensor, Tensor]":
    """Write tracked points into the pixels in which they start.

    Args:
        tracks: `(f, n, 2)`, x then y in pixels.
        visible: `(f, n)`, bool, or numbers that are not 0 where a point can be seen.
        height: rows of the image.
        width: columns of the image.

    Returns:
        flow `(f, h, w, 2)`, float32, pixels from frame 0; visible `(f, h, w)`, bool. Where two points start in a pixel
        the later one wins; where none starts flow is 0 and nothing is visible.

    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, or a start outside the image.
    """
    import torch

    positions, seen = np.asarray(tracks, np.float64), np.asarray(visible) != 0
    if positions.ndim != 3 or positions.shape[2] != 2 or positions.shape[:2] != seen.shape or 0 in seen.shape:
        raise ValueError(f"Tracks are (f, n, 2) with visible (f, n); these are {positions.shape} and {seen.shape}.")
    bad = ~np.isfinite(positions).all((0, 2))
    if bad.any():
        raise ValueError(f"Track {int(np.nonzero(bad)[0][0])} holds a number that is not finite; leave the track out.")
    x, y = rearrange(positions[0], "n xy -> xy n")
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        first = int(np.nonzero(outside)[0][0])
        raise ValueError(
            f"Track {first} starts at ({x[first]:g}, {y[first]:g}), outside the image of {width}x{height} pixels."
        )
    pixels = y.astype(int) * width + x.astype(int)
    # The last track of each pixel: numpy does not promise an order for repeated indices, so find it.
    unique, from_the_end = np.unique(pixels[::-1], return_index=True)
    last = len(pixels) - 1 - from_the_end
    flow = np.zeros((len(positions), height * width, 2), np.float32)
    shown = np.zeros((len(positions), height * width), bool)
    flow[:, unique] = (positions - positions[0])[:, last]
    shown[:, unique] = seen[:, last]
    return (
        torch.from_numpy(rearrange(flow, "f (h w) xy -> f h w xy", h=height)),
        torch.from_numpy(rearrange(shown, "f (h w) -> f h w", h=height)),
    )


def merge_flows(*motions: Any, published: bool = False) -> "tuple[Tensor, Tensor]":
    """Let several motions happen together, such as an object's and the camera's.

    Args:
        *motions: pairs of flow `(f, h, w, 2)` and visible `(f, h, w)`, or `(h, w)` for all frames; all of one size.
        published: repeat the released code: flows and their sum pass through float16, and a frame's visibility is
            that of the frame before (frame 0: all).

    Returns:
        flow `(f, h, w, 2)`, float32, the sum; visible `(f, h, w)`, bool, where all are visible.

    Raises:
        ValueError: for no motion, or sizes that differ.
    """
    import torch

    if not motions:
        raise ValueError("merge_flows needs at least one pair of flow and visibility.")
    flows = [torch.as_tensor(flow, dtype=torch.float32) for flow, _ in motions]
    seen = [torch.as_tensor(visible) != 0 for _, visible in motions]
    seen = [
        shown.expand(flow.shape[:-1]) if shown.ndim == 2 and shown.shape == flow.shape[1:3] else shown
        for flow, shown in zip(flows, seen, strict=True)
    ]
    shapes = {(*flow.shape[:-1],) for flow in flows} | {(*visible.shape,) for visible in seen}
    if len(shapes) != 1:
        raise ValueError(f"All motions need the same frames, rows and columns; these have {sorted(shapes)}.")
    visible = torch.stack(seen).all(0)
    if not published:
        return torch.stack(flows).sum(0), visible
    flow = torch.stack([flow.half() for flow in flows]).sum(0, dtype=torch.float32).half().float()
    return flow, torch.cat([torch.ones_like(visible[:1]), visible[:-1]])
