"""A small folder of clips, the pocket encoder, and a filled database that each test gets a copy of."""

import csv
import os
import shutil
from pathlib import Path

import pytest

from motionrag.database import MotionDatabase
from motionrag.encoder import MotionEncoder
from tests.video_files import make_video

SUBJECTS = ("horse", "car", "wave", "dancer")
MOTIONS = ("pan", "orbit", "zoom")
NUM_CLIPS = len(SUBJECTS) * len(MOTIONS)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def all_rows(database: MotionDatabase) -> list[dict]:
    """Every column of every row, by id."""
    return sorted(database._table.scan().to_pylist(), key=lambda row: row["id"])


@pytest.fixture(scope="session")
def encoder() -> MotionEncoder:
    return MotionEncoder.from_pretrained("pocket")


@pytest.fixture(scope="session")
def made_clips(tmp_path_factory) -> Path:
    """Twelve clips and `clips.csv` with further columns; one caption holds a comma, one is empty."""
    folder = tmp_path_factory.mktemp("clips")
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "motion", "take", "gain", "licence", "source"])
        for number in range(NUM_CLIPS):
            subject, motion = SUBJECTS[number // len(MOTIONS)], MOTIONS[number % len(MOTIONS)]
            name = f"{subject}_{motion}.mp4"
            make_video(folder / name, num_frames=10 + 2 * number, seed=number)
            caption = "" if number == 5 else f"A {subject}, seen in a {motion}"
            writer.writerow([name, caption, motion, number, number / 4, "CC0" if number % 2 else "unknown", subject])
    return folder


@pytest.fixture
def clips(made_clips, tmp_path) -> Path:
    """A copy of the clips that the test may change; `cp -p`, so that times are kept."""
    return Path(shutil.copytree(made_clips, tmp_path / "clips"))


@pytest.fixture(scope="session")
def filled(made_clips, encoder, tmp_path_factory) -> Path:
    """Folder of a database that holds the clips; never write to it."""
    path = tmp_path_factory.mktemp("filled") / "db"
    report = MotionDatabase.create(path, encoder=encoder).add(made_clips, captions=made_clips / "clips.csv")
    assert (report.added, report.failed) == (NUM_CLIPS, [])
    return path


@pytest.fixture
def path(filled, tmp_path) -> Path:
    """Folder of a copy of the filled database."""
    return Path(shutil.copytree(filled, tmp_path / "db"))


@pytest.fixture
def database(path, encoder) -> MotionDatabase:
    return MotionDatabase(path, encoder=encoder)


@pytest.fixture
def empty(tmp_path, encoder) -> MotionDatabase:
    return MotionDatabase.create(tmp_path / "empty", encoder=encoder)


def keep_time(path: Path, change) -> None:
    """Change a file and give it back its time."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
