"""What people hand in for indexing, turned into a list of clips: folders, manifests, lists from Python.

The convention is recognised and named, never guessed in silence. Nothing is decoded here; a listed file may turn out
to be unreadable later. Tables: `docs/indexing.md` shows one example of each convention.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrag.video import Clip

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    }
)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

VIDEO_COLUMNS = ("file_name", "video", "video_path", "path", "file_path", "file", "uri")
CAPTION_COLUMNS = ("caption", "text", "prompt")
START_COLUMNS = ("start_s", "start_sec")
END_COLUMNS = ("end_s", "end_sec")
LICENCE_COLUMNS = ("licence", "license")


@dataclass(frozen=True)
class Failure:
    """A clip that could not be indexed.

    Attributes:
        uri: The file, as far as it is known.
        reason: One sentence.
    """

    uri: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """Clips in the order in which they were listed.

    Attributes:
        convention: What the input was taken for, in words.
        clips: The clips; their files exist.
        failures: Entries that name no usable file, and why.
    """

    convention: str
    clips: list[Clip]
    failures: list[Failure] = field(default_factory=list)


def list_clips(
    source: str | Path | Sequence[Clip],
    *,
    captions: str | Path | None = None,
    video_column: str | None = None,
    caption_column: str | None = None,
) -> Listing:
    """Recognise the convention of `source` and list its clips.

    Args:
        source: A folder (videos with optional same-stem `.txt` captions, or a VideoFolder with `metadata.csv`,
            `.jsonl` or `.parquet`), a manifest (`.csv`, `.tsv`, `.jsonl`, `.parquet`), one video file, or clips.
        captions: A manifest whose relative paths lie in the folder `source`; files that it does not list are
            indexed without a caption.
        video_column: Column of the manifest that names the file; None looks for the usual names.
        caption_column: Column that holds the caption; None looks for the usual names.

    Returns:
        The clips, the convention, and entries that could not be used.

    Raises:
        ValueError: If `source` is none of these, or a manifest is malformed; the columns found are named.
        FileNotFoundError: If `source` or `captions` does not exist.
    """
    columns = _Columns(video_column, caption_column)
    if not isinstance(source, (str, Path)):
        return _from_python(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if captions is not None:
        if not path.is_dir():
            raise ValueError(f"Captions from a separate file go with a folder of videos, but {path} is a file.")
        listing = _from_table(Path(captions), root=path, columns=columns)
        listed = {clip.uri for clip in listing.clips} | {failure.uri for failure in listing.failures}
        others = [Clip(str(file)) for file in _videos_in(path) if str(file) not in listed]
        return Listing(f"folder with captions from {Path(captions).name}", listing.clips + others, listing.failures)
    if path.is_dir():
        return _from_folder(path, columns)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _from_table(path, root=path.parent, columns=columns)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return Listing("a single video", [Clip(str(path.resolve()), caption=_caption_beside(path))])
    raise ValueError(
        f"{path} is neither a folder, nor a manifest ({', '.join(TABLE_SUFFIXES)}), nor a video "
        f"({', '.join(sorted(VIDEO_SUFFIXES))})."
    )


@dataclass(frozen=True)
class _Columns:
    """Names of columns that the caller has fixed."""

    video: str | None
    caption: str | None


def _from_python(clips: Sequence[Clip]) -> Listing:
    wrong = next((clip for clip in clips if not isinstance(clip, Clip)), None)
    if wrong is not None:
        raise ValueError(f"A list to index must hold Clip objects, got {type(wrong).__name__}: {str(wrong)[:80]!r}.")
    present = [clip for clip in clips if Path(clip.uri).is_file()]
    missing = [Failure(clip.uri, "there is no such file") for clip in clips if not Path(clip.uri).is_file()]
    return _unique("a list of clips", present, missing)


def _from_folder(folder: Path, columns: _Columns) -> Listing:
    metadata = [folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES if (folder / f"metadata{suffix}").is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{folder} holds {' and '.join(file.name for file in metadata)}; keep one of them.")
    if metadata:
        listing = _from_table(metadata[0], root=folder, columns=columns)
        return Listing(f"VideoFolder with {metadata[0].name}", listing.clips, listing.failures)
    videos = _videos_in(folder)
    if not videos:
        raise ValueError(f"{folder} holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) and no metadata.csv.")
    root = folder.resolve()
    clips = []
    for video in videos:
        label = video.parent.relative_to(root).as_posix()
        clips.append(
            Clip(str(video), caption=_caption_beside(video), metadata={"label": label} if label != "." else {})
        )
    captioned = sum(bool(clip.caption) for clip in clips)
    return Listing(f"folder of videos, {captioned} of {len(clips)} with a same-stem .txt caption", clips)


def _from_table(path: Path, *, root: Path, columns: _Columns) -> Listing:
    rows = _read_table(path)
    names = list(rows[0]) if rows else []
    video = _column(path, names, columns.video, VIDEO_COLUMNS, what="video", required=True)
    caption = _column(path, names, columns.caption, CAPTION_COLUMNS, what="caption", required=False)
    start = _column(path, names, None, START_COLUMNS, what="start", required=False)
    end = _column(path, names, None, END_COLUMNS, what="end", required=False)
    licence = _column(path, names, None, LICENCE_COLUMNS, what="licence", required=False)
    taken = {name for name in (video, caption, start, end, licence, "source") if name}

    clips, failures = [], []
    for number, row in enumerate(rows, start=1):
        written = _text(_cell(row, video))
        try:
            clips.append(
                Clip(
                    str(_inside(root, written)),
                    start_s=_seconds(_cell(row, start), default=0.0) or 0.0,
                    end_s=_seconds(_cell(row, end), default=None),
                    caption=_text(_cell(row, caption)),
                    licence=_text(_cell(row, licence)),
                    source=_text(_cell(row, "source")),
                    metadata={name: value for name, value in row.items() if name not in taken},
                )
            )
        except ValueError as error:
            failures.append(Failure(str(root / written), f"row {number} of {path.name}: {error}"))
    kind = {"video_path": "musubi-tuner-style", "file_name": "VideoFolder-style", "video": "OpenVid-style"}.get(
        video or ""
    )
    name = f"{kind} manifest" if kind else "manifest"
    return _unique(f"{name} {path.name} (column {video!r} for the video, {caption!r} for the caption)", clips, failures)


def _unique(convention: str, clips: Iterable[Clip], failures: list[Failure]) -> Listing:
    """Keep the first of several entries for one span of one file; the others are listed as failures."""
    seen: set[tuple[str, float, float | None]] = set()
    kept, failures = [], list(failures)
    for clip in clips:
        span = (clip.uri, clip.start_s, clip.end_s)
        if span in seen:
            failures.append(Failure(clip.uri, "listed more than once; the first entry is used"))
        else:
            seen.add(span)
            kept.append(clip)
    return Listing(convention, kept, failures)


def _read_table(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no manifest {path}.")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise ValueError(f"{path} is no readable Parquet file: {error}") from error
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, delimiter="\t" if suffix == ".tsv" else ",")
    raise ValueError(f"{path} is no manifest; expected one of {', '.join(TABLE_SUFFIXES)}.")


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    """Read a CSV file; a column becomes numbers if every filled cell is one."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path} line {reader.line_num}: expected {len(reader.fieldnames or [])} fields; "
                        "put a caption that holds a comma in quotes."
                    )
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable CSV file in UTF-8: {error}") from error
    for name in rows[0] if rows else []:
        convert = _number_type([row[name] for row in rows])
        for row in rows:
            row[name] = None if row[name] == "" else convert(row[name])
    return rows


