"""One writer per database folder, between processes and between threads.

The lock itself is the kernel's (`filelock`), which frees it when its holder dies, however it dies. The JSON note
beside it only serves the error message: a note left by a dead holder does no harm.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = "write.lock"
NOTE_NAME = "write.lock.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DatabaseLocked(RuntimeError):
    """Another process, or another thread of this one, is writing the database."""


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the only right to write in a database folder; never waits.

    Args:
        folder: the database folder; it must exist.

    Yields:
        Nothing; the right lasts as long as the block.

    Raises:
        DatabaseLocked: somebody else holds it; the message names the holder.
    """
    lock = FileLock(folder / LOCK_NAME, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise DatabaseLocked(
            f"database {folder} is being written by {_holder(folder)}; wait for it or stop it"
        ) from None
    note = folder / NOTE_NAME
    try:
        _write_note(note)
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _write_note(path: Path) -> None:
    note = {
        "pid": os.getpid(),
        "boot_id": _boot_id(),
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(note))
    os.replace(temporary, path)  # whole or absent, for the reader in _holder


def _holder(folder: Path) -> str:
    """Describe the holder as its note does, unless the note was left by a process that has since died."""
    try:
        note = json.loads((folder / NOTE_NAME).read_text())
        pid, host, boot_id, started = int(note["pid"]), note["host"], note["boot_id"], note["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (which has not said yet who it is)"
    if host != socket.gethostname():
        return f"process {pid} on {host} (started {started})"
    if boot_id != _boot_id() or not _is_alive(pid):
        return "another process (which has not said yet who it is)"
    return f"process {pid} (started {started})"


def _boot_id() -> str:
    """Tell this run of the machine from the one before a restart, after which process ids start again."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # on Windows os.kill(pid, 0) would end the process instead of asking
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
