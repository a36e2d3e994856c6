"""`python benchmarks/adaptation.py [--real-size]`: stage-2 steps from stored tokens against encoding on the fly.

Both train the same networks on the same clips, in turn. On the fly, every step runs the video encoder over all k+1
clips and the image encoder over their first frames. It reads the clips as arrays; decoding videos would make the ratio
larger. The figures are medians of one run; the losses of both must agree. `--real-size` takes encoders, resamplers and
CAMA of the published sizes with random weights; it needs 8 GB of memory and, on two cores, minutes.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import default_collate

from motionrag.bundle import EncoderSource, MotionBundle
from motionrag.encoder import MotionEncoder
from motionrag.encoders import DINOv2Encoder, VideoMAEEncoder
from motionrag.pocket.clips import PocketClips
from motionrag.training import AdaptationTraining, EncodedClips, RetrievedReferences
from motionrag.training.encoded import sample_frames
from motionrag.training.start import new_bundle


def main() -> None:
    """Print seconds for each, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="pocket")
    parser.add_argument("--real-size", action="store_true")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.real_size:
            options.bundle = real_size(Path(folder), options.bundle)
        source = str(MotionEncoder.from_pretrained(options.bundle).bundle.folder)
        clips = PocketClips(options.clips, seed=9, folder=folder)
        encoded = EncodedClips(
            clips,
            folder=folder,
            bundle=source,
            features=["motion_tokens", "context_features"],
            precision="float32",
        )
        references = RetrievedReferences(encoded, source)
        encoder = MotionEncoder.from_pretrained(source)
        module = AdaptationTraining(source)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        optimiser = module.configure_optimizers()["optimizer"]
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = 0.0  # both see the same weights

        def step(batch: dict[str, torch.Tensor]) -> float:
            loss = module.training_step(batch, 0)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.item()

        def stored(rows: list[int]) -> float:
            return step(default_collate([references[row] for row in rows]))

        @torch.no_grad()
        def on_the_fly(rows: list[int]) -> dict[str, torch.Tensor]:
            order = [[*references.references(row), row] for row in rows]
            videos = [torch.stack([clips.video(clip) for clip in each]) for each in order]
            frames = [sample_frames(video, encoder.num_frames) for video in videos]
            return {
                "motion_tokens": torch.stack([encoder.encode_motion(list(each)) for each in frames]),
                "context_features": torch.stack([encoder.image_encoder(video[:, 0]) for video in videos]),
            }

        seconds: dict[str, list[tuple[float, float]]] = {"stored": [], "on the fly": []}
        for repeat in range(options.repeats + 1):
            first = repeat * options.batch_size % options.clips
            rows = [(first + clip) % options.clips for clip in range(options.batch_size)]
            losses = []
            for name, action in (("stored", stored), ("on the fly", lambda rows: step(on_the_fly(rows)))):
                wall, processor = time.perf_counter(), time.process_time()
                losses.append(action(rows))
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
            if abs(losses[0] - losses[1]) > 0.01 * losses[1]:
                raise SystemExit(f"The losses differ: {losses[0]} from stored tokens, {losses[1]} on the fly.")
    medians = {}
    for name, laps in seconds.items():
        # The first lap loads the encoders.
        medians[name] = [statistics.median(values) for values in zip(*laps[1:], strict=True)]
        wall, processor = medians[name]
        print(
            f"{name:12} {wall:.4f} s a step, {processor:.4f} s of processor, {options.batch_size / wall:.1f} samples/s"
        )
    ratios = [slow / fast for slow, fast in zip(medians["on the fly"], medians["stored"], strict=True)]
    print(f"ratio        {ratios[0]:.1f} of wall time, {ratios[1]:.1f} of processor time")


def real_size(folder: Path, bundle: str) -> str:
    """Write an untrained bundle of the published sizes; sentences and backbone are those of another bundle."""
    from transformers import Dinov2Config, VideoMAEConfig

    given = MotionBundle.from_pretrained(bundle)
    encoders = {
        name: replace(given.config.encoders[name], source=given.path_or_id(given.config.encoders[name].source))
        for name in ("clip", "text")
    }
    dinov2_large = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=224)
    for name, encoder in (
        ("video", VideoMAEEncoder.from_pretrained(VideoMAEConfig(num_frames=16))),
        ("image", DINOv2Encoder.from_pretrained(dinov2_large)),
    ):
        encoder.save_pretrained(folder / name)
        encoders[name] = EncoderSource(str(folder / name))
    new_bundle(given.path_or_id(given.config.base_model), folder / "bundle", encoders=encoders)
    return str(folder / "bundle")


if __name__ == "__main__":
    main()
