"""Ranking rows by the weighted mean of their similarities over several indexes. Arrays in, ids out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from motionrag.database.index import VectorIndex

# A mixed search over approximate indexes compares this many times k candidates of every key exactly, at least these.
_CANDIDATES_PER_RESULT = 20
_MIN_CANDIDATES = 200
_CHUNK_ROWS = 8192  # compared in double precision at a time, so that memory stays flat
_ROUNDING = 1e-5  # how far a FAISS score can lie from the one computed here, for unit vectors


@dataclass(frozen=True)
class Hit:
    """A row that a search found.

    Attributes:
        id: Identity of the row.
        score: Weighted mean of `scores`.
        scores: Similarity by each key of the query.
    """

    id: str
    score: float
    scores: dict[str, float]


def rank(
    indexes: Mapping[str, VectorIndex],
    queries: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    k: int,
    ids: np.ndarray | None = None,
) -> list[Hit]:
    """Find the k best rows.

    A row that an index does not hold scores 0 on that key. With exact indexes the result is exact; a mix of keys over
    approximate ones ranks the best candidates of each key exactly.

    Args:
        indexes: Key → index.
        queries: Key → unit vector `(d)`, for the same keys.
        weights: Key → weight; they sum to 1.
        k: How many.
        ids: `(m)` bytes; only these rows. All when None.

    Returns:
        Hits, best first; ties by id, so that the order is always the same.
    """
    candidates = [_candidates(indexes[key], query, k, ids, mixed=len(queries) > 1) for key, query in queries.items()]
    found = np.unique(np.concatenate(candidates))
    if len(found) > k:  # single precision tells which rows can be among the best, ties with the k-th included
        quick = _mean({key: _scores(VectorIndex.scores, indexes[key], queries[key], found) for key in queries}, weights)
        found = found[quick >= np.partition(quick, -k)[-k] - 2 * _ROUNDING]
    columns = {key: _scores(_scores_in_double, indexes[key], query, found) for key, query in queries.items()}
    total = _mean(columns, weights)
    best = np.lexsort((found, -total))[:k]
    return [
        Hit(found[row].decode(), float(total[row]), {key: float(column[row]) for key, column in columns.items()})
        for row in best
    ]


def normalised_weights(weights: Mapping[str, float] | None, keys: Sequence[str]) -> dict[str, float]:
    """Weights of the keys of a query, summing to 1.

    Args:
        weights: Key → non-negative number; equal when None.
        keys: The keys of the query.

    Returns:
        Key → weight.

    Raises:
        ValueError: If a key has no weight, a weight has no key, or none is positive.
    """
    given = dict.fromkeys(keys, 1.0) if weights is None else dict(weights)
    finite = all(isinstance(each, Real) and math.isfinite(each) and each >= 0 for each in given.values())
    if given.keys() != set(keys) or not finite or sum(given.values()) <= 0:
        raise ValueError(
            f"weights must give a number of 0 or more to each of {', '.join(keys)}, not all 0; got {given}."
        )
    total = sum(given.values())
    return {key: weight / total for key, weight in given.items()}


def _candidates(index: VectorIndex, query: np.ndarray, k: int, ids: np.ndarray | None, *, mixed: bool) -> np.ndarray:
    allowed = None
    if ids is not None:
        positions = index.positions_of(ids)
        allowed = np.zeros(len(index), bool)
        allowed[positions[positions >= 0]] = True
    if mixed and index.is_exact:  # every row is compared anyway
        return index.keys["id"][index.alive if allowed is None else index.alive & allowed]
    wanted = max(_CANDIDATES_PER_RESULT * k, _MIN_CANDIDATES) if mixed else k + 1
    while True:
        scores, positions = index.search(query[None], wanted, allowed)
        found = positions.shape[1]
        # Rows that tie with the k-th, as equal captions do, must all be seen, or the order of storage would choose.
        if found < wanted or scores[0, -1] < scores[0, k - 1] - _ROUNDING:
            return index.keys["id"][positions[0]]
        wanted *= 4


def _mean(columns: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted mean `(n)` of the scores by each key, in double precision."""
    return np.sum([weights[key] * column.astype(np.float64) for key, column in columns.items()], axis=0)


def _scores(
    compare: Callable[[VectorIndex, np.ndarray, np.ndarray], np.ndarray],
    index: VectorIndex,
    query: np.ndarray,
    ids: np.ndarray,
) -> np.ndarray:
    """Similarities `(n)` float32 by `compare`; 0 for rows that the index does not hold."""
    positions = index.positions_of(ids)
    held = positions >= 0
    scores = np.zeros(len(ids), np.float32)
    scores[held] = compare(index, query, positions[held])
    return scores


def _scores_in_double(index: VectorIndex, query: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Similarities `(n)` in double precision, chunk by chunk: equal vectors score equally wherever they lie."""
    scores = np.empty(len(positions))
    for start in range(0, len(positions), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        scores[chunk] = index.vectors(positions[chunk]).astype(np.float64) @ query.astype(np.float64)
    return scores