def _number_type(cells: Sequence[str]) -> type[int] | type[float] | type[str]:
    filled = [cell for cell in cells if cell != ""]
    for number in (int, float):
        try:
            for cell in filled:
                number(cell)
        except ValueError:
            continue
        if filled:
            return number
    return str


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} must be a JSON object, got {type(row).__name__}.")
        rows.append(row)
    # Every row gets every column, so that the columns found do not depend on the first row.
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _column(
    path: Path, names: Sequence[str], asked: str | None, usual: Sequence[str], *, what: str, required: bool
) -> str | None:
    found = next((name for name in ([asked] if asked else usual) if name in names), None)
    if found is None and (asked or required):
        raise ValueError(
            f"{path} has no column for the {what}: looked for {asked or ', '.join(usual)}; "
            f"the columns are {', '.join(names) or 'none'}. Name it with --{what}-column."
        )
    return found


def _inside(root: Path, written: str) -> Path:
    """The file that a manifest names: absolute, or relative and inside `root`."""
    if not written:
        raise ValueError("no file is named")
    root = root.resolve()
    path = Path(written)
    resolved = path.resolve() if path.is_absolute() else (root / path).resolve()
    if not path.is_absolute() and not resolved.is_relative_to(root):
        raise ValueError(f"{written} leads out of {root}")
    if not resolved.is_file():
        raise ValueError("there is no such file")
    return resolved


def _cell(row: Mapping[str, Any], column: str | None) -> Any:
    return None if column is None else row.get(column)


def _seconds(value: Any, default: float | None) -> float | None:
    if value is None or value == "":
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no time in seconds") from None


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _videos_in(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.resolve().rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
    )


def _caption_beside(video: Path) -> str:
    text = video.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


def plain_metadata(metadata: Mapping[str, Any], reserved: Iterable[str]) -> dict[str, str | int | float | bool]:
    """The part of a clip's metadata that becomes columns of the database.

    Args:
        metadata: As the user gave it.
        reserved: Columns of the database itself; these are measured and win over what a manifest claims.

    Returns:
        Strings, numbers and booleans as they are, everything else as JSON; empty values left out.
    """
    reserved = set(reserved)
    plain: dict[str, str | int | float | bool] = {}
    for name, value in metadata.items():
        if name in reserved or value is None or value == "":
            continue
        plain[name] = value if isinstance(value, (str, int, float, bool)) else json.dumps(value, default=str)
    return plain
