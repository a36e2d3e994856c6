"""MotionDatabase: clips with their motion, searchable. A database is a domain.

    manifest.json   settings and fingerprints           clips.lance/   the clip table, the source of truth
    errors.jsonl    files that could not be read        index/         FAISS, derived: rebuilt when in doubt

Everything that a generation needs of a reference is in the table: no video is decoded to search.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from motionrag.database.build import AddReport, add_clips, preview_clips
from motionrag.database.creation import create_folder, require_free
from motionrag.database.failures import FailureLog
from motionrag.database.indexes import RetrievalIndexes, require_factory
from motionrag.database.lock import writer_lock
from motionrag.database.manifest import Manifest
from motionrag.database.metadata import metadata_columns
from motionrag.database.ranking import Hit, normalised_weights, rank
from motionrag.database.reference import Reference
from motionrag.database.schema import (
    PLAIN_COLUMNS,
    TOKEN_COLUMNS,
    clip_of,
    to_numpy,
)
from motionrag.database.selection import eligible
from motionrag.database.sources import list_clips
from motionrag.database.table import ClipTable
from motionrag.encoder import RETRIEVAL_KEYS, MotionEncoder, pool_motion
from motionrag.encoders.preprocessing import ImageLike, frames_to_tensor, image_to_tensor
from motionrag.video import Clip, read_clip, require_reader

logger = logging.getLogger(__name__)

FINGERPRINTED = ("motion_tokens", "context_tokens", "text", "image")


class FingerprintMismatch(ValueError):
    """The database was made with other weights or preprocessing than those it is used with."""


class MotionDatabase:
    """A folder of clips with motion tokens, context tokens and retrieval embeddings.

    A reader keeps the version that it opened while a writer appends; `refresh` moves on.

    Args:
        path: The folder.
        encoder: Encodes queries and new clips. None opens the one that the database was made with when it is needed.

    Raises:
        FileNotFoundError: If there is no database at `path`.
        ValueError: If its manifest is damaged.
    """

    def __init__(self, path: str | Path, *, encoder: MotionEncoder | None = None) -> None:
        self.path = Path(path).absolute()
        self.manifest = Manifest.read(self.path)
        self._table = ClipTable.open(self.path / "clips.lance")
        self._encoder = encoder
        self._checked: set[str] = set()
        self._indexes = RetrievalIndexes(self.path, self.manifest)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        encoder: MotionEncoder,
        name: str | None = None,
        index_factory: str | None = None,
    ) -> "MotionDatabase":
        """Make an empty database; the folder appears complete or not at all.

        Args:
            path: A folder that does not exist, or is empty.
            encoder: Makes all tokens and embeddings of this database.
            name: Shown to people; the folder's name by default.
            index_factory: FAISS factory string, such as "HNSW32"; None chooses by size.

        Returns:
            The database.

        Raises:
            FileExistsError: If something is there already.
            ValueError: If FAISS cannot read the factory string.
        """
        path = Path(path).absolute()
        require_free(path)
        dims: dict[str, int] = {key: encoder.embedding_dim(key) for key in RETRIEVAL_KEYS}
        if index_factory is not None:
            for dim in dims.values():
                require_factory(index_factory, dim)
        manifest = Manifest(
            name=name or path.name,
            encoder={"source": encoder.source, "text_encoder": encoder.text_source},
            fingerprints={what: encoder.fingerprint(what) for what in FINGERPRINTED},
            embedding_dims=dims,
            num_tokens=encoder.num_tokens,
            token_dim=encoder.token_dim,
            index_factory=index_factory,
        )
        create_folder(path, manifest)
        return cls(path, encoder=encoder)

    @classmethod
    def open(cls, path: str | Path, *, encoder: MotionEncoder | None = None) -> "MotionDatabase":
        """Open a database; the same as calling the class.

        Args:
            path: The folder.
            encoder: As for the class.

        Returns:
            The database.
        """
        return cls(path, encoder=encoder)

    @property
    def encoder(self) -> MotionEncoder:
        """Encodes queries and new clips."""
        if self._encoder is None:
            source, text_encoder = self.manifest.encoder["source"], self.manifest.encoder["text_encoder"]
            if not source:
                raise ValueError(
                    f"{self.path} was made with an encoder that was never saved; pass it: "
                    "MotionDatabase(path, encoder=…)."
                )
            self._encoder = MotionEncoder.from_pretrained(source, text_encoder=text_encoder)
        return self._encoder

    def __len__(self) -> int:
        return self._table.count()

    @property
    def has_captions(self) -> bool:
        """Whether any clip can be found by text."""
        return self._table.count("caption != ''") > 0

    def __repr__(self) -> str:
        return f"MotionDatabase({str(self.path)!r}, {len(self)} clips)"

    def check_fingerprints(self, encoder: MotionEncoder, kinds: Sequence[str]) -> None:
        """Refuse an encoder that does not give the numbers which the database holds.

        Args:
            encoder: To compare with.
            kinds: Any of "motion_tokens", "context_tokens", "text", "image", "motion".

        Raises:
            FingerprintMismatch: With both fingerprints, and what to do.
        """
        for kind in kinds:
            stored = self.manifest.fingerprints["motion_tokens" if kind == "motion" else kind]
            given = encoder.fingerprint(kind)
            if stored != given:
                made_by = _in_words(self.manifest.encoder["source"], self.manifest.encoder["text_encoder"])
                raise FingerprintMismatch(
                    f"The database {self.path} holds {kind.replace('_', ' ')} of fingerprint {stored} (made by "
                    f"{made_by}), but this encoder ({_in_words(encoder.source, encoder.text_source)}) has {given}. "
                    "Use the encoder that made it, or index the clips again into a new database: "
                    f"motionrag index CLIPS --out NEW --encoder {encoder.source or 'BUNDLE'}"
                    + (f" --text-encoder {encoder.text_source}" if encoder.text_source else "")
                )

    def add(
        self,
        source: str | Path | Sequence[Clip],
        *,
        captions: str | Path | None = None,
        video_column: str | None = None,
        caption_column: str | None = None,
        reader: str = "auto",
        retry_failed: bool = False,
        strict: bool = False,
        dry_run: bool = False,
        progress: bool = True,
        num_workers: int | None = None,
        timeout_s: float | None = None,
    ) -> AddReport:
        """Index clips. The same command again continues where a killed run stopped, and adds nothing twice.

        Clips that cannot be read are skipped, listed in the report and in `errors.jsonl`, and not tried again until
        their file, the reader or the time-out is another.

        Args:
            source: A folder, a manifest (`.csv`, `.tsv`, `.jsonl`, `.parquet`), one video, or a list of clips.
            captions: A manifest with captions for the folder `source`.
            video_column: Column of the manifest that names the file; None looks for the usual names.
            caption_column: Column that holds the caption; None looks for the usual names.
            reader: How to decode, as for `motionrag.video.read_clip`.
            retry_failed: Try again what failed before, though nothing has changed since.
            strict: Stop at the first clip that cannot be read.
            dry_run: Say what would be done; decode and write nothing.
            progress: Show a progress bar on a terminal.
            num_workers: Decoding processes; None: by the number of cores.
            timeout_s: Longest time for one clip; None: 30 s, or five times its duration.

        Returns:
            Numbers of new, changed, unchanged and failed clips.

        Raises:
            DatabaseLocked: If another process is writing.
            FingerprintMismatch: If the encoder is not the one that made the database.
            IndexingStopped: If `strict` is set and a clip cannot be read.
            ValueError: If `source` cannot be understood.
        """
        require_reader(reader)
        listing = list_clips(source, captions=captions, video_column=video_column, caption_column=caption_column)
        failures = FailureLog(self.path, reader=reader, timeout_s=timeout_s, retry=retry_failed)
        if dry_run:  # writes nothing, so it needs neither the lock nor the encoder
            self.refresh()
            return preview_clips(listing, table=self._table, failures=failures)
        self.check_fingerprints(self.encoder, FINGERPRINTED)
        with writer_lock(self.path):
            self.refresh()
            report = add_clips(
                listing,
                table=self._table,
                encoder=self.encoder,
                failures=failures,
                reader=reader,
                strict=strict,
                progress=progress,
                num_workers=num_workers,
                timeout_s=timeout_s,
            )
            self._update_indexes()
        return report

    def delete(self, where: str) -> int:
        """Remove clips.

        Args:
            where: SQL condition on the columns, for example `licence = 'unknown'` or `uri LIKE '%/raw/%'`.

        Returns:
            How many were removed.

        Raises:
            DatabaseLocked: If another process is writing.
            ValueError: If the condition cannot be understood; the columns are named.
        """
        with writer_lock(self.path):
            removed = self._table.delete(where)
            self._update_indexes()
        return removed

    def compact(self) -> None:
        """Join small files, and remove old versions and what killed runs left behind.

        Readers that have an older version open lose it and must `refresh`.

        Raises:
            DatabaseLocked: If another process is writing.
        """
        with writer_lock(self.path):
            self._table.compact()
            self._table.collect_garbage()
            self._update_indexes()

    def refresh(self) -> None:
        """Move to the newest version that a writer has committed."""
        self._table.refresh()

    def search(
        self,
        *,
        text: str | None = None,
        image: ImageLike | None = None,
        motion: Clip | Tensor | None = None,
        k: int = 9,
        where: str | None = None,
        weights: Mapping[str, float] | None = None,
        exclude: Clip | str | Path | Sequence[Clip | str | Path] | None = None,
    ) -> list[Reference]:
        """Find the clips most similar to a description, an image, a motion, or a mix of them.

        Args:
            text: Compared with the captions.
            image: PIL image, path or array; compared with the clips' first frames.
            motion: A clip (decoded and encoded now) or motion tokens `(l d)`; compared with the clips' motion.
            k: How many; fewer come back if the database holds fewer.
            where: SQL condition on the columns, such as `motion = 'orbit' AND fps >= 8`.
            weights: Retrieval key → weight in the mean of the similarities; 1 each by default.
            exclude: Clips or files whose whole source file must not come back, by path and by content. A clip given
                as `motion` is left out by default; pass `()` to keep it.

        Returns:
            References, best first.

        Raises:
            FingerprintMismatch: If the encoder is not the one that made the embeddings.
            ValueError: If there is no query, the database is empty, or an argument is malformed.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}.")
        table = copy(self._table)  # stays at its version while another thread writes through this object
        if table.count() == 0:
            raise ValueError(
                f"The database {self.path} is empty; add clips with: motionrag index CLIPS --out {self.path}"
            )
        queries = self._embed_queries(text, image, motion)
        if exclude is None:
            exclude = motion if isinstance(motion, Clip) else ()
        mixed = normalised_weights(weights, list(queries))
        sources = [exclude] if isinstance(exclude, (Clip, str, Path)) else exclude
        ids = eligible(table, where, sources)
        indexes = {key: self._indexes.get(key, table) for key in queries}
        if "text" in indexes and not indexes["text"].alive.any():
            raise ValueError(
                f"No clip in {self.path} has a caption; index with captions, or search by image or motion."
            )
        ranked = rank(indexes, queries, mixed, k, ids)
        if len(ranked) < k:
            logger.warning("%s: %d references for the %d that were asked for", self.path, len(ranked), k)
        return self._references(ranked, table)

    def verify(self, *, deep: bool = True) -> list[str]:
        """Look for damage.

        Args:
            deep: Also read every vector of the table and compare every file with its checksum.

        Returns:
            One sentence for each finding; empty if all is well. Damaged indexes repair themselves at the next search.
        """
        findings = [*self._table.recovered, *self._table.verify(deep=deep)]
        for key in RETRIEVAL_KEYS:
            findings += self._indexes.findings(key, self._table)
        return findings

    def info(self) -> dict[str, Any]:
        """Facts about the database, as JSON values.

        Returns:
            Name, number of clips, columns, encoder, fingerprints, indexes and size on disk in bytes.
        """
        columns = [*PLAIN_COLUMNS, *metadata_columns(self._table.schema)]
        if len(self):
            for key in RETRIEVAL_KEYS:
                self._indexes.get(key, self._table)
        licences = self._table.scan(["licence"])["licence"].value_counts().to_pylist()
        return {
            "name": self.manifest.name,
            "path": str(self.path),
            "clips": len(self),
            "captioned": self._table.count("caption != ''"),
            "licences": {entry["values"] or "not stated": entry["counts"] for entry in licences},
            "columns": columns,
            "encoder": self.manifest.encoder,
            "fingerprints": self.manifest.fingerprints,
            "tokens": [self.manifest.num_tokens, self.manifest.token_dim],
            "index": self._indexes.info(),
            "bytes": _size_on_disk(self.path),
            "created_with": self.manifest.created_with,
            "version": self._table.version,
        }

    def _update_indexes(self) -> None:
        for key in RETRIEVAL_KEYS:
            self._indexes.get(key, self._table, holds_lock=True)

    # Queries

    def _embed_queries(
        self, text: str | None, image: ImageLike | None, motion: Clip | Tensor | None
    ) -> dict[str, np.ndarray]:
        queries: dict[str, np.ndarray] = {}
        if text is not None:
            if not text.strip():
                raise ValueError("The text to search for is empty.")
            self._check_once("text")
            queries["text"] = self.encoder.embed_texts([text])[0].numpy()
        if image is not None:
            self._check_once("image")
            queries["image"] = self.encoder.embed_images([image_to_tensor(image)])[0].numpy()
        if motion is not None:
            queries["motion"] = self._embed_motion(motion)
        if not queries:
            raise ValueError("Nothing to search for: pass text, image or motion.")
        return queries

    def _embed_motion(self, motion: Clip | Tensor) -> np.ndarray:
        if isinstance(motion, Clip) or self._encoder is not None:  # tokens need no encoder
            self._check_once("motion")
        if isinstance(motion, Clip):
            decoded = read_clip(motion, num_frames=self.encoder.num_frames)
            tokens = self.encoder.encode_motion([frames_to_tensor(decoded.frames)])
        else:
            expected = (self.manifest.num_tokens, self.manifest.token_dim)
            if tuple(motion.shape) != expected or not torch.isfinite(motion).all():
                raise ValueError(f"Motion tokens must be finite and {expected}, got {tuple(motion.shape)}.")
            tokens = rearrange(motion.cpu(), "l d -> 1 l d")
        return pool_motion(tokens)[0].numpy()

    def _check_once(self, kind: str) -> None:
        if kind not in self._checked:
            self.check_fingerprints(self.encoder, [kind])
            self._checked.add(kind)

    def _references(self, ranked: Sequence[Hit], table: ClipTable) -> list[Reference]:
        if not ranked:
            return []
        metadata = metadata_columns(table.schema)
        rows = table.take([hit.id for hit in ranked], [*PLAIN_COLUMNS, *metadata, *TOKEN_COLUMNS])
        tokens = {name: self._tokens(to_numpy(rows[name])) for name in TOKEN_COLUMNS}
        total = sum(max(hit.score, 0.0) for hit in ranked)
        return [
            Reference(
                clip=clip_of(row, metadata),
                id=hit.id,
                rank=number + 1,
                score=hit.score,
                scores=hit.scores,
                weight=max(hit.score, 0.0) / total if total > 0 else 1 / len(ranked),
                motion_tokens=tokens["motion_tokens"][number],
                context_tokens=tokens["context_tokens"][number],
            )
            for number, (hit, row) in enumerate(
                zip(ranked, rows.select([*PLAIN_COLUMNS, *metadata]).to_pylist(), strict=True)
            )
        ]

    def _tokens(self, flat: np.ndarray) -> Tensor:
        return rearrange(torch.from_numpy(flat).float(), "b (l d) -> b l d", l=self.manifest.num_tokens)


def _in_words(source: str | None, text_encoder: str | None) -> str:
    bundle = f"bundle {source}" if source else "a bundle in memory"
    return bundle if text_encoder is None else f"{bundle} with text encoder {text_encoder}"


def _size_on_disk(folder: Path) -> int:
    """Bytes of all files; one that a writer removes meanwhile counts as nothing."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total
