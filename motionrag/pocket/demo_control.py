"""The demo of control: things of one picture are dragged, each along a way of its own, and measured where they end.

Picture and noise stay the same; only the control is added, and then retrieval to it. Without a picture of your own it
draws a scene of the pocket's world with three things: two shall go along curves, one straight.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from motionrag.database import MotionDatabase
from motionrag.output import MotionRAGOutput
from motionrag.pipeline import MotionRAGPipeline
from motionrag.pocket.demo import CLIPS_PER_DOMAIN, VERBS
from motionrag.pocket.folder import CAPTIONS, render_domain
from motionrag.pocket.world import FAMILIES, FPS, NUM_FRAMES, SIZE, Scene, Style, named_domain, render
from motionrag.pocket.world.dynamics import Motion
from motionrag.pocket.world.scene import COLOURS
from motionrag.sheet import MARGIN, SheetRow, contact_sheet
from motionrag.tracking import track_points
from motionrag.trajectory import RegionTrajectory, Tracks, draw_on_video, draw_trajectories, read_tracks
from motionrag.trajectory.region import check_inside

UNTRAINED = "The weights are untrained: the demo shows that every part runs, not yet that things follow."
BUNDLE = "pocket-control"
UNSEEN = 1025  # seed of a scene with three things in colours that the eye and the tracker tell apart
# No thing comes near another on its way, and none goes farther than 20 pixels: of three at once those that do are left
# behind.
WAYS = (
    RegionTrajectory([(13, 14), (11, 24), (17, 32)]),
    RegionTrajectory([(51, 51), (51, 34)]),
    RegionTrajectory([(33, 23), (40, 20), (47, 12)]),
)
VERB = VERBS[0]  # of the database for retrieval
WITHOUT, WITH, BOTH = "without control", "with control", "with control and retrieval"
FILES = {WITHOUT: "uncontrolled.mp4", WITH: "controlled.mp4", BOTH: "controlled_with_retrieval.mp4"}
TILE = 128
_LARGE = 384  # side of the picture with the drawn ways, pixels
_COLUMNS = 8
_FIGURES_WIDTH = 600
_LINE = 22
_LEGEND = "Arrow: the way it shall go. Circle: shall stay. Light: brushed, may move."

Follow = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Task:
    """A picture and what its things shall do.

    Attributes:
        image: The first frame.
        names: What each way drags.
        tracks: The ways, on the picture.
        follow: Finds the things in a video `(t h w 3)` uint8: positions `(n t 2)` in pixels of the video, and whether
            they were seen `(n t)` bool.
        prompt: Searches the captions.
        mask: What is brushed `(h w)` bool; None for no more than the ways' own blocks.
        truth: A video `(t h w 3)` uint8 in which the things do what they shall, if there is one.
    """

    image: Image.Image
    names: list[str]
    tracks: Tracks
    follow: Follow
    prompt: str = ""
    mask: np.ndarray | None = None
    truth: np.ndarray | None = None


@dataclass(frozen=True)
class ControlDemoResult:
    """What the demo of control did.

    Attributes:
        videos: The generated videos.
        sheet: The picture that shows ways and videos.
        report: Everything in figures, as JSON.
        table: How far each thing ends from where it was asked to, in words.
        note: What to know before judging the videos; empty if there is nothing.
        seconds: Wall time by step.
    """

    videos: list[Path]
    sheet: Path
    report: Path
    table: str
    note: str
    seconds: dict[str, float]


def run_control_demo(
    *,
    image: str | Path | None = None,
    tracks: str | Path | None = None,
    bundle: str | Path = BUNDLE,
    out: str | Path = "outputs/demo-control",
    num_inference_steps: int | None = None,
    seed: int = 0,
) -> ControlDemoResult:
    """Generate from one picture without control and with it, from the same noise.

    Args:
        image: Picture to start from; None draws a scene, and generates with retrieval too.
        tracks: File with the ways of things on that picture, in any format of `read_tracks`.
        bundle: "pocket-control", or folder or hub id of a bundle with feature modulation. For the scene, one that
            makes videos of the pocket's size.
        out: Where everything is written. Database and clips of an earlier demo there are replaced.
        num_inference_steps: Denoising steps; None for the bundle's default.
        seed: Of the noise.

    Returns:
        Paths and figures.

    Raises:
        ValueError: If there is a picture without tracks or the other way round, or a way begins outside the picture.
        ImportError: If a picture of your own is given, but OpenCV is missing, which follows its points.
    """
    out = Path(out)
    seconds: dict[str, float] = {}
    since = time.monotonic()

    def lap(name: str) -> None:
        nonlocal since
        seconds[name], since = round(time.monotonic() - since, 2), time.monotonic()

    task = scene_task() if image is None and tracks is None else picture_task(image, tracks)
    out.mkdir(parents=True, exist_ok=True)
    pipeline = MotionRAGPipeline.from_pretrained(bundle)
    pipeline.pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"output_type": "np", "num_inference_steps": num_inference_steps}
    control = {"trajectories": task.tracks, "motion_mask": task.mask}
    lap("load")

    def generate(**more: Any) -> MotionRAGOutput:
        return pipeline(task.image, task.prompt, generator=torch.Generator().manual_seed(seed), **options, **more)

    outputs = {WITHOUT: generate(num_references=0)}
    lap(f"generate {WITHOUT}")
    outputs[WITH] = generate(num_references=0, **control)
    lap(f"generate {WITH}")
    if task.truth is not None:
        pipeline.database = _database(out, pipeline)
        lap("index")
        # The prompt names no motion, so no caption is similar to it.
        outputs[BOTH] = generate(min_similarity=-1.0, **control)
        lap(f"generate {BOTH}")

    frames = {name: (output.frames[0].clip(0, 1) * 255).round().astype(np.uint8) for name, output in outputs.items()}
    things = _measure(task, frames)
    lap("track")
    videos = [video for name, output in outputs.items() for video in output.save(out / FILES[name])]
    note = "" if pipeline.bundle.config.trained else UNTRAINED
    sheet, report = out / "sheet.png", out / "report.json"
    _sheet(task, frames, things, note).save(sheet)
    lap("write")
    content = {
        "image": None if image is None else str(image),
        "tracks": None if tracks is None else str(tracks),
        "bundle": str(bundle),
        "frame": dict(zip(("height", "width"), frames[WITH].shape[1:3], strict=True)),
        "things": things,
        "generations": {name: output.to_dict() for name, output in outputs.items()},
        "videos": {name: FILES[name] for name in outputs},
        "note": note,
        "seconds": seconds,
    }
    report.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return ControlDemoResult(videos, sheet, report, _table(things), note, seconds)


def scene_task() -> Task:
    """Three things of the pocket's world and their ways.

    Returns:
        The task, with the video in which the things follow exactly.
    """
    scene = Scene.sample(np.random.default_rng(UNSEEN), Style(), len(WAYS))
    tracks = Tracks(WAYS, height=SIZE, width=SIZE, fps=FPS)
    drawn = render(scene, Motion.along(tracks.sampled(NUM_FRAMES).double().numpy()), truth=False)

    def follow(frames: np.ndarray) -> tuple[Tensor, Tensor]:
        from motionrag.evaluation.tracks import track

        tracked = track(
            torch.from_numpy(frames[None]),
            starts=torch.from_numpy(drawn["tracks"][None, :, 0]),
            first_masks=torch.from_numpy(drawn["masks"][None, 0]),
            colours=torch.tensor([[list(COLOURS).index(thing.colour) for thing in scene.things]]),
        )
        return tracked.positions[0], tracked.found[0]

    return Task(
        image=Image.fromarray(drawn["frames"][0]),
        names=[thing.name for thing in scene.things],
        tracks=tracks,
        follow=follow,
        prompt=f"{scene.name} move",
        mask=drawn["masks"][0] > 0,
        truth=drawn["frames"],
    )


def picture_task(image: str | Path | None, tracks: str | Path | None) -> Task:
    """A picture of one's own, with ways from a file.

    Args:
        image: The picture.
        tracks: The ways, in any format of `read_tracks`.

    Returns:
        The task.

    Raises:
        ValueError: If one of the two is missing, the file holds no way, or a way begins outside the picture.
        ImportError: If OpenCV is missing.
    """
    if image is None or tracks is None:
        there, missing = ("an image", "tracks") if tracks is None else ("tracks", "an image")
        raise ValueError(f"The demo got {there} without {missing}; give --image and --tracks together, or neither.")
    if importlib.util.find_spec("cv2") is None:
        raise ImportError("Following the things of your own image needs OpenCV: pip install 'motionrag[control]'")
    with Image.open(image) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    drawn = read_tracks(tracks).resized(height=picture.height, width=picture.width)
    for index, way in enumerate(drawn.trajectories):
        check_inside(way, index, picture.height, picture.width)

    def follow(frames: np.ndarray) -> tuple[Tensor, Tensor]:
        starts = drawn.resized(height=frames.shape[1], width=frames.shape[2]).sampled(1)[:, 0]
        video = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
        # Trackers count from the centre of the first pixel, ways from its corner.
        positions, visible = track_points(video, starts - 0.5)
        return positions + 0.5, visible

    names = [f"track {index + 1}" for index in range(len(drawn.trajectories))]
    return Task(picture, names, drawn, follow)


def _database(out: Path, pipeline: MotionRAGPipeline) -> MotionDatabase:
    """Clips of one domain; those of an earlier demo are replaced."""
    clips, folder = out / "clips" / VERB, out / "databases" / VERB
    for made, sign in ((clips, CAPTIONS), (folder, "manifest.json")):
        if (made / sign).exists():  # nothing but what a demo made is ever removed
            shutil.rmtree(made)
    captions = render_domain(clips, named_domain(VERB), CLIPS_PER_DOMAIN)
    folder.parent.mkdir(exist_ok=True)
    database = MotionDatabase.create(folder, encoder=pipeline.encoder)
    database.add(clips, captions=captions)
    return database


def _measure(task: Task, videos: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each thing where it was asked to go, and where it is in each video, in pixels of the video."""
    num_frames, height, width = videos[WITH].shape[:3]
    asked = task.tracks.resized(height=height, width=width).sampled(num_frames)
    followed = {name: task.follow(frames) for name, frames in videos.items()}
    things = []
    for index, name in enumerate(task.names):
        way = _rounded(asked[index])
        results = {}
        for video, (positions, found) in followed.items():
            track = _rounded(positions[index])
            distance = float(np.hypot(track[-1][0] - way[-1][0], track[-1][1] - way[-1][1]))
            results[video] = {
                "track": track,
                "found": bool(found[index, -1]),
                "distance_pixels": round(distance, 2),
                "distance_percent": round(100 * distance / width, 2),
            }
        things.append({"name": name, "asked": way, "videos": results})
    return things


