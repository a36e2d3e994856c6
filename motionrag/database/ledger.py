"""The ledger of a table: the name and SHA-256 of every file of it that has reached the disk.

Lance neither fsyncs what it writes nor stores checksums. Its files never change once written, so one line per
file does both jobs: what is listed is durable, and what no longer matches its line is damaged. A line reads
`<sha256>  <crc32 of the rest>  <name>`; one that is damaged itself is passed over, and its file listed again.
"""

import os
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from motionrag.database.durable import fsync_file, fsync_folder, sha256, written_aside

# Rewritten by Lance at every commit, and only a hint: nothing is lost with it.
_CHANGING = "latest_version_hint.json"


class Ledger:
    """The files of one Lance folder that are known to be on the disk.

    Args:
        folder: the Lance folder; the ledger lies beside it, with the suffix `.sha256`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.with_suffix(".sha256")
        self.digests: dict[str, str] = dict(_lines(self.path))

    def record(self) -> None:
        """Make every file of the folder that is not listed yet durable, then list it.

        The order matters: contents, then the names in their folders, and the ledger last.
        """
        new = [name for name in files(self.folder) if name not in self.digests]
        if not new:
            return
        digests = {}
        for name in new:
            fsync_file(self.folder / name)
            digests[name] = sha256(self.folder / name)
        for parent in {(self.folder / name).parent for name in new} | {self.folder, self.folder.parent}:
            fsync_folder(parent)
        # A line torn by a kill must not swallow the next one, hence the newline in front.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + "".join(_line(name, digest) for name, digest in digests.items()))
        fsync_file(self.path)
        fsync_folder(self.path.parent)
        self.digests.update(digests)

    def forget(self, names: Collection[str]) -> None:
        """Strike out files that were removed or set aside."""
        for name in names:
            self.digests.pop(name, None)
        with written_aside(self.path) as temporary:
            temporary.write_text("".join(_line(*item) for item in self.digests.items()), encoding="utf-8")

    def fault(self, name: str) -> str | None:
        """Say what is wrong with a listed file, or None: it is intact, or not listed.

        Args:
            name: path relative to the Lance folder.

        Returns:
            A few words, or None.
        """
        path = self.folder / name
        if name not in self.digests:
            return None
        if not path.exists():
            return "is missing"
        return None if sha256(path) == self.digests[name] else "does not match its checksum"


def files(folder: Path) -> list[str]:
    """Names, relative to a Lance folder and with forward slashes, of the files in it that never change."""
    found = []
    for parent, _, names in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        found += [(relative / name).as_posix() for name in names if name != _CHANGING]
    return found


def _line(name: str, digest: str) -> str:
    return f"{digest}  {zlib.crc32(f'{digest}{name}'.encode()):08x}  {name}\n"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Read (name, digest) pairs, without lines that were torn by a kill or damaged since."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.split("  ", 2) if line.count("  ") >= 2 else ("", "", "")
        if name and _line(name, digest) == line + "\n":
            yield name, digest
