"""Evaluation of the pocket: does retrieval move the picture, and how much of what it could does it reach?

For every query (an unseen scene of a domain that no training has seen) the pipeline generates from the same noise

    a  no retrieval              the plain backbone
    b  top-1                     the best reference's tokens, without CAMA
    c  mean                      the mean of the references' tokens, without CAMA
    d  CAMA                      the method
    e  true clip                 the tokens of the clip that should come out: the ceiling

and the tracked result is compared with the truth. Every row, condition and seed is a CSV file of its own, so a killed
run continues with the same call.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from motionrag.database import MotionDatabase, Reference
from motionrag.encoders.fingerprint import fingerprint
from motionrag.encoders.preprocessing import frames_to_tensor
from motionrag.evaluation.appearance import appearance
from motionrag.evaluation.family_accuracy import (
    FAMILY_NAMES,
    FamilyClassifier,
    guess_families,
    track_features,
    train_classifier,
)
from motionrag.evaluation.files import claim_folder, write_rows
from motionrag.evaluation.material import COLUMNS, REFERENCES, SEED, Column, TrueClips, column, indexed
from motionrag.evaluation.reconstruction import reconstruct
from motionrag.evaluation.report import PocketReport, write_report
from motionrag.evaluation.swap import SwapPair, swap_pairs
from motionrag.evaluation.track_error import position_errors
from motionrag.pipeline import MotionRAGPipeline
from motionrag.pocket.world import FAMILIES, SIZE, domain, sample_clip
from motionrag.sheet import SheetRow, contact_sheet
from motionrag.video import sample_indices


@dataclass(frozen=True)
class Sizes:
    """How much is generated.

    Attributes:
        domains: In each column.
        queries: For each domain.
        seeds: Noises for each query.
        side_queries: Queries of the side conditions (other k, other retrieval, wrong references), spread over the
            domains of the seen column.
        side_seeds: Noises for each of these.
        swap_pairs: Pairs of dynamics in the zero-shot swap.
        judge_clips: True clips of each family that train the judge of families; a quarter as many test it.
        batch_size: Videos in one call.
    """

    domains: int = 36
    queries: int = 2
    seeds: int = 3
    side_queries: int = 72
    side_seeds: int = 3
    swap_pairs: int = 16
    judge_clips: int = 60
    batch_size: int = 16


QUICK = Sizes(domains=9, queries=1, seeds=1, side_queries=9, side_seeds=1, swap_pairs=4, judge_clips=12)


@dataclass(frozen=True)
class Condition:
    """What is injected, and where it comes from.

    Attributes:
        row: a to e.
        k: Most references.
        by: Retrieval keys, each with weight 1.
        wrong: Share of the right domain's clips that may not be found, 0 to 1.
    """

    row: str
    k: int = REFERENCES
    by: tuple[str, ...] = ("text",)
    wrong: float = 0.0

    @property
    def name(self) -> str:
        """As in file names: "d-k9-text-wrong0"; rows without retrieval are their letter."""
        if self.row in "ae":
            return self.row
        return f"{self.row}-k{self.k}-{'+'.join(self.by)}-wrong{round(100 * self.wrong)}"


MAIN = tuple(Condition(row) for row in "abcde")
SIDE = (
    Condition("d", k=1),
    Condition("d", k=3),
    Condition("d", by=("image",)),
    Condition("d", by=("text", "image")),
    Condition("d", wrong=0.5),
    Condition("d", wrong=1.0),
)


def evaluate_pocket(
    source: MotionRAGPipeline | str | Path = "pocket",
    *,
    out: str | Path = "outputs/evaluation",
    sizes: Sizes | None = None,
    columns: Sequence[str] = COLUMNS,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    motion_guidance_scale: float | None = None,
) -> PocketReport:
    """Measure a pocket: track error, family accuracy, appearance and diversity of every row, and the zero-shot swap.

    Args:
        source: A pipeline, "pocket", or a bundle folder.
        out: Gets per-clip CSV files, `summary.json`, `report.md` and `swap.png`. A run that was stopped continues.
        sizes: How much is generated; None for the full evaluation.
        columns: Which of `COLUMNS`; the side conditions need "seen".
        num_inference_steps: Denoising steps; None for the pipeline's default.
        guidance_scale: Classifier-free guidance; None for the backbone's default.
        motion_guidance_scale: Of all rows with motion; None for the bundle's default.

    Returns:
        The report; everything in it is also in `out`.

    Raises:
        ValueError: If `out` holds an evaluation of other weights or settings, or a column is unknown.
    """
    if set(columns) - set(COLUMNS):
        raise ValueError(f"columns are some of {list(COLUMNS)}, got {list(columns)}.")
    pipe = source if isinstance(source, MotionRAGPipeline) else MotionRAGPipeline.from_pretrained(source)
    pipe.pipeline.set_progress_bar_config(disable=True)
    if motion_guidance_scale is None:
        motion_guidance_scale = pipe.bundle.config.motion_guidance_scale
    given = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "motion_guidance_scale": motion_guidance_scale,
    }
    run = _Run(pipe, Path(out), sizes or Sizes(), {name: value for name, value in given.items() if value is not None})
    database = pipe.database
    try:
        return run.evaluate(columns)
    finally:
        pipe.database = database


class _Run:
    """One evaluation: the pipeline, where results go, and the judge of families."""

    def __init__(self, pipe: MotionRAGPipeline, out: Path, sizes: Sizes, options: Mapping[str, Any]) -> None:
        self.pipe, self.out, self.sizes, self.options = pipe, out, sizes, options
        (out / "clips").mkdir(parents=True, exist_ok=True)
        self.settings = {
            "sizes": asdict(sizes),
            "options": dict(options),
            "weights": _weights(pipe),
            "trained": pipe.bundle.config.trained,
            "min_similarity": pipe.bundle.config.min_similarity,
        }
        claim_folder(self.out, self.settings)
        self.judge, self.judge_accuracy = self._train_judge()

    def evaluate(self, columns: Sequence[str]) -> PocketReport:
        """Run everything that is not there yet and write the report."""
        started = time.monotonic()
        checks: dict[str, Any] = {"judge_accuracy": self.judge_accuracy, "still_error": {}}
        for name in columns:
            material = column(
                name,
                self.out / "material",
                num_domains=self.sizes.domains,
                queries_per_domain=self.sizes.queries,
                encoder=self.pipe.encoder,
            )
            tracks = material.queries.tracks
            still = position_errors(tracks[:, :, :1].expand_as(tracks), tracks, SIZE)
            checks["still_error"][name] = float(still.mean())
            if name == columns[0]:
                checks.update(self._check_instruments(material.queries))
            self.pipe.database = material.database
            everything = range(len(material.queries))
            for condition in MAIN:
                for seed in range(self.sizes.seeds):
                    self._measure(material, condition, everything, seed)
            if name == "seen":
                chosen = everything[:: max(1, len(everything) // self.sizes.side_queries)][: self.sizes.side_queries]
                for condition in SIDE:
                    for seed in range(self.sizes.side_seeds):
                        self._measure(material, condition, chosen, seed)
        self._measure_swap()
        return write_report(
            self.out,
            columns=columns,
            settings=self.settings,
            checks=checks,
            seconds=round(time.monotonic() - started, 1),
        )

    def _train_judge(self) -> tuple[FamilyClassifier, float]:
        """The judge of families and its accuracy on true clips that it has not seen, 0 to 1."""
        file = self.out / "judge.safetensors"
        if file.exists():
            tensors = load_file(file)
            accuracy = float(tensors.pop("accuracy"))
            judge = FamilyClassifier(len(tensors["mean"]))
            judge.load_state_dict(tensors)
            return judge.eval(), accuracy
        seen, seen_families = self._judge_material(self.sizes.judge_clips, 3)
        unseen, unseen_families = self._judge_material(max(1, self.sizes.judge_clips // 4), 4)
        judge = train_classifier(seen, seen_families, seed=0)
        with torch.no_grad():
            accuracy = (judge(unseen).argmax(1) == unseen_families).float().mean()
        save_file({**judge.state_dict(), "accuracy": accuracy}, file)
        return judge, float(accuracy)

    def _judge_material(self, count: int, part: int) -> tuple[Tensor, Tensor]:
        """Features of tracked true clips of all families, one domain each, and their families."""
        features = []
        for index, family in enumerate(tqdm(FAMILY_NAMES, "judge", leave=False, disable=None)):
            clips = TrueClips.of(
                [
                    # As the columns are mixed: a third of the trained families' clips are from the held-out range.
                    sample_clip(
                        domain(
                            (SEED, part, index, number),
                            family=family,
                            held_out_range=number % 3 == 0 and not FAMILIES[family].held_out,
                        ),
                        (SEED, part, index, number, 1),
                        truth=False,
                    )
                    for number in range(count)
                ]
            )
            features.append(track_features(clips.track(clips.frames)))
        return torch.cat(features), torch.arange(len(FAMILY_NAMES)).repeat_interleave(count)

    def _check_instruments(self, truth: TrueClips) -> dict[str, float]:
        """Track error of the tracker on true clips, and of the autoencoder's reconstruction of them, in %."""
        tracked = truth.track(truth.frames)
        restored_frames = reconstruct(self.pipe.pipeline, truth.frames)
        restored = truth.track(restored_frames)
        own = position_errors(tracked.positions, truth.tracks, SIZE)
        through = position_errors(restored.positions, truth.tracks, SIZE)
        looks = appearance(restored_frames, truth.frames[:, 0], restored, truth.tracks, truth.masks)
        return {
            "tracker_error": float(own.mean()),
            "tracker_error_median": float(own.median()),
            "reconstruction_error": float(through.mean()),
            "reconstruction_error_median": float(through.median()),
            "reconstruction_psnr": float(looks.psnr.mean()),
        }

    def _measure(self, material: Column, condition: Condition, chosen: Sequence[int], seed: int) -> None:
        """Generate, track and write one CSV file, and the tracks beside it, unless it is there."""
        file = self.out / "clips" / f"{material.name}_{condition.name}_seed{seed}.csv"
        if file.exists():
            return
        frames, references, abstained = [], [], []
        for batch in tqdm(self._batches(material, condition, chosen), file.stem, leave=False, disable=None):
            made = self._generate(material, condition, batch, seed)
            frames.append(made[0])
            references += made[1]
            abstained += made[2]
        truth = material.queries.select(chosen)
        rows, positions = self._judge(torch.cat(frames), truth)
        for row, query, hits, without in zip(rows, chosen, references, abstained, strict=True):
            right = {path.resolve() for path in material.references[material.domains[query]]}
            shares = [Path(hit.clip.uri).resolve() in right for hit in hits]
            row |= {
                "query": query,
                "domain": material.domains[query],
                "seed": seed,
                "references": len(hits),
                "precision": float(np.mean(shares)) if shares else "",
                "abstained": int(without),
            }
        np.save(file.with_suffix(".npy"), positions.numpy().astype(np.float32))
        write_rows(file, rows)

    def _batches(self, material: Column, condition: Condition, chosen: Sequence[int]) -> list[list[int]]:
        """Queries that run in one call: those of one domain where its clips are left out."""
        groups = [list(chosen)]
        if condition.wrong:
            domains = sorted({material.domains[query] for query in chosen})
            groups = [[query for query in chosen if material.domains[query] == each] for each in domains]
        size = self.sizes.batch_size
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    def _generate(
        self, material: Column, condition: Condition, batch: Sequence[int], seed: int
    ) -> tuple[Tensor, list[list[Reference]], list[bool]]:
        """Frames `(b t h w 3)` uint8, references and whether each query abstained."""
        truth = material.queries.select(batch)
        images, prompts = _images(truth), truth.captions
        noise = [torch.Generator().manual_seed(1000 * query + seed) for query in batch]
        options = {**self.options, "generator": noise, "output_type": "np"}
        nothing: list[list[Reference]] = [[] for _ in batch]
        if condition.row in "ae":
            motion = {"num_references": 0} if condition.row == "a" else {"motion_tokens": self._true_tokens(truth)}
            return _pixels(self.pipe(images, prompts, **motion, **options).frames), nothing, [False] * len(batch)
        weights = dict.fromkeys(condition.by, 1.0)
        if condition.row == "d":
            left_out = round(condition.wrong * REFERENCES)
            output = self.pipe(
                images,
                prompts,
                num_references=condition.k,
                retrieval_weights=weights,
                exclude=material.references[material.domains[batch[0]]][:left_out],
                **options,
            )
            return _pixels(output.frames), output.references, output.abstained  # type: ignore[return-value] # a batch
        found = [
            material.database.search(
                text=prompt if "text" in weights else None, image=image if "image" in weights else None, k=condition.k
            )
            for image, prompt in zip(images, prompts, strict=True)
        ]
        used = [hits[:1] if condition.row == "b" else hits for hits in found]
        tokens = torch.stack([torch.stack([hit.motion_tokens for hit in hits]).mean(0) for hits in used])
        frames = self.pipe(images, prompts, motion_tokens=tokens, **options).frames
        return _pixels(frames), used, [False] * len(batch)

    def _true_tokens(self, truth: TrueClips) -> Tensor:
        """Tokens of the true clips, from the frames that indexing would sample."""
        sampled = sample_indices(truth.frames.shape[1], self.pipe.encoder.num_frames)
        return self.pipe.encoder.encode_motion([frames_to_tensor(clip[sampled].numpy()) for clip in truth.frames])

    def _judge(self, frames: Tensor, truth: TrueClips) -> tuple[list[dict[str, Any]], Tensor]:
        """A row of figures for each clip, and the tracked positions `(b n t 2)`."""
        tracked = truth.track(frames)
        errors = position_errors(tracked.positions, truth.tracks, SIZE)
        looks = appearance(frames, truth.frames[:, 0], tracked, truth.tracks, truth.masks)
        guesses = guess_families(self.judge, tracked)
        exists = truth.colours >= 0
        lost = (~tracked.found & exists[..., None]).sum((1, 2)) / (exists.sum(1) * frames.shape[1])
        rows = [
            {
                "family": family,
                "track_error": round(float(errors[index]), 3),
                "moves_like": guesses[index],
                "lost": round(float(lost[index]), 3),
                "psnr": round(float(looks.psnr[index]), 2),
                "colour_kept": round(float(looks.colour_kept[index]), 3),
                "shape_kept": round(float(looks.shape_kept[index]), 3),
            }
            for index, family in enumerate(truth.families)
        ]
        return rows, tracked.positions

    def _measure_swap(self) -> None:
        """The zero-shot swap: `swap.csv` and, for the first pairs, `swap.png`."""
        file = self.out / "swap.csv"
        if file.exists() or not self.sizes.swap_pairs:
            return
        pairs = swap_pairs(self.sizes.swap_pairs)
        truths = [TrueClips.of([pair.truths[side] for pair in pairs]) for side in (0, 1)]
        rows, shown = [], []
        for side in (0, 1):
            self.pipe.database = self._swap_database(pairs, side)
            for seed in range(self.sizes.seeds):
                frames = self._generate_swap(truths[side], seed)
                positions = truths[side].track(frames).positions
                own, other = (position_errors(positions, truths[which].tracks, SIZE) for which in (side, 1 - side))
                rows += [
                    {
                        "pair": index,
                        "database": "AB"[side],
                        "seed": seed,
                        "family": truths[side].families[index],
                        "other_family": truths[1 - side].families[index],
                        "own_error": round(float(own[index]), 3),
                        "other_error": round(float(other[index]), 3),
                    }
                    for index in range(len(pairs))
                ]
                if seed == 0:
                    shown.append(frames)
        _swap_sheet(pairs, shown).save(self.out / "swap.png")
        write_rows(file, rows)

    def _swap_database(self, pairs: Sequence[SwapPair], side: int) -> MotionDatabase:
        clips = [
            (f"{index:03d}-{reference}", pair.domains[side], (SEED, 9, index, 3 + side, reference))
            for index, pair in enumerate(pairs)
            for reference in range(REFERENCES)
        ]
        return indexed(self.out / "material" / f"swap-{'AB'[side]}", clips, self.pipe.encoder)

    def _generate_swap(self, truth: TrueClips, seed: int) -> Tensor:
        """Frames `(b t h w 3)` uint8, with the pipeline's present database."""
        parts = []
        for start in range(0, len(truth), self.sizes.batch_size):
            batch = truth.select(range(start, min(len(truth), start + self.sizes.batch_size)))
            noise = [torch.Generator().manual_seed(1000 * (start + index) + seed) for index in range(len(batch))]
            output = self.pipe(
                _images(batch),
                batch.captions,
                generator=noise,
                output_type="np",
                retrieval_weights={"text": 1.0},
                **self.options,
            )
            parts.append(_pixels(output.frames))
        return torch.cat(parts)


