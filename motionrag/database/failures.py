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
    """A clip that could not be decoded, and the state of its file at that time."""

    uri: str
    start_s: float
    end_s: float | None
    file_size: int
    file_mtime_ns: int
    reason: str


class FailureLog:
    """Failures of one database, by file and span."""

    def __init__(self, folder: Path) -> None:
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
        """Why a clip failed before, if its file is still the same; None if it may be tried."""
        entry = self._entries.get((uri, start_s, end_s))
        same = entry is not None and (entry.file_size, entry.file_mtime_ns) == (file_size, file_mtime_ns)
        return entry.reason if entry is not None and same else None

    def add(self, entry: FailedClip) -> None:
        """Remember a failure; `save` writes it."""
        self._entries[entry.uri, entry.start_s, entry.end_s] = entry
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
