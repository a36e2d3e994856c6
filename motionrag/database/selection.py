"""Which rows a search may return: those that meet a condition, less whole source files. Table in, ids out."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from motionrag.database.schema import content_hash, quoted
from motionrag.database.sources import absolute_path
from motionrag.database.table import ClipTable, fixed_width_ids
from motionrag.video import Clip


def eligible(table: ClipTable, where: str | None, left_out: Sequence[Clip | str | Path]) -> np.ndarray | None:
    """Ids `(n)` of the rows that meet a condition and are of no source file to leave out; None for all rows."""
    if where is None and not left_out:
        return None
    ids = table.keys()["id"] if where is None else _ids(table, where)
    named = [source.uri if isinstance(source, Clip) else str(source) for source in left_out]
    files = {name for source in named for name in (source, absolute_path(source), os.path.realpath(source))}
    if files:
        contents = {content_hash(file) for file in files if os.path.isfile(file)}
        contents.update(table.scan(["content"], _one_of("uri", files))["content"].to_pylist())
        ids = ids[~np.isin(ids, _ids(table, f"{_one_of('uri', files)} OR {_one_of('content', contents)}"))]
    return ids


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(map(quoted, sorted(values))) or 'NULL'})"


def _ids(table: ClipTable, condition: str) -> np.ndarray:
    return fixed_width_ids(table.scan(["id"], condition)["id"])
