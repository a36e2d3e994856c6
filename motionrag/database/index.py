"""Nearest vectors: a FAISS index over an array of unit vectors, with the identity of each position beside it.

It is a derived cache of the clip table, and never trusted: `index_file.load` checks everything it can before FAISS
sees the file, and whoever gets an `IndexUnusable` builds the index again. Knows nothing of tables.

A `VectorIndex` never changes. `extended`, `masked` and `synced` return another one, so that a search in one thread is
not disturbed when another thread puts a newer index in its place (FAISS itself allows searches side by side on the CPU,
but not a search beside a change).
"""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
from einops import rearrange

from motionrag.database import faiss_kinds
from motionrag.database.faiss_kinds import faiss_module
from motionrag.database.keys import ROW_KEY, IdLookup

EXACT_UP_TO = 100_000  # vectors; a flat search of 100 k × 512 takes about 10 ms on one core
TARGET_RECALL = 0.98  # of the 9 nearest, on stored vectors; leaves room to 0.95 for queries that are not stored
_RECALL_AT = 9
_RECALL_QUERIES = 400
_REBUILD_MASKED_SHARE = 0.2
# Up to this many allowed vectors are compared one by one, exactly: cheaper than a filtered approximate search.
_COMPARE_ALL_UP_TO = 20_000
_CHUNK_ROWS = 65_536
_NORM_TOLERANCE = 2e-3  # what rounding a unit vector to fp16 can do

Synced = Literal["unchanged", "updated", "rebuilt"]


def default_factory(count: int) -> str:
    """FAISS factory string for a number of vectors.

    Flat (exact) up to 100 000; above, IVF with 2·√n lists, rounded to a power of two so that an index that grows is
    trained again only when it has quadrupled. How many lists a search visits is measured on each index when it is
    built (`VectorIndex.recall`).
    """
    if count <= EXACT_UP_TO:
        return "Flat"
    return f"IVF{2 ** round(np.log2(2 * np.sqrt(count)))},Flat"


