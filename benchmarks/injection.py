"""`OMP_NUM_THREADS=1 python benchmarks/injection.py cogvideox svd [--dtype bfloat16]`: the cost of motion injection.

Random weights at real width, without gradients. Compared, in turn: the backbone's own layers ("plain"), the published
arithmetic (query projected from the attention's output, keys and values from the tokens, all at every call) and ours.

- `cogvideox`: one block of CogVideoX-5B at 17 frames of 480×720: 226 text and 5·30·45 video positions. Two clocks stand
  around the injection inside the block, so what it adds is not the difference of two noisy times of a block.
- `svd`: the 16 spatial cross-attentions of a UNet, guidance on; each runs as a module on its own.

Medians of wall and processor time in milliseconds; on CUDA, of events. What both forms hand on is compared in the same
run: with each other (float32: must agree to 1e-5 of the largest value) and with float64.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.adapters import AttentionInjection
from motionrag.adapters.attention import MotionAttention

TOKENS, TOKEN_DIM, HEAD_DIM = 25, 1024, 64
TEXT_POSITIONS, POSITIONS = 226, 226 + 5 * 30 * 45
TOLERANCE = 1e-5  # float32, of the largest value
# Level of the UNet (0 the finest) of every spatial cross-attention: down, middle, up.
LEVELS = (0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0)


class Lap(NamedTuple):
    """Milliseconds: by the clock (events on CUDA) and of the processor."""

    wall: float
    processor: float


class Moment:
    """A point in time, on the CPU and, if there is one, on the GPU's own clock."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event is not None:
            self.event.record()
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def until(self, end: "Moment") -> Lap:
        """Time from here to a later moment; waits for the GPU."""
        processor = 1000 * (end.processor - self.processor)
        if self.event is None or end.event is None:
            return Lap(1000 * (end.wall - self.wall), processor)
        end.event.synchronize()
        return Lap(self.event.elapsed_time(end.event), processor)


def median(laps: list[Lap]) -> Lap:
    """Median of each column."""
    return Lap(*(statistics.median(column) for column in zip(*laps, strict=True)))


