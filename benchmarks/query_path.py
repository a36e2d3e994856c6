"""`OMP_NUM_THREADS=1 python benchmarks/query_path.py`: motion tokens of a query image, from stored tokens or encoded.

Encoders, resamplers and CAMA of the published sizes with random weights (VideoMAE-B, DINOv2-L, 25 tokens of 1024).
Ours encodes the query image, reads the tokens of the references from a Lance table and runs CAMA; the unconditional
tokens for guidance are in the bundle. The published path encodes in every call: the references' clips and the grey clip
of guidance as motion, the references' first frames and the query image as context. Clips are given as arrays: decoding
them, which the published path does too, would make the ratio larger, and so would the clip made of the query image,
which it encodes and does not use.

Both run in turn on other references each time; medians of wall and processor time. The table holds tokens of the same
weights in float16, so the motion tokens of both must agree to that precision, in the same run.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from injection import Lap, Moment, default_device, median, relative_error
from torch import Tensor

from motionrag.database.schema import TOKEN_COLUMNS, to_numpy, vectors
from motionrag.database.table import ClipTable
from motionrag.encoders import DINOv2Encoder, VideoMAEEncoder
from motionrag.models import CAMA, Resampler

NUM_TOKENS, FRAMES = 25, 16
TOLERANCE = 2e-3  # of the largest value; float16 rounds the tokens by up to 5e-4


@dataclass
class Networks:
    """What turns clips and images into motion tokens.

    Attributes:
        video: `(b t c h w)` → `(b l d)`.
        image: `(b c h w)` → `(b l d)`.
        motion_resampler: Features of `video` → tokens.
        context_resampler: Features of `image` → tokens.
        cama: Tokens of references and look of the query → motion tokens.
    """

    video: VideoMAEEncoder
    image: DINOv2Encoder
    motion_resampler: Resampler
    context_resampler: Resampler
    cama: CAMA

    def motion(self, clips: Tensor) -> Tensor:
        """Motion tokens of clips in [-1, 1]."""
        return self.motion_resampler(self.video(clips))

    def context(self, images: Tensor) -> Tensor:
        """Context tokens of images in [-1, 1]."""
        return self.context_resampler(self.image(images))

    @classmethod
    def make(cls, *, depth: int, width: int, device: torch.device) -> "Networks":
        """Random weights; `depth` 24 and `width` 1024 are the published sizes, less is for trying the script out."""
        from transformers import Dinov2Config, VideoMAEConfig

        torch.manual_seed(0)
        heads = max(1, width // 64)
        video_width, video_heads = 3 * width // 4, max(1, 3 * heads // 4)
        video = VideoMAEConfig(
            num_frames=FRAMES,
            hidden_size=video_width,
            num_hidden_layers=depth // 2,
            num_attention_heads=video_heads,
            intermediate_size=4 * video_width,
        )
        image = Dinov2Config(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=224)
        resampler = {
            "dim": width,
            "output_dim": width,
            "num_queries": NUM_TOKENS,
            "depth": 4,
            "num_heads": video_heads,
            "head_dim": 64,
        }
        return cls(
            VideoMAEEncoder.from_pretrained(video, device=device),
            DINOv2Encoder.from_pretrained(image, device=device),
            Resampler(input_dim=video_width, **resampler).eval().to(device),
            Resampler(input_dim=width, **resampler).eval().to(device),
            CAMA(dim=width, depth=4, num_heads=heads, ff_dim=4 * width, num_tokens=NUM_TOKENS).eval().to(device),
        )


@torch.no_grad()
def store(networks: Networks, clips: Tensor, path: Path, rows: int) -> ClipTable:
    """A table whose first rows hold the tokens of the clips; the others hold random ones."""
    width = networks.cama.dim
    tokens = np.random.default_rng(0).standard_normal((rows, 2, NUM_TOKENS, width), dtype=np.float32)
    for number, clip in enumerate(clips):
        tokens[number, 0] = networks.motion(clip[None])[0].cpu().numpy()
        tokens[number, 1] = networks.context(clip[None, 0])[0].cpu().numpy()
    column = pa.list_(pa.float16(), NUM_TOKENS * width)
    fields = [pa.field("id", pa.string(), nullable=False), *(pa.field(name, column) for name in TOKEN_COLUMNS)]
    table = ClipTable.create(path, pa.schema(fields))
    columns = {name: vectors(tokens[:, kind], np.float16) for kind, name in enumerate(TOKEN_COLUMNS)}
    table.append(pa.table({"id": [row_id(number) for number in range(rows)], **columns}))
    return table


def row_id(number: int) -> str:
    """Identity of a row."""
    return f"{number:032x}"


def from_table(networks: Networks, table: ClipTable, query: Tensor, chosen: list[int]) -> Tensor:
    """Ours: motion tokens `(1 l d)` of the query image; `chosen` are rows, the most similar last."""
    rows = table.take([row_id(number) for number in chosen], TOKEN_COLUMNS)
    motion, context = (
        rearrange(torch.from_numpy(to_numpy(rows[name])).to(query), "k (l d) -> 1 k l d", l=NUM_TOKENS)
        for name in TOKEN_COLUMNS
    )
    look = rearrange(networks.context(query), "1 l d -> 1 1 l d")
    return networks.cama.predict(motion, torch.cat([context, look], dim=1))


def encoding_all(networks: Networks, clips: Tensor, query: Tensor, chosen: list[int]) -> Tensor:
    """Published: motion tokens `(2 l d)` of the query image and, for guidance, of a grey clip."""
    references = clips[chosen]
    motion = networks.motion(torch.cat([references, torch.zeros_like(references[:1])]))
    context = networks.context(torch.cat([references[:, 0], query]))
    return torch.cat([networks.cama.predict(motion[None, :-1], context[None]), motion[-1:]])


@torch.no_grad()
def main() -> None:
    """Print both medians, their ratio and how far the results are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=9)
    parser.add_argument("--clips", type=int, default=12, help="to choose references from")
    parser.add_argument("--rows", type=int, default=300, help="of the table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=24, help="of the image encoder; the video encoder has half")
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    device = default_device()
    networks = Networks.make(depth=options.depth, width=options.width, device=device)
    clips = torch.rand(options.clips, FRAMES, 3, 240, 320, device=device) * 2 - 1
    generator = np.random.default_rng(1)
    laps: dict[str, list[Lap]] = {"stored": [], "published": []}
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        table = store(networks, clips, Path(folder) / "clips.lance", options.rows)
        for repeat in range(options.repeats + 1):
            chosen = generator.choice(options.clips, options.references, replace=False).tolist()
            query = torch.rand(1, 3, 240, 320, device=device) * 2 - 1
            actions: dict[str, Callable[[], Tensor]] = {
                "stored": partial(from_table, networks, table, query, chosen),
                "published": partial(encoding_all, networks, clips, query, chosen),
            }
            predicted = {}
            for name, action in actions.items():
                start = Moment()
                predicted[name] = action()[:1]
                if repeat:  # the first lap fills caches
                    laps[name].append(start.until(Moment()))
            errors.append(relative_error(predicted["stored"], predicted["published"]))
            if not errors[-1] <= TOLERANCE:
                raise SystemExit(f"The motion tokens differ by {errors[-1]:.1e} of the largest value.")
        swapped = from_table(networks, table, query, chosen[::-1])
    medians = {name: median(values) for name, values in laps.items()}
    for name, lap in medians.items():
        print(f"{name:10} {lap.wall:9.1f} ms, {lap.processor:9.1f} ms of processor")
    ratios = [slow / fast for slow, fast in zip(medians["published"], medians["stored"], strict=True)]
    print(f"ratio      {ratios[0]:.1f} of wall time, {ratios[1]:.1f} of processor time")
    print(f"motion tokens differ by {max(errors):.1e} of the largest value (stored in float16);", end=" ")
    print(f"by {relative_error(swapped, predicted['published']):.1e} with the references the other way round")


if __name__ == "__main__":
    main()
