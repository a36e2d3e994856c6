"""The report of trajectory control: per-clip CSV files to `report.json`, a table and a contact sheet. Reads files only.

All intervals are by bootstrap over scenes, whose noises are averaged first; shares are ratios of means over all clips.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from motionrag.evaluation.control_material import Drag, DragScene
from motionrag.evaluation.files import write_text
from motionrag.evaluation.intervals import interval
from motionrag.pocket.world import SIZE
from motionrag.sheet import SheetRow, contact_sheet
from motionrag.trajectory import RegionTrajectory, draw_on_video, draw_trajectories

_SHEET_ROWS = {
    "u": "nothing asked",
    "c": "way and brush",
    "f": "way, brush over the whole frame",
    "c3": "three ways at once",
}
WORDS = {
    "drag": {
        "u": "(u) nothing asked",
        "c": "(c) way and brush",
        "w": "(w) as (c), without guidance of the control",
        "f": "(f) way, brush over the frame",
        "t": "(t) the video that does what is asked",
        "u3": "(u) nothing asked, held against three ways",
        "c3": "(c3) three ways at once",
    },
    "together": {
        "n": "(n) neither",
        "c": "(c) way and brush",
        "r": "(r) retrieval",
        "b": "(b) both",
    },
    "true-seen": {"u": "(u) nothing asked", "c": "(c) true ways and brush"},
    "true-held-out": {"u": "(u) nothing asked", "c": "(c) true ways and brush"},
}
# What a row's figures are held against: name of the share → part, row, field, row it is a share of.
_SHARES = {
    "drag_end": ("drag", "c", "md_end", "u"),
    "drag_all_frames": ("drag", "c", "md", "u"),
    "unguided_end": ("drag", "w", "md_end", "u"),
    "whole_brush_end": ("drag", "f", "md_end", "u"),
    "three_end": ("drag", "c3", "md_end", "u3"),
    "others_of_u": ("drag", "c", "others_moved", "u"),
    "others_of_f": ("drag", "c", "others_moved", "f"),
    "outside_of_u": ("drag", "c", "moved_outside", "u"),
    "outside_of_f": ("drag", "c", "moved_outside", "f"),
    "both_end_of_control": ("together", "b", "md_end", "c"),
    "both_all_frames_of_control": ("together", "b", "md", "c"),
    "both_others_error_of_control": ("together", "b", "others_error", "c"),
    "true_seen": ("true-seen", "c", "md", "u"),
    "true_held_out": ("true-held-out", "c", "md", "u"),
}
FIELDS = ("drawn", "drawn_end", "md", "md_end", "others_moved", "others_error", "moved_outside", "flow_outside")
# Figure → words and what it shall not exceed, in %.
_TARGETS = {
    "drag_end": ("MD at the end, of the uncontrolled one", 40),
    "md_end_of_width": ("MD at the end, of the frame's width", 5),
    "others_of_u": ("motion of the other things, of the uncontrolled one", 20),
    "outside_of_u": ("motion outside, of the uncontrolled one", 20),
    "others_of_f": ("motion of the other things, of that with a brush over the frame", 20),
    "outside_of_f": ("motion outside, of that with a brush over the frame", 20),
    "both_end_of_control": ("MD at the end with retrieval, of control alone", 110),
}

Spread = tuple[float, float, float]
Values = dict[str, dict[int, float]]  # field → scene → mean over noises


@dataclass(frozen=True)
class ControlReport:
    """What an evaluation of control found.

    Attributes:
        folder: Where everything is written.
        summary: As in `report.json`; intervals are [figure, low, high] at 95 %.
        table: As in `table.md`.
    """

    folder: Path
    summary: dict[str, Any]
    table: str


def write_control_report(
    out: Path,
    *,
    settings: Mapping[str, Any],
    checks: Mapping[str, Any],
    cost: Mapping[str, Any] | None,
    shown: Sequence[DragScene],
    seconds: float,
) -> ControlReport:
    """Summarise the CSV files of an evaluation.

    Args:
        out: Its folder.
        settings: What was run.
        checks: Figures of the material.
        cost: What control costs; None where it was not measured.
        shown: Scenes of the contact sheet.
        seconds: How long this run took; a continued one counts from where it continued.

    Returns:
        The report, as written to `report.json`, `table.md` and `sheet.png`.
    """
    values, clips = _read(out / "clips")
    parts = {
        part: {name: _row(values[part][name], clips[part][name]) for name in names if values[part].get(name)}
        for part, names in WORDS.items()
    }
    shares = {name: _share(values[part], *which) for name, (part, *which) in _SHARES.items()}
    in_percent = {name: None if share is None else _times(100, share) for name, share in shares.items()}
    reached = {**in_percent, "md_end_of_width": _times(100 / SIZE, parts["drag"]["c"]["md_end"])}
    summary: dict[str, Any] = {
        "settings": dict(settings),
        "checks": dict(checks),
        "parts": parts,
        "shares": shares,
        "targets": {
            name: {"figure": reached[name], "limit": limit, "met": _is_met(reached[name], limit)}
            for name, (_, limit) in _TARGETS.items()
        },
        "cost": None if cost is None else dict(cost),
        "seconds": seconds,
    }
    table = _markdown(summary)
    _save(_sheet(out / "clips", shown), out / "sheet.png")
    write_text(out / "report.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "table.md", table)
    return ControlReport(out, summary, table)


def _read(folder: Path) -> tuple[dict[str, dict[str, Values]], dict[str, dict[str, int]]]:
    """Part → row → means over noises, and how many clips they are of."""
    rows: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(folder.glob("*.csv")):
        part, name, _ = file.stem.rsplit("_", 2)
        with file.open(newline="", encoding="utf-8") as opened:
            rows[part][name] += list(csv.DictReader(opened))
    values = {part: {name: _means(each) for name, each in names.items()} for part, names in rows.items()}
    return values, {part: {name: len(each) for name, each in names.items()} for part, names in rows.items()}


def _means(rows: Sequence[Mapping[str, str]]) -> Values:
    """Fields without a figure in a scene are left out there."""
    values: Values = {}
    for field in (*FIELDS, "lost"):
        by_scene: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            if row[field]:
                by_scene[int(row["scene"])].append(float(row[field]))
        if by_scene:
            values[field] = {scene: float(np.mean(each)) for scene, each in sorted(by_scene.items())}
    return values


def _row(values: Values, clips: int) -> dict[str, Any]:
    spreads = {field: interval(np.array(list(values[field].values()))) for field in FIELDS if field in values}
    return {**spreads, "lost": float(np.mean(list(values["lost"].values()))), "clips": clips}


def _share(rows: Mapping[str, Values], name: str, field: str, other: str) -> Spread | None:
    """Ratio of means over the same scenes; None where nothing was measured, or nothing moves."""
    mine, theirs = (rows.get(which, {}).get(field, {}) for which in (name, other))
    if not mine or not np.mean(list(theirs.values())):
        return None
    pairs = np.array([(mine[scene], theirs[scene]) for scene in mine])
    return interval(pairs[:, 0], pairs[:, 1], figure=_ratio)


def _ratio(this: np.ndarray, that: np.ndarray) -> np.ndarray:
    """A resample in which nothing moves does not count."""
    return np.where(that > 0, this / np.where(that > 0, that, 1), np.nan)


def _times(factor: float, spread: Spread) -> Spread:
    return factor * spread[0], factor * spread[1], factor * spread[2]


def _is_met(spread: Spread | None, limit: float) -> bool | None:
    return None if spread is None else spread[0] <= limit


def _markdown(summary: Mapping[str, Any]) -> str:
    parts, targets = summary["parts"], summary["targets"]
    lines = ["# Evaluation of trajectory control", ""]
    if not summary["settings"].get("trained", True):
        lines += ["**These weights are untrained: the figures show that everything runs, no more.**", ""]
    lines += ["| target | at most | reached | |", "|---|---|---|---|"]
    for name, (words, limit) in _TARGETS.items():
        met = {True: "met", False: "missed", None: ""}[targets[name]["met"]]
        lines.append(f"| {words} | {limit} % | {_spread(targets[name]['figure'], ' %')} | {met} |")
    lines += ["", "## One thing is dragged, all else shall stay", "", *_rows(parts, "drag")]
    lines += ["", "## Retrieval and trajectory together", "", *_rows(parts, "together")]
    error = summary["shares"]["both_others_error_of_control"]
    if error is not None:
        lines += ["", f"Track error of the other things, both of control alone: {_spread(_times(100, error), ' %')}."]
    for name, figure in summary["checks"].items():
        lines += ["", f"{name.replace('_', ' ').capitalize()}: {100 * figure:.0f} %."]
    for part, title in (("true-seen", "trained"), ("true-held-out", "held-out")):
        lines += ["", f"## Things dragged where they truly go, {title} families", "", *_rows(parts, part)]
    if summary["cost"]:
        cost = summary["cost"]
        lines += [
            "",
            "## Cost",
            "",
            f"A controlled denoising step takes {cost['step_ratio']:.2f} times as long as a plain one "
            f"({1000 * cost['step']:.0f} ms, median of {cost['runs']} runs), with this bundle's guidance of the "
            f"control {cost['guided_step_ratio']:.2f} times; encoding the condition takes as long as "
            f"{cost['encoding_in_steps']:.2f} steps, once for each video.",
        ]
    lines += [
        "",
        f"Distances in pixels of {SIZE}; brackets are 95 % intervals, by bootstrap over scenes. A video in which "
        "nothing moves has as MD how far the ways lead.",
    ]
    return "\n".join(lines) + "\n"


def _rows(parts: Mapping[str, Mapping[str, Any]], part: str) -> list[str]:
    lines = [
        "| | clips | MD at the end | MD over all frames | the ways lead | others moved | others' track error, % | "
        "moved outside | flow outside | lost |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in parts[part].items():
        cells = [
            WORDS[part][name],
            str(figures["clips"]),
            _spread(figures["md_end"]),
            _spread(figures["md"]),
            f"{figures['drawn_end'][0]:.1f} at the end, {figures['drawn'][0]:.1f} over all",
            _spread(figures.get("others_moved")),
            # Against the domain's motion, which nothing asks for in the other parts.
            _spread(figures.get("others_error")) if part == "together" else "",
            _spread(figures.get("moved_outside"), digits=2),
            _spread(figures.get("flow_outside"), digits=2),
            f"{100 * figures['lost']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(spread: Spread | None, unit: str = "", *, digits: int = 1) -> str:
    if spread is None:
        return "–"
    figure, low, high = spread
    return f"{figure:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _sheet(clips: Path, scenes: Sequence[DragScene]) -> Image.Image:
    """For each scene the image with its ways, and every row's video with where things should be."""
    videos = {name: iter(np.load(clips / f"drag_{name}_noise0.npy")) for name in _SHEET_ROWS}
    rows = []
    for index, scene in enumerate(scenes):
        for name, words in _SHEET_ROWS.items():
            drag = scene.all_at_once if name == "c3" else scene.drag
            if drag is not None:
                rows.append(_sheet_row(f"Scene {index}: {words}", scene, drag, next(videos[name])))
    return contact_sheet(rows, columns=9, tile=96)


def _sheet_row(title: str, scene: DragScene, drag: Drag, frames: np.ndarray) -> SheetRow:
    ways = [RegionTrajectory(way, may_leave=True) for way in drag.ways]
    image = draw_trajectories(Image.fromarray(scene.clip.frames[0]), ways, mask=drag.brush)
    return SheetRow(title, draw_on_video(frames, ways), "", image)


def _save(picture: Image.Image, file: Path) -> None:
    aside = file.with_suffix(".tmp")
    picture.save(aside, format="PNG")
    aside.replace(file)
