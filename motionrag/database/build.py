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
    """A clip to decode, with its place in the listing."""

    position: int
    clip: Clip
    id: str
    file: _File


@dataclass
class _Plan:
    """What a listing asks for, compared with the table."""

    jobs: list[_Job] = field(default_factory=list)
    rewritten: dict[str, Clip] = field(default_factory=dict)  # id → clip whose words or path changed
    superseded: dict[str, list[str]] = field(default_factory=dict)  # uri → ids of rows made from an older content
    unchanged: int = 0
    failed: list[Failure] = field(default_factory=list)


def add_clips(
    listing: Listing,
    *,
    table: ClipTable,
    encoder: MotionEncoder,
    failures: FailureLog,
    reader: str,
    strict: bool,
    dry_run: bool,
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
        dry_run: Compare only.
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
    report = AddReport(convention=listing.convention, unchanged=plan.unchanged, failed=plan.failed, dry_run=dry_run)
    changed = sum(job.clip.uri in plan.superseded for job in plan.jobs)
    if dry_run:
        report.added, report.changed = len(plan.jobs) - changed, changed + len(plan.rewritten)
        return report
    if strict and plan.failed:
        raise IndexingStopped(f"{plan.failed[0].uri}: {plan.failed[0].reason}. Nothing was indexed.")

    clips = [job.clip for job in plan.jobs] + list(plan.rewritten.values())
    table.add_columns(metadata_fields((_metadata(clip) for clip in clips), table.schema))
    _rewrite(plan.rewritten, table, encoder)
    report.changed += len(plan.rewritten)

    writer = _Writer(table, failures)
    results = decode_clips(
        [job.clip for job in plan.jobs],
        num_frames=encoder.num_frames if plan.jobs else 16,
        num_workers=num_workers,
        timeout_s=timeout_s,
        decode=partial(read_clip_in_worker, reader=reader),
    )
    try:
        for batch in _batches(plan.jobs, results, progress=progress):
            decoded = []
            for job, result in batch:
                if isinstance(result, VideoError):
                    report.failed.append(Failure(job.clip.uri, str(result)))
                    failures.add(_failed(job, str(result)))
                    if strict:
                        break
                else:
                    decoded.append((job, result))
            if decoded:
                writer.add(_rows(decoded, table.schema, encoder))
            for job, _ in decoded:
                if job.clip.uri in plan.superseded:
                    report.changed += 1
                else:
                    report.added += 1
            if strict and report.failed:
                writer.flush()
                failure = report.failed[0]
                raise IndexingStopped(f"{failure.uri}: {failure.reason}. {report.added} clips before it are stored.")
        writer.flush()
    finally:
        results.close()
    lost = {failure.uri for failure in report.failed}
    stale = [id_ for uri, ids in plan.superseded.items() if uri not in lost for id_ in ids]
    if stale:
        table.delete(f"id IN ({', '.join(map(quoted, stale))})")
    report.seconds = time.monotonic() - started
    return report


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
    rows = table.scan(["id", "uri", "content", "file_size", "file_mtime_ns", *words]).to_pylist()
    by_id = {row["id"]: row for row in rows}
    by_uri: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_uri.setdefault(row["uri"], []).append(row)

    files: dict[str, _File] = {}
    seen: set[str] = set()
    for position, clip in enumerate(listing.clips):
        if clip.uri not in files:
            files[clip.uri] = _inspect(clip.uri, by_uri.get(clip.uri, []))
            older = [row["id"] for row in by_uri.get(clip.uri, []) if row["content"] != files[clip.uri].content]
            if older:
                plan.superseded[clip.uri] = older
        file = files[clip.uri]
        id_ = clip_id(file.content, clip)
        row = by_id.get(id_)
        if id_ in seen:
            plan.unchanged += 1
        elif row is None:
            reason = failures.find(clip.uri, clip.start_s, clip.end_s, file.size, file.mtime_ns)
            if reason is None:
                plan.jobs.append(_Job(position, clip, id_, file))
            else:
                plan.failed.append(Failure(clip.uri, f"{reason} (tried before; skipped until the file changes)"))
        elif _differs(row, clip, metadata):
            plan.rewritten[id_] = clip
        else:
            plan.unchanged += 1
        seen.add(id_)
    return plan


def _inspect(uri: str, rows: Sequence[Mapping[str, Any]]) -> _File:
    """The file as it is now; its bytes are read only if size or time differ from what is stored."""
    stat = Path(uri).stat()
    for row in rows:
        if (row["file_size"], row["file_mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return _File(stat.st_size, stat.st_mtime_ns, row["content"])
    return _File(stat.st_size, stat.st_mtime_ns, content_hash(uri))


def _differs(row: Mapping[str, Any], clip: Clip, metadata: Sequence[str]) -> bool:
    if row["uri"] != clip.uri:
        # The same content under two names is stored once; a moved file takes its row along.
        return not Path(row["uri"]).exists()
    stored = {name: row[name] for name in metadata if row[name] is not None}
    words = (clip.caption, clip.licence, clip.source, _metadata(clip))
    return (row["caption"], row["licence"], row["source"], stored) != words


def _metadata(clip: Clip) -> dict[str, str | int | float | bool]:
    reserved = {*PLAIN_COLUMNS, *map(embedding_column, ("text", "image", "motion")), "motion_tokens", "context_tokens"}
    return plain_metadata(clip.metadata, reserved)


def _failed(job: _Job, reason: str) -> FailedClip:
    return FailedClip(job.clip.uri, job.clip.start_s, job.clip.end_s, job.file.size, job.file.mtime_ns, reason)


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


def _rewrite(rewritten: Mapping[str, Clip], table: ClipTable, encoder: MotionEncoder) -> None:
    """Store new words or paths of clips whose pictures are the same; tokens are kept."""
    ids = list(rewritten)
    for start in range(0, len(ids), COMMIT_ROWS):
        batch = ids[start : start + COMMIT_ROWS]
        clips = [rewritten[id_] for id_ in batch]
        rows = table.take(batch)
        words: dict[str, list[Any]] = {
            "uri": [clip.uri for clip in clips],
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

    def add(self, rows: pa.Table) -> None:
        self._rows.append(rows)
        if sum(map(len, self._rows)) >= COMMIT_ROWS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._table.append(pa.concat_tables(self._rows))
        self._failures.save()
        self._rows, self._since = [], time.monotonic()
