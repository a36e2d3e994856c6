"""A `VectorIndex` on disk: `<name>.faiss`, `<name>.keys.npy`, and the sidecar `<name>.json` that vouches for both.

The sidecar is written last and read first: FAISS gets to see a file only after its size and checksum are right, since
a damaged or crafted index file can crash the process or worse. Vectors are mapped from the file, not copied.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motionrag.database.durable import sector_digest, written_aside
from motionrag.database.faiss_kinds import faiss_module
from motionrag.database.index import VectorIndex
from motionrag.database.keys import ROW_KEY

FORMAT = 1


class IndexUnusable(RuntimeError):
    """The stored index cannot be used; the message says why. Build it again."""


@dataclass(frozen=True)
class Sidecar:
    """What must be true of the two files beside it.

    Attributes:
        format: number of this layout.
        database_id: the database the index belongs to.
        table_version: the version of the clip table it was brought up to date with; only a note, since numbers of
            lost versions are used again. Compare keys, as `VectorIndex.synced` does.
        metric: always `inner_product`.
        dimension: width of a vector.
        ntotal: positions, removed ones included.
        factory: FAISS factory string.
        effort: search effort, see `VectorIndex`.
        recall: measured recall, see `VectorIndex`.
        faiss: version that wrote the file.
        sizes: bytes by file suffix.
        digests: `durable.sector_digest` by file suffix.
    """

    format: int
    database_id: str
    table_version: int
    metric: str
    dimension: int
    ntotal: int
    factory: str
    effort: int
    recall: float
    faiss: str
    sizes: dict[str, int]
    digests: dict[str, str]


def save(index: VectorIndex, folder: Path, name: str, *, database_id: str, table_version: int) -> None:
    """Write an index, replacing the one of the same name; the caller holds the writer lock.

    A kill at any point leaves the old index, the new one, or files that `load` refuses.

    Args:
        index: what to write.
        folder: made if missing.
        name: the retrieval key.
        database_id: the database it belongs to.
        table_version: the version of the clip table it is up to date with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faiss = faiss_module()
    paths = _paths(folder, name)
    with written_aside(paths[".faiss"]) as temporary:
        faiss.write_index(index.faiss_index, str(temporary))
    with written_aside(paths[".keys.npy"]) as temporary, temporary.open("wb") as file:
        np.save(file, index.keys, allow_pickle=False)
    sidecar = Sidecar(
        format=FORMAT,
        database_id=database_id,
        table_version=table_version,
        metric="inner_product",
        dimension=index.dimension,
        ntotal=len(index),
        factory=index.factory,
        effort=index.effort,
        recall=index.recall,
        faiss=faiss.__version__,
        sizes={suffix: path.stat().st_size for suffix, path in paths.items()},
        digests={suffix: sector_digest(path) for suffix, path in paths.items()},
    )
    content = asdict(sidecar)
    with written_aside(folder / f"{name}.json") as temporary:
        text = json.dumps(content | {"sha256_of_the_rest": _digest(content)}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_sidecar(folder: Path, name: str) -> Sidecar:
    """Read what an index's sidecar says, without looking at the files it vouches for.

    Args:
        folder: where it lies.
        name: the retrieval key.

    Returns:
        Its content, as it was written.

    Raises:
        IndexUnusable: it is missing or damaged.
    """
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256_of_the_rest")
        sidecar = Sidecar(**content)
    except FileNotFoundError:
        raise IndexUnusable(f"{path} is missing") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise IndexUnusable(f"{path} cannot be read: {error}") from None
    if digest != _digest(content):
        raise IndexUnusable(f"{path} cannot be read: it does not match its checksum")
    return sidecar


def load(folder: Path, name: str, *, database_id: str, dimension: int) -> VectorIndex:
    """Read an index after checking its sidecar.

    Its keys are those of the table version it was made from: call `VectorIndex.synced` with the table's own before
    searching, and `VectorIndex.spot_check` with a few of the table's vectors.

    Args:
        folder: where it lies.
        name: the retrieval key.
        database_id: the database it must belong to.
        dimension: the width its vectors must have.

    Returns:
        The index.

    Raises:
        IndexUnusable: it is missing, damaged, half-written, or another database's.
    """
    paths = _paths(folder, name)
    before = _identities(paths)
    sidecar = read_sidecar(folder, name)
    expected = {"format": FORMAT, "database_id": database_id, "metric": "inner_product", "dimension": dimension}
    for field, wanted in expected.items():
        if getattr(sidecar, field) != wanted:
            raise IndexUnusable(f"{folder / name}: {field} is {getattr(sidecar, field)!r}, expected {wanted!r}")
    for suffix, path in paths.items():
        if path.stat().st_size != sidecar.sizes.get(suffix):
            raise IndexUnusable(f"{path} has {path.stat().st_size} bytes of {sidecar.sizes.get(suffix)}")
        if sector_digest(path) != sidecar.digests.get(suffix):
            raise IndexUnusable(f"{path} does not match its checksum")
    index = _read_checked(paths, sidecar)
    if _identities(paths) != before:  # a writer replaced a file between the checks and the reading
        raise IndexUnusable(f"{folder / name} changed while it was being read")
    return index


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _paths(folder: Path, name: str) -> dict[str, Path]:
    return {suffix: folder / f"{name}{suffix}" for suffix in (".faiss", ".keys.npy")}


def _identities(paths: dict[str, Path]) -> list[tuple[int, int, int]]:
    """Tell files from others of the same name; IndexUnusable if one is missing."""
    try:
        found = [path.stat() for path in paths.values()]
    except FileNotFoundError as error:
        raise IndexUnusable(f"{error.filename} is missing") from None
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def _read_checked(paths: dict[str, Path], sidecar: Sidecar) -> VectorIndex:
    """Read files whose checksums are right."""
    faiss = faiss_module()
    keys = np.load(paths[".keys.npy"], allow_pickle=False)
    index = faiss.read_index(str(paths[".faiss"]), faiss.IO_FLAG_MMAP_IFC)
    if keys.dtype != ROW_KEY or not (len(keys) == index.ntotal == sidecar.ntotal) or index.d != sidecar.dimension:
        raise IndexUnusable(
            f"{paths['.faiss']} holds {index.ntotal} vectors of width {index.d} and {len(keys)} keys, "
            f"expected {sidecar.ntotal} of width {sidecar.dimension}"
        )
    return VectorIndex(index, keys, factory=sidecar.factory, effort=sidecar.effort, recall=float(sidecar.recall))
