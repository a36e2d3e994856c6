"""Writing files so that a killed process or a power cut leaves the old content or the new, never a mixture.

Small functions on paths. Knows nothing of tables or indexes.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from einops import rearrange

_CHUNK_BYTES = 4 * 2**20
_SECTOR_BYTES = 512


def fsync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows has no such call and needs none."""
    if os.name != "nt":
        fsync_file(path)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on leaving without an error it durably becomes `path`.

    There is one temporary name per target (only one process writes), so a killed write leaves at most one
    file behind, and the next write overwrites it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sector_digest(path: Path) -> str:
    """Checksum of a file that must be read in milliseconds: SHA-256 over the 64-bit sums of its 512-byte sectors.

    Any change inside a single 8-byte word, and any lost, stale, moved or zeroed sector, changes it (up to a chance of
    2⁻⁶⁴); what it cannot see is words of one sector changing places. That is for accidents: whoever can forge the file
    can forge its checksum too. 200 MB take 14 ms, where SHA-256 takes 106 ms with, and far more without SHA
    instructions.
    """
    if path.stat().st_size == 0:
        return hashlib.sha256().hexdigest()
    content = np.memmap(path, np.uint8, mode="r")
    whole = len(content) - len(content) % _SECTOR_BYTES
    sectors = rearrange(content[:whole].view(np.uint64), "(sector word) -> sector word", word=_SECTOR_BYTES // 8)
    digest = hashlib.sha256(sectors.sum(axis=1).tobytes())  # the sums wrap around
    digest.update(content[whole:].tobytes())
    return digest.hexdigest()
