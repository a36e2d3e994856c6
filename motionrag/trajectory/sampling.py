"""From the dense flow of a video to MotionPro's training condition: a few visible blocks, a mask and a number."""

import math
from typing import TYPE_CHECKING, Any

from einops import repeat

from motionrag.trajectory.region import BLOCK

if TYPE_CHECKING:
    from torch import Generator, Tensor

TRIES = 4


def keep_blocks(visible: Any, ratio: float, draws: Any) -> "Tensor":
    """Decide which blocks are kept.

    Args:
        visible: `(h, w)`, bool: visible in all frames. A block is visible if its upper left pixel is.
        ratio: share of the visible blocks that is dropped, 0 to 1.
        draws: `(ceil(h / 8), ceil(w / 8))`, uniform in [0, 1).

    Returns:
        bool, of the shape of the draws.

    Raises:
        ValueError: if the draws have another shape.
    """
    import torch

    blocks = torch.as_tensor(visible)[::BLOCK, ::BLOCK] != 0
    draws = torch.as_tensor(draws, device=blocks.device)  # drawn on the CPU, for a flow that may lie elsewhere
    if blocks.shape != draws.shape:
        raise ValueError(f"{tuple(blocks.shape)} blocks need as many draws; these have {tuple(draws.shape)}.")
    return blocks & (draws > ratio)


def spread_blocks(blocks: Any, *, height: int, width: int) -> "Tensor":
    """Blocks as pixels: `(ceil(h / 8), ceil(w / 8))` to `(h, w)`, of the same type."""
    import torch

    pixels = repeat(torch.as_tensor(blocks), "y x -> (y by) (x bx)", by=BLOCK, bx=BLOCK)
    return pixels[:height, :width]


def sample_regions(
    flow: Any,
    visible: Any,
    *,
    ratio: tuple[float, float] = (0.75, 1.0),
    shift: bool = False,
    generator: "Generator | None" = None,
) -> "tuple[Tensor, Tensor]":
    """Keep the flow of a few random blocks that are visible in all frames.

    The share to drop is drawn from `ratio`. If nothing is kept, both are drawn again, up to four times; then one
    visible block is kept, so that every clip can be used.

    Published training takes blocks from a grid that begins at the upper left pixel, but a drawn way starts anywhere:
    `shift` moves the grid. Blocks that the border cuts stay, smaller, and are visible if their own upper left pixel is.

    Args:
        flow: `(f, h, w, 2)`, pixels from frame 0.
        visible: `(f, h, w)`, bool, or `(h, w)`: visible in all frames.
        ratio: lower and upper end of the share of blocks to drop, in [0, 1].
        shift: move the grid up and to the left by 0 to 7 pixels each, drawn anew with the blocks.
        generator: source of random numbers; None for torch's own.

    Returns:
        flow `(f, h, w, 2)`, 0 outside the kept blocks; kept `(h, w)`, bool.

    Raises:
        ValueError: for sizes or ratios that do not fit, or if no block is visible in all frames.
    """
    import torch

    flow, shown = torch.as_tensor(flow), torch.as_tensor(visible) != 0
    if shown.shape not in (flow.shape[:-1], flow.shape[1:-1]):
        raise ValueError(f"Flow {tuple(flow.shape)} and visibility {tuple(shown.shape)} differ in frames or size.")
    if not 0 <= ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"ratio is {ratio}; give the lower and the upper share of blocks to drop, within 0 and 1.")
    always = shown if shown.ndim == 2 else shown.all(0)
    height, width = always.shape
    for _ in range(TRIES):
        up, left = torch.randint(BLOCK, (2,), generator=generator).tolist() if shift else (0, 0)
        grid = _grown(always, up, left)
        shape = (math.ceil(grid.shape[0] / BLOCK), math.ceil(grid.shape[1] / BLOCK))
        dropped = ratio[0] + (ratio[1] - ratio[0]) * float(torch.rand((), generator=generator))
        blocks = keep_blocks(grid, dropped, torch.rand(shape, generator=generator))
        if blocks.any():
            break
    else:
        if not grid[::BLOCK, ::BLOCK].any():  # a moved grid may miss what little is visible
            up, left, grid = 0, 0, always
        blocks = _one_block(grid, generator)
    kept = spread_blocks(blocks, height=height + up, width=width + left)[up:, left:]
    return torch.where(kept[None, :, :, None], flow, 0), kept


def motion_mask(flow: Any) -> "Tensor":
    """Where a video moves: flow `(f, h, w, 2)` to bool `(h, w)`, mean squared displacement above 1 pixel²."""
    import torch

    return torch.as_tensor(flow).square().sum(-1).mean(0) > 1


def motion_bucket(flow: Any) -> float:
    """How much a video moves: mean length of the displacement in flow `(f, h, w, 2)`, in pixels, frame 0 included."""
    import torch

    return float(torch.as_tensor(flow).norm(dim=-1).mean())


def _grown(visible: "Tensor", up: int, left: int) -> "Tensor":
    """More rows above and columns to the left, like the first ones: what a moved grid sees, `(h + up, w + left)`."""
    import torch

    rows, columns = (
        torch.arange(-more, size).clamp(min=0) for more, size in zip((up, left), visible.shape, strict=True)
    )
    return visible[rows[:, None], columns]


def _one_block(visible: "Tensor", generator: "Generator | None") -> "Tensor":
    import torch

    blocks = visible[::BLOCK, ::BLOCK]
    candidates = blocks.nonzero()
    if not len(candidates):
        raise ValueError("No 8x8 block is visible in all frames, so there is no flow to keep; leave the clip out.")
    row, column = candidates[torch.randint(len(candidates), (), generator=generator)]
    chosen = torch.zeros_like(blocks)
    chosen[row, column] = True
    return chosen
