"""MC-Bench: does a generated video move along the drawn ways?

It measures any folder of videos, whatever made them. Every item is one line of `items.csv`, written as soon as it is
measured: a killed run continues with the same call, a video that changed is measured again, and a folder that holds
figures of other settings is refused.
"""

import csv
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from motionrag.encoders.preprocessing import frames_to_tensor, normalise
from motionrag.evaluation.files import claim_folder, write_text
from motionrag.evaluation.frame_consistency import frame_consistency
from motionrag.evaluation.intervals import interval
from motionrag.evaluation.mc_bench_items import Drags, MCBenchItem, find_video, read_mc_bench
from motionrag.evaluation.mean_distance import block_pixels, md_img, md_vid, md_vid_published, targets
from motionrag.tracking import OpticalFlowTracker, Tracker, track_points
from motionrag.video import Clip, read_clip, sample_indices

if TYPE_CHECKING:
    from motionrag.encoder import MotionEncoder

NUM_FRAMES = 16
"""The benchmark's frames: videos with more are measured at as many, evenly spaced."""
PUBLISHED_PANELS = 5
COLUMNS = (
    "category",
    "item",
    "drags",
    "video_frames",
    "pairs",
    "md_vid",
    "md_vid_published",
    "md_img",
    "frame_consistency",
    "drawn",
    "tracked",
    "digest",
)
FIGURES = ("md_vid", "md_vid_published", "md_img", "frame_consistency", "drawn", "tracked")
_ASPECT_TOLERANCE = 0.01

Row = dict[str, str]


