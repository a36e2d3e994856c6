"""Finding the newest version of a Lance table that can be read, and setting unreadable ones aside.

A power cut can leave the newest manifest empty, zeroed or cut short, or a data file missing, and Lance then refuses
the whole table; it opens an all-zero manifest as an empty table. Here every candidate is checked before it is
believed, newest first. Reading changes nothing on the disk; `quarantine` does, and needs the writer lock.
"""

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrag.database.ledger import Ledger

_MAGIC = b"LANC"
_FOOTER = struct.Struct("<QHH4s")  # position of the manifest message, format version (2), magic
_LENGTH = struct.Struct("<I")
# A row is read as a trial from fragments with files that the ledger does not list (a power cut takes what was
# written last), and from this many of the newest; files that were listed as durable are only looked up.
_TRIED_FRAGMENTS = 16
# By default Lance takes 6 GiB for indexes, of which this table has none.
_INDEX_CACHE_BYTES = 16 * 2**20
_METADATA_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Damage:
    """A version that cannot be read: its number, its manifest and what is wrong."""

    version: int
    manifest: Path
    reason: str


def manifests(table: Path) -> dict[int, Path]:
    """Manifest file of every version of a Lance table, newest first.

    Lance names them 2⁶⁴ − 1 − version, so that the newest is listed first; killed commits leave other names.
    """
    numbered = {
        2**64 - 1 - int(path.stem): path
        for path in (table / "_versions").glob("*.manifest")
        if path.stem.isdigit() and len(path.stem) == 20
    }
    return dict(sorted(numbered.items(), reverse=True))


def open_version(table: Path, version: int) -> Any:
    """Open one version with caches of a stated size, shared with no other handle.

    Version numbers are used again after a recovery; a shared cache could answer with the lost one.

    Args:
        table: the Lance folder.
        version: the version's number.

    Returns:
        A `lance.LanceDataset`.
    """
    import lance

    session = lance.Session(  # type: ignore[attr-defined]
        index_cache_size_bytes=_INDEX_CACHE_BYTES, metadata_cache_size_bytes=_METADATA_CACHE_BYTES
    )
    return lance.dataset(str(table), version=version, session=session)


def open_newest(table: Path, ledger: Ledger) -> tuple[Any, list[Damage]]:
    """Open the newest version that can be read.

    Args:
        table: the Lance folder.
        ledger: checksums of the files known to be on the disk.

    Returns:
        A `lance.LanceDataset`, and the newer versions that were passed over.

    Raises:
        OSError: no version can be read.
    """
    damaged: list[Damage] = []
    candidates = manifests(table)
    for version, manifest in candidates.items():
        dataset, reason = _try_version(table, version, manifest, ledger)
        if reason is None:
            return dataset, damaged
        if list(manifests(table)) != list(candidates):  # a writer committed or collected meanwhile
            return open_newest(table, ledger)
        damaged.append(Damage(version, manifest, reason))
    detail = f"the newest: {damaged[0].reason}" if damaged else "it has none"
    raise OSError(f"{table}: no version of this table can be read ({detail}); restore it from a copy or index again")


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Run something that reads Lance files.

    Damaged files can also panic inside Lance; that arrives as pyo3's PanicException, which is no `Exception`.

    Args:
        action: what to run.

    Returns:
        Its result, and None; or None, and in one line how it failed.
    """
    try:
        return action(), None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0][:300]


def quarantine(damaged: Sequence[Damage], ledger: Ledger) -> None:
    """Move the manifests of unreadable versions to `_quarantine` beside the table, each with its reason.

    The next commit takes the number after the newest version that is left, so the lost numbers are used again.

    Args:
        damaged: what `open_newest` passed over.
        ledger: the table's ledger; the moved files are struck out.
    """
    folder = ledger.folder.parent / "_quarantine"
    folder.mkdir(exist_ok=True)
    for damage in damaged:
        target = folder / damage.manifest.name
        for number in range(1, 1000):
            if not target.exists():
                break
            target = folder / f"{damage.manifest.name}.{number}"
        os.replace(damage.manifest, target)
        target.with_name(f"{target.name}.reason.txt").write_text(damage.reason + "\n", encoding="utf-8")
    ledger.forget([damage.manifest.relative_to(ledger.folder).as_posix() for damage in damaged])


def _try_version(table: Path, version: int, manifest: Path, ledger: Ledger) -> tuple[Any, str | None]:
    """Open a version and try it: the dataset, and None; or what is wrong."""
    if fault := _manifest_fault(manifest, ledger):
        return None, fault
    dataset, fault = attempt(lambda: open_version(table, version))
    return dataset, fault or _trial_fault(dataset, table, version, ledger)


def _manifest_fault(manifest: Path, ledger: Ledger) -> str | None:
    """Check a manifest against the ledger, and its frame (length, position, magic), before Lance reads it."""
    try:
        content = manifest.read_bytes()
    except OSError as error:
        return f"manifest {manifest.name} cannot be read: {error}"
    mismatch = ledger.fault(manifest.relative_to(ledger.folder).as_posix())
    if len(content) < _LENGTH.size + _FOOTER.size:
        return f"manifest {manifest.name} has only {len(content)} bytes"
    position, _, _, magic = _FOOTER.unpack(content[-_FOOTER.size :])
    end = len(content) - _FOOTER.size
    if magic != _MAGIC or position + _LENGTH.size > end:
        return f"manifest {manifest.name} is cut short or overwritten"
    if position + _LENGTH.size + _LENGTH.unpack_from(content, position)[0] != end:
        return f"manifest {manifest.name} has a message of the wrong length"
    return f"manifest {manifest.name} {mismatch}" if mismatch else None


def _trial_fault(dataset: Any, table: Path, version: int, ledger: Ledger) -> str | None:
    """Check that every file of a version is there at its full size, and read a row where damage is likeliest."""
    if dataset.version != version:
        return f"manifest says version {dataset.version}"
    metadata = [fragment.metadata for fragment in dataset.get_fragments()]
    starts, rows = [], 0
    for number, fragment in enumerate(metadata):
        expected = _expected_sizes(fragment)
        for name, size in expected.items():
            if fault := _size_fault(table / name, size):
                return f"{name} {fault}"
        unproven = any(name not in ledger.digests for name in expected)
        if fragment.num_rows and (unproven or number >= len(metadata) - _TRIED_FRAGMENTS):
            starts.append(rows)
        rows += fragment.num_rows
    return attempt(lambda: dataset.take(starts, columns=["id"]))[1]


def _expected_sizes(fragment: Any) -> dict[str, int | None]:
    """Files of a fragment, relative to the table, with their sizes in bytes where the manifest records them."""
    expected = {f"data/{file.path}": file.file_size_bytes for file in fragment.files}
    if fragment.deletion_file is not None:
        expected[fragment.deletion_file.path(fragment.id)] = None
    return expected


def _size_fault(path: Path, size: int | None) -> str | None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if found == 0 or (size is not None and found != size):
        return f"has {found} bytes" + (f" of {size}" if size else "")
    return None
