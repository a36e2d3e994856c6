"""`python benchmarks/token_reads.py --rows 20000`: the tokens of 9 references from the table against a numpy memmap.

Real sizes: 25 × 1024 motion and context tokens in float16. Both read the same random rows in turn; medians of wall
time in milliseconds. The values are compared in the same run.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from motionrag.database.schema import vectors
from motionrag.database.table import ClipTable

TOKENS = 25 * 1024
REFERENCES = 9
BATCH = 1000


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    ids = [f"{number:032x}" for number in range(options.rows)]
    columns = ["motion_tokens", "context_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        shape = (options.rows, 2, TOKENS)
        memmap = np.memmap(Path(folder) / "tokens.npy", np.float16, "w+", shape=shape)
        token_type = pa.list_(pa.float16(), TOKENS)
        fields = [pa.field("id", pa.string(), nullable=False), *(pa.field(name, token_type) for name in columns)]
        table = ClipTable.create(Path(folder) / "clips.lance", pa.schema(fields))
        for start in range(0, options.rows, BATCH):
            end = min(start + BATCH, options.rows)
            batch = generator.standard_normal((end - start, 2, TOKENS), dtype=np.float32).astype(np.float16)
            memmap[start:end] = batch
            tokens = {name: vectors(batch[:, i], np.float16) for i, name in enumerate(columns)}
            table.append(pa.table({"id": ids[start:end], **tokens}))
        memmap.flush()

        times: dict[str, list[float]] = {"table": [], "memmap": []}
        for repeat in range(options.repeats + 5):  # the first reads fill caches
            rows = generator.choice(options.rows, REFERENCES, replace=False)
            start_time = time.perf_counter()
            found = table.take([ids[row] for row in rows], columns)
            taken = time.perf_counter()
            mapped = memmap[rows]
            done = time.perf_counter()
            assert np.array_equal(
                found["motion_tokens"].combine_chunks().flatten().to_numpy().reshape(REFERENCES, TOKENS), mapped[:, 0]
            )
            if repeat >= 5:
                times["table"].append(1000 * (taken - start_time))
                times["memmap"].append(1000 * (done - taken))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"9 rows from {options.rows}: table {medians['table']:.2f} ms, memmap {medians['memmap']:.2f} ms, ", end="")
    print(f"ratio {medians['table'] / medians['memmap']:.1f}")


if __name__ == "__main__":
    main()