def _rounded(positions: Tensor) -> list[list[float]]:
    return [[round(x, 2), round(y, 2)] for x, y in positions.tolist()]


def _in_words(result: dict[str, Any]) -> str:
    if not result["found"]:
        return "lost"
    return f"{result['distance_pixels']:.1f} px, {result['distance_percent']:.1f} %"


def _table(things: Sequence[dict[str, Any]]) -> str:
    """Distances of the last frame's positions from the asked ends, in aligned columns."""
    rows = [["distance from the asked end", "asked end", *things[0]["videos"]]]
    for thing in things:
        x, y = thing["asked"][-1]
        rows.append([thing["name"], f"({x:.0f}, {y:.0f})", *map(_in_words, thing["videos"].values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _sheet(task: Task, videos: dict[str, np.ndarray], things: Sequence[dict[str, Any]], note: str) -> Image.Image:
    """What was asked for, large and in figures, above the videos with the trails of what was tracked."""
    circles = FAMILIES[named_domain(VERB).dynamics.family].words
    captions = {BOTH: f"The database: {CLIPS_PER_DOMAIN} clips in which one thing {circles}."}
    rows = []
    for name, frames in videos.items():
        tracks = [thing["videos"][name]["track"] for thing in things]
        rows.append(SheetRow(name.capitalize(), _with_trails(frames, tracks), captions.get(name, "")))
    if task.truth is not None:
        rows.append(SheetRow("As asked, drawn by the world's renderer", task.truth))
    below = contact_sheet(rows, columns=_COLUMNS, tile=TILE)
    asked = _asked(task)
    left = 2 * MARGIN + asked.width
    figures = _figures(things, note, max(below.width - left - MARGIN, _FIGURES_WIDTH))
    size = (left + figures.width + MARGIN, MARGIN + max(asked.height, figures.height) + below.height)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(asked, (MARGIN, MARGIN))
    sheet.paste(figures, (left, MARGIN))
    sheet.paste(below, (0, sheet.height - below.height))
    return sheet


def _asked(task: Task) -> Image.Image:
    """The picture with its ways and the brush, enlarged."""
    scale = _LARGE / max(task.image.size)
    size = (max(1, round(task.image.width * scale)), max(1, round(task.image.height * scale)))
    ways = task.tracks.resized(height=size[1], width=size[0]).trajectories
    mask = None if task.mask is None else np.asarray(Image.fromarray(task.mask).resize(size))
    return draw_trajectories(task.image.resize(size, Image.Resampling.BICUBIC), ways, mask=mask)


def _with_trails(frames: np.ndarray, tracks: Sequence[Any]) -> list[Image.Image]:
    """Frames at the size of the sheet's tiles, with the way of each thing so far."""
    height, width = frames.shape[1:3]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    enlarged = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return [Image.fromarray(each) for each in draw_on_video(enlarged, [np.array(track) * scale for track in tracks])]


def _figures(things: Sequence[dict[str, Any]], note: str, width: int) -> Image.Image:
    """Distances as text, with a dot in the colour of each way."""
    black, grey, warning = (20, 20, 20), (95, 95, 95), (160, 60, 0)
    lines = [(0, _LEGEND, grey), (0, "Distance from the asked end, in the last frame:", black)]
    dots = []
    for thing in things:
        x, y = thing["asked"][-1]
        dots.append([(_LINE * 0.4, _LINE * (len(lines) + 0.5))])
        lines.append((_LINE, f"{thing['name']}, asked to end at ({x:.0f}, {y:.0f})", black))
        lines += [(_LINE, f"{name}: {_in_words(result)}", grey) for name, result in thing["videos"].items()]
    lines += [(0, note, warning)] if note else []
    panel = Image.new("RGB", (width, _LINE * len(lines)), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=15)
    for number, (left, text, colour) in enumerate(lines):
        draw.text((left, _LINE * number), text, fill=colour, font=font)
    [with_dots] = draw_on_video([panel], dots)
    return Image.fromarray(with_dots)
