"""The list of files that could not be indexed, kept beside the table as `errors.jsonl`.

A file on it is skipped by the next run until it changes, so that a poisonous video is not tried again every time.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from motionrag.database.durable import written_aside

NAME = "errors.jsonl"


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
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        entries = [FailedClip(**json.loads(line)) for line in lines]
        self._entries = {(entry.uri, entry.start_s, entry.end_s): entry for entry in entries}

    def find(self, uri: str, start_s: float, end_s: float | None, file_size: int, file_mtime_ns: int) -> str | None:
        """Why a clip failed before, if its file is still the same; None if it may be tried."""
        entry = self._entries.get((uri, start_s, end_s))
        same = entry is not None and (entry.file_size, entry.file_mtime_ns) == (file_size, file_mtime_ns)
        return entry.reason if entry is not None and same else None

    def add(self, entry: FailedClip) -> None:
        """Remember a failure; `save` writes it."""
        self._entries[(entry.uri, entry.start_s, entry.end_s)] = entry

    def forget(self, uri: str) -> None:
        """Drop what is known of a file that could be read now."""
        self._entries = {span: entry for span, entry in self._entries.items() if span[0] != uri}

    def save(self) -> None:
        """Write the list durably, in one step."""
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in self._entries.values()]
        if lines or self._path.exists():
            with written_aside(self._path) as aside:
                aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
