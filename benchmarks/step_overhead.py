"""`OMP_NUM_THREADS=1 python benchmarks/step_overhead.py cogvideox [--blocks 1]`: a denoising step with injection.

Real diffusers pipelines with random weights at real width, guidance on; the autoencoder and what embeds the condition
are tiny, they do not belong to the step. Compared, in turn: the plain backbone, the published arithmetic of
`injection.py` and ours. A step goes from the call of the denoiser to the scheduler's result. On a CPU, CogVideoX-5B is
cut to few blocks (what is outside of them counts more then), and SVD wants a small picture and, in float32 (6 GB of
weights), `--layers 1`.

Medians of wall and processor time in milliseconds; on CUDA, of events. Peak memory is of the whole process, or of CUDA.
In the same run: what the plain denoiser predicts after the injection was detached must be what it did before, bit for
bit, and in float32 the predictions with ours and with the published form must agree to 1e-4 of the largest value.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from injection import (
    TOKEN_DIM,
    TOKENS,
    Lap,
    Moment,
    default_device,
    forms,
    median,
    picture,
    randomise,
    relative_error,
    require_equal,
)
from PIL import Image
from torch import Tensor

from motionrag.adapters import AttentionInjection

HEAD_DIM = 64
TOLERANCE = 1e-4  # of the largest value; a random UNet in float32 is itself 3e-5 from float64


@contextmanager
def making(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New weights are of this precision on this device at once; gigabytes are never held twice."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def cogvideox(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A CogVideoX-5B-I2V pipeline of some blocks, and the arguments of its call."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    height, width = options.size or (480, 720)
    with making(device, dtype):
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=options.heads,
            attention_head_dim=HEAD_DIM,
            in_channels=32,
            out_channels=16,
            num_layers=options.blocks or (42 if device.type == "cuda" else 1),
            sample_height=height // 8,
            sample_width=width // 8,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        )
        vae = AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1)
        text = torch.randn(2, 1, 226, transformer.config.text_embed_dim)
    pipeline = CogVideoXImageToVideoPipeline(None, None, vae, transformer, CogVideoXDDIMScheduler())
    call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "guidance_scale": 6.0}
    return pipeline, {"height": height, "width": width, "num_frames": options.frames or 17, **call}


def svd(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A Stable Video Diffusion pipeline, and the arguments of its call."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    height, width = options.size or (576, 1024)
    channels = tuple(options.channels)
    with making(device, dtype):
        unet = UNetSpatioTemporalConditionModel(
            block_out_channels=channels,
            num_attention_heads=tuple(width // HEAD_DIM for width in channels),
            layers_per_block=options.layers,
        )
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            patch_size=56,
            projection_dim=TOKEN_DIM,
        )
        image_encoder = CLIPVisionModelWithProjection(vision)
    with making(device, torch.float32):  # diffusers hands it pictures in float32
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, layers_per_block=1
        )
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0
    )
    pipeline = StableVideoDiffusionPipeline(vae, image_encoder, unet, scheduler, CLIPImageProcessor())
    return pipeline, {"height": height, "width": width, "num_frames": options.frames or 14}


class Run:
    """One call of a pipeline, with a clock on each of its steps."""

    def __init__(self, pipeline: Any, denoiser: Any, call: dict[str, Any], steps: int) -> None:
        self.pipeline, self.denoiser = pipeline, denoiser
        self.call = {**call, "num_inference_steps": steps}
        self.call["image"] = Image.linear_gradient("L").convert("RGB").resize((call["width"], call["height"]))

    def __call__(self) -> tuple[Tensor, list[Lap]]:
        """What the denoiser gave last, and the time of each step."""
        starts: list[Moment] = []
        laps: list[Lap] = []
        predictions: list[Tensor] = []

        def stepped(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            laps.append(starts[-1].until(Moment()))
            return tensors

        # Not the latents: a step from the highest noise takes large numbers from each other.
        hooks = [
            self.denoiser.register_forward_pre_hook(lambda *_: starts.append(Moment()), prepend=True),
            self.denoiser.register_forward_hook(lambda *call: predictions.append(call[-1][0])),
        ]
        try:
            generator = torch.Generator().manual_seed(0)
            self.pipeline(**self.call, generator=generator, output_type="latent", callback_on_step_end=stepped)
        finally:
            for hook in hooks:
                hook.remove()
        return predictions[-1], laps


def forget_peak() -> None:
    """Start a new measurement of the peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see `man 5 proc`


