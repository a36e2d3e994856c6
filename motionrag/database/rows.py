"""Rows of the clip table as Arrow, from decoded clips and the encoder. It commits nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from motionrag.database.metadata import metadata_columns, own_metadata
from motionrag.database.plan import Job
from motionrag.database.schema import PLAIN_COLUMNS, embedding_column, vectors
from motionrag.encoder import MotionEncoder
from motionrag.video import Clip, DecodedClip


def new_rows(decoded: Sequence[tuple[Job, DecodedClip]], schema: pa.Schema, encoder: MotionEncoder) -> pa.Table:
    """Encode clips.

    Args:
        decoded: Clips and their frames; they are encoded in one batch.
        schema: Columns of the table.
        encoder: Makes tokens and embeddings.

    Returns:
        One row for each, revision 0.
    """
    encoded = encoder.encode_frames([result.frames for _, result in decoded])
    plain = [
        {
            "id": job.id,
            "uri": job.clip.uri,
            "content": job.file.content,
            "file_size": job.file.size,
            "file_mtime_ns": job.file.mtime_ns,
            "start_s": result.start_s,
            "end_s": result.end_s,
            "fps": result.fps,
            "width": result.width,
            "height": result.height,
            "num_frames": result.num_frames,
            "short": result.short,
            "still_share": result.still_share,
            "reader": result.reader,
            "caption": job.clip.caption,
            "licence": job.clip.licence,
            "source": job.clip.source,
            "revision": 0,
            **own_metadata(job.clip),
        }
        for job, result in decoded
    ]
    columns: dict[str, pa.Array] = {
        embedding_column("text"): vectors(_text_embeddings([job.clip for job, _ in decoded], encoder), np.float32),
        embedding_column("image"): vectors(encoded.image.numpy(), np.float32),
        embedding_column("motion"): vectors(encoded.motion.numpy(), np.float32),
        "motion_tokens": vectors(encoded.motion_tokens.numpy(), np.float16),
        "context_tokens": vectors(encoded.context_tokens.numpy(), np.float16),
    }
    for name in (*PLAIN_COLUMNS, *metadata_columns(schema)):
        columns[name] = _column([row.get(name) for row in plain], schema.field(name))
    return pa.table({name: columns[name] for name in schema.names})


def rewritten_rows(jobs: Sequence[Job], stored: pa.Table, encoder: MotionEncoder) -> pa.Table:
    """Give stored rows new words or paths; tokens are kept.

    Args:
        jobs: Clips as they are now.
        stored: Their rows, in the same order.
        encoder: Embeds the captions.

    Returns:
        The rows with the next revision.
    """
    clips = [job.clip for job in jobs]
    words: dict[str, list[Any]] = {
        "uri": [clip.uri for clip in clips],
        "file_size": [job.file.size for job in jobs],
        "file_mtime_ns": [job.file.mtime_ns for job in jobs],
        "caption": [clip.caption for clip in clips],
        "licence": [clip.licence for clip in clips],
        "source": [clip.source for clip in clips],
        **{name: [own_metadata(clip).get(name) for clip in clips] for name in metadata_columns(stored.schema)},
    }
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: stored[name] for name in stored.column_names}
    columns |= {name: _column(values, stored.schema.field(name)) for name, values in words.items()}
    columns[embedding_column("text")] = vectors(_text_embeddings(clips, encoder), np.float32)
    columns["revision"] = pc.add(stored["revision"], pa.scalar(1, pa.int32()))
    return pa.table(columns)


def _column(values: Sequence[Any], column: pa.Field) -> pa.Array:
    if pa.types.is_string(column.type):  # a column of text takes numbers too
        values = [None if value is None else str(value) for value in values]
    return pa.array(values, column.type)


def _text_embeddings(clips: Sequence[Clip], encoder: MotionEncoder) -> np.ndarray:
    """Embeddings of captions `(b e)`; zeros where there is none."""
    embeddings = np.zeros((len(clips), encoder.embedding_dim("text")), np.float32)
    captioned = [index for index, clip in enumerate(clips) if clip.caption]
    if captioned:
        try:
            embeddings[captioned] = encoder.embed_texts([clips[index].caption for index in captioned]).numpy()
        except ValueError as error:
            files = ", ".join(clips[index].uri for index in captioned)
            raise ValueError(
                f"A caption of {files} cannot be embedded: {error}. Change it, or leave it out."
            ) from error
    return embeddings