@dataclass(frozen=True)
class ImageFeatures:
    """What sees the frames.

    Attributes:
        name: Identifies the weights: figures of different names are not mixed.
        whole: Frames `(t 3 h w)` in [-1, 1] to one vector each, `(t d)`, for frame consistency.
        dense: Frames likewise to features on a grid over the whole frame, `(t d h w)`, for MD-Img.
    """

    name: str
    whole: Callable[[Tensor], Tensor]
    dense: Callable[[Tensor], Tensor]

    @classmethod
    def of_encoder(cls, encoder: "MotionEncoder") -> "ImageFeatures":
        """The image encoders of a bundle: CLIP for the whole, DINOv2's patches for the grid.

        Args:
            encoder: Of the pocket, or of any bundle.

        Returns:
            The features.
        """
        dino = encoder.image_encoder
        patch: Any = dino.model.config.patch_size

        def dense(frames: Tensor) -> Tensor:
            # Stretched, not cropped: every place of the frame must be on the grid.
            side = (dino.crop_size, dino.crop_size)
            pixels = F.interpolate((frames + 1) / 2, size=side, mode="bicubic", antialias=True).clamp(0, 1)
            pixels = normalise(pixels.to(dino.device), dino.image_mean, dino.image_std)
            patches = dino.encode(pixels)[:, 1:].float().cpu()  # the first is the class token
            return rearrange(patches, "t (h w) d -> t d h w", h=dino.crop_size // patch)

        name = f"{encoder.clip_encoder.fingerprint} {dino.fingerprint}"
        return cls(name, lambda frames: encoder.embed_images(list(frames)), dense)


@dataclass(frozen=True)
class MCBenchReport:
    """What came out.

    Attributes:
        folder: With `items.csv`, `summary.json` and `report.md`.
        summary: As in `summary.json`.
        table: As in `report.md`.
    """

    folder: Path
    summary: dict[str, Any]
    table: str


def evaluate_mc_bench(
    root: str | Path,
    videos: str | Path,
    *,
    out: str | Path,
    tracker: Tracker | None = None,
    features: ImageFeatures | None = None,
    frames: int = NUM_FRAMES - 1,
    panels: int = 1,
) -> MCBenchReport:
    """Measure a folder of generated videos on MC-Bench.

    Args:
        root: The benchmark: `CATEGORY/ITEM/`.
        videos: `CATEGORY/ITEM.mp4`, or one video in `CATEGORY/ITEM/`. They show the first frame at any size, uncropped.
        out: Gets `items.csv`, `summary.json` and `report.md`; a stopped run continues.
        tracker: Follows points; None for optical flow. The benchmark's published figures come from CoTracker.
        features: For frame consistency and MD-Img; None leaves them out.
        frames: Pairs of frame 0 and a later frame that are compared, 1 to 15, evenly spaced.
        panels: Pictures side by side in each video, of which the last one counts; 5 for the released sampler's.

    Returns:
        The report; everything in it is also in `out`.

    Raises:
        FileNotFoundError: If there is no folder of videos.
        ValueError: If `out` holds figures of other settings, a setting is out of range, or there is no item.
    """
    if not 1 <= frames < NUM_FRAMES:
        raise ValueError(f"frames is {frames}; compare 1 to {NUM_FRAMES - 1} frames with frame 0.")
    if panels < 1:
        raise ValueError(f"panels is {panels}; use 1, or {PUBLISHED_PANELS} for the released sampler's videos.")
    if not Path(videos).is_dir():
        raise FileNotFoundError(f"{videos} is no folder; it holds the videos as CATEGORY/ITEM.mp4.")
    run = _Run(Path(videos), Path(out), tracker or OpticalFlowTracker(), features, frames, panels)
    return run.evaluate(root)


class _Run:
    """One evaluation: what measures, and where results go."""

    def __init__(
        self, videos: Path, out: Path, tracker: Tracker, features: ImageFeatures | None, frames: int, panels: int
    ) -> None:
        self.videos, self.out, self.tracker, self.features = videos, out, tracker, features
        self.frames, self.panels = frames, panels
        self.settings = {
            "tracker": tracker.name,
            "features": None if features is None else features.name,
            "frames": frames,
            "panels": panels,
        }
        out.mkdir(parents=True, exist_ok=True)
        claim_folder(self.out, self.settings)

    def evaluate(self, root: str | Path) -> MCBenchReport:
        bench = read_mc_bench(root)
        failed, missing = dict(bench.broken), []
        table = _Table(self.out / "items.csv")
        rows = []
        for item in tqdm(bench.items, "MC-Bench", disable=None):
            try:
                video = find_video(self.videos, item)
                if video is None:
                    missing.append(item.path)
                    continue
                digest = _digest(item, video)
                row = table.done.get(item.path)
                if row is None or row["digest"] != digest:
                    row = {**self._measure(item, video), "digest": digest}
                    table.add(row)
                rows.append(row)
            except (ValueError, OSError) as error:
                failed[item.path] = str(error)
        summary = {
            "settings": self.settings,
            "items": len(bench.items) + len(bench.broken),
            "measured": len(rows),
            "categories": _figures_by_category(rows),
            "missing": missing,
            "failed": failed,
            "notes": list(bench.notes),
        }
        return _write_report(self.out, summary)

    def _measure(self, item: MCBenchItem, file: Path) -> Row:
        """All figures of one video, as they are written."""
        video = self._read(item, file)
        # Videos of other lengths are brought to the benchmark's frames after tracking, which likes small steps.
        moments = torch.from_numpy(sample_indices(len(video), min(NUM_FRAMES, len(video))))
        compared = sample_indices(len(moments), 1 + min(self.frames, len(moments) - 1))[1:].tolist()
        drawn = targets(item.drags, len(video))[:, moments]
        blocks, block_tracks, seen = self._track_blocks(item.drags, video, item)
        starts = _start_rows(item.drags, blocks)
        fraction = torch.tensor([[value % 1 for value in drag[0]] for drag in item.drags])
        tracks = block_tracks[starts][:, moments] + fraction[:, None]
        published = None
        if item.evaluator_drags is not None:
            if item.evaluator_drags != item.drags:
                _, block_tracks, _ = self._track_blocks(item.evaluator_drags, video, item)
            there = targets(item.evaluator_drags, len(video), published=True)[:, moments]
            published = md_vid_published(block_tracks[:, moments], there, compared)
        whole, dense = self._look(item, video[moments], drawn, compared)
        figures = {
            "md_vid": md_vid(tracks, drawn, compared),
            "md_vid_published": published,
            "md_img": dense,
            "frame_consistency": whole,
            "drawn": md_vid(drawn[:, :1].expand_as(drawn), drawn, compared),
            "tracked": seen[starts][:, moments][:, compared].float().mean(),
        }
        return {
            "category": item.category,
            "item": item.name,
            "drags": str(len(item.drags)),
            "video_frames": str(len(video)),
            "pairs": str(len(compared)),
            **{name: "" if value is None else f"{float(value):.6g}" for name, value in figures.items()},
        }

    def _read(self, item: MCBenchItem, file: Path) -> Tensor:
        """The picture that counts, all frames, `(t 3 h w)` uint8."""
        clip = Clip(str(file))
        count = read_clip(clip, num_frames=2).num_frames
        frames = read_clip(clip, num_frames=count).frames
        width = frames.shape[2]
        if width % self.panels:
            raise ValueError(f"{file} is {width} pixels wide, which are not {self.panels} panels of one width.")
        frames = frames[:, :, width - width // self.panels :]
        height, width = frames.shape[1:3]
        if abs(width / height * item.height / item.width - 1) > _ASPECT_TOLERANCE:
            raise ValueError(
                f"{file} shows {width}x{height} pixels, {item.path} is {item.width}x{item.height}: the drags do not "
                "fit a picture of another shape. Was it cropped, or has it panels?"
            )
        return rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> t c h w")

    def _track_blocks(self, drags: Drags, video: Tensor, item: MCBenchItem) -> tuple[Tensor, Tensor, Tensor]:
        """Block pixels `(m 2)`, their tracks `(m t 2)` in pixels of the first frame, and where they are seen."""
        pixels = block_pixels(drags)
        scale = torch.tensor([video.shape[3] / item.width, video.shape[2] / item.height])
        tracks, visible = track_points(video, (pixels + 0.5) * scale - 0.5, tracker=self.tracker)
        return pixels, (tracks + 0.5) / scale - 0.5, visible

    def _look(
        self, item: MCBenchItem, video: Tensor, drawn: Tensor, compared: Sequence[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Frame consistency and MD-Img of the benchmark's frames."""
        if self.features is None:
            return None, None
        pictures = frames_to_tensor(rearrange(video, "t c h w -> t h w c").numpy())
        distance = md_img(self.features.dense(pictures), drawn, compared, size=(item.height, item.width))
        return frame_consistency(self.features.whole(pictures)), distance


class _Table:
    """`items.csv`: one line for each measured item, each on the disk before the next is measured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, Row] = {}
        if file.exists():
            content = file.read_text(encoding="utf-8")
            # A kill may leave half a line.
            whole = content[: content.rfind("\n") + 1]
            self.done = {f"{row['category']}/{row['item']}": row for row in csv.DictReader(whole.splitlines())}
        self._rewrite()

    def add(self, row: Row) -> None:
        """Write a line; one that the item has already is replaced."""
        path = f"{row['category']}/{row['item']}"
        known = path in self.done
        self.done[path] = row
        if known:
            self._rewrite()
            return
        with self.file.open("a", newline="", encoding="utf-8") as opened:
            csv.DictWriter(opened, COLUMNS, lineterminator="\n").writerow(row)
            opened.flush()
            os.fsync(opened.fileno())

    def _rewrite(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.done.values())
        os.replace(temporary, self.file)


def _start_rows(drags: Drags, blocks: Tensor) -> list[int]:
    """Which of the block pixels each drag starts in; the same pixel of two blocks has the same track."""
    rows = {(int(x), int(y)): row for row, (x, y) in enumerate(blocks.tolist())}
    return [rows[int(drag[0][0]), int(drag[0][1])] for drag in drags]


def _digest(item: MCBenchItem, video: Path) -> str:
    """Of everything that the figures of an item depend on, besides the settings."""
    known = json.dumps([item.height, item.width, item.drags, item.evaluator_drags])
    return hashlib.sha256(known.encode() + video.read_bytes()).hexdigest()[:32]


def _figures_by_category(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over videos, as in the benchmark, not over drags; `all` holds every category."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    return {name: _figures(groups[name]) for name in sorted(groups)} | ({"all": _figures(rows)} if rows else {})


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    columns = {name: np.array([float(row[name]) for row in rows if row[name]]) for name in FIGURES}
    return {
        "items": len(rows),
        "published_items": len(columns["md_vid_published"]),
        **{name: float(values.mean()) if len(values) else None for name, values in columns.items()},
        "md_vid_interval": interval(columns["md_vid"]),
        "md_vid_median": float(np.median(columns["md_vid"])),
    }


def _write_report(out: Path, summary: dict[str, Any]) -> MCBenchReport:
    table = _markdown(summary)
    write_text(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "report.md", table)
    return MCBenchReport(out, summary, table)


def _markdown(summary: Mapping[str, Any]) -> str:
    settings = summary["settings"]
    lines = [
        "# MC-Bench",
        "",
        f"{summary['measured']} of {summary['items']} items, {settings['frames']} frames against frame 0, tracked by "
        f"{settings['tracker']}. Distances in pixels of the first frame, with the 95 % interval over videos.",
        "",
        "| category | items | MD-Vid | MD-Vid as released | MD-Img | frame consistency | still video | tracked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in summary["categories"].items():
        mean, low, high = figures["md_vid_interval"]
        cells = [
            name,
            str(figures["items"]),
            f"{mean:.2f} ({low:.2f}–{high:.2f})",
            _number(figures["md_vid_published"], 2),
            _number(figures["md_img"], 2),
            _number(figures["frame_consistency"], 3),
            _number(figures["drawn"], 2),
            f"{100 * figures['tracked']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- no video: {path}" for path in summary["missing"])]
    lines += [f"- failed: {path}: {reason}" for path, reason in summary["failed"].items()]
    lines += [f"- passed over: {note}" for note in summary["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