class VectorIndex:
    """An immutable index over unit vectors; inner product, best first. Made by `build` or `index_file.load`.

    Args:
        index: a FAISS index, from now on never changed.
        keys: (n,) of `ROW_KEY`.
        factory: FAISS factory string.
        effort: see below.
        recall: see below.

    Attributes:
        keys: (n,) of `ROW_KEY`, one for each position; all zero for removed positions, which no search returns.
        alive: (n,) bool; False for removed positions.
        factory: FAISS factory string it was built with.
        effort: lists visited (IVF) or candidates kept (HNSW) in a search; 0 where the kind has no such setting.
        recall: share of the 9 nearest that a search finds, measured on stored vectors when it was built.
        faiss_index: the FAISS index itself; never change it.
    """

    def __init__(self, index: Any, keys: np.ndarray, *, factory: str, effort: int, recall: float) -> None:
        self.faiss_index = index
        self.keys = keys
        self.alive: np.ndarray = keys["id"] != b""
        self.factory = factory
        self.effort = effort
        self.recall = recall
        self._gpu_lock = threading.Lock()

    @classmethod
    def build(cls, vectors: np.ndarray, keys: np.ndarray, factory: str | None = None) -> "VectorIndex":
        """Train and fill an index, and measure its recall.

        Approximate kinds visit as many lists, or keep as many candidates, as it takes to find 98 % of the 9 nearest of
        400 stored vectors. On queries that are not stored, benchmarks/search.py measured for 200 000 vectors in
        overlapping groups a recall@9 of 0.983 (width 128, 4 of 1024 lists) and 0.981 (width 512, 3 lists). Vectors
        without any structure cannot be indexed: there all lists are visited, and the recall is 1. Queries unlike
        everything stored (text against images) can fall below what was measured.

        Args:
            vectors: (n, d) float32, finite, L2-normalised.
            keys: (n,) of `ROW_KEY`, all different.
            factory: FAISS factory string of a flat, IVF, HNSW, SQ or PQ index, with or without a PCA or OPQ in front;
                by size when None.

        Returns:
            The index.

        Raises:
            ValueError: malformed vectors or keys, or a factory string that FAISS or this class cannot use.
        """
        vectors, keys = _checked(vectors, keys)
        chosen = factory or default_factory(len(vectors))
        index = faiss_kinds.trained(vectors, chosen)
        faiss_kinds.add(index, vectors)
        built = cls(index, keys, factory=chosen, effort=0, recall=1.0)
        built.effort, built.recall = built._calibrated(vectors)
        return built

    def __len__(self) -> int:
        """Positions, removed ones included."""
        return len(self.keys)

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        return int(self.faiss_index.d)

    @property
    def is_exact(self) -> bool:
        """Whether searches compare every vector, unrounded."""
        return isinstance(self.faiss_index, faiss_module().IndexFlat)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest vectors.

        Args:
            queries: (q, d) float, finite.
            k: how many.
            allowed: (n,) bool over positions; all when None. Removed positions are never returned.

        Returns:
            Scores (q, k') float32, descending, and positions (q, k') int64, with k' the smaller of k and the number of
            vectors to choose from. All k' are always found, so that there is nothing to pad.

        Raises:
            ValueError: malformed queries, mask or k.
        """
        queries = self._checked_queries(queries)
        usable = self._usable(allowed)
        available = len(self) if usable is None else int(np.count_nonzero(usable))
        k = min(_positive(k), available)
        if k == 0 or not len(queries):
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        if usable is not None and not self.is_exact and available <= _COMPARE_ALL_UP_TO:
            return self._compare(queries, k, np.flatnonzero(usable))
        scores, positions = self._search(queries, k, usable, self.effort)
        short = (positions < 0).any(axis=1)
        if short.any():  # the lists visited held fewer than k usable vectors
            candidates = np.arange(len(self)) if usable is None else np.flatnonzero(usable)
            scores[short], positions[short] = self._compare(queries[short], k, candidates)
        return scores, positions

    def scores(self, query: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Inner products of one query with the vectors at these positions; an exact index does not copy its vectors.

        Args:
            query: (d,) float.
            positions: (n,) integers.

        Returns:
            (n,) float32, in single precision; of the rounded vectors where the factory rounds them (SQ, PQ, PCA).

        Raises:
            ValueError: malformed query, or a position that is not here.
        """
        queries = self._checked_queries(rearrange(np.asarray(query), "d -> 1 d"))
        positions = self._checked_positions(positions)
        scores = np.empty(len(positions), np.float32)
        if self.is_exact and len(positions):
            pointer = faiss_module().swig_ptr
            self.faiss_index.compute_distance_subset(
                1, pointer(queries), len(positions), pointer(scores), pointer(positions)
            )
            return scores
        for start in range(0, len(positions), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            scores[chunk] = self.vectors(positions[chunk]) @ queries[0]
        return scores

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """Stored vectors, as far as the index keeps them: (n, d) float32."""
        positions = self._checked_positions(positions)
        if not len(positions):
            return np.empty((0, self.dimension), np.float32)
        return self.faiss_index.reconstruct_batch(positions)

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """Positions of rows by id, whatever their revision.

        Args:
            ids: (m,) of bytes, `S32`.

        Returns:
            (m,) int64; −1 for an id that is not here, or was removed.
        """
        found = self._lookup.positions(ids)
        return np.where(found < 0, -1, np.append(np.flatnonzero(self.alive), -1)[found])

    def spot_check(self, positions: np.ndarray, vectors: np.ndarray) -> bool:
        """Tell whether stored vectors are the caller's, up to what the index's kind rounds.

        Args:
            positions: (m,) integers.
            vectors: (m, d) what they should be.

        Returns:
            True if all agree.
        """
        stored = self.vectors(positions)
        if np.shape(vectors) != stored.shape:
            return False
        if faiss_kinds.keeps_vectors(self.faiss_index):
            return bool(np.allclose(stored, vectors, atol=1e-3))
        return bool(np.all(np.sum(stored * vectors, axis=1) > 0.5 * np.linalg.norm(stored, axis=1)))

    def extended(self, vectors: np.ndarray, keys: np.ndarray) -> "VectorIndex":
        """Copy with vectors added at the end.

        Args:
            vectors: (m, d) float32, finite, L2-normalised.
            keys: (m,) of `ROW_KEY`, none of them here already.

        Returns:
            A new index.

        Raises:
            ValueError: malformed vectors or keys.
        """
        vectors, keys = _checked(vectors, keys)
        if vectors.shape[1] != self.dimension:
            raise ValueError(f"vectors have {vectors.shape[1]} components, the index has {self.dimension}")
        index = self._owned_copy()
        faiss_kinds.add(index, vectors)
        return self._with(index, np.concatenate([self.keys, keys]))

    def masked(self, removed: np.ndarray) -> "VectorIndex":
        """Copy without some positions; they keep their place, and no search returns them.

        Args:
            removed: positions or (n,) bool.

        Returns:
            A new index, which shares the vectors with this one.
        """
        keys = self.keys.copy()
        keys[removed] = np.zeros((), ROW_KEY)
        return self._with(self.faiss_index, keys)

    def synced(
        self,
        table_keys: np.ndarray,
        fetch: Callable[[np.ndarray], np.ndarray],
        factory: str | None = None,
    ) -> tuple["VectorIndex", Synced]:
        """Bring the index up to date with a table.

        Rows that are gone or have another revision are masked, new ones are added. It is built anew when more than a
        fifth of it would be masked, or when the factory for its new size, or the one asked for, is another.

        Args:
            table_keys: (n,) of `ROW_KEY`, all different.
            fetch: gives the vectors (m, d) of rows by their positions (m,) in `table_keys`.
            factory: FAISS factory string; by size when None.

        Returns:
            The index (this one if nothing changed), and what was done.
        """
        if np.array_equal(_words(self.keys), _words(table_keys)) and self.factory == (
            factory or default_factory(len(table_keys))
        ):
            return self, "unchanged"
        gone = np.flatnonzero(self.alive & ~_contains(table_keys, self.keys))
        new = np.flatnonzero(~_contains(self.keys[self.alive], table_keys))
        masked = len(self) - int(np.count_nonzero(self.alive)) + len(gone)
        wanted = factory or default_factory(len(table_keys))
        if wanted != self.factory or masked > _REBUILD_MASKED_SHARE * (len(self) + len(new)):
            rows = np.arange(len(table_keys))
            return VectorIndex.build(fetch(rows), table_keys, factory), "rebuilt"
        if not len(gone) and not len(new):
            return self, "unchanged"
        index = self.masked(gone) if len(gone) else self
        return (index.extended(fetch(new), table_keys[new]) if len(new) else index), "updated"

    @cached_property
    def _lookup(self) -> IdLookup:
        return IdLookup(self.keys["id"][self.alive])

    @cached_property
    def _on_gpu(self) -> tuple[Any, Any] | None:
        """Resources and copy of the index on the first GPU, or None; made at the first search, under the lock."""
        return faiss_kinds.to_gpu(self.faiss_index)

    def _with(self, index: Any, keys: np.ndarray) -> "VectorIndex":
        return VectorIndex(index, keys, factory=self.factory, effort=self.effort, recall=self.recall)

    def _owned_copy(self) -> Any:
        """Copy in memory of its own: adding to an index that is mapped from a file would abort the process."""
        faiss = faiss_module()
        return faiss.deserialize_index(faiss.serialize_index(self.faiss_index))

    def _usable(self, allowed: np.ndarray | None) -> np.ndarray | None:
        """Combine a caller's mask with the removed positions; None where everything may be returned."""
        if allowed is None:
            return None if self.alive.all() else self.alive
        allowed = np.asarray(allowed)
        if allowed.dtype != bool or allowed.shape != (len(self),):
            raise ValueError(f"allowed must be ({len(self)},) bool, got {allowed.shape} {allowed.dtype}")
        return allowed & self.alive

    def _search(
        self, queries: np.ndarray, k: int, usable: np.ndarray | None, effort: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search with FAISS; positions are −1 where it found too few.

        GPU indexes take one search at a time, no masks, and k up to 2048; the CPU does the rest.
        """
        if usable is None and k <= faiss_kinds.GPU_MAX_K:
            with self._gpu_lock:
                if self._on_gpu is not None:
                    index = self._on_gpu[1]
                    return index.search(queries, k, params=faiss_kinds.parameters(index, None, effort, k))
        selector = None
        if usable is not None:
            selector = faiss_module().IDSelectorBitmap(np.packbits(usable, bitorder="little"))
        parameters = faiss_kinds.parameters(self.faiss_index, selector, effort, k)
        return self.faiss_index.search(queries, k, params=parameters)

    def _compare(self, queries: np.ndarray, k: int, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Search by comparing the queries with every candidate, in chunks."""
        faiss = faiss_module()
        heap = faiss.ResultHeap(len(queries), k, keep_max=True)
        for start in range(0, len(candidates), _CHUNK_ROWS):
            chunk = candidates[start : start + _CHUNK_ROWS]
            scores, found = faiss.knn(queries, self.vectors(chunk), min(k, len(chunk)), faiss.METRIC_INNER_PRODUCT)
            heap.add_result(scores, chunk[found])
        heap.finalize()
        return heap.D, heap.I

    def _calibrated(self, vectors: np.ndarray) -> tuple[int, float]:
        """Smallest effort, rising in steps, that reaches the target recall, with that recall; the largest if none does.

        Stored vectors are the queries, each without itself.
        """
        steps = faiss_kinds.efforts(self.faiss_index)
        if self.is_exact or len(vectors) <= _RECALL_AT:
            return steps[-1], 1.0
        sample = np.random.default_rng(0).choice(len(vectors), min(_RECALL_QUERIES, len(vectors)), replace=False)
        queries = vectors[sample]
        truth = _without(faiss_module().knn(queries, vectors, _RECALL_AT + 1, 0)[1], sample)
        recall = 0.0
        for effort in steps:
            found = _without(self._search(queries, _RECALL_AT + 1, None, effort)[1], sample)
            recall = (
                float(np.mean([len(np.intersect1d(*pair)) for pair in zip(found, truth, strict=True)])) / _RECALL_AT
            )
            if recall >= TARGET_RECALL:
                break
        return effort, recall

    def _checked_positions(self, positions: np.ndarray) -> np.ndarray:
        """As FAISS reads them, which would read beyond its memory for a wrong one."""
        positions = np.ascontiguousarray(positions, np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= len(self)):
            raise ValueError(f"positions must lie in 0 … {len(self) - 1}")
        return positions

    def _checked_queries(self, queries: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"queries must be (q, {self.dimension}), got {queries.shape}")
        if not np.isfinite(queries).all():
            raise ValueError("a query has values that are not finite")
        return queries


def _checked(vectors: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refuse vectors that are not unit vectors, and keys that do not name each of them once."""
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise ValueError(f"vectors must be (n, d) float32, got {vectors.shape} {vectors.dtype}")
    if keys.dtype != ROW_KEY or keys.shape != vectors.shape[:1]:
        raise ValueError(f"keys must be ({len(vectors)},) of ROW_KEY, got {keys.shape} {keys.dtype}")
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _NORM_TOLERANCE))  # NaN is wrong too
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"vector {row} ({keys['id'][row].decode()}) has length {lengths[row]}; normalise it to 1")
    if (keys["id"] == b"").any() or len(np.unique(_words(keys))) < len(keys):
        raise ValueError("keys must be all different, with no empty id")
    return np.ascontiguousarray(vectors), keys


def _words(keys: np.ndarray) -> np.ndarray:
    """Keys as (n,) of 36-byte strings, which numpy sorts and compares fast; equal where all 36 bytes are."""
    return np.ascontiguousarray(keys).view(f"S{ROW_KEY.itemsize}")


def _contains(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Tell which of `wanted` are among `keys`: (m,) bool."""
    ordered = np.sort(_words(keys))
    words = _words(wanted)
    return np.append(ordered, [b""])[np.searchsorted(ordered, words)] == words


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def _without(found: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
    """Nearest others of each query, without the query itself."""
    return [row[row != position][:_RECALL_AT] for row, position in zip(found, own, strict=True)]