def peak_gigabytes() -> float:
    """Peak memory since `forget_peak`; NaN where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1e6 if found else float("nan")


@torch.no_grad()
def measure(run: Run, *, repeats: int) -> None:
    """Print time and memory of a step for each form."""
    denoiser = run.denoiser
    injection = randomise(AttentionInjection.for_model(denoiser, TOKEN_DIM)).to(denoiser.device, denoiser.dtype)
    tokens = torch.randn(2, TOKENS, TOKEN_DIM).to(denoiser.device, denoiser.dtype)
    size = "×".join(str(run.call[name]) for name in ("num_frames", "height", "width"))
    print(f"{type(denoiser).__name__}: {size}, guidance, {len(injection.sites)} sites, {denoiser.dtype}", flush=True)

    ways = forms(injection, denoiser, tokens)
    laps: dict[str, list[Lap]] = {name: [] for name in ways}
    predicted: dict[str, Tensor] = {}
    memory = dict.fromkeys(ways, 0.0)
    preparing = []
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            forget_peak()
            entered = Moment()
            with way():
                if name == "ours":
                    preparing.append(entered.until(Moment()))
                made, steps = run()
            memory[name] = max(memory[name], peak_gigabytes())
            if repeat:  # the first call fills caches
                laps[name] += steps
            if name == "plain" and not torch.equal(made, predicted.setdefault("plain", made)):
                raise SystemExit("The plain backbone changed after the injection was detached.")
            predicted[name] = made
    error = require_equal(predicted["ours"], predicted["published"], type(denoiser).__name__, tolerance=TOLERANCE)

    plain = median(laps["plain"])
    print(f"{'':10} step ms (processor)      over the plain step           peak GB")
    for name in ways:
        lap = median(laps[name])
        # Of laps next to each other, since the load of the machine drifts.
        over = statistics.median(mine.wall / its.wall - 1 for mine, its in zip(laps[name], laps["plain"], strict=True))
        more = lap.processor / plain.processor - 1
        print(
            f"{name:10} {lap.wall:9.1f} ({lap.processor:9.1f})    {100 * over:+6.2f} % (processor {100 * more:+6.2f} %)"
            f"    {memory[name]:.2f}"
        )
    print(f"prepared once for a generation: {median(preparing).wall:.1f} ms")
    changed = relative_error(predicted["ours"], predicted["plain"])
    print(f"injection changes the prediction by {changed:.1e}; ours against published: {error:.1e}")


def main() -> None:
    """Print a table for one backbone."""
    makers: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {"cogvideox": cogvideox, "svd": svd}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=sorted(makers))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=picture, help="like 480x720; the model's own by default")
    parser.add_argument("--blocks", type=int, help="CogVideoX: of 42; by default all on CUDA, one on a CPU")
    parser.add_argument("--heads", type=int, default=48, help="CogVideoX: of 64 channels")
    parser.add_argument("--layers", type=int, default=2, help="SVD: residual blocks of a level on the way down")
    parser.add_argument("--channels", nargs=4, type=int, default=(320, 640, 1280, 1280), help="SVD")
    options = parser.parse_args()
    pipeline, call = makers[options.backbone](options, default_device(), getattr(torch, options.dtype))
    pipeline.set_progress_bar_config(disable=True)
    denoiser = (pipeline.transformer if options.backbone == "cogvideox" else pipeline.unet).eval()
    measure(Run(pipeline, denoiser, call, options.steps), repeats=options.repeats)


if __name__ == "__main__":
    main()
