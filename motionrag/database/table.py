"""The clip table: rows in a versioned Lance dataset, the source of truth of a database.

Every commit is made durable before it is reported, and opening falls back to the newest version that can be read.
Rows are identified by `id`, 32 ASCII characters. Knows nothing of what the columns mean, and nothing of indexes.
Writing methods expect the caller to hold the database's `writer_lock`; reading needs no lock, and sees the version
that was opened until `refresh`. Reading is safe from several threads, also while one of them writes.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from motionrag.database import recovery
from motionrag.database.durable import fsync_folder
from motionrag.database.keys import ROW_KEY, IdLookup
from motionrag.database.ledger import Ledger, files
from motionrag.database.lock import DatabaseLocked, writer_lock

logger = logging.getLogger(__name__)

# Pinned, so that an upgrade of Lance does not silently change what is written.
STORAGE_VERSION: Literal["2.1"] = "2.1"
# About 1.7 GB a file at 104 kB a clip. Lance's own default is a million rows.
ROWS_PER_FILE = 16_384
ID_LENGTH = 32
_VERIFY_BATCH_ROWS = 1024


class MissingRows(KeyError):
    """Some ids are not in the table; the message names them."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the message quoted


class ClipTable:
    """Rows of a Lance dataset, by id or in storage order. Made by `create` or `open`.

    Args:
        path: the Lance folder.
        dataset: an opened `lance.LanceDataset`.
        ledger: the folder's ledger.

    Attributes:
        recovered: a sentence for each newer version that could not be read when the table was opened.
    """

    def __init__(self, path: Path, dataset: Any, ledger: Ledger) -> None:
        self.path = path
        self.recovered: list[str] = []
        self._ledger = ledger
        self._damaged: list[recovery.Damage] = []
        self._snapshot = _Snapshot(dataset)

    @classmethod
    def create(cls, path: Path, schema: pa.Schema) -> "ClipTable":
        """Create an empty table.

        Args:
            path: the Lance folder to make; its parent must exist.
            schema: the columns, with a non-nullable string column `id`.

        Returns:
            The table.

        Raises:
            FileExistsError: something is at `path` already.
            ValueError: the schema has no proper `id`.
        """
        import lance

        if path.exists():
            raise FileExistsError(f"{path} exists already; open it, or remove it first")
        if "id" not in schema.names or schema.field("id") != pa.field("id", pa.string(), nullable=False):
            raise ValueError(f"{path}: the schema needs a non-nullable string column 'id'")
        lance.write_dataset(
            schema.empty_table(),
            str(path),
            mode="create",
            data_storage_version=STORAGE_VERSION,
            enable_v2_manifest_paths=True,
        )
        ledger = Ledger(path)
        ledger.record()
        return cls(path, recovery.open_newest(path, ledger)[0], ledger)

    @classmethod
    def open(cls, path: Path) -> "ClipTable":
        """Open the newest version that can be read.

        If newer ones cannot, that is logged and kept in `recovered`, and their manifests are moved to `_quarantine`
        beside the table: at once where nobody is writing and the disk can be written to, else by the next write
        through this object.

        Args:
            path: the Lance folder.

        Returns:
            The table.

        Raises:
            FileNotFoundError: there is no table at `path`.
            OSError: no version can be read.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: there is no clip table here")
        ledger = Ledger(path)
        dataset, damaged = recovery.open_newest(path, ledger)
        table = cls(path, dataset, ledger)
        table._note(damaged)
        if damaged:
            try:
                with writer_lock(path.parent):
                    table._set_aside()
            except (DatabaseLocked, OSError) as error:  # a writer at work, or a disk that takes no writing
                logger.warning("%s: the unreadable version is left where it is: %s", path, error)
        return table

    @property
    def version(self) -> int:
        """Number of the version being read; numbers of versions lost to damage are used again."""
        return self._snapshot.dataset.version

    @property
    def schema(self) -> pa.Schema:
        """Columns of the version being read."""
        return self._snapshot.dataset.schema

    def count(self, where: str | None = None) -> int:
        """Count the rows, or those that meet an SQL condition.

        Args:
            where: for example `licence = 'CC0' AND end_s - start_s > 2`.

        Returns:
            The number of rows.

        Raises:
            ValueError: the condition cannot be understood.
        """
        with self._explained(where):
            return self._snapshot.dataset.count_rows(_whole(where))

    def scan(self, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """Read columns of all rows, or of those that meet an SQL condition, in storage order.

        Args:
            columns: names; all when None.
            where: as for `count`.

        Returns:
            The rows, the columns in the order asked.

        Raises:
            ValueError: no such column, or the condition cannot be understood.
        """
        self._require_columns(columns)
        with self._explained(where):
            return self._snapshot.dataset.to_table(columns=_list(columns), filter=_whole(where))

    def take(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows with these ids, in this order; an id may come twice.

        Args:
            ids: row ids.
            columns: names; all when None.

        Returns:
            One row for each id.

        Raises:
            MissingRows: an id is not in the table (it is a KeyError).
            ValueError: no such column.
        """
        self._require_columns(columns)
        snapshot = self._snapshot
        offsets, order = np.unique(snapshot.offsets(ids), return_inverse=True)
        return snapshot.dataset.take(offsets.tolist(), columns=_list(columns)).take(pa.array(order))

    def keys(self) -> np.ndarray:
        """Identity of every row in storage order, for a `VectorIndex`: (n,) of `ROW_KEY`.

        Returns:
            The ids and revisions; a table without an int32 column `revision` has revision 0 everywhere.
        """
        return self._snapshot.keys

    def refresh(self) -> None:
        """Move to the newest version; a version that cannot be read is passed over, as in `open`."""
        if _stamp(next(iter(recovery.manifests(self.path).values()), None)) != self._snapshot.stamp:
            self._ledger = Ledger(self.path)
            dataset, damaged = recovery.open_newest(self.path, self._ledger)
            self._snapshot = _Snapshot(dataset)
            self._note(damaged)

    def append(self, rows: pa.Table) -> None:
        """Add rows in one commit.

        Args:
            rows: exactly the table's columns, in any order; ids that the table does not hold yet. Only the batch is
                searched for repeated ids, since searching the table would cost time in every commit: use `upsert`
                when in doubt.

        Raises:
            ValueError: other columns, repeated or malformed ids, nulls or numbers that are not finite.
        """
        import lance

        rows = self._checked(rows)
        if rows.num_rows:
            self._commit(
                lambda dataset: lance.write_dataset(
                    rows, dataset, mode="append", max_rows_per_file=ROWS_PER_FILE, data_storage_version=STORAGE_VERSION
                )
            )

    def upsert(self, rows: pa.Table, on: str = "id") -> None:
        """Replace the rows whose `on` is stored already, and add the others, in one commit.

        Args:
            rows: exactly the table's columns, in any order, no two with the same `on`.
            on: the column that tells rows apart.

        Raises:
            ValueError: as for `append`.
        """
        rows = self._checked(rows, on)
        if rows.num_rows:
            self._commit(
                lambda dataset: (
                    dataset.merge_insert(on).when_matched_update_all().when_not_matched_insert_all().execute(rows)
                )
            )

    def delete(self, where: str) -> int:
        """Remove the rows that meet an SQL condition.

        Args:
            where: as for `count`.

        Returns:
            The number of rows removed.

        Raises:
            ValueError: the condition cannot be understood.
        """
        self.refresh()
        number = self.count(where)
        if number:
            self._commit(lambda dataset: dataset.delete(_whole(where)))
        return number

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add columns that are null in every row; nothing is rewritten.

        Args:
            fields: nullable fields with new names.

        Raises:
            ValueError: a field is not nullable, or its name is taken.
        """
        self.refresh()
        for field in fields:
            if not field.nullable:
                raise ValueError(f"{self.path}: new column '{field.name}' must be nullable")
            if field.name in self.schema.names:
                raise ValueError(f"{self.path}: there is a column '{field.name}' already")
        if fields:
            self._commit(lambda dataset: dataset.add_columns(list(fields)))

    def compact(self) -> None:
        """Join small files and leave out deleted rows; the old files stay until `collect_garbage`."""
        self._commit(lambda dataset: dataset.optimize.compact_files(target_rows_per_fragment=ROWS_PER_FILE))

    def collect_garbage(self, dry_run: bool = False) -> list[str]:
        """Remove old versions and what killed writes left behind.

        Readers that still have an older version open lose it: they must `refresh`. So does `_quarantine`: the rows
        of versions set aside cannot be restored by hand afterwards.

        Args:
            dry_run: only list.

        Returns:
            Names of the files removed (or to be removed), relative to the table.
        """
        self.refresh()
        if not dry_run:
            self._set_aside()
            self._ledger.record()
        tracked = self._snapshot.dataset.tracked_files(min_version=self.version).read_all()
        kept = set(tracked["path"].to_pylist())
        # Manifests first: killed half-way, this leaves files that no version names, never a version without its files.
        garbage = sorted(set(files(self.path)) - kept, key=lambda name: (not name.startswith("_versions/"), name))
        if garbage and not dry_run:
            for name in garbage:
                (self.path / name).unlink()
            for folder in {(self.path / name).parent for name in garbage}:
                fsync_folder(folder)
            self._ledger.forget(garbage)
        return garbage

    def verify(self, deep: bool = False) -> list[str]:
        """Look for damage and for rows that break the table's rules, in batches.

        Args:
            deep: also compare every file with its checksum, and read the vectors and tokens; takes as long as reading
                the whole table twice.

        Returns:
            Findings as sentences; empty when there are none.
        """
        findings = self._file_findings() if deep else []
        columns = [field.name for field in self.schema if deep or not _is_vector(field.type)]
        seen: list[np.ndarray] = []

        def read() -> None:
            batches = self._snapshot.dataset.to_batches(columns=columns, batch_size=_VERIFY_BATCH_ROWS)
            for batch in batches:
                findings.extend(f"{self.path}: {fault}" for fault in _value_faults(batch, self.schema))
                seen.append(fixed_width_ids(batch.column("id")))

        reason = recovery.attempt(read)[1]
        if reason:
            findings.append(f"{self.path}: rows cannot be read: {reason}")
        ids, counts = np.unique(np.concatenate([*seen, np.empty(0, ROW_KEY["id"])]), return_counts=True)
        findings += [f"{self.path}: id {row.decode()} is stored {n} times" for row, n in _repeated(ids, counts)]
        return findings

    def _file_findings(self) -> list[str]:
        faults = ((name, self._ledger.fault(name)) for name in sorted(self._ledger.digests))
        return [f"{self.path / name} {fault}" for name, fault in faults if fault]

    def _commit(self, action: Callable[[Any], object]) -> None:
        """Commit once, make it durable, and move to the new version.

        The commit runs on a handle of its own, so that readers in other threads keep their version. An error from a
        commit does not say whether it took place; only this process writes, so a newer version means that it did.
        """
        self.refresh()
        self._set_aside()
        handle = recovery.open_version(self.path, self.version)
        try:
            action(handle)
        except Exception as error:
            if next(iter(recovery.manifests(self.path))) <= self.version:
                raise
            logger.warning("%s: the commit is in place although it reported: %s", self.path, error)
        self._ledger.record()
        self.refresh()
        if self._damaged:
            raise OSError(f"{self.path}: what was just written cannot be read back ({self._damaged[0].reason})")

    def _note(self, damaged: list[recovery.Damage]) -> None:
        """Remember and log the versions that were passed over."""
        self._damaged = damaged
        for damage in damaged:
            sentence = (
                f"{self.path}: version {damage.version} cannot be read ({damage.reason}); "
                f"fell back to version {self.version}"
            )
            if sentence not in self.recovered:
                self.recovered.append(sentence)
                logger.warning(sentence)

    def _set_aside(self) -> None:
        """Move the manifests of unreadable versions away: Lance would build the next commit on them."""
        if self._damaged:
            recovery.quarantine(self._damaged, self._ledger)
            self._damaged = []

    def _checked(self, rows: pa.Table, unique: str = "id") -> pa.Table:
        """Put columns in the table's order and types, and refuse what must not be stored."""
        missing = set(self.schema.names) - set(rows.column_names)
        unknown = set(rows.column_names) - set(self.schema.names)
        if missing or unknown or len(set(rows.column_names)) < rows.num_columns:
            raise ValueError(
                f"{self.path}: rows need exactly the table's columns; missing: {sorted(missing) or 'none'}, "
                f"unknown: {sorted(unknown) or 'none'}"
            )
        plain = pa.schema([field.with_nullable(True) for field in self.schema])
        rows = rows.select(self.schema.names).cast(plain)  # nulls are reported below, with their column
        faults = [fault for batch in rows.to_batches() for fault in _value_faults(batch, self.schema)]
        if faults:
            raise ValueError(f"{self.path}: {faults[0]}")
        counts = rows[unique].value_counts()
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise ValueError(f"{self.path}: {unique} {repeated[0]['values']} comes more than once in the rows")
        return rows.cast(self.schema)

    def _require_columns(self, columns: Sequence[str] | None) -> None:
        unknown = set(columns or ()) - set(self.schema.names)
        if unknown:
            raise ValueError(f"{self.path}: no column {sorted(unknown)}; there are {', '.join(self.schema.names)}")

    @contextmanager
    def _explained(self, where: str | None) -> Iterator[None]:
        """Turn Lance's error about a condition into a sentence that lists the columns."""
        try:
            yield
        except (OSError, ValueError) as error:
            if where is None or "Invalid user input" not in str(error):
                raise
            detail = str(error).partition("Invalid user input: ")[2].partition(", /")[0]
            raise ValueError(
                f"{self.path}: the condition {where!r} cannot be used ({detail}); "
                f"the columns are {', '.join(self.schema.names)}"
            ) from error


