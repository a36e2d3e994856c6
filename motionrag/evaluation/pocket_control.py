"""Evaluation of trajectory control: do dragged things go where they are asked to, and does all else stay?

Every part has scenes that no training has seen (`control_material.py`), and each of its rows makes every scene's video
from the same noises:

    drag          u  nothing asked           c  way and brush          f  way, brush over the whole frame
                  w  as c, but without guidance of the control         c3 three ways at once
                  t  the video that does what is asked: what the instruments show of it
    together      n  neither                 c  way and brush          r  retrieval          b  both
    true-seen, true-held-out                 u  nothing asked          c  things' true ways and brush

Things are tracked by their colours. Every row and noise is a CSV file of its own, so a killed run continues with the
same call; `control_report.py` makes figures of these files.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from motionrag.encoders.fingerprint import fingerprint
from motionrag.evaluation.control_making import Make, PipelineMaker, Request
from motionrag.evaluation.control_material import (
    Drag,
    DragScene,
    covered,
    drag_scenes,
    together_domains,
    together_scenes,
    true_way_scenes,
)
from motionrag.evaluation.control_report import FIELDS, ControlReport, write_control_report
from motionrag.evaluation.files import claim_folder, write_rows
from motionrag.evaluation.material import REFERENCES, SEED, TrueClips, indexed
from motionrag.evaluation.mean_distance import md_vid
from motionrag.evaluation.region_motion import region_motion
from motionrag.evaluation.track_error import position_errors
from motionrag.pipeline import MotionRAGPipeline
from motionrag.pocket.world import NUM_FRAMES, SIZE, Domain

_REFERENCE_CLIPS = 15  # behind SEED: seeds of the database's clips
_SCENES_PER_DOMAIN = 2
_COST_RUNS = 5
# Optical flow smears motion over its edge. In videos that do exactly what is asked it is then 0.13 pixels on the mean
# outside, without a rim 0.42.
_RIM = 4
SHOWN = 6
"""Scenes whose frames are kept for the contact sheet."""


@dataclass(frozen=True)
class ControlSizes:
    """How much is generated.

    Attributes:
        scenes: Of drags, and as many of drags together with retrieval, and half as many for each table of true ways.
        noises: For each scene, the same ones in all rows.
        batch_size: Videos in one call.
        seed: Of scenes and noises.
    """

    scenes: int = 72
    noises: int = 3
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """What the videos of a row are made with.

    Attributes:
        is_controlled: Ways and brush.
        retrieves: Motion of retrieved clips.
        is_whole: The brush covers the frame.
        at_once: All three things are dragged; scenes of two are left out.
        control_guidance_scale: None for the bundle's own.
    """

    is_controlled: bool = False
    retrieves: bool = False
    is_whole: bool = False
    at_once: bool = False
    control_guidance_scale: float | None = None


_UNCONTROLLED, _CONTROLLED = Row(), Row(is_controlled=True)
_UNGUIDED = Row(is_controlled=True, control_guidance_scale=1.0)
PARTS = {
    "drag": {
        "u": _UNCONTROLLED,
        "c": _CONTROLLED,
        "w": _UNGUIDED,
        "f": Row(is_controlled=True, is_whole=True),
        "c3": Row(is_controlled=True, at_once=True),
    },
    "together": {
        "n": _UNCONTROLLED,
        "c": _CONTROLLED,
        "r": Row(retrieves=True),
        "b": Row(is_controlled=True, retrieves=True),
    },
    "true-seen": {"u": _UNCONTROLLED, "c": _CONTROLLED},
    "true-held-out": {"u": _UNCONTROLLED, "c": _CONTROLLED},
}


def evaluate_pocket_control(
    source: MotionRAGPipeline | str | Path = "pocket-control",
    *,
    out: str | Path = "outputs/evaluation-control",
    sizes: ControlSizes | None = None,
    num_inference_steps: int | None = None,
) -> ControlReport:
    """Measure the control of a pocket: drags, drags together with retrieval, true ways, and what control costs.

    Args:
        source: A pipeline whose bundle has both adapters, "pocket-control", or a bundle folder.
        out: Gets per-clip CSV files, `report.json`, `table.md` and `sheet.png`. A run that was stopped continues.
        sizes: How much is generated; None for the full evaluation.
        num_inference_steps: Denoising steps; None for the bundle's default.

    Returns:
        The report; everything in it is also in `out`.

    Raises:
        ValueError: If `out` holds an evaluation of other weights or settings, or the bundle lacks an adapter.
    """
    pipe = source if isinstance(source, MotionRAGPipeline) else MotionRAGPipeline.from_pretrained(source)
    _ = pipe.modulation, pipe.injection  # refuses a bundle without them
    pipe.pipeline.set_progress_bar_config(disable=True)
    sizes, database = sizes or ControlSizes(), pipe.database
    settings = {
        "weights": _weights(pipe),
        "trained": pipe.bundle.config.trained,
        "num_inference_steps": num_inference_steps,
        "motion_guidance_scale": pipe.bundle.config.motion_guidance_scale,
        "control_guidance_scale": pipe.bundle.config.control_guidance_scale,
        "dtype": str(pipe.denoisers[0].dtype).removeprefix("torch."),
    }
    make = PipelineMaker(pipe, num_inference_steps)
    try:
        return measure_control(
            make,
            out=Path(out),
            sizes=sizes,
            settings=settings,
            prepare=lambda scenes: _index_references(pipe, Path(out) / "material", sizes, scenes),
            cost=None if num_inference_steps == 1 else make.cost,  # a first step tells nothing of the others
        )
    finally:
        pipe.database = database


def measure_control(
    make: Make,
    *,
    out: Path,
    sizes: ControlSizes,
    settings: Mapping[str, Any],
    prepare: Callable[[Sequence[DragScene]], dict[str, Any]] | None = None,
    cost: Callable[[Sequence[Request]], dict[str, Any]] | None = None,
) -> ControlReport:
    """Measure whatever makes videos.

    Args:
        make: Makes videos of one row.
        out: As in `evaluate_pocket_control`.
        sizes: How much is generated.
        settings: What makes the videos; a folder of others is refused.
        prepare: Makes the database that the scenes' captions search, and returns figures of it for the report.
        cost: Measures on some controlled requests what control costs; None to leave it out.

    Returns:
        The report.

    Raises:
        ValueError: If `out` holds an evaluation with other settings.
    """
    started = time.monotonic()
    settings = {**settings, "sizes": asdict(sizes), "figures": list(FIELDS)}
    clips = out / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    claim_folder(out, settings)
    scenes = {part: _scenes(part, sizes) for part in PARTS}
    checks = prepare(scenes["together"]) if prepare else {}
    _measure_asked(clips, scenes["drag"])
    for part, rows in PARTS.items():
        for noise in range(sizes.noises):
            for name in rows:
                _run_row(make, clips, part, name, scenes[part], noise=noise, sizes=sizes)
    timing = None
    if cost is not None:
        timing = cost([request_of(scene, _CONTROLLED, noise=0) for scene in scenes["drag"][:_COST_RUNS]])
    return write_control_report(
        out,
        settings=settings,
        checks=checks,
        cost=timing,
        shown=scenes["drag"][:SHOWN],
        seconds=round(time.monotonic() - started, 1),
    )


def request_of(scene: DragScene, row: Row, *, noise: int) -> Request:
    """What a scene's video in a row is made from.

    Args:
        scene: The scene; it has three ways if the row asks for them.
        row: The row.
        noise: Seed of the noise.

    Returns:
        The request.
    """
    drag = _asked(scene, row.at_once)
    caption = scene.clip.caption if row.retrieves else None
    if not row.is_controlled:
        return Request(scene.clip.frames[0], noise, caption=caption)
    brush = np.ones_like(drag.brush) if row.is_whole else drag.brush
    return Request(scene.clip.frames[0], noise, drag.ways, brush, caption, row.control_guidance_scale)


def _run_row(
    make: Make, folder: Path, part: str, name: str, scenes: Sequence[DragScene], *, noise: int, sizes: ControlSizes
) -> None:
    """Make a row's videos with one noise for each scene, track them and write their figures, unless they are there."""
    file, row = folder / f"{part}_{name}_noise{noise}.csv", PARTS[part][name]
    if file.exists():
        return
    three = [index for index, scene in enumerate(scenes) if scene.all_at_once]
    chosen = three if row.at_once else list(range(len(scenes)))
    seed = _noise_seed(sizes.seed, list(PARTS).index(part), noise)
    parts = [torch.zeros(0, NUM_FRAMES, SIZE, SIZE, 3, dtype=torch.uint8)]
    for start in tqdm(range(0, len(chosen), sizes.batch_size), file.stem, leave=False, disable=None):
        batch = chosen[start : start + sizes.batch_size]
        parts.append(make([request_of(scenes[index], row, noise=seed + index) for index in batch]))
    frames = torch.cat(parts)
    if part == "drag" and noise == 0:
        count = sum(index < SHOWN for index in chosen)
        np.save(file.with_suffix(".npy"), frames[:count].numpy())
    if (part, name) == ("drag", "u"):
        # The same videos, held against three ways: what row c3 is compared with.
        against_three = figures(frames[three], scenes, three, at_once=True, noise=noise)
        write_rows(folder / f"drag_u3_noise{noise}.csv", against_three)
    write_rows(file, figures(frames, scenes, chosen, at_once=row.at_once, noise=noise))