def _images(truth: TrueClips) -> list[Image.Image]:
    return [Image.fromarray(frame.numpy()) for frame in truth.frames[:, 0]]


def _pixels(frames: np.ndarray) -> Tensor:
    """`(b t h w 3)` in [0, 1] as uint8."""
    return torch.from_numpy((frames.clip(0, 1) * 255).round().astype(np.uint8))


def _weights(pipe: MotionRAGPipeline) -> str:
    """One hash of every network whose numbers matter here."""
    parts = {name: pipe.bundle.part_fingerprint(name) for name in ("cama", "motion_injection")}
    for kind in ("motion_tokens", "context_tokens", "text", "image"):
        parts[kind] = pipe.encoder.fingerprint(kind)
    parts["vae"] = fingerprint("vae", {}, pipe.pipeline.vae)
    [denoiser] = pipe.backbone.denoisers(pipe.pipeline)
    return fingerprint("denoiser", parts, denoiser)


def _swap_sheet(pairs: Sequence[SwapPair], shown: Sequence[Tensor], *, count: int = 3) -> Image.Image:
    """Image, and for each database what was generated and what is true."""
    rows = []
    for index, pair in enumerate(pairs[:count]):
        image = Image.fromarray(pair.truths[0].frames[0])
        for side in (0, 1):
            truth = pair.truths[side]
            rows.append(
                SheetRow(
                    f"Database {'AB'[side]}, in which “{pair.domains[side].verb}” means: {truth.family}",
                    shown[side][index].numpy(),
                    f"generated; prompt: {truth.caption}",
                    image,
                )
            )
            rows.append(SheetRow(f"Truth under database {'AB'[side]}", truth.frames, "", image))
    return contact_sheet(rows, columns=9, tile=64)
