"""`OMP_NUM_THREADS=2 python benchmarks/search.py --rows 100000 200000 --dimensions 128 512`.

Nearest clips: our index against Lance's own flat search of the same vectors, and the time to open and search.

For each size, width and kind of data, vectors are stored in a Lance table and in a `VectorIndex` of the default
factory. Queries that are not stored, from the same distribution, go to both in turn (paired, one at a time, k = 9);
the table shows medians in milliseconds of wall time, their ratio, and recall@9 against numpy in the same run.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from motionrag.database import index_file
from motionrag.database.index import VectorIndex
from motionrag.database.keys import ROW_KEY
from motionrag.database.table import ClipTable

K = 9
HEADER = (
    "data      rows    width factory       effort  ours ms  lance ms  ratio  recall  build s  open + first search ms"
)


def clustered(count: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors in 1 000 overlapping groups of uneven size, as embeddings of real clips lie."""
    centres = generator.standard_normal((1000, width), dtype=np.float32)
    groups = np.minimum(generator.exponential(200, count).astype(np.int64), 999)
    return normalised(centres[groups] + 0.7 * generator.standard_normal((count, width), dtype=np.float32))


def uniform(count: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors without any structure: the worst case of every approximate index."""
    return normalised(generator.standard_normal((count, width), dtype=np.float32))


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(kind: str, rows: int, width: int, queries: int, folder: Path) -> str:
    """Store, build, search both ways; one line of the table."""
    make = {"clustered": clustered, "uniform": uniform}[kind]
    # One draw for both, so that the queries come from the same groups.
    points = make(rows + queries, width, np.random.default_rng(0))
    vectors, wanted = points[:rows], points[rows:]
    keys = np.zeros(rows, ROW_KEY)
    keys["id"] = [f"{row:032x}".encode() for row in range(rows)]
    table = ClipTable.create(
        folder / "clips.lance",
        pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("revision", pa.int32(), nullable=False),
                pa.field("vector", pa.list_(pa.float32(), width), nullable=False),
            ]
        ),
    )
    table.append(
        pa.table(
            {
                "id": keys["id"].astype(str),
                "revision": keys["revision"],
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width),
            }
        )
    )
    dataset = lance.dataset(str(table.path))
    start = time.perf_counter()
    index = VectorIndex.build(vectors, keys)
    building = time.perf_counter() - start
    index_file.save(index, folder, "text", database_id="benchmark", table_version=table.version)

    def ours(query: np.ndarray) -> np.ndarray:
        return index.search(query[None], K)[1][0]

    def theirs(query: np.ndarray) -> np.ndarray:
        nearest = {"column": "vector", "q": query, "k": K, "metric": "dot"}
        found = dataset.to_table(columns=["id", "_distance"], nearest=nearest)
        return np.array([int(row, 16) for row in found["id"].to_pylist()])

    # Before the timing: numpy's threads go on spinning for a while, and would disturb it.
    truths = [np.argpartition(vectors @ query, -K)[-K:] for query in wanted]
    times, found = [], []
    for query in wanted:
        start = time.perf_counter()
        mine = ours(query)
        middle = time.perf_counter()
        reference = theirs(query)
        times.append((middle - start, time.perf_counter() - middle))
        found.append((mine, reference))
    recalls = [
        [len(np.intersect1d(each, truth)) / K for each in both] for both, truth in zip(found, truths, strict=True)
    ]
    recall, lance_recall = np.mean(recalls, axis=0)
    assert lance_recall > 0.99, "Lance's flat search should be exact"
    ours_ms, lance_ms = 1000 * np.median(times, axis=0)
    opening = 1000 * np.median([seconds(lambda: open_and_search(folder, width, wanted[:1])) for _ in range(5)])
    return (
        f"{kind:9s} {rows:7d} {width:5d} {index.factory:14s} {index.effort:5d} {ours_ms:8.2f} {lance_ms:9.2f} "
        f"{lance_ms / ours_ms:6.1f} {recall:7.3f} {building:8.1f} {opening:10.0f}"
    )


def open_and_search(folder: Path, width: int, query: np.ndarray) -> None:
    """What a process does before its first answer: table, index, sync, spot check, search, rows."""
    table = ClipTable.open(folder / "clips.lance")
    index = index_file.load(folder, "text", database_id="benchmark", dimension=width)
    index, done = index.synced(table.keys(), lambda rows: rows)
    assert done == "unchanged"
    positions = index.search(query, K)[1][0]
    ids = index.keys["id"][positions].astype(str).tolist()
    vectors = table.take(ids, ["vector"])["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    assert index.spot_check(positions, vectors)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 200_000])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--data", nargs="+", choices=["clustered", "uniform"], default=["clustered", "uniform"])
    parser.add_argument("--queries", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    print(HEADER)
    for kind in arguments.data:
        for rows in arguments.rows:
            for width in arguments.dimensions:
                with tempfile.TemporaryDirectory() as folder:
                    print(measure(kind, rows, width, arguments.queries, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