def figures(
    frames: Tensor, scenes: Sequence[DragScene], chosen: Sequence[int], *, at_once: bool, noise: int
) -> list[dict[str, Any]]:
    """Measure videos.

    Args:
        frames: `(b t h w 3)` uint8.
        scenes: All of a part.
        chosen: Which of them the videos show.
        at_once: Hold them against the ways of all three things.
        noise: Number of the noise.

    Returns:
        A row for each: `drawn` and `md`, pixels on the mean over frames and dragged things, how far the asked ways
        lead and how far the things are from them; `drawn_end` and `md_end` in the last frame; `lost`, the share of
        frames in which dragged things are not seen; `others_moved`, pixels that the other things are away from their
        start, on the mean; `others_error`, their track error against their domain's motion in % of the frame; and what
        `region_motion` finds outside the brush and the way and a rim of 4 pixels: `moved_outside`, pixels that it
        moves on the mean, and `flow_outside`, the length of all flow.
    """
    if not len(chosen):
        return []
    tracked = TrueClips.of([scenes[index].clip for index in chosen]).track(frames)
    rows = []
    for place, index in enumerate(chosen):
        clip, drag = scenes[index].clip, _asked(scenes[index], at_once)
        positions, things = tracked.positions[place], list(drag.things)
        asked, went = torch.from_numpy(drag.asked.tracks[things]), positions[things]
        later, last = range(1, frames.shape[1]), [frames.shape[1] - 1]
        still = asked[:, :1].expand_as(asked)
        others = [thing for thing in range(len(clip.things)) if thing not in things]
        row = {
            "scene": index,
            "noise": noise,
            "family": clip.family,
            "things": len(things),
            "drawn": md_vid(still, asked, later),
            "drawn_end": md_vid(still, asked, last),
            "md": md_vid(went, asked, later),
            "md_end": md_vid(went, asked, last),
            "lost": 1 - tracked.found[place, things].float().mean(),
            "others_moved": "",
            "others_error": "",
            "moved_outside": "",
            "flow_outside": "",
        }
        if not at_once:
            row["moved_outside"], row["flow_outside"] = region_motion(frames[place], _outside(drag))
        if others:
            start = positions[others, :1].expand_as(positions[others])
            row["others_moved"] = md_vid(positions[others], start, later)
            truth = torch.from_numpy(clip.tracks[others])
            row["others_error"] = position_errors(positions[others][None], truth[None], SIZE)[0]
        rows.append({name: f"{float(v):.4f}" if isinstance(v, Tensor) else v for name, v in row.items()})
    return rows


