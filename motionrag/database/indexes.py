"""The FAISS indexes of a database, kept true to its table: loaded, brought up to date, rebuilt when in doubt."""

import logging
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from motionrag.database import index_file
from motionrag.database.faiss_kinds import faiss_module
from motionrag.database.index import VectorIndex
from motionrag.database.lock import DatabaseLocked, writer_lock
from motionrag.database.manifest import Manifest
from motionrag.database.schema import embedding_column, to_numpy
from motionrag.database.table import ClipTable

logger = logging.getLogger(__name__)

_SPOT_CHECKS = 4


class RetrievalIndexes:
    """One index for each retrieval key.

    Methods take the table as it is to be read; a search passes a table that no writer moves on meanwhile.

    Args:
        folder: The database.
        manifest: Its settings.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        # Key → the keys of the table it is true to, by identity (numbers of lost versions are used again), and index.
        self._indexes: dict[str, tuple[np.ndarray, VectorIndex]] = {}
        self._on_disk: dict[str, VectorIndex] = {}  # what was last read or written

    def get(self, key: str, table: ClipTable, *, holds_lock: bool = False) -> VectorIndex:
        """Load or build an index, sync it with the table, and store it if it differs from what is on disk.

        Args:
            key: "text", "image" or "motion".
            table: What it must be true to.
            holds_lock: Whether the caller is the writer. A reader that cannot become one for a moment, or may not
                write here, keeps the index in memory.

        Returns:
            The index; an immutable snapshot.
        """
        table_keys, index = self._indexes.get(key, (None, None))
        is_new = table_keys is not table.keys()
        if index is None or is_new:
            index = self._brought_up_to_date(key, self._from_disk(key) if index is None else index, table)
            self._indexes[key] = (table.keys(), index)
        # What another thread of this process could not store for want of the lock, the writer stores.
        if (is_new or holds_lock) and index is not self._on_disk.get(key):
            self._store(key, index, table.version, holds_lock=holds_lock)
        return index

    def findings(self, key: str, table: ClipTable) -> list[str]:
        """Compare the stored index with the table.

        Args:
            key: Which one.
            table: What it must be true to.

        Returns:
            One sentence for each fault; empty if all is well.
        """
        fault = self._fault_on_disk(key, table)
        if fault is not None:  # not to be hidden from the next search by what is in memory
            self._indexes.pop(key, None)
            self._on_disk.pop(key, None)
        return [] if fault is None else [f"index {key!r} {fault}"]

    def info(self) -> dict[str, dict[str, object]]:
        """Kind of every index that is in use.

        Returns:
            Key → factory string, whether it is exact, and its measured recall.
        """
        return {
            key: {"factory": index.factory, "exact": index.is_exact, "recall": index.recall}
            for key, (_, index) in self._indexes.items()
        }

    def _brought_up_to_date(self, key: str, index: VectorIndex | None, table: ClipTable) -> VectorIndex:
        factory = self._manifest.index_factory
        if factory is not None:
            try:
                return self._true_to(key, index, table, factory)
            except ValueError as error:  # such as too few rows to train it on
                logger.warning("%s: index %r is chosen by size: %s", self._folder, key, error)
        return self._true_to(key, index, table, None)

    def _true_to(self, key: str, index: VectorIndex | None, table: ClipTable, factory: str | None) -> VectorIndex:
        keys = _row_keys(key, table)
        if index is not None:
            synced, _ = index.synced(keys, lambda rows: self._vectors(key, keys[rows], table), factory)
            if self._holds_vectors_of_table(key, synced, table):
                return synced
            logger.warning("%s: index %r holds other vectors than the table; building it anew", self._folder, key)
        return VectorIndex.build(self._vectors(key, keys, table), keys, factory)

    def _fault_on_disk(self, key: str, table: ClipTable) -> str | None:
        keys = _row_keys(key, table)
        try:
            index = self._load(key)
        except index_file.IndexUnusable as error:
            return f"cannot be used: {error}; the next search rebuilds it" if len(keys) else None
        if not np.array_equal(np.sort(index.keys[index.alive]), np.sort(keys)):
            return "is not up to date with the table; the next search brings it up to date"
        if not self._holds_vectors_of_table(key, index, table, everywhere=True):
            return "holds other vectors than the table; the next search rebuilds it"
        return None

    def _from_disk(self, key: str) -> VectorIndex | None:
        try:
            self._on_disk[key] = self._load(key)
            return self._on_disk[key]
        except index_file.IndexUnusable as error:
            # A new database has no indexes yet: nothing to warn of.
            level = logging.WARNING if (self._folder / "index" / f"{key}.json").exists() else logging.DEBUG
            logger.log(level, "%s; building the index from the table", error)
            return None

    def _load(self, key: str) -> VectorIndex:
        try:
            return index_file.load(
                self._folder / "index",
                key,
                database_id=self._manifest.database_id,
                dimension=self._manifest.embedding_dims[key],
            )
        except OSError as error:  # such as a disk that cannot be read there
            raise index_file.IndexUnusable(str(error)) from error

    def _store(self, key: str, index: VectorIndex, table_version: int, *, holds_lock: bool) -> None:
        if not holds_lock:
            try:
                with writer_lock(self._folder):
                    if not self._is_newer_on_disk(key, table_version):
                        self._store(key, index, table_version, holds_lock=True)
            except (DatabaseLocked, OSError) as error:  # such as a read-only or a full disk
                logger.info("%s: index %r stays in memory: %s", self._folder, key, error)
            return
        index_file.save(
            index, self._folder / "index", key, database_id=self._manifest.database_id, table_version=table_version
        )
        self._on_disk[key] = index

    def _is_newer_on_disk(self, key: str, table_version: int) -> bool:
        """Whether the stored index is usable and of a later version than the one that this reader has open."""
        try:
            self._load(key)
            return index_file.read_sidecar(self._folder / "index", key).table_version > table_version
        except index_file.IndexUnusable:
            return False

    def _holds_vectors_of_table(
        self, key: str, index: VectorIndex, table: ClipTable, *, everywhere: bool = False
    ) -> bool:
        positions = np.flatnonzero(index.alive)
        if not everywhere:
            positions = positions[:: max(1, len(positions) // _SPOT_CHECKS)][:_SPOT_CHECKS]
        return index.spot_check(positions, self._vectors(key, index.keys[positions], table))

    def _vectors(self, key: str, keys: np.ndarray, table: ClipTable) -> np.ndarray:
        """Embeddings of rows, `(n d)`."""
        column = embedding_column(key)
        if not len(keys):
            return np.empty((0, self._manifest.embedding_dims[key]), np.float32)
        if np.array_equal(keys["id"], table.keys()["id"]):  # all rows in order: no need to pick
            return to_numpy(table.scan([column])[column]).astype(np.float32)
        return to_numpy(table.take([id_.decode() for id_ in keys["id"]], [column])[column]).astype(np.float32)


def require_factory(factory: str, dimension: int) -> None:
    """Refuse a factory string that FAISS cannot read.

    Args:
        factory: FAISS factory string.
        dimension: Width of the vectors.

    Raises:
        ValueError: If there is no such index of this width.
    """
    faiss = faiss_module()
    try:
        faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot make an index of {factory!r} in {dimension} dimensions: {error}") from None


def _row_keys(key: str, table: ClipTable) -> np.ndarray:
    """Rows that an index holds: all, but for text only those with a caption."""
    if key != "text":
        return table.keys()
    return table.keys()[pc.not_equal(table.scan(["caption"])["caption"], "").to_numpy()]
