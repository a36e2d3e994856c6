"""The demo: the whole method on real clips, from a folder to a video and a picture that explains it.

index → retrieve → adapt → inject → generate, once with and once without retrieval from the same noise.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from motionrag.database import AddReport, MotionDatabase, Reference
from motionrag.database.sources import list_clips
from motionrag.encoder import MotionEncoder
from motionrag.pipeline import MotionRAGPipeline
from motionrag.pocket import render
from motionrag.sheet import SheetRow, contact_sheet
from motionrag.video import Clip, VideoError, read_clip

UNTRAINED = "The pocket's weights are untrained: the demo shows that every part runs, not yet that retrieval helps."
SHOWN_REFERENCES = 3
AMPLIFIED = 4


@dataclass(frozen=True)
class Query:
    """What the demo generates from.

    Attributes:
        image: The first frame of the video to make.
        prompt: What should happen.
        exclude: A clip that must not be retrieved, because the image was taken from it.
        truth: How the image really goes on, `(t h w 3)` uint8, if that is known.
    """

    image: Image.Image
    prompt: str
    exclude: Clip | None = None
    truth: np.ndarray | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        video: The generated video.
        sheet: The picture that shows query, references and videos.
        report: Everything in figures, as JSON.
        index: What was indexed.
        references: What was retrieved, best first.
        effect: Size of the injected term against the attention's output.
        note: What to know before judging the video; empty if nothing.
        seconds: Wall time by step.
    """

    video: Path
    sheet: Path
    report: Path
    index: AddReport
    references: list[Reference]
    effect: float
    note: str
    seconds: dict[str, float]


def run_demo(
    clips: str | Path | None = None,
    *,
    captions: str | Path | None = None,
    image: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path = "outputs/demo",
    num_references: int = 5,
    num_inference_steps: int = 30,
    seed: int = 0,
) -> DemoResult:
    """Run the method on a folder of clips.

    Args:
        clips: Folder or manifest; None renders a few clips first.
        captions: Captions for the folder.
        image: Image to start from; None takes the first frame of a clip, which is then no reference.
        prompt: What should happen; None takes that clip's caption.
        out: Where everything is written. A database of an earlier demo there is replaced.
        num_references: Most references.
        num_inference_steps: Denoising steps.
        seed: Of the noise.

    Returns:
        Paths and figures.

    Raises:
        ValueError: If no clip of the folder can be read.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    rendered = clips is None
    if clips is None:
        captions = render.render_folder(out / "clips")
        clips = out / "clips"
        clock.lap("render")
    database = _new_database(out / "database")
    report = database.add(clips, captions=captions)
    clock.lap("index")

    query = _query(clips, captions, image, prompt, rendered=rendered)
    pipeline = MotionRAGPipeline.from_pretrained("pocket", database=database)
    pipeline.pipeline.set_progress_bar_config(disable=True)
    clock.lap("load")
    options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "output_type": "np"}
    exclude = () if query.exclude is None else query.exclude
    plain = pipeline(query.image, query.prompt, num_references=0, generator=_noise(seed), **options)
    clock.lap("generate without retrieval")
    output = pipeline(
        query.image,
        query.prompt,
        num_references=num_references,
        exclude=exclude,
        generator=_noise(seed),
        **options,
    )
    clock.lap("generate with retrieval")

    references: list[Reference] = output.references  # type: ignore[assignment] # one image: one list
    note = "" if pipeline.bundle.config.trained else UNTRAINED
    [video] = output.save(out / "video.mp4")
    sheet = out / "sheet.png"
    contact_sheet(_rows(query, references, plain.frames[0], output.frames[0], note)).save(sheet)
    clock.lap("write")
    result = DemoResult(
        video=video,
        sheet=sheet,
        report=out / "report.json",
        index=report,
        references=references,
        effect=output.injected_effect.mean,
        note=note,
        seconds=clock.laps,
    )
    content = {
        "index": asdict(report),
        "generation": output.to_dict(),
        "change_by_retrieval": float(np.abs(output.frames - plain.frames).mean()),
        "note": note,
        "seconds": clock.laps,
    }
    result.report.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


class _Clock:
    """Wall time of the steps, in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._since, 2)
        self._since = now


def _new_database(folder: Path) -> MotionDatabase:
    if (folder / "manifest.json").exists():  # nothing but a database of ours is ever removed
        shutil.rmtree(folder)
    return MotionDatabase.create(folder, encoder=MotionEncoder.from_pretrained("pocket"))


def _query(
    clips: str | Path, captions: str | Path | None, image: str | Path | None, prompt: str | None, *, rendered: bool
) -> Query:
    if image is not None:
        with Image.open(image) as opened:
            return Query(opened.convert("RGB"), prompt or "")
    if rendered:  # a scene that is not in the folder
        truth = render.render("orbit", "box", "yellow", 1)
        return Query(Image.fromarray(truth[0]), prompt or render.caption("orbit", "box", "yellow"), truth=truth)
    for clip in list_clips(clips, captions=captions).clips:
        try:
            frames = read_clip(clip).frames
        except VideoError:
            continue  # listed in the indexing report already
        return Query(Image.fromarray(frames[0]), prompt or clip.caption, exclude=clip, truth=frames)
    raise ValueError(f"No clip in {clips} can be read; see errors.jsonl in the database.")


def _rows(
    query: Query, references: list[Reference], plain: np.ndarray, output: np.ndarray, note: str
) -> list[SheetRow]:
    rows = [SheetRow("Query image", [query.image], query.prompt)]
    if query.truth is not None:
        rows.append(SheetRow("What really happens", query.truth))
    for reference in references[:SHOWN_REFERENCES]:
        title = f"Reference {reference.rank}, similarity {reference.score:.2f}"
        rows.append(SheetRow(title, read_clip(reference.clip).frames, reference.clip.caption))
    change = np.abs(output - plain)
    rows.append(SheetRow("Generated without retrieval", _as_uint8(plain), note))
    rows.append(SheetRow("Generated with retrieval, from the same noise", _as_uint8(output), note))
    rows.append(SheetRow(f"What retrieval changed, {AMPLIFIED} times amplified", _as_uint8(AMPLIFIED * change)))
    return rows


def _as_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