def _outside(drag: Drag) -> Tensor:
    """Pixels `(h w)` at which nothing is asked to move, and nothing to come."""
    inside = torch.from_numpy(drag.brush | covered(drag)).float()
    outside: Tensor = F.max_pool2d(inside[None], 2 * _RIM + 1, stride=1, padding=_RIM)[0] == 0
    return outside


def _asked(scene: DragScene, at_once: bool) -> Drag:
    if not at_once:
        return scene.drag
    assert scene.all_at_once is not None  # noqa: S101 - others are not chosen
    return scene.all_at_once


def _measure_asked(clips: Path, scenes: Sequence[DragScene]) -> None:
    """Row t: what the instruments show of videos that do what is asked."""
    frames = torch.from_numpy(np.stack([scene.drag.asked.frames for scene in scenes]))
    write_rows(clips / "drag_t_noise0.csv", figures(frames, scenes, range(len(scenes)), at_once=False, noise=0))


def _scenes(part: str, sizes: ControlSizes) -> list[DragScene]:
    if part == "drag":
        return drag_scenes(sizes.scenes, seed=sizes.seed)
    if part == "together":
        return together_scenes(_domains(sizes), sizes.scenes, seed=sizes.seed)
    return true_way_scenes((sizes.scenes + 1) // 2, held_out=part == "true-held-out", seed=sizes.seed)


def _domains(sizes: ControlSizes) -> list[Domain]:
    return together_domains((sizes.scenes + _SCENES_PER_DOMAIN - 1) // _SCENES_PER_DOMAIN, seed=sizes.seed)


def _index_references(
    pipe: MotionRAGPipeline, folder: Path, sizes: ControlSizes, scenes: Sequence[DragScene]
) -> dict[str, Any]:
    """Give the pipeline the database of the part `together`; how well it is searched, as shares."""
    clips = [
        (f"{index:03d}-{number}", each, (SEED, _REFERENCE_CLIPS, sizes.seed, index, number))
        for index, each in enumerate(_domains(sizes))
        for number in range(REFERENCES)
    ]
    pipe.database = indexed(folder, clips, pipe.encoder)
    least = pipe.bundle.config.min_similarity
    right, is_served = [], []
    for scene in scenes:
        hits = pipe.database.search(text=scene.clip.caption, k=REFERENCES)
        used = [hit for hit in hits if least is None or hit.score >= least]
        right += [Path(hit.clip.uri).name.startswith(f"{scene.domain:03d}-") for hit in used]
        is_served.append(bool(used))
    return {
        "references_from_the_right_domain": float(np.mean(right)) if right else 0.0,
        "scenes_with_references": float(np.mean(is_served)),
    }


def _noise_seed(seed: int, part: int, noise: int) -> int:
    """Seed of scene 0; those of the next scenes follow. The same in all rows of a part."""
    return ((100 * seed + part) * 1000 + noise) * 10_000


def _weights(pipe: MotionRAGPipeline) -> str:
    """One hash of every network whose numbers matter here."""
    names = ("cama", "motion_injection", "feature_modulation")
    parts = {name: pipe.bundle.part_fingerprint(name) for name in names}
    for kind in ("motion_tokens", "context_tokens", "text", "image"):
        parts[kind] = pipe.encoder.fingerprint(kind)
    for name in ("vae", "image_encoder"):
        parts[name] = fingerprint(name, {}, getattr(pipe.pipeline, name))
    [denoiser] = pipe.denoisers
    return fingerprint("denoiser", parts, denoiser)