class _Snapshot:
    """One version of the table, with what is computed from its ids once."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.stamp = _stamp(recovery.manifests(Path(dataset.uri)).get(dataset.version))

    @cached_property
    def keys(self) -> np.ndarray:
        columns = ["id", "revision"] if "revision" in self.dataset.schema.names else ["id"]
        rows = self.dataset.to_table(columns=columns)
        keys = np.zeros(rows.num_rows, ROW_KEY)
        keys["id"] = fixed_width_ids(rows["id"])
        if "revision" in rows.column_names:
            keys["revision"] = rows["revision"].to_numpy()
        return keys

    @cached_property
    def _lookup(self) -> IdLookup:
        return IdLookup(self.keys["id"])

    def offsets(self, ids: Sequence[str]) -> np.ndarray:
        """Positions of ids in storage order: (n,) int64; MissingRows names those that are not in this version."""
        offsets = self._lookup.positions(np.array([row.encode() for row in ids], ROW_KEY["id"]))
        # A longer id is cut by numpy, perhaps to a stored one.
        absent = [row for row, offset in zip(ids, offsets, strict=True) if offset < 0 or len(row) != ID_LENGTH]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise MissingRows(f"{self.dataset.uri}: no row with id {', '.join(absent[:3])}{more}")
        return offsets


def _stamp(manifest: Path | None) -> tuple[str, int, int] | str:
    """Tell a version from a lost one of the same number; a manifest that was collected meanwhile has no stamp."""
    try:
        status = manifest.stat() if manifest else None
    except FileNotFoundError:
        status = None
    return (manifest.name, status.st_ino, status.st_mtime_ns) if manifest and status else "collected"


def _whole(where: str | None) -> str | None:
    """A condition in brackets: Lance ignores in silence what follows the first expression, as in `a = 1 nonsense`."""
    return None if where is None else f"({where})"


def _list(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else list(columns)


def fixed_width_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Turn a column of ids into an array, five times as fast as by way of Python strings.

    Args:
        ids: strings of 32 ASCII characters, none null.

    Returns:
        (n,) of bytes, `S32`.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    flat = ids.cast(pa.binary()).cast(pa.binary(ID_LENGTH))
    return np.frombuffer(flat.buffers()[1], ROW_KEY["id"], len(flat), flat.offset * ID_LENGTH)


def _is_vector(data_type: pa.DataType) -> bool:
    return pa.types.is_nested(data_type)


def _repeated(ids: np.ndarray, counts: np.ndarray) -> Iterator[tuple[bytes, int]]:
    return ((row, n) for row, n in zip(ids, counts, strict=True) if n > 1)


def _value_faults(batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[str]:
    """Describe, per column, ids of the wrong length, nulls where none may be, and vector values that are not finite."""
    names = batch.column("id").to_pylist()
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count and not schema.field(name).nullable:
            yield f"column '{name}' is null in row {names[pc.index(column.is_null(), True).as_py()]}"
        elif name == "id":
            wrong = [row for row in names if len(row.encode()) != ID_LENGTH]
            if wrong:
                yield f"id '{wrong[0]}' is not {ID_LENGTH} ASCII characters"
        elif pa.types.is_fixed_size_list(column.type) and (row := _first_non_finite(column)) is not None:
            yield f"column '{name}' has values that are not finite in row {names[row]}"


def _first_non_finite(column: pa.FixedSizeListArray) -> int | None:
    """Row of the first NaN or infinity in a column of (nested) fixed-size lists of floats, or None."""
    values, per_row = column, 1
    rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    while pa.types.is_fixed_size_list(values.type):
        per_row *= values.type.list_size
        values = values.flatten()
    if not pa.types.is_floating(values.type) or per_row == 0:
        return None
    wrong = ~np.isfinite(values.to_numpy(zero_copy_only=False))
    return int(rows[wrong.argmax() // per_row]) if wrong.any() else None
