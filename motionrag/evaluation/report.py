"""The report: per-clip CSV files to `summary.json` and a table in Markdown. Reads files only; generates nothing."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motionrag.evaluation.diversity import diversity
from motionrag.evaluation.intervals import interval
from motionrag.pocket.world import SIZE

ROWS = {
    "a": "(a) no retrieval",
    "b": "(b) top-1 tokens, no CAMA",
    "c": "(c) mean of tokens, no CAMA",
    "d": "(d) CAMA",
    "e": "(e) true clip's tokens (ceiling)",
}
_MEANS = ("lost", "psnr", "colour_kept", "shape_kept", "abstained")
Rows = list[dict[str, str]]
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class PocketReport:
    """What an evaluation found.

    Attributes:
        folder: Where everything is written.
        summary: As in `summary.json`; intervals are [figure, low, high] at 95 %.
        table: As in `report.md`.
    """

    folder: Path
    summary: dict[str, Any]
    table: str


def write_report(
    out: Path, *, columns: Sequence[str], settings: Mapping[str, Any], checks: Mapping[str, Any], seconds: float
) -> PocketReport:
    """Summarise the CSV files of an evaluation.

    Args:
        out: Its folder.
        columns: Which to report, in this order.
        settings: What was run.
        checks: Of the instruments: the tracker's, the autoencoder's and the judge's own figures.
        seconds: How long this run took; a continued one counts from where it continued.

    Returns:
        The report, as written to `summary.json` and `report.md`.
    """
    measured: dict[str, dict[str, dict[int, Rows]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted((out / "clips").glob("*.csv")):
        column, condition, seed = file.stem.rsplit("_", 2)
        measured[column][condition][int(seed.removeprefix("seed"))] = _read(file)
    main: dict[str, Any] = {}
    side: dict[str, Any] = {}
    cama: dict[str, dict[str, Spread]] = {}
    for column in columns:
        conditions = measured[column]
        plain, ceiling = conditions["a"], conditions["e"]
        for condition, seeds in conditions.items():
            positions = [np.load(out / "clips" / f"{column}_{condition}_seed{seed}.npy") for seed in sorted(seeds)]
            figures = _figures(seeds, plain, ceiling)
            if len(positions) > 1:
                figures["diversity"] = float(diversity(torch.from_numpy(np.stack(positions)), SIZE).mean())
            (main if _is_main(condition) else side).setdefault(column, {})[condition] = figures
        cama[column] = _cama_against(conditions)
    summary: dict[str, Any] = {
        "settings": dict(settings),
        "checks": dict(checks),
        "main": main,
        "side": side,
        "cama_against": cama,
        "swap": _swap(out / "swap.csv"),
        "seconds": seconds,
    }
    table = _markdown(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(table, encoding="utf-8")
    return PocketReport(out, summary, table)


def _is_main(condition: str) -> bool:
    """Whether this is one of the rows a to e: all references, by text, nothing left out."""
    return condition in ("a", "e") or condition.endswith("-k9-text-wrong0")


def _read(file: Path) -> Rows:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _by_query(seeds: Mapping[int, Rows], field: str, like: Mapping[int, Rows]) -> np.ndarray:
    """Means over the seeds, one for each query that `like` has, in its order and over its seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for seed in like:
        for row in seeds[seed]:
            values[row["query"]].append(float(row[field]))
    return np.array([np.mean(values[row["query"]]) for row in next(iter(like.values()))])


def _figures(seeds: Mapping[int, Rows], plain: Mapping[int, Rows], ceiling: Mapping[int, Rows]) -> dict[str, Any]:
    rows = [row for part in seeds.values() for row in part]
    error = _by_query(seeds, "track_error", seeds)
    without, best = (_by_query(each, "track_error", seeds) for each in (plain, ceiling))
    families = sorted({row["family"] for row in rows})
    precision = [float(row["precision"]) for row in rows if row["precision"]]
    return {
        "track_error": interval(error),
        "track_error_median": float(np.median([float(row["track_error"]) for row in rows])),
        "no_retrieval_on_the_same": float(without.mean()),
        "gain": interval(without, error, figure=lambda plain, this: 1 - this / plain),
        # Without a gain of the ceiling there is nothing to have a share of.
        "share_of_ceiling": interval(without, error, best, figure=_share) if best.mean() < without.mean() else None,
        "family_accuracy": float(np.mean([row["moves_like"] == row["family"] for row in rows])),
        **{name: float(np.mean([float(row[name]) for row in rows])) for name in _MEANS},
        "precision": float(np.mean(precision)) if precision else None,
        "clips": len(rows),
        "queries": len(error),
        "track_error_by_family": {
            family: float(np.mean([float(row["track_error"]) for row in rows if row["family"] == family]))
            for family in families
        },
    }


def _cama_against(conditions: Mapping[str, Mapping[int, Rows]]) -> dict[str, Spread]:
    """Track error of row d less that of b and of c, query by query."""
    rows = {name[0]: _by_query(seeds, "track_error", seeds) for name, seeds in conditions.items() if _is_main(name)}
    return {other: interval(rows["d"] - rows[other]) for other in "bc"}


