"""Indexing: from a listing of clips to committed rows. One machine, decoding in worker processes.

plan    what is new, what changed, what is stored already (no video is decoded)
decode  16 frames of each new clip, in killable workers, in the order of the listing
encode  in batches that follow the listing, so that a run that was killed and continued gives the same numbers
commit  hundreds of rows at a time; what was committed survives anything

The caller holds the writer lock.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from motionrag.database.failures import FailedClip, FailureLog
from motionrag.database.schema import (
    PLAIN_COLUMNS,
    clip_id,
    embedding_column,
    fitted,
    metadata_columns,
    metadata_fields,
    quoted,
    vectors,
)
from motionrag.database.sources import Failure, Listing, plain_metadata
from motionrag.database.table import ClipTable
from motionrag.decoding import decode_clips, read_clip_in_worker
from motionrag.encoder import MotionEncoder
from motionrag.video import Clip, DecodedClip, VideoError

ENCODE_BATCH = 8  # clips; encoding batches follow the listing, see the module's head
COMMIT_ROWS = 256
COMMIT_SECONDS = 30.0  # slow encoders commit smaller batches, so that a kill costs little
_HASH_CHUNK = 1 << 20


class IndexingStopped(ValueError):
    """A clip could not be indexed, and `strict` asked to stop there. Everything before it is stored."""


@dataclass
class AddReport:
    """What `add` did, or, on a dry run, would do.

    Attributes:
        convention: What the input was taken for.
        added: New clips.
        changed: Stored clips whose file, caption or metadata differ now.
        unchanged: Clips that are stored already.
        failed: Clips that could not be read, and why.
        seconds: Wall time.
        dry_run: Nothing was decoded or written.
    """

    convention: str
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    failed: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        reasons = "; ".join(f"{Path(failure.uri).name}: {failure.reason}" for failure in self.failed[:3])
        more = f"; and {len(self.failed) - 3} more" if len(self.failed) > 3 else ""
        unreadable = f", {len(self.failed)} unusable ({reasons}{more})" if self.failed else ""
        return f"{self.added} new, {self.changed} changed, {self.unchanged} unchanged{unreadable}"


@dataclass(frozen=True)
class _File:
    """A video file as it is now."""

    size: int
    mtime_ns: int
    content: str


@dataclass(frozen=True)
class _Job:
    """A clip to store, with its place in the listing."""

    position: int
    clip: Clip
    id: str
    file: _File


@dataclass
class _Plan:
    """What a listing asks for, compared with the table."""

    jobs: list[_Job] = field(default_factory=list)  # to decode
    rewritten: list[_Job] = field(default_factory=list)  # stored; words or path changed
    touched: list[_Job] = field(default_factory=list)  # stored; the file has another time and the same content
    superseded: dict[str, list[str]] = field(default_factory=dict)  # uri → ids of rows made from an older content
    unchanged: int = 0
    failed: list[Failure] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)  # uris; what is stored of them is kept


def preview_clips(listing: Listing, *, table: ClipTable, failures: FailureLog) -> AddReport:
    """Say what `add_clips` would do; nothing is decoded or written.

    Args:
        listing: Clips in order.
        table: Compared with.
        failures: Files that failed before.

    Returns:
        The report.

    Raises:
        ValueError: If metadata does not fit the columns that the database has.
    """
    started = time.monotonic()
    plan = _compare(listing, table, failures)
    _new_columns(plan, table)
    replaced = sum(job.clip.uri in plan.superseded for job in plan.jobs)
    return AddReport(
        convention=listing.convention,
        added=len(plan.jobs) - replaced,
        changed=replaced + len(plan.rewritten),
        unchanged=plan.unchanged,
        failed=plan.failed,
        seconds=time.monotonic() - started,
        dry_run=True,
    )


def add_clips(
    listing: Listing,
    *,
    table: ClipTable,
    encoder: MotionEncoder,
    failures: FailureLog,
    reader: str,
    strict: bool,
    progress: bool,
    num_workers: int | None,
    timeout_s: float | None,
) -> AddReport:
    """Bring the table up to date with a listing.

    Args:
        listing: Clips in order.
        table: Written to; the caller holds the lock.
        encoder: Makes tokens and embeddings.
        failures: Files that failed before; written to.
        reader: How to decode; by name.
        strict: Stop at the first clip that cannot be read.
        progress: Show a progress bar on a terminal.
        num_workers: Decoding processes; None: by the number of cores.
        timeout_s: Longest time for one clip; None: by its duration.

    Returns:
        The report.

    Raises:
        IndexingStopped: If `strict` is set and a clip cannot be read.
        ValueError: If metadata does not fit the columns that the database has.
    """
    started = time.monotonic()
    plan = _compare(listing, table, failures)
    if strict and plan.failed:
        raise IndexingStopped(f"{plan.failed[0].uri}: {plan.failed[0].reason}. Nothing was indexed.")
    report = AddReport(convention=listing.convention, unchanged=plan.unchanged, failed=plan.failed)
    table.add_columns(_new_columns(plan, table))
    _rewrite([*plan.rewritten, *plan.touched], table, encoder)
    report.changed = len(plan.rewritten)
    if plan.jobs:
        results = decode_clips(
            [job.clip for job in plan.jobs],
            num_frames=encoder.num_frames,
            num_workers=num_workers,
            timeout_s=timeout_s,
            decode=partial(read_clip_in_worker, reader=reader),
        )
        with closing(results):
            batches = _batches(plan.jobs, results, progress=progress)
            _store(batches, plan, report, _Writer(table, failures), encoder, strict=strict)
    _delete_superseded(plan, table)
    report.seconds = time.monotonic() - started
    return report


def _new_columns(plan: _Plan, table: ClipTable) -> list[pa.Field]:
    return metadata_fields((_metadata(job.clip) for job in (*plan.jobs, *plan.rewritten)), table.schema)


def _store(
    batches: Iterable[list[tuple[_Job, DecodedClip | VideoError]]],
    plan: _Plan,
    report: AddReport,
    writer: "_Writer",
    encoder: MotionEncoder,
    *,
    strict: bool,
) -> None:
    """Encode and commit what was decoded, batch by batch, and count it in the report."""
    for batch in batches:
        decoded = []
        for job, result in batch:
            if isinstance(result, VideoError):
                report.failed.append(Failure(job.clip.uri, str(result)))
                plan.unreadable.add(job.clip.uri)
                writer.add_failure(job, str(result))
                if strict:
                    break
            else:
                decoded.append((job, result))
        if decoded:
            writer.add(decoded, encoder)
        replaced = sum(job.clip.uri in plan.superseded for job, _ in decoded)
        report.changed += replaced
        report.added += len(decoded) - replaced
        if strict and report.failed:
            writer.flush()
            failure = report.failed[0]
            stored = report.added + report.changed
            raise IndexingStopped(f"{failure.uri}: {failure.reason}. {stored} clips before it are stored.")
    writer.flush()


def _delete_superseded(plan: _Plan, table: ClipTable) -> None:
    ids = [id_ for uri, old in plan.superseded.items() if uri not in plan.unreadable for id_ in old]
    for start in range(0, len(ids), COMMIT_ROWS):
        table.delete(f"id IN ({', '.join(map(quoted, ids[start : start + COMMIT_ROWS]))})")


def content_hash(path: str | Path) -> str:
    """Hash of a file's bytes: 32 hexadecimal characters."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _compare(listing: Listing, table: ClipTable, failures: FailureLog) -> _Plan:
    plan = _Plan(failed=list(listing.failures))
    metadata = metadata_columns(table.schema)
    words = ["caption", "licence", "source", *metadata]
    stored = table.scan(["id", "uri", "content", "file_size", "file_mtime_ns", *words])
    files = _inspect_all(listing, stored, plan)
    jobs = [
        _Job(position, clip, clip_id(files[clip.uri].content, clip), files[clip.uri])
        for position, clip in enumerate(listing.clips)
        if clip.uri in files
    ]
    rows = {row["id"]: row for row in _rows_with("id", {job.id for job in jobs}, stored)}

    wanted: dict[str, _Job] = {}  # one content under two names is stored once: under the name that it has, or the first
    for job in jobs:
        if job.id not in wanted or (job.id in rows and rows[job.id]["uri"] == job.clip.uri):
            wanted[job.id] = job
    plan.unchanged = len(jobs) - len(wanted)
    for job in wanted.values():
        if job.id not in rows:
            reason = failures.find(job.clip.uri, job.clip.start_s, job.clip.end_s, job.file.size, job.file.mtime_ns)
            if reason is None:
                plan.jobs.append(job)
            else:
                plan.unreadable.add(job.clip.uri)
                plan.failed.append(Failure(job.clip.uri, f"{reason} (tried before; skipped until the file changes)"))
        elif _differs(rows[job.id], job, files, table.schema):
            plan.rewritten.append(job)
        else:
            plan.unchanged += 1
            row = rows[job.id]
            if row["uri"] == job.clip.uri and row["file_mtime_ns"] != job.file.mtime_ns:
                plan.touched.append(job)
    for row in _rows_with("uri", set(files), stored):
        if row["content"] != files[row["uri"]].content and row["id"] not in wanted:
            plan.superseded.setdefault(row["uri"], []).append(row["id"])
    return plan


