"""Columns of the clip table, and rows to and from Arrow. It stores nothing.

identity   id, uri, content, file_size, file_mtime_ns, revision
span       start_s, end_s, fps, width, height, num_frames, short, still_share, reader
words      caption, licence, source, and one nullable column per name in the clips' metadata
vectors    text_embedding, image_embedding, motion_embedding (float32, L2-normalised; a clip without caption has
           zeros), motion_tokens, context_tokens (float16, l·d values)
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
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
PLAIN_COLUMNS = tuple(name for name, _ in _PLAIN_FIELDS)
TOKEN_COLUMNS = ("motion_tokens", "context_tokens")


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


def metadata_columns(schema: pa.Schema) -> list[str]:
    """Columns that came from the clips' metadata."""
    return [
        field.name
        for field in schema
        if field.name not in PLAIN_COLUMNS and not pa.types.is_fixed_size_list(field.type)
    ]


def metadata_fields(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> list[pa.Field]:
    """Columns that metadata needs and the table lacks.

    Args:
        rows: Metadata of clips: strings, numbers and booleans.
        schema: The table's present columns.

    Returns:
        New nullable fields.

    Raises:
        ValueError: If a value does not fit the type of an existing column.
    """
    types: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.items():
            types[name] = _joined(types.get(name), _type_of(value))
    new = []
    for name, found in types.items():
        if name not in schema.names:
            new.append(pa.field(name, found, nullable=True))
        elif _joined(schema.field(name).type, found) != schema.field(name).type:
            raise ValueError(
                f"Metadata {name!r} is {found} here, but {schema.field(name).type} in the database; rename it."
            )
    return new


def _type_of(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64()
    return pa.float64() if isinstance(value, float) else pa.string()


def _joined(first: pa.DataType | None, second: pa.DataType) -> pa.DataType:
    """The narrowest type that holds both: whole numbers widen to floats, anything else to text."""
    if first is None or first == second:
        return second
    if {first, second} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


def fitted(values: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Metadata as its columns hold it: a column of text takes numbers too.

    Args:
        values: Metadata of a clip.
        schema: Columns of the table; names that are not among them stay as they are.

    Returns:
        The values, as reading them back would give them.
    """
    text = {name for name in values if name in schema.names and pa.types.is_string(schema.field(name).type)}
    return {name: str(value) if name in text else value for name, value in values.items()}


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


def clip_id(content: str, clip: Clip) -> str:
    """Identity of a clip: its file's content and its span, whatever the file is called."""
    # As plain floats: 2, 2.0 and a NumPy number are the same time.
    start_s, end_s = float(clip.start_s), None if clip.end_s is None else float(clip.end_s)
    return hashlib.blake2b(f"{content}:{start_s!r}:{end_s!r}".encode(), digest_size=16).hexdigest()


def quoted(text: str) -> str:
    """A string literal for a `where` condition."""
    return "'" + text.replace("'", "''") + "'"
