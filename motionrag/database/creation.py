"""Making the folder of a new database, so that it appears complete or not at all."""

import glob
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from motionrag.database.durable import fsync_folder
from motionrag.database.manifest import Manifest
from motionrag.database.schema import table_schema
from motionrag.database.table import ClipTable

_LEFTOVER_S = 3600.0  # a creation takes a second


def require_free(path: Path) -> None:
    """Refuse a folder that holds anything.

    Args:
        path: Where a database is to be made.

    Raises:
        FileExistsError: If something is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; open it with MotionDatabase(path), or choose another folder.")


def create_folder(path: Path, manifest: Manifest) -> None:
    """Make a database without clips.

    Args:
        path: A folder that does not exist, or is empty.
        manifest: Its settings.

    Raises:
        FileExistsError: If something is there, also made by another process meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with TemporaryDirectory(prefix=_prefix(path), dir=path.parent) as aside:
        folder = Path(aside) / path.name
        folder.mkdir()
        schema = table_schema(manifest.embedding_dims, manifest.num_tokens, manifest.token_dim)
        ClipTable.create(folder / "clips.lance", schema)
        manifest.write(folder)
        try:
            os.replace(folder, path)  # takes the place of an empty folder
        except OSError:
            require_free(path)
            raise
    fsync_folder(path.parent)


def _prefix(path: Path) -> str:
    return f".{path.name}.creating-"


def _remove_leftovers(path: Path) -> None:
    """Remove what creations of the same database left behind that were killed long ago."""
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        with suppress(FileNotFoundError):  # another creation may finish meanwhile
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_S:
                shutil.rmtree(leftover, ignore_errors=True)
