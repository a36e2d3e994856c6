"""The list of files that could not be indexed, kept beside the table as `errors.jsonl`.

A file on it is skipped by the next run until it changes, so that a poisonous video is not tried again every time.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from motionrag.database.durable import written_aside

logger = logging.getLogger(__name__)

NAME = "errors.jsonl"
_Span = tuple[str, float, float | None]  # uri, start_s, end_s


@dataclass(frozen=True)
class FailedClip:
    """A clip that could not be decoded, the state of its file at that time, and how it was tried."""

    uri: str
    start_s: float
    end_s: float | None
    file_size: int
    file_mtime_ns: int
    reason: str
    reader: str = "auto"
    timeout_s: float | None = None


class FailureLog:
    """Failures of one database, by file and span.

    Args:
        folder: The database.
        reader: How clips are decoded now; what failed with another reader is tried again.
        timeout_s: Likewise the longest time for one clip.
        retry: Try everything again.
    """

    def __init__(
        self, folder: Path, *, reader: str = "auto", timeout_s: float | None = None, retry: bool = False
    ) -> None:
        self._reader, self._timeout_s, self._retry = reader, timeout_s, retry
        self._path = folder / NAME
        self._entries: dict[_Span, FailedClip] = {}
        self._changed = False
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = FailedClip(**json.loads(line))
            except (ValueError, TypeError) as error:
                logger.warning("%s line %d cannot be read, its file is tried again: %s", self._path, number, error)
            else:
                self._entries[entry.uri, entry.start_s, entry.end_s] = entry

    def find(self, uri: str, start_s: float, end_s: float | None, file_size: int, file_mtime_ns: int) -> str | None:
        """Why a clip failed before, if nothing has changed since; None if it may be tried."""
        entry = self._entries.get((uri, start_s, end_s))
        if entry is None or self._retry:
            return None
        now = (file_size, file_mtime_ns, self._reader, self._timeout_s)
        then = (entry.file_size, entry.file_mtime_ns, entry.reader, entry.timeout_s)
        return entry.reason if now == then else None

    def add(
        self, uri: str, start_s: float, end_s: float | None, file_size: int, file_mtime_ns: int, reason: str
    ) -> None:
        """Remember a failure; `save` writes it."""
        self._entries[uri, start_s, end_s] = FailedClip(
            uri, start_s, end_s, file_size, file_mtime_ns, reason, self._reader, self._timeout_s
        )
        self._changed = True

    def forget(self, uri: str, start_s: float, end_s: float | None) -> None:
        """Drop what is known of a clip that could be read now."""
        self._changed |= self._entries.pop((uri, start_s, end_s), None) is not None

    def save(self) -> None:
        """Write the list durably, in one step, if it has changed."""
        if self._changed:
            with written_aside(self._path) as aside:
                # In ASCII, so that a line of the file is a line to every reader.
                lines = (json.dumps(asdict(entry)) for entry in self._entries.values())
                aside.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
            self._changed = False
