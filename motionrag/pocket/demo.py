"""The demo: one image under several databases, from folders of clips to videos and a picture that explains them.

index → retrieve → adapt → inject → generate. Without clips of your own it renders three domains of the pocket's world,
in which things move in three ways, and one scene that is in none of them. Image, prompt, weights and noise stay the
same; only the database is exchanged. How the scene goes on under each dynamics is known, so the videos can be judged.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from motionrag.database import AddReport, MotionDatabase, Reference
from motionrag.database.sources import list_clips
from motionrag.output import MotionRAGOutput
from motionrag.pipeline import MotionRAGPipeline
from motionrag.pocket.folder import CAPTIONS, render_domain
from motionrag.pocket.world import WorldClip, named_domain, same_start
from motionrag.sheet import SheetRow, contact_sheet
from motionrag.video import Clip, VideoError, read_clip

UNTRAINED = "The pocket's weights are untrained: the demo shows that every part runs, not yet that retrieval helps."
# They circle, hop and drift: chosen for motions that the eye tells apart and that fit into the frame from one start.
VERBS = ("zamp", "blurn", "waff")
CLIPS_PER_DOMAIN = 12  # of the same scenes in each, so that the databases differ by motion alone
UNSEEN = 1004  # seed of a scene with a thing of which no clip has both colour and shape
SHOWN_REFERENCES = 2
TILE = 96


@dataclass(frozen=True)
class Query:
    """What the demo generates from.

    Attributes:
        image: The first frame of the videos to make.
        prompt: What should happen.
        exclude: A clip that must not be retrieved, because the image was taken from it.
    """

    image: Image.Image
    prompt: str
    exclude: Clip | None = None


@dataclass(frozen=True)
class Source:
    """What a database is made from.

    Attributes:
        name: Of the database.
        clips: Folder or manifest.
        captions: Captions for the folder.
        video: Name of the file that is generated with this database.
        truth: How the query image really goes on, `(t h w 3)` uint8, if that is known.
        world: The same with tracks, if it was rendered.
    """

    name: str
    clips: Path
    captions: Path | None
    video: str
    truth: np.ndarray | None = None
    world: WorldClip | None = None


@dataclass(frozen=True)
class Result:
    """What one database made of the query.

    Attributes:
        source: What the database was made from.
        index: What was indexed.
        output: The generation.
        frames: The video `(t h w 3)` uint8.
        track_errors: Name of a source → distance from its truth, % of the frame's side; empty if none is known.
        change: Mean difference from the video without retrieval, 0 to 1.
    """

    source: Source
    index: AddReport
    output: MotionRAGOutput
    frames: np.ndarray
    track_errors: dict[str, float]
    change: float

    @property
    def references(self) -> list[Reference]:
        """What was retrieved, best first."""
        return self.output.references  # type: ignore[return-value] # one image: one list

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels, as JSON values."""
        return {
            "name": self.source.name,
            "index": asdict(self.index),
            "generation": self.output.to_dict(),
            "change_by_retrieval": self.change,
            "track_errors": self.track_errors,
        }


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        videos: The generated videos: without retrieval, then one for each database.
        sheet: The picture that shows query, references, videos and truth.
        report: Everything in figures, as JSON.
        plain_track_errors: Of the video without retrieval, as in `Result`.
        results: One for each database.
        note: What to know before judging the videos; empty if there is nothing.
        seconds: Wall time by step.
    """

    videos: list[Path]
    sheet: Path
    report: Path
    plain_track_errors: dict[str, float]
    results: list[Result]
    note: str
    seconds: dict[str, float]


def run_demo(
    clips: str | Path | None = None,
    *,
    captions: str | Path | None = None,
    image: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path = "outputs/demo",
    num_inference_steps: int | None = None,
    seed: int = 0,
) -> DemoResult:
    """Generate from one image without retrieval and under each database, from the same noise.

    Args:
        clips: Folder or manifest, for one database; None renders three domains.
        captions: Captions for the folder.
        image: Image to start from; None takes a scene that is in no database, or the first frame of one of your clips,
            which is then no reference.
        prompt: What should happen; None takes one that does not name the motion, or that clip's caption.
        out: Where everything is written. Databases and rendered clips of an earlier demo there are replaced.
        num_inference_steps: Denoising steps; None for the pipeline's default.
        seed: Of the noise.

    Returns:
        Paths and figures.

    Raises:
        ValueError: If no clip of the folder can be read.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    if clips is None:
        query, sources = _three_domains(out / "clips")
        clock.lap("render")
    else:
        query, sources = _own_clips(Path(clips), None if captions is None else Path(captions))
    if image is not None:
        query, sources = _other_image(image, sources)
    if prompt is not None:
        query = Query(query.image, prompt, query.exclude)
    pipeline = MotionRAGPipeline.from_pretrained("pocket")
    pipeline.pipeline.set_progress_bar_config(disable=True)
    note = "" if pipeline.bundle.config.trained else UNTRAINED
    # The prompt names no motion, so no caption is similar to it; here the database alone is to say how things move.
    options: dict[str, Any] = {"output_type": "np", "min_similarity": -1.0}
    if num_inference_steps is not None:
        options["num_inference_steps"] = num_inference_steps
    clock.lap("load")

    plain = pipeline(query.image, query.prompt, num_references=0, generator=_noise(seed), **options)
    plain_frames = _as_uint8(plain.frames[0])
    clock.lap("generate without retrieval")
    results = []
    for source in sources:
        database = _new_database(out / "databases" / source.name, pipeline)
        index = database.add(source.clips, captions=source.captions)
        clock.lap(f"index {source.name}")
        pipeline.database = database  # no training: this is all that changes
        output = pipeline(query.image, query.prompt, exclude=query.exclude or (), generator=_noise(seed), **options)
        frames = _as_uint8(output.frames[0])
        change = float(np.abs(output.frames - plain.frames).mean())
        results.append(Result(source, index, output, frames, _track_errors(frames, sources), change))
        clock.lap(f"generate with {source.name}")

    plain_errors = _track_errors(plain_frames, sources)
    videos = [*plain.save(out / "video_plain.mp4")]
    for result in results:
        videos += result.output.save(out / result.source.video)
    sheet = out / "sheet.png"
    contact_sheet(_rows(query, plain_frames, plain_errors, results, note), tile=TILE).save(sheet)
    clock.lap("write")
    report = out / "report.json"
    content = {
        "prompt": query.prompt,
        "without_retrieval": {"generation": plain.to_dict(), "track_errors": plain_errors},
        "databases": [result.to_dict() for result in results],
        "note": note,
        "seconds": clock.laps,
    }
    report.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return DemoResult(videos, sheet, report, plain_errors, results, note, clock.laps)


