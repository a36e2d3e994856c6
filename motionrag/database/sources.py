"""What people hand in for indexing, turned into a list of clips: folders, manifests, lists from Python.

The convention is recognised and named, never guessed in silence. Nothing is decoded here; a listed file may turn out
to be unreadable later. Tables: `docs/indexing.md` shows one example of each convention.
"""

import csv
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from motionrag.database.metadata import is_missing, is_utf8
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

# As JSON writes them: `007`, `1_000` and `nan` are words. At most 18 digits fit 64 bits.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,2})?", re.ASCII)


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
        others = [Clip(file) for file in _left_out(path, listing)]
        name = f"folder with captions from {Path(captions).name}, {len(others)} videos without"
        return _unique(name, [*listing.clips, *others], listing.failures)
    if path.is_dir():
        return _from_folder(path, columns)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _from_table(path, root=path.parent, columns=columns)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _unique("a single video", *_sorted_out([absolute_path(path)], _with_caption_beside))
    raise ValueError(
        f"{path} is neither a folder, nor a manifest ({', '.join(TABLE_SUFFIXES)}), nor a video "
        f"({', '.join(sorted(VIDEO_SUFFIXES))})."
    )


def absolute_path(path: str | Path) -> str:
    """The name under which a file is stored: absolute, folders resolved, but a link to a file keeps its own name.

    A cache of the Hugging Face hub consists of links, whose targets have neither suffix nor name.
    """
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


@dataclass(frozen=True)
class _Columns:
    """Names of columns that the caller has fixed."""

    video: str | None
    caption: str | None


def _from_python(clips: Sequence[Clip]) -> Listing:
    wrong = next((clip for clip in clips if not isinstance(clip, Clip)), None)
    if wrong is not None:
        raise ValueError(f"A list to index must hold Clip objects, got {type(wrong).__name__}: {str(wrong)[:80]!r}.")
    found, missing = [], []
    for clip in clips:
        if os.path.isfile(clip.uri):
            found.append(replace(clip, uri=absolute_path(clip.uri)))
        else:
            missing.append(Failure(clip.uri, "there is no such file"))
    return _unique("a list of clips", found, missing)


def _from_folder(folder: Path, columns: _Columns) -> Listing:
    metadata = [folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES if (folder / f"metadata{suffix}").is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{folder} holds {' and '.join(file.name for file in metadata)}; keep one of them.")
    if metadata:
        listing = _from_table(metadata[0], root=folder, columns=columns)
        ignored = len(_left_out(folder, listing))
        note = f"; {ignored} videos that it does not list are left out" if ignored else ""
        return replace(listing, convention=f"VideoFolder with {metadata[0].name}{note}")
    videos = dict(_videos_in(folder))
    if not videos:
        raise ValueError(f"{folder} holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) and no metadata.csv.")

    def labelled(video: str) -> Clip:
        return replace(_with_caption_beside(video), metadata={"label": videos[video]} if videos[video] else {})

    clips, failures = _sorted_out(videos, labelled)
    captioned = sum(bool(clip.caption) for clip in clips)
    return _unique(f"folder of videos, {captioned} of {len(videos)} with a same-stem .txt caption", clips, failures)


def _from_table(path: Path, *, root: Path, columns: _Columns) -> Listing:
    rows = _read_table(path)
    if not rows:
        raise ValueError(f"{path} lists no clips.")
    names = list(rows[0])
    video = _column(path, names, columns.video, VIDEO_COLUMNS, what="video", required=True)
    caption = _column(path, names, columns.caption, CAPTION_COLUMNS, what="caption", required=False)
    start = _column(path, names, None, START_COLUMNS, what="start", required=False)
    end = _column(path, names, None, END_COLUMNS, what="end", required=False)
    licence = _column(path, names, None, LICENCE_COLUMNS, what="licence", required=False)
    taken = {name for name in (video, caption, start, end, licence, "source") if name}
    others = [name for name in names if name not in taken]
    if path.suffix.lower() in (".csv", ".tsv"):
        for name in others:
            _read_numbers(rows, name)

    real_root = os.path.realpath(root)
    clips, failures = [], []
    for number, row in enumerate(rows, start=1):
        written = _text(_cell(row, video))
        try:
            clips.append(
                Clip(
                    _inside(real_root, written),
                    start_s=_seconds(_cell(row, start)) or 0.0,
                    end_s=_seconds(_cell(row, end)),
                    caption=_text(_cell(row, caption)),
                    licence=_text(_cell(row, licence)),
                    source=_text(_cell(row, "source")),
                    metadata={name: row[name] for name in others},
                )
            )
        except ValueError as error:
            failures.append(Failure(os.path.join(real_root, written), f"row {number} of {path.name}: {error}"))
    kind = {"video_path": "musubi-tuner-style", "file_name": "VideoFolder-style", "video": "OpenVid-style"}.get(
        video or ""
    )
    name = f"{kind} manifest" if kind else "manifest"
    return _unique(f"{name} {path.name} (column {video!r} for the video, {caption!r} for the caption)", clips, failures)


def _unique(convention: str, clips: Iterable[Clip], failures: list[Failure]) -> Listing:
    """Keep the first of several entries for one span of one file, and only words that can be written as UTF-8."""
    seen: set[tuple[str, float, float | None]] = set()
    kept, failures = [], list(failures)
    for clip in clips:
        span = (clip.uri, clip.start_s, clip.end_s)
        if not is_utf8(clip.uri, clip.caption, clip.licence, clip.source):
            name = os.fsencode(clip.uri).decode("utf-8", "backslashreplace")
            failures.append(Failure(name, "its name, caption, licence or source cannot be written as UTF-8"))
        elif span in seen:
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
    """Read a CSV file; empty cells become None, all others stay text."""
    rows: list[dict[str, Any]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"{path} names a column twice: {', '.join(names)}.")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path} line {reader.line_num}: expected {len(names)} fields; "
                        "put a caption that holds a comma in quotes."
                    )
                rows.append({name: cell or None for name, cell in row.items()})
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} from line {reader.line_num + 1} on is no CSV in UTF-8: {error}") from error
    return rows