def default_device() -> torch.device:
    """CUDA where there is a device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def published_term(adapter: MotionAttention, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The motion term `(b n d)` as published: tokens `(videos l d)` repeated over frames, everything projected."""
    tokens = tokens.repeat_interleave(len(hidden) // len(tokens), dim=0)
    projected = (adapter.to_q(hidden), adapter.to_k(tokens), adapter.to_v(tokens))
    query, key, value = (rearrange(each, "b n (h c) -> b h n c", h=adapter.num_heads) for each in projected)
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b h n c -> b n (h c)")


@contextmanager
def published(injection: AttentionInjection, model: nn.Module, tokens: Tensor, scale: float = 1.0) -> Iterator[None]:
    """Inject by the published arithmetic with the weights of an adapter of ours."""

    def inject(adapter: MotionAttention, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + scale * published_term(adapter, args[0], tokens), *args[1:])

    sites = zip(injection.site_names, injection.sites.values(), strict=True)
    handles = [model.get_submodule(site).register_forward_pre_hook(partial(inject, adapter)) for site, adapter in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ours(injection: AttentionInjection, model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Inject as the library does."""
    injection.attach(model)
    try:
        with injection.condition(tokens):
            yield
    finally:
        injection.detach()


def forms(
    injection: AttentionInjection, model: nn.Module, tokens: Tensor
) -> dict[str, Callable[[], AbstractContextManager]]:
    """What is compared, by name."""
    return {
        "plain": nullcontext,
        "published": partial(published, injection, model, tokens),
        "ours": partial(ours, injection, model, tokens),
    }


@torch.no_grad()
def randomise(injection: AttentionInjection) -> AttentionInjection:
    """Weights that keep the size of what they project, so that scores and values are of order 1."""
    for weight in injection.parameters():
        weight.normal_(std=weight.shape[1] ** -0.5)
    return injection


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, over the largest value of `truth`."""
    return float((value.double() - truth.double()).abs().max() / truth.double().abs().max())


def require_equal(value: Tensor, truth: Tensor, what: str, *, tolerance: float = TOLERANCE) -> float:
    """The relative error; in float32, a difference ends the run."""
    error = relative_error(value, truth)
    if value.dtype == torch.float32 and not error <= tolerance:
        raise SystemExit(f"{what}: ours and the published form differ by {error:.1e} of the largest value.")
    return error


class Probe:
    """Clocks before and after what is injected at a layer, and what the layer would have had and what it gets."""

    def __init__(self, layer: nn.Module) -> None:
        self._handles = [
            layer.register_forward_pre_hook(self._before, prepend=True),
            layer.register_forward_pre_hook(self._after),
        ]

    def _before(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.hidden = args[0]
        self._start = Moment()

    def _after(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._end = Moment()
        self.injected = args[0]

    def remove(self) -> None:
        """Take the clocks away."""
        for handle in self._handles:
            handle.remove()

    def added(self) -> Lap:
        """Time that the injection took in the last call."""
        return self._start.until(self._end)


@torch.no_grad()
def cogvideox_block(
    *, positions: int, heads: int, repeats: int, dtype: torch.dtype, batch: int, device: torch.device
) -> None:
    """Print the time of one block, and what injection adds to it."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    torch.manual_seed(0)
    width = heads * HEAD_DIM
    block = CogVideoXBlock(width, heads, HEAD_DIM, time_embed_dim=512, attention_bias=True).eval().to(device, dtype)
    # Random attention over thousands of positions averages values away; in a trained block the output is of order 1.
    block.attn1.to_v.weight.mul_(positions**0.5)
    injection = randomise(AttentionInjection.for_model(block, TOKEN_DIM, sites=["attn1"])).to(device, dtype)
    adapter = next(iter(injection.sites.values()))

    text = round(positions * TEXT_POSITIONS / POSITIONS)
    make = partial(torch.randn, device=device)
    angles = make(positions - text, HEAD_DIM)
    inputs: dict[str, Any] = {
        "hidden_states": make(batch, positions - text, width, dtype=dtype),
        "encoder_hidden_states": make(batch, text, width, dtype=dtype),
        "temb": make(batch, 512, dtype=dtype),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    tokens = make(batch, TOKENS, TOKEN_DIM, dtype=dtype)
    print(f"CogVideoX-5B block: width {width}, {batch} × {positions} positions, {str(dtype)[6:]}, {device}")

    ways = forms(injection, block, tokens)
    blocks: dict[str, list[Lap]] = {name: [] for name in ways}
    added: dict[str, list[Lap]] = {name: [] for name in ways}
    handed: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            with way():
                probe = Probe(block.attn1.to_out[0])
                start = Moment()
                block(**inputs)
                lap = start.until(Moment())
                probe.remove()
            handed[name] = probe.injected
            if repeat:  # the first lap fills caches
                blocks[name].append(lap)
                added[name].append(probe.added())
    every = max(1, positions // 128)
    few = slice(None, None, every)
    hidden = handed["plain"][:, few].double()
    truth = hidden + published_term(adapter.double(), hidden, tokens.double())
    error = require_equal(handed["ours"], handed["published"], "CogVideoX block")

    whole = median(blocks["plain"])
    print(f"{'':10} block ms (processor)    added ms (processor)   share of the plain block")
    for name in ways:
        block_time, extra = median(blocks[name]), median(added[name])
        print(
            f"{name:10} {block_time.wall:8.1f} ({block_time.processor:8.1f})    {extra.wall:8.2f} "
            f"({extra.processor:8.2f})     {100 * extra.wall / whole.wall:.2f} %"
        )
    ratios = [slow / fast for slow, fast in zip(median(added["published"]), median(added["ours"]), strict=True)]
    print(f"published / ours, added: {ratios[0]:.2f} of wall time, {ratios[1]:.2f} of processor time")
    print(f"the term is {relative_size(handed):.2f} of the attention's output; ours against published: {error:.1e}")
    for name in ("published", "ours"):
        print(f"{name} against float64: {relative_error(handed[name][:, few], truth):.1e}")


def relative_size(handed: dict[str, Tensor]) -> float:
    """Norm of the injected term over that of the attention's output."""
    plain = handed["plain"].double()
    return float((handed["published"].double() - plain).norm() / plain.norm())


@torch.no_grad()
def svd_attentions(
    *,
    size: tuple[int, int],
    frames: int,
    channels: tuple[int, ...],
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Print the time of all spatial cross-attentions of a step, with and without injection."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    batch = 2 * frames  # guidance
    attentions = nn.ModuleList(
        Attention(query_dim=width, cross_attention_dim=TOKEN_DIM, heads=width // HEAD_DIM, dim_head=HEAD_DIM)
        for width in (channels[level] for level in LEVELS)
    )
    attentions = attentions.eval().to(device, dtype)
    sites = [str(number) for number in range(len(LEVELS))]
    injection = randomise(AttentionInjection.for_model(attentions, TOKEN_DIM, sites=sites)).to(device, dtype)
    rows, columns = (side // 8 for side in size)
    make = partial(torch.randn, device=device, dtype=dtype)
    hidden = [
        make(batch, max(1, rows >> level) * max(1, columns >> level), width) for level, width in enumerate(channels)
    ]
    context = make(2, 1, TOKEN_DIM).repeat_interleave(frames, dim=0)
    tokens = make(2, TOKENS, TOKEN_DIM)
    print(f"SVD, {len(LEVELS)} attn2: {frames} frames of {size[0]}×{size[1]}, guidance, {str(dtype)[6:]}, {device}")

    def run() -> list[Tensor]:
        few = []
        for attention, level in zip(attentions, LEVELS, strict=True):
            output = attention(hidden[level], encoder_hidden_states=context)
            few.append(output[:, :: max(1, output.shape[1] // 16)])  # a view; big outputs are not kept
        return [each.clone() for each in few] if is_compared else []

    ways = forms(injection, attentions, tokens)
    laps: dict[str, list[Lap]] = {name: [] for name in ways}
    is_compared = True
    outputs = {}
    for name, way in ways.items():
        with way():
            outputs[name] = run()
    is_compared = False
    for _ in range(repeats):
        for name, way in ways.items():
            with way():
                start = Moment()
                run()
                laps[name].append(start.until(Moment()))
    pairs = zip(outputs["ours"], outputs["published"], strict=True)
    error = max(require_equal(mine, theirs, f"SVD attn2 {number}") for number, (mine, theirs) in enumerate(pairs))
    changed = [relative_error(*pair) for pair in zip(outputs["published"], outputs["plain"], strict=True)]

    medians = {name: median(values) for name, values in laps.items()}
    for name, lap in medians.items():
        print(f"{name:10} {lap.wall:9.1f} ms, {lap.processor:9.1f} ms of processor")
    for other in ("published", "plain"):
        ratios = [slow / fast for slow, fast in zip(medians[other], medians["ours"], strict=True)]
        print(f"{other} / ours: {ratios[0]:.1f} of wall time, {ratios[1]:.1f} of processor time")
    print(f"injection changes outputs by {min(changed):.2f} or more; ours against published: {error:.1e}")


def picture(text: str) -> tuple[int, int]:
    """`320x512` as height and width."""
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    """Print one table for each backbone and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="+", choices=("cogvideox", "svd"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--positions", type=int, default=POSITIONS, help="CogVideoX: text and video together")
    parser.add_argument("--batch", type=int, default=1, help="CogVideoX: 2 with guidance")
    parser.add_argument("--heads", type=int, default=48, help="CogVideoX: of 64 channels")
    parser.add_argument("--sizes", nargs="+", type=picture, default=[(320, 512)], help="SVD, like 576x1024")
    parser.add_argument("--frames", type=int, default=14, help="SVD")
    parser.add_argument("--channels", nargs=4, type=int, default=(320, 640, 1280, 1280), help="SVD")
    options = parser.parse_args()
    common = {"repeats": options.repeats, "dtype": getattr(torch, options.dtype), "device": default_device()}
    if "cogvideox" in options.backbones:
        cogvideox_block(positions=options.positions, heads=options.heads, batch=options.batch, **common)
    if "svd" in options.backbones:
        for size in options.sizes:
            svd_attentions(size=size, frames=options.frames, channels=tuple(options.channels), **common)


if __name__ == "__main__":
    main()