class _Clock:
    """Wall time of the steps, in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._since, 2)
        self._since = now


def _three_domains(folder: Path) -> tuple[Query, list[Source]]:
    """Rendered clips of each domain, and a scene that is in none, moved by the dynamics of each."""
    domains = {verb: named_domain(verb) for verb in VERBS}
    truths = same_start(list(domains.values()), UNSEEN)
    sources = []
    for (verb, domain), truth in zip(domains.items(), truths, strict=True):
        clips = folder / verb
        if (clips / CAPTIONS).exists():  # nothing but what a demo rendered is ever removed
            shutil.rmtree(clips)
        captions = render_domain(clips, domain, CLIPS_PER_DOMAIN)
        sources.append(Source(verb, clips, captions, f"video_{verb}.mp4", truth.frames, truth))
    things = truths[0].caption.rsplit(" ", 1)[0]
    return Query(Image.fromarray(truths[0].frames[0]), f"{things} moves"), sources


def _own_clips(clips: Path, captions: Path | None) -> tuple[Query, list[Source]]:
    """One database; the first clip that can be read gives the image and is left out of the search."""
    for clip in list_clips(clips, captions=captions).clips:
        try:
            frames = read_clip(clip).frames
        except VideoError:
            continue  # indexing lists it
        query = Query(Image.fromarray(frames[0]), clip.caption, exclude=clip)
        return query, [Source("clips", clips, captions, "video.mp4", truth=frames)]
    raise ValueError(f"No clip in {clips} can be read; motionrag index says why.")


def _other_image(image: str | Path, sources: Sequence[Source]) -> tuple[Query, list[Source]]:
    """An image of which nobody knows how it goes on."""
    with Image.open(image) as opened:
        query = Query(opened.convert("RGB"), "")
    return query, [Source(each.name, each.clips, each.captions, each.video) for each in sources]


def _new_database(folder: Path, pipeline: MotionRAGPipeline) -> MotionDatabase:
    if (folder / "manifest.json").exists():  # nothing but a database of ours is ever removed
        shutil.rmtree(folder)
    folder.parent.mkdir(exist_ok=True)
    return MotionDatabase.create(folder, encoder=pipeline.encoder)


def _track_errors(frames: np.ndarray, sources: Sequence[Source]) -> dict[str, float]:
    """Distance of the thing from where it is under the dynamics of each source that knows."""
    from motionrag.evaluation.track_error import track_errors
    from motionrag.pocket.world.scene import COLOURS

    errors = {}
    for source in sources:
        if source.world is not None:
            colours = [list(COLOURS).index(thing.colour) for thing in source.world.things]
            [error] = track_errors(
                torch.from_numpy(frames[None]),
                torch.from_numpy(source.world.tracks[None]),
                torch.from_numpy(source.world.masks[None, 0]),
                torch.tensor([colours]),
            )
            errors[source.name] = round(float(error), 2)
    return errors


def _rows(
    query: Query, plain: np.ndarray, plain_errors: dict[str, float], results: Sequence[Result], note: str
) -> list[SheetRow]:
    rows = [
        SheetRow("Query image", [query.image], query.prompt),
        SheetRow("Without retrieval", plain, " ".join(filter(None, [*_in_words(plain_errors), note]))),
    ]
    for result in results:
        name = result.source.name
        for reference in result.references[:SHOWN_REFERENCES]:
            title = f"Database {name}: reference {reference.rank}, similarity {reference.score:.2f}"
            rows.append(SheetRow(title, read_clip(reference.clip).frames, reference.clip.caption))
        remarks = _in_words(result.track_errors)
        if result.output.abstained:
            remarks.append("No clip was similar enough: this is the video without retrieval.")
        rows.append(SheetRow(f"Database {name}: generated from the same noise", result.frames, " ".join(remarks)))
        if result.source.truth is not None:
            rows.append(SheetRow(f"Database {name}: truth", result.source.truth))
    return rows


def _in_words(errors: dict[str, float]) -> list[str]:
    if not errors:
        return []
    shares = ", ".join(f"{name} {error:.1f} %" for name, error in errors.items())
    return [f"Track error against the truth, of the frame: {shares}."]


def _as_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