def _rows_with(column: str, values: set[str], stored: pa.Table) -> list[dict[str, Any]]:
    """Rows whose column has one of these values; the others never become Python objects."""
    return stored.filter(pc.is_in(stored[column], pa.array(list(values), pa.string()))).to_pylist()


def _inspect_all(listing: Listing, stored: pa.Table, plan: _Plan) -> dict[str, _File]:
    """Every listed file as it is now; one that cannot be read is listed as failed instead."""
    known: dict[str, list[dict[str, Any]]] = {}
    states = stored.select(["uri", "content", "file_size", "file_mtime_ns"])
    for row in _rows_with("uri", {clip.uri for clip in listing.clips}, states):
        known.setdefault(row["uri"], []).append(row)
    files: dict[str, _File] = {}
    for uri in dict.fromkeys(clip.uri for clip in listing.clips):
        try:
            files[uri] = _inspect(uri, known.get(uri, []))
        except OSError as error:
            plan.failed.append(Failure(uri, f"it cannot be read: {error.strerror}"))
    return files


def _inspect(uri: str, rows: Sequence[Mapping[str, Any]]) -> _File:
    """The file as it is now; its bytes are read only if size or time differ from what is stored."""
    stat = Path(uri).stat()
    for row in rows:
        if (row["file_size"], row["file_mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return _File(stat.st_size, stat.st_mtime_ns, row["content"])
    return _File(stat.st_size, stat.st_mtime_ns, content_hash(uri))


def _differs(row: Mapping[str, Any], job: _Job, files: Mapping[str, _File], schema: pa.Schema) -> bool:
    """Whether a stored clip has other words now, or its file another name."""
    if row["uri"] != job.clip.uri:
        # A copy changes nothing, but a file that moved takes its row along, also to where another one was.
        return files[row["uri"]].content != row["content"] if row["uri"] in files else not Path(row["uri"]).exists()
    stored = {name: row[name] for name in metadata_columns(schema) if row[name] is not None}
    words = (job.clip.caption, job.clip.licence, job.clip.source, fitted(_metadata(job.clip), schema))
    return (row["caption"], row["licence"], row["source"], stored) != words


def _metadata(clip: Clip) -> dict[str, str | int | float | bool]:
    reserved = {*PLAIN_COLUMNS, *map(embedding_column, ("text", "image", "motion")), "motion_tokens", "context_tokens"}
    return plain_metadata(clip.metadata, reserved)


def _batches(
    jobs: Sequence[_Job], results: Iterable[tuple[int, DecodedClip | VideoError]], *, progress: bool
) -> Iterator[list[tuple[_Job, DecodedClip | VideoError]]]:
    """Group decoded clips by their place in the listing, never by when they happen to be ready."""
    from tqdm.auto import tqdm

    # disable=None: a bar on a terminal only.
    bar = tqdm(results, total=len(jobs), desc="indexing", unit="clip", disable=None if progress else True)
    pairs = ((jobs[index], result) for index, result in bar)
    for _, batch in groupby(pairs, key=lambda pair: pair[0].position // ENCODE_BATCH):
        yield list(batch)


def _rows(decoded: Sequence[tuple[_Job, DecodedClip]], schema: pa.Schema, encoder: MotionEncoder) -> pa.Table:
    encoded = encoder.encode_frames([result.frames for _, result in decoded])
    plain = [
        {
            "id": job.id,
            "uri": job.clip.uri,
            "content": job.file.content,
            "file_size": job.file.size,
            "file_mtime_ns": job.file.mtime_ns,
            "start_s": result.start_s,
            "end_s": result.end_s,
            "fps": result.fps,
            "width": result.width,
            "height": result.height,
            "num_frames": result.num_frames,
            "short": result.short,
            "still_share": result.still_share,
            "reader": result.reader,
            "caption": job.clip.caption,
            "licence": job.clip.licence,
            "source": job.clip.source,
            "revision": 0,
            **_metadata(job.clip),
        }
        for job, result in decoded
    ]
    columns: dict[str, pa.Array] = {
        embedding_column("text"): vectors(_text_embeddings([job.clip for job, _ in decoded], encoder), np.float32),
        embedding_column("image"): vectors(encoded.image.numpy(), np.float32),
        embedding_column("motion"): vectors(encoded.motion.numpy(), np.float32),
        "motion_tokens": vectors(encoded.motion_tokens.numpy(), np.float16),
        "context_tokens": vectors(encoded.context_tokens.numpy(), np.float16),
    }
    for name in (*PLAIN_COLUMNS, *metadata_columns(schema)):
        columns[name] = _column([row.get(name) for row in plain], schema.field(name))
    return pa.table({name: columns[name] for name in schema.names})


def _column(values: Sequence[Any], column: pa.Field) -> pa.Array:
    if pa.types.is_string(column.type):  # a column of text takes numbers too
        values = [None if value is None else str(value) for value in values]
    return pa.array(values, column.type)


def _text_embeddings(clips: Sequence[Clip], encoder: MotionEncoder) -> np.ndarray:
    """Embeddings of captions `(b e)`; zeros where there is none."""
    embeddings = np.zeros((len(clips), encoder.embedding_dim("text")), np.float32)
    captioned = [index for index, clip in enumerate(clips) if clip.caption]
    if captioned:
        embeddings[captioned] = encoder.embed_texts([clips[index].caption for index in captioned]).numpy()
    return embeddings


def _rewrite(jobs: Sequence[_Job], table: ClipTable, encoder: MotionEncoder) -> None:
    """Store new words or paths of clips whose pictures are the same; tokens are kept."""
    for start in range(0, len(jobs), COMMIT_ROWS):
        batch = jobs[start : start + COMMIT_ROWS]
        clips = [job.clip for job in batch]
        rows = table.take([job.id for job in batch])
        words: dict[str, list[Any]] = {
            "uri": [clip.uri for clip in clips],
            "file_size": [job.file.size for job in batch],
            "file_mtime_ns": [job.file.mtime_ns for job in batch],
            "caption": [clip.caption for clip in clips],
            "licence": [clip.licence for clip in clips],
            "source": [clip.source for clip in clips],
            **{name: [_metadata(clip).get(name) for clip in clips] for name in metadata_columns(table.schema)},
        }
        columns: dict[str, pa.Array | pa.ChunkedArray] = {name: rows[name] for name in rows.column_names}
        columns |= {name: _column(values, table.schema.field(name)) for name, values in words.items()}
        columns[embedding_column("text")] = vectors(_text_embeddings(clips, encoder), np.float32)
        columns["revision"] = pc.add(rows["revision"], pa.scalar(1, pa.int32()))
        table.upsert(pa.table(columns))


class _Writer:
    """Collects rows and commits them by hundreds, or sooner when encoding is slow."""

    def __init__(self, table: ClipTable, failures: FailureLog) -> None:
        self._table = table
        self._failures = failures
        self._rows: list[pa.Table] = []
        self._since = time.monotonic()

    def add(self, decoded: Sequence[tuple[_Job, DecodedClip]], encoder: MotionEncoder) -> None:
        self._rows.append(_rows(decoded, self._table.schema, encoder))
        for job, _ in decoded:
            self._failures.forget(job.clip.uri, job.clip.start_s, job.clip.end_s)
        if sum(map(len, self._rows)) >= COMMIT_ROWS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.flush()

    def add_failure(self, job: _Job, reason: str) -> None:
        clip, file = job.clip, job.file
        self._failures.add(FailedClip(clip.uri, clip.start_s, clip.end_s, file.size, file.mtime_ns, reason))

    def flush(self) -> None:
        if self._rows:
            self._table.append(pa.concat_tables(self._rows))
        self._failures.save()
        self._rows, self._since = [], time.monotonic()