def _read_numbers(rows: Sequence[dict[str, Any]], name: str) -> None:
    """Turn a column of CSV cells into numbers if every filled one is a number."""
    filled = [row[name] for row in rows if row[name] is not None]
    convert: type[int] | type[float]
    if all(map(_WHOLE_NUMBER.fullmatch, filled)):
        convert = int
    elif all(map(_NUMBER.fullmatch, filled)):
        convert = float
    else:
        return
    for row in rows:
        row[name] = None if row[name] is None else convert(row[name])


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    # In bytes, whose lines end with a line feed only; text also breaks at U+2028, which captions do contain.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # also a UnicodeDecodeError
                raise ValueError(f"{path} line {number} is no JSON in UTF-8: {error}") from error
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


def _inside(root: str, written: str) -> str:
    """The file that a manifest names: absolute, or relative and inside `root`."""
    if not written:
        raise ValueError("no file is named")
    path = absolute_path(os.path.join(root, written))
    if not os.path.isabs(written) and os.path.commonpath([root, path]) != root:
        raise ValueError(f"{written} leads out of {root}")
    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    return path


def _cell(row: Mapping[str, Any], column: str | None) -> Any:
    return None if column is None else row.get(column)


def _seconds(value: Any) -> float | None:
    if is_missing(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no time in seconds") from None


def _text(value: Any) -> str:
    return "" if is_missing(value) else str(value).strip()


def _left_out(folder: Path, listing: Listing) -> list[str]:
    """Videos in a folder that a manifest does not list."""
    listed = {clip.uri for clip in listing.clips}
    for failure in listing.failures:  # named as written, perhaps by way of a link to a folder
        listed.add(failure.uri)
        with suppress(ValueError):  # such as a null byte, which no video here has
            listed.add(absolute_path(failure.uri))
    return [video for video, _ in _videos_in(folder) if video not in listed]


def _videos_in(folder: Path) -> list[tuple[str, str]]:
    """Videos in a folder and those below it, sorted, each with the way to its folder ("" for the first one).

    Hidden files and folders are passed over. Links to folders are followed; their videos have the names that
    `absolute_path` gives them.
    """
    return sorted(_walk(os.path.realpath(folder)))


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Visit every folder once, so that loops of links end, and under its own name where it has one below `root`."""
    visited: set[tuple[int, int]] = set()
    folders, links = [(root, "")], deque[tuple[str, str]]()
    while folders or links:
        path, way = folders.pop() if folders else links.popleft()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in _visible(path):
            below = f"{way}/{entry.name}" if way else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, below))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append((os.path.realpath(entry.path), below))
            elif os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES and entry.is_file():
                yield entry.path, way


def _visible(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without checkpoints of notebooks, "._x.mp4" of macOS, caches."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _sorted_out(videos: Iterable[str], make: Callable[[str], Clip]) -> tuple[list[Clip], list[Failure]]:
    clips, failures = [], []
    for video in videos:
        try:
            clips.append(make(video))
        except ValueError as error:
            failures.append(Failure(video, str(error)))
    return clips, failures


def _with_caption_beside(video: str) -> Clip:
    text = Path(video).with_suffix(".txt")
    try:
        return Clip(video, caption=text.read_text(encoding="utf-8-sig").strip() if text.is_file() else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {text.name} is not in UTF-8: {error}") from error
