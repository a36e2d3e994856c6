"""Columns of the clip table, and rows to and from Arrow. It stores nothing.

identity   id, uri, content, file_size, file_mtime_ns, revision
span       start_s, end_s, fps, width, height, num_frames, short, still_share, reader
words      caption, licence, source, and one nullable column per name in the clips' metadata
vectors    text_embedding, image_embedding, motion_embedding (float32, L2-normalised; a clip without caption has
           zeros), motion_tokens, context_tokens (float16, l·d values)
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from motionrag.video import Clip

_PLAIN_FIELDS = (
    ("id", pa.string()),  # hash of content and span: 32 hexadecimal characters
    ("uri", pa.string()),
    ("content", pa.string()),  # hash of the file
    ("file_size", pa.int64()),  # bytes; with the time below, spares hashing a file that has not changed
    ("file_mtime_ns", pa.int64()),
    ("start_s", pa.float64()),
    ("end_s", pa.float64()),
    ("fps", pa.float64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("num_frames", pa.int32()),
    ("short", pa.bool_()),  # fewer frames than the encoder takes, so some are repeated
    ("still_share", pa.float32()),  # share of identical consecutive frames, 0 to 1
    ("reader", pa.string()),
    ("caption", pa.string()),
    ("licence", pa.string()),
    ("source", pa.string()),
    ("revision", pa.int32()),  # counts changes of the row; an index notices by it that a vector is out of date
)
_HASH_CHUNK = 1 << 20

PLAIN_COLUMNS = tuple(name for name, _ in _PLAIN_FIELDS)
TOKEN_COLUMNS = ("motion_tokens", "context_tokens")
EMBEDDING_COLUMNS = ("text_embedding", "image_embedding", "motion_embedding")
OWN_COLUMNS = frozenset((*PLAIN_COLUMNS, *EMBEDDING_COLUMNS, *TOKEN_COLUMNS))


def embedding_column(key: str) -> str:
    """Name of the column that holds a retrieval embedding."""
    return f"{key}_embedding"


def table_schema(embedding_dims: Mapping[str, int], num_tokens: int, token_dim: int) -> pa.Schema:
    """Schema of an empty database.

    Args:
        embedding_dims: Retrieval key → width of its embedding.
        num_tokens: Motion tokens of a clip, and as many context tokens.
        token_dim: Channels of a token.

    Returns:
        The schema, without metadata columns.
    """
    fields = [pa.field(name, type_, nullable=False) for name, type_ in _PLAIN_FIELDS]
    fields += [
        pa.field(embedding_column(key), pa.list_(pa.float32(), dim), nullable=False)
        for key, dim in embedding_dims.items()
    ]
    tokens = pa.list_(pa.float16(), num_tokens * token_dim)
    return pa.schema(fields + [pa.field(name, tokens, nullable=False) for name in TOKEN_COLUMNS])


def vectors(array: np.ndarray, dtype: type[np.floating]) -> pa.FixedSizeListArray:
    """`(b, …)` numbers as a column with one fixed-size list a row."""
    flat = np.ascontiguousarray(array, dtype=dtype).reshape(len(array), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of fixed-size lists as `(b, n)`."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in chunks]
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


def clip_of(row: Mapping[str, Any], metadata: Sequence[str]) -> Clip:
    """The clip that a row describes.

    Args:
        row: Plain and metadata columns of one row.
        metadata: Names of the metadata columns.

    Returns:
        The clip; missing metadata is left out.
    """
    words = {name: row[name] for name in ("uri", "start_s", "end_s", "caption", "licence", "source")}
    return Clip(**words, metadata={name: row[name] for name in metadata if row[name] is not None})


def content_hash(path: str | Path) -> str:
    """Hash of a file's bytes: 32 hexadecimal characters."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def clip_id(content: str, clip: Clip) -> str:
    """Identity of a clip: its file's content and its span, whatever the file is called."""
    # As plain floats: 2, 2.0 and a NumPy number are the same time.
    start_s, end_s = float(clip.start_s), None if clip.end_s is None else float(clip.end_s)
    return hashlib.blake2b(f"{content}:{start_s!r}:{end_s!r}".encode(), digest_size=16).hexdigest()


def quoted(text: str) -> str:
    """A string literal for a `where` condition."""
    return "'" + text.replace("'", "''") + "'"
