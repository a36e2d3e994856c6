"""What evaluations write: files that are whole if they are there, in a folder that holds one evaluation."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to mix results of different weights or settings; a new folder gets its `settings.json`.

    Args:
        out: Folder of the evaluation; it is there.
        settings: What is run, as JSON values.

    Raises:
        ValueError: If it holds an evaluation with others.
    """
    file = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        write_text(file, json.dumps(settings, indent=2) + "\n")
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    other = [f"{name} {stored.get(name)!r}" for name in settings if stored.get(name) != settings[name]]
    if other:
        raise ValueError(f"{out} holds figures with {', '.join(other)}; choose another folder, or delete it.")


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write CSV, see `write_text`.

    Args:
        file: Where.
        rows: With the same names each; none makes an empty file.
    """
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(file, text.getvalue())


def write_text(file: Path, text: str) -> None:
    """Write aside and rename: a file that is there is whole.

    Args:
        file: Where.
        text: What.
    """
    aside = file.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8", newline="")
    aside.replace(file)