def _share(plain: np.ndarray, this: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    """Share of the ceiling's gain; a resample in which the ceiling gains nothing does not count."""
    gain = plain - ceiling
    return np.where(gain > 0, (plain - this) / np.where(gain > 0, gain, 1), np.nan)


def _swap(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    rows = _read(file)
    for row in rows:
        row["query"] = f"{row['pair']}{row['database']}"
    seeds: dict[int, Rows] = defaultdict(list)
    for row in rows:
        seeds[int(row["seed"])].append(row)
    return {
        "own_error": interval(_by_query(seeds, "own_error", seeds)),
        "other_error": interval(_by_query(seeds, "other_error", seeds)),
        "nearer_its_own": float(np.mean([float(row["own_error"]) < float(row["other_error"]) for row in rows])),
        "clips": len(rows),
        "pairs": len({row["pair"] for row in rows}),
    }


def _markdown(summary: Mapping[str, Any]) -> str:
    checks = summary["checks"]
    lines = ["# Evaluation of the pocket", ""]
    if not summary["settings"]["trained"]:
        lines += ["**These weights are untrained: the figures show that everything runs, no more.**", ""]
    lines += [
        f"The tracker's own error on true clips is {checks['tracker_error']:.2f} % of the frame (median "
        f"{checks['tracker_error_median']:.2f}); that of the autoencoder's reconstruction "
        f"{checks['reconstruction_error']:.2f} % (median {checks['reconstruction_error_median']:.2f}), at "
        f"{checks['reconstruction_psnr']:.1f} dB. The judge of families is right on "
        f"{100 * checks['judge_accuracy']:.0f} % of unseen true clips: no row can show more.",
    ]
    for column, conditions in summary["main"].items():
        first = next(iter(conditions.values()))
        title = f"{column}: {first['queries']} queries, {first['clips']} clips in each row"
        still = f"Where nothing moves, the error is {checks['still_error'][column]:.1f} %."
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", still, "", *_table(conditions)]
        against = summary["cama_against"][column]
        lines += ["", f"(d) less (b), query by query: {_spread(against['b'])}; (d) less (c): {_spread(against['c'])}."]
        lines += ["", *_family_table(conditions)]
    for column, conditions in summary["side"].items():
        first = next(iter(conditions.values()))
        title = (
            f"Side conditions on the column {column}: {first['queries']} queries, {first['clips']} clips in each row"
        )
        lines += ["", f"## {title}", "", *_table(conditions)]
    if summary["swap"]:
        swap = summary["swap"]
        lines += [
            "",
            f"## Zero-shot swap: {swap['pairs']} pairs of databases, {swap['clips']} clips",
            "",
            "The same image, prompt and noise with two databases in which the verb names two motions.",
            "",
            "| | track error, % of the frame |",
            "|---|---|",
            f"| against the truth of its own database | {_spread(swap['own_error'])} |",
            f"| against the truth of the other database | {_spread(swap['other_error'])} |",
            "",
            f"{100 * swap['nearer_its_own']:.0f} % of the clips are nearer to the truth of their own database.",
        ]
    lines += ["", "Brackets are 95 % intervals, by bootstrap over queries."]
    return "\n".join(lines) + "\n"


def _table(conditions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| | track error, % of the frame | median | less than (a) | share of the ceiling's gain | right family | "
        "references from the right domain | abstained | PSNR of frame 0 | colour kept | shape kept | diversity |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in conditions.items():
        cells = [
            ROWS[name[0]] if _is_main(name) else _in_words(name),
            _spread(each["track_error"]),
            f"{each['track_error_median']:.1f}",
            "" if name == "a" else _percent(each["gain"]),
            "" if name == "a" else _percent(each["share_of_ceiling"]),
            f"{100 * each['family_accuracy']:.0f} %",
            "" if each["precision"] is None else f"{100 * each['precision']:.0f} %",
            f"{100 * each['abstained']:.0f} %",
            f"{each['psnr']:.1f} dB",
            f"{100 * each['colour_kept']:.0f} %",
            f"{100 * each['shape_kept']:.0f} %",
            f"{each['diversity']:.1f}" if "diversity" in each else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _family_table(conditions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Track errors of every row, family by family."""
    by_family = {name[0]: each["track_error_by_family"] for name, each in conditions.items()}
    lines = ["| family | " + " | ".join(f"({row})" for row in by_family) + " |", "|---" * (1 + len(by_family)) + "|"]
    for family in by_family["a"]:
        cells = [f"{errors[family]:.1f}" for errors in by_family.values()]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return lines


def _in_words(name: str) -> str:
    _, k, by, wrong = name.split("-")
    share = int(wrong.removeprefix("wrong"))
    missing = f", {share} % of the right clips left out" if share else ""
    return f"{ROWS[name[0]]}, k = {k[1:]}, by {by.replace('+', ' and ')}{missing}"


def _spread(figures: Sequence[float]) -> str:
    figure, low, high = figures
    return f"{figure:.1f} [{low:.1f}, {high:.1f}]"


def _percent(shares: Sequence[float] | None) -> str:
    if shares is None:
        return "–"
    figure, low, high = (round(100 * share) for share in shares)
    return f"{figure} % [{low}, {high}]"
