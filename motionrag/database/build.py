"""Indexing: from a listing of clips to committed rows. One machine, decoding in worker processes.

plan    what is new, what changed, what is stored already (no video is decoded)
decode  16 frames of each new clip, in killable workers, in the order of the listing
encode  in batches that follow the listing, so that a run that was killed and continued gives the same numbers
commit  hundreds of rows at a time; what was committed survives anything

The caller holds the writer lock.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from motionrag.database.failures import FailureLog
from motionrag.database.plan import Job, Plan, compare, new_columns
from motionrag.database.rows import new_rows, rewritten_rows
from motionrag.database.schema import quoted
from motionrag.database.sources import Failure, Listing
from motionrag.database.table import ClipTable
from motionrag.decoding import decode_clips, read_clip_in_worker
from motionrag.encoder import MotionEncoder
from motionrag.video import DecodedClip, VideoError

ENCODE_BATCH = 8  # clips; encoding batches follow the listing, see the module's head
COMMIT_ROWS = 256
COMMIT_SECONDS = 30.0  # slow encoders commit smaller batches, so that a kill costs little


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
    plan = compare(listing, table, failures)
    new_columns(plan, table)
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
    plan = compare(listing, table, failures)
    if strict and plan.failed:
        raise IndexingStopped(f"{plan.failed[0].uri}: {plan.failed[0].reason}. Nothing was indexed.")
    report = AddReport(convention=listing.convention, unchanged=plan.unchanged, failed=plan.failed)
    table.add_columns(new_columns(plan, table))
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


def _store(
    batches: Iterable[list[tuple[Job, DecodedClip | VideoError]]],
    plan: Plan,
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


def _delete_superseded(plan: Plan, table: ClipTable) -> None:
    ids = [id_ for uri, old in plan.superseded.items() if uri not in plan.unreadable for id_ in old]
    for start in range(0, len(ids), COMMIT_ROWS):
        table.delete(f"id IN ({', '.join(map(quoted, ids[start : start + COMMIT_ROWS]))})")


def _batches(
    jobs: Sequence[Job], results: Iterable[tuple[int, DecodedClip | VideoError]], *, progress: bool
) -> Iterator[list[tuple[Job, DecodedClip | VideoError]]]:
    """Group decoded clips by their place in the listing, never by when they happen to be ready."""
    from tqdm.auto import tqdm

    # disable=None: a bar on a terminal only.
    bar = tqdm(results, total=len(jobs), desc="indexing", unit="clip", disable=None if progress else True)
    pairs = ((jobs[index], result) for index, result in bar)
    for _, batch in groupby(pairs, key=lambda pair: pair[0].position // ENCODE_BATCH):
        yield list(batch)


def _rewrite(jobs: Sequence[Job], table: ClipTable, encoder: MotionEncoder) -> None:
    for start in range(0, len(jobs), COMMIT_ROWS):
        batch = jobs[start : start + COMMIT_ROWS]
        table.upsert(rewritten_rows(batch, table.take([job.id for job in batch]), encoder))


class _Writer:
    """Collects rows and commits them by hundreds, or sooner when encoding is slow."""

    def __init__(self, table: ClipTable, failures: FailureLog) -> None:
        self._table = table
        self._failures = failures
        self._rows: list[pa.Table] = []
        self._since = time.monotonic()

    def add(self, decoded: Sequence[tuple[Job, DecodedClip]], encoder: MotionEncoder) -> None:
        self._rows.append(new_rows(decoded, self._table.schema, encoder))
        for job, _ in decoded:
            self._failures.forget(job.clip.uri, job.clip.start_s, job.clip.end_s)
        self._flush_if_due()

    def add_failure(self, job: Job, reason: str) -> None:
        clip, file = job.clip, job.file
        self._failures.add(clip.uri, clip.start_s, clip.end_s, file.size, file.mtime_ns, reason)
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        if sum(map(len, self._rows)) >= COMMIT_ROWS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._table.append(pa.concat_tables(self._rows))
        self._failures.save()
        self._rows, self._since = [], time.monotonic()
