"""Metadata of clips as columns of the table: which names and values can be stored, and which columns that takes."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from motionrag.database.schema import OWN_COLUMNS, PLAIN_COLUMNS
from motionrag.video import Clip

# What Lance cannot read back in a column's name.
_NOT_IN_COLUMN_NAMES = re.compile(r"[.`\x00-\x1f]")


def own_metadata(clip: Clip) -> dict[str, str | int | float | bool]:
    """Metadata of a clip that becomes columns; the database's own columns win over what a manifest claims."""
    return plain_metadata(clip.metadata, OWN_COLUMNS)


def plain_metadata(metadata: Mapping[str, Any], reserved: Iterable[str]) -> dict[str, str | int | float | bool]:
    """The part of a clip's metadata that becomes columns of the database.

    Args:
        metadata: As the user gave it.
        reserved: Columns of the database itself; these are measured and win over what a manifest claims.

    Returns:
        Strings, numbers and booleans as they are, everything else as JSON; empty values left out. Characters that a
        column's name cannot hold are replaced by an underscore.
    """
    reserved = set(reserved)
    plain: dict[str, str | int | float | bool] = {}
    for written, value in metadata.items():
        name = _column_name(written)
        if name and name not in reserved and not is_missing(value):
            plain.setdefault(name, _plain_value(value))
    return plain


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


def _column_name(written: object) -> str:
    name = _NOT_IN_COLUMN_NAMES.sub("_", str(written).strip())
    return name.lstrip("_") if name.startswith("_row") else name  # Lance has _rowid and others of its own


def _plain_value(value: Any) -> str | int | float | bool:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy or PyTorch
        value = value.item()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, str) and not is_utf8(value):
        return value.encode("utf-8", "backslashreplace").decode()
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, default=str)


def is_missing(value: Any) -> bool:
    """Whether a cell is empty; pandas writes NaN for that."""
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def is_utf8(*words: str) -> bool:
    """Whether words can be stored as text; a file name may hold anything."""
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        return False
    return True
