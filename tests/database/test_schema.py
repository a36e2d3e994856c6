"""Columns, types of metadata, and identity of clips."""

import numpy as np
import pyarrow as pa
import pytest

from motionrag.database import metadata, schema
from motionrag.video import Clip

TABLE = schema.table_schema({"text": 3, "image": 4, "motion": 2}, num_tokens=5, token_dim=2)


def test_table_schema():
    assert TABLE.field("text_embedding").type == pa.list_(pa.float32(), 3)
    assert TABLE.field("motion_tokens").type == TABLE.field("context_tokens").type == pa.list_(pa.float16(), 10)
    assert not any(field.nullable for field in TABLE)
    assert metadata.metadata_columns(TABLE) == []
    assert metadata.metadata_columns(TABLE.append(pa.field("motion", pa.string()))) == ["motion"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False], pa.bool_()),
        ([1, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2.5, 1], pa.float64()),
        ([1, "x"], pa.string()),
        ([True, 1], pa.string()),
        (["x"], pa.string()),
    ],
)
def test_type_of_a_new_column(values, expected):
    rows = [{"tag": value} for value in values] + [{}]
    assert metadata.metadata_fields(rows, TABLE) == [pa.field("tag", expected, nullable=True)]


@pytest.mark.parametrize(
    ("stored", "value", "fits"),
    [
        (pa.string(), 1, True),
        (pa.float64(), 1, True),
        (pa.int64(), 1, True),
        (pa.int64(), 0.5, False),
        (pa.int64(), True, False),
        (pa.float64(), "x", False),
        (pa.bool_(), 1, False),
    ],
)
def test_value_for_an_existing_column(stored, value, fits):
    table = TABLE.append(pa.field("tag", stored))
    if fits:
        assert metadata.metadata_fields([{"tag": value}], table) == []
    else:
        with pytest.raises(ValueError, match=f"'tag' is .* here, but {stored} in the database; rename it"):
            metadata.metadata_fields([{"tag": value}], table)


def test_fitted_is_what_reading_back_gives():
    table = TABLE.append(pa.field("tag", pa.string())).append(pa.field("gain", pa.float64()))
    assert metadata.fitted({"tag": True, "gain": 1, "new": 2}, table) == {"tag": "True", "gain": 1.0, "new": 2}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_round_trip(dtype):
    array = np.random.default_rng(0).standard_normal((6, 2, 3)).astype(dtype)
    column = schema.vectors(array, dtype)
    assert column.type == pa.list_(pa.from_numpy_dtype(dtype), 6)
    np.testing.assert_array_equal(schema.to_numpy(column), array.reshape(6, 6))
    chunked = pa.chunked_array([column.slice(4), column.slice(1, 2)])
    np.testing.assert_array_equal(schema.to_numpy(chunked), array.reshape(6, 6)[[4, 5, 1, 2]])
    assert schema.to_numpy(chunked.slice(0, 0)).shape == (0, 6)


def test_clip_id_is_content_and_span():
    same = [Clip("a", 2), Clip("b", 2.0, caption="other"), Clip("c", np.float64(2)), Clip("d", np.float32(2))]
    assert len({schema.clip_id("content", clip) for clip in same}) == 1
    other = [Clip("a", 2), Clip("a", 2, 3), Clip("a", 1), Clip("a", 2, np.int64(4))]
    assert len({schema.clip_id("content", clip) for clip in other} | {schema.clip_id("other", other[0])}) == 5
    identity = schema.clip_id("content", Clip("a"))
    assert len(identity.encode("ascii")) == 32


def test_clip_of_a_row():
    row = {"uri": "a.mp4", "start_s": 1.0, "end_s": 2.0, "caption": "x", "licence": "CC0", "source": "y"}
    clip = schema.clip_of({**row, "motion": "pan", "take": None}, ["motion", "take"])
    assert clip == Clip("a.mp4", 1.0, 2.0, "x", "CC0", "y")
    assert clip.metadata == {"motion": "pan"}


@pytest.mark.parametrize("text", ["plain", "it's", "''", "back\\slash", 'q"uote`', "x'; DROP TABLE --", "é\u2028"])
def test_quoted_text_is_one_literal(text, tmp_path):
    import lance

    dataset = lance.write_dataset(pa.table({"uri": [text, "other"]}), str(tmp_path / "table"))
    assert dataset.to_table(filter=f"uri = {schema.quoted(text)}")["uri"].to_pylist() == [text]
    assert dataset.count_rows(f"uri NOT IN ({schema.quoted(text)})") == 1
