"""The FAISS indexes of a database, kept true to its table: loaded, brought up to date, rebuilt when in doubt."""

import logging
from pathlib import Path

import numpy as np

from motionrag.database import index_file
from motionrag.database.index import VectorIndex
from motionrag.database.lock import DatabaseLocked, writer_lock
from motionrag.database.manifest import Manifest
from motionrag.database.schema import embedding_column, to_numpy
from motionrag.database.table import ClipTable

logger = logging.getLogger(__name__)

_SPOT_CHECKS = 4


class RetrievalIndexes:
    """One index for each retrieval key.

    Args:
        folder: The database.
        manifest: Its settings.
        table: Its rows; the indexes follow the version that it reads.
    """

    def __init__(self, folder: Path, manifest: Manifest, table: ClipTable) -> None:
        self._folder = folder
        self._manifest = manifest
        self._table = table
        self._indexes: dict[str, tuple[int, VectorIndex]] = {}  # key → table version, index

    def get(self, key: str) -> VectorIndex:
        """An index that is true to the table; it is an immutable snapshot.

        Args:
            key: "text", "image" or "motion".

        Returns:
            The index.
        """
        cached = self._indexes.get(key)
        if cached is None or cached[0] != self._table.version:
            self.bring_up_to_date(key, holds_lock=False)
        return self._indexes[key][1]

    def bring_up_to_date(self, key: str, *, holds_lock: bool) -> None:
        """Load or build an index, sync it with the table, and store it if it differs from what is on disk.

        Args:
            key: Which one.
            holds_lock: Whether the caller is the writer. A reader that cannot become one for a moment, or may not
                write here, keeps the index in memory.
        """
        keys, factory = self._row_keys(key), self._manifest.index_factory
        index, outcome = self._from_disk(key), "rebuilt"
        if index is not None:
            index, outcome = index.synced(keys, lambda rows: self._vectors(key, keys[rows]), factory)
            if not self._holds_vectors_of_table(key, index):
                logger.warning("%s: index %r holds other vectors than the table; building it anew", self._folder, key)
                index = None
        if index is None:
            index, outcome = VectorIndex.build(self._vectors(key, keys), keys, factory), "rebuilt"
        self._indexes[key] = (self._table.version, index)
        if outcome != "unchanged":
            self._store(key, index, holds_lock=holds_lock)

    def findings(self, key: str) -> list[str]:
        """Compare the stored index with the table.

        Args:
            key: Which one.

        Returns:
            One sentence for each fault; empty if all is well.
        """
        try:
            index = self._load(key)
        except index_file.IndexUnusable as error:
            return [f"index {key!r}: {error}; the next search rebuilds it"] if self._table.count() else []
        if not np.array_equal(np.sort(index.keys[index.alive]), np.sort(self._row_keys(key))):
            return [f"index {key!r} is not up to date with the table; the next search brings it up to date"]
        if not self._holds_vectors_of_table(key, index, everywhere=True):
            return [f"index {key!r} holds other vectors than the table; the next search rebuilds it"]
        return []

    def info(self) -> dict[str, dict[str, object]]:
        """Kind of every index that is in use.

        Returns:
            Key → factory string, whether it is exact, and its measured recall.
        """
        return {
            key: {"factory": index.factory, "exact": index.is_exact, "recall": index.recall}
            for key, (_, index) in self._indexes.items()
        }

    def _from_disk(self, key: str) -> VectorIndex | None:
        if key in self._indexes:
            return self._indexes[key][1]
        try:
            return self._load(key)
        except index_file.IndexUnusable as error:
            # A new database has no indexes yet: nothing to warn of.
            level = logging.WARNING if (self._folder / "index" / f"{key}.json").exists() else logging.DEBUG
            logger.log(level, "%s; building the index from the table", error)
            return None

    def _load(self, key: str) -> VectorIndex:
        return index_file.load(
            self._folder / "index",
            key,
            database_id=self._manifest.database_id,
            dimension=self._manifest.embedding_dims[key],
        )

    def _store(self, key: str, index: VectorIndex, *, holds_lock: bool) -> None:
        if not holds_lock:
            try:
                with writer_lock(self._folder):
                    self._store(key, index, holds_lock=True)
            except (DatabaseLocked, PermissionError) as error:
                logger.info("%s: index %r stays in memory: %s", self._folder, key, error)
            return
        index_file.save(
            index,
            self._folder / "index",
            key,
            database_id=self._manifest.database_id,
            table_version=self._table.version,
        )

    def _row_keys(self, key: str) -> np.ndarray:
        """Rows that an index holds: all, but for text only those with a caption."""
        keys = self._table.keys()
        if key != "text":
            return keys
        captions = self._table.scan(["caption"])["caption"].to_numpy()
        return keys[captions.astype(bool)]

    def _holds_vectors_of_table(self, key: str, index: VectorIndex, *, everywhere: bool = False) -> bool:
        positions = np.flatnonzero(index.alive)
        if not everywhere:
            positions = positions[:: max(1, len(positions) // _SPOT_CHECKS)][:_SPOT_CHECKS]
        return index.spot_check(positions, self._vectors(key, index.keys[positions]))

    def _vectors(self, key: str, keys: np.ndarray) -> np.ndarray:
        """Embeddings of rows, `(n d)`."""
        column = embedding_column(key)
        if not len(keys):
            return np.empty((0, self._manifest.embedding_dims[key]), np.float32)
        if np.array_equal(keys["id"], self._table.keys()["id"]):  # all rows in order: no need to pick
            return to_numpy(self._table.scan([column])[column]).astype(np.float32)
        return to_numpy(self._table.take([id_.decode() for id_ in keys["id"]], [column])[column]).astype(np.float32)
