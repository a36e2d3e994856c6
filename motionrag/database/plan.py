"""What a listing asks for, compared with the table: what is new, changed, moved or stored already.

Files are looked at and, where size or time differ from what is stored, hashed; no video is decoded and nothing is
written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from motionrag.database.failures import FailureLog
from motionrag.database.metadata import fitted, metadata_columns, metadata_fields, own_metadata
from motionrag.database.schema import clip_id, content_hash
from motionrag.database.sources import Failure, Listing
from motionrag.database.table import ClipTable
from motionrag.video import Clip


@dataclass(frozen=True)
class SourceFile:
    """A video file as it is now."""

    size: int
    mtime_ns: int
    content: str


@dataclass(frozen=True)
class Job:
    """A clip to store, with its place in the listing."""

    position: int
    clip: Clip
    id: str
    file: SourceFile


@dataclass
class Plan:
    """What a listing asks for.

    Attributes:
        jobs: Clips to decode, in the order of the listing.
        rewritten: Stored clips whose words or path changed.
        touched: Stored clips whose file has another time and the same content.
        superseded: File → ids of the rows that were made from an older content of it.
        unchanged: Number of clips that are stored as they are.
        failed: Clips that cannot be used, and why.
        unreadable: Files that cannot be read now; what is stored of them is kept.
    """

    jobs: list[Job] = field(default_factory=list)
    rewritten: list[Job] = field(default_factory=list)
    touched: list[Job] = field(default_factory=list)
    superseded: dict[str, list[str]] = field(default_factory=dict)
    unchanged: int = 0
    failed: list[Failure] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)


def compare(listing: Listing, table: ClipTable, failures: FailureLog) -> Plan:
    """Make the plan.

    Args:
        listing: Clips in order.
        table: What is stored.
        failures: Files that failed before; they are not tried again until they change.

    Returns:
        The plan.
    """
    plan = Plan(failed=list(listing.failures))
    metadata = metadata_columns(table.schema)
    words = ["caption", "licence", "source", *metadata]
    stored = table.scan(["id", "uri", "content", "file_size", "file_mtime_ns", *words])
    files = _inspect_all(listing, stored, plan)
    jobs = [
        Job(position, clip, clip_id(files[clip.uri].content, clip), files[clip.uri])
        for position, clip in enumerate(listing.clips)
        if clip.uri in files
    ]
    rows = {row["id"]: row for row in _rows_with("id", {job.id for job in jobs}, stored)}

    wanted: dict[str, Job] = {}  # one content under two names is stored once: under the name that it has, or the first
    for job in jobs:
        if job.id not in wanted or (job.id in rows and rows[job.id]["uri"] == job.clip.uri):
            wanted[job.id] = job
    plan.unchanged = len(jobs) - len(wanted)
    for job in wanted.values():
        if job.id in rows:
            job = replace(job, clip=_completed(job.clip, rows[job.id], metadata))
        if job.id not in rows:
            reason = failures.find(job.clip.uri, job.clip.start_s, job.clip.end_s, job.file.size, job.file.mtime_ns)
            if reason is None:
                plan.jobs.append(job)
            else:
                plan.unreadable.add(job.clip.uri)
                plan.failed.append(
                    Failure(
                        job.clip.uri, f"{reason} (tried before; skipped until the file changes, or with retry_failed)"
                    )
                )
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


def new_columns(plan: Plan, table: ClipTable) -> list[pa.Field]:
    """Columns that the clips' metadata needs and the table lacks.

    Args:
        plan: What is to be stored.
        table: What there is.

    Returns:
        Nullable fields.

    Raises:
        ValueError: If metadata does not fit the type of a column that exists.
    """
    return metadata_fields((own_metadata(job.clip) for job in (*plan.jobs, *plan.rewritten)), table.schema)


def _rows_with(column: str, values: set[str], stored: pa.Table) -> list[dict[str, Any]]:
    """Rows whose column has one of these values; the others never become Python objects."""
    return stored.filter(pc.is_in(stored[column], pa.array(list(values), pa.string()))).to_pylist()


def _inspect_all(listing: Listing, stored: pa.Table, plan: Plan) -> dict[str, SourceFile]:
    """Every listed file as it is now; one that cannot be read is listed as failed instead."""
    known: dict[str, list[dict[str, Any]]] = {}
    states = stored.select(["uri", "content", "file_size", "file_mtime_ns"])
    for row in _rows_with("uri", {clip.uri for clip in listing.clips}, states):
        known.setdefault(row["uri"], []).append(row)
    files: dict[str, SourceFile] = {}
    for uri in dict.fromkeys(clip.uri for clip in listing.clips):
        try:
            files[uri] = _inspect(uri, known.get(uri, []))
        except OSError as error:
            plan.failed.append(Failure(uri, f"it cannot be read: {error.strerror}"))
    return files


def _inspect(uri: str, rows: Sequence[Mapping[str, Any]]) -> SourceFile:
    """The file as it is now; its bytes are read only if size or time differ from what is stored."""
    stat = Path(uri).stat()
    for row in rows:
        if (row["file_size"], row["file_mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return SourceFile(stat.st_size, stat.st_mtime_ns, row["content"])
    return SourceFile(stat.st_size, stat.st_mtime_ns, content_hash(uri))


def _completed(clip: Clip, row: Mapping[str, Any], metadata: Sequence[str]) -> Clip:
    """What a source does not state stays as it is stored: indexing again without captions erases none."""
    stored = {name: row[name] for name in metadata if row[name] is not None}
    return replace(
        clip,
        caption=clip.caption or row["caption"],
        licence=clip.licence or row["licence"],
        source=clip.source or row["source"],
        metadata={**stored, **own_metadata(clip)},
    )


def _differs(row: Mapping[str, Any], job: Job, files: Mapping[str, SourceFile], schema: pa.Schema) -> bool:
    """Whether a stored clip has other words now, or its file another name."""
    if row["uri"] != job.clip.uri:
        # A copy changes nothing, but a file that moved takes its row along, also to where another one was.
        return files[row["uri"]].content != row["content"] if row["uri"] in files else not Path(row["uri"]).exists()
    stored = {name: row[name] for name in metadata_columns(schema) if row[name] is not None}
    words = (job.clip.caption, job.clip.licence, job.clip.source, fitted(own_metadata(job.clip), schema))
    return (row["caption"], row["licence"], row["source"], stored) != words
