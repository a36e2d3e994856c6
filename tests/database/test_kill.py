"""Indexing killed with SIGKILL at random moments and continued: the database equals that of an undisturbed run."""

import os
import random
import select
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import motionrag
from motionrag.database import MotionDatabase
from tests.database.conftest import all_rows, tree
from tests.video_files import make_video

NUM_VIDEOS = 40
# Loading the encoders takes ten times as long as indexing, so one process loads them and forks for each path that it
# reads from standard input. Forking is safe here only because neither Lance nor FAISS has been imported yet.
PROGRAM = """
import os, sys
from pathlib import Path
import torch
from motionrag.database import MotionDatabase, build
from motionrag.encoder import MotionEncoder
torch.set_num_threads(1)
build.COMMIT_ROWS = 1  # every encoding batch
clips = Path(sys.argv[1])
encoder = MotionEncoder.from_pretrained("pocket")
for what in ("motion_tokens", "context_tokens", "text", "image"):
    encoder.fingerprint(what)
assert not {"lance", "faiss"} & set(sys.modules)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        path = Path(line.strip())
        exists = (path / "manifest.json").exists()
        database = MotionDatabase(path, encoder=encoder) if exists else MotionDatabase.create(path, encoder=encoder)
        database.add(clips, captions=clips / "clips.csv", num_workers=2)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def many_clips(tmp_path_factory):
    """Clips with captions, one of them garbage, one a copy of another, all with a column of their own."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["file,caption,number"]
    for number in range(NUM_VIDEOS):
        make_video(folder / f"{number:02}.mp4", num_frames=8 + number % 20, seed=number)
        lines.append(f"{number:02}.mp4,clip number {number},{number}")
    (folder / "17.mp4").write_bytes(b"garbage")
    (folder / "copy.mp4").write_bytes((folder / "05.mp4").read_bytes())
    (folder / "clips.csv").write_text("\n".join(lines))
    return folder


class Runner:
    """Indexes in processes of their own, which can be killed."""

    def __init__(self, clips):
        name, value = "MOTIONRAG_TEST", uuid.uuid4().hex
        self._mark = f"{name}={value}".encode()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(clips)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, name: value, "PYTHONPATH": str(Path(motionrag.__file__).parents[1])},
        )

    def index(self, path, kill_after_s=None):
        """Index into `path`: whether the process was killed, and how long it took."""
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        child, started = int(self._process.stdout.readline()), time.monotonic()
        if kill_after_s is not None and not select.select([self._process.stdout], [], [], kill_after_s)[0]:
            os.kill(child, signal.SIGKILL)  # a zombie, if it has just ended: its number is not given away yet
        status = int(self._process.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status != 0, time.monotonic() - started

    def close(self):
        self._process.kill()
        self._process.communicate()

    def alive(self):
        """Processes that carry the mark in their environment: the runner and decoding workers."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # ended meanwhile
        return found


@pytest.fixture
def runner(many_clips):
    runner = Runner(many_clips)
    yield runner
    runner.close()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for orphans in /proc")
@pytest.mark.parametrize("num_kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_continued(many_clips, encoder, tmp_path, runner, num_kills):
    runner.index(tmp_path / "undisturbed")
    undisturbed = MotionDatabase(tmp_path / "undisturbed", encoder=encoder)
    rows, errors = all_rows(undisturbed), (undisturbed.path / "errors.jsonl").read_bytes()
    assert (len(rows), len(errors.splitlines())) == (NUM_VIDEOS - 1, 1)
    _, duration = runner.index(tmp_path / "timed")

    generator, kills, databases = random.Random(num_kills), 0, 0
    path, anew = tmp_path / "db0", True
    while True:
        # A moment in each third of the run time in turn; the last run is left alone.
        moment = (kills % 3 + generator.random()) / 3 * duration if kills < num_kills else None
        killed, taken = runner.index(path, moment)
        kills += killed
        if killed:
            anew = False
            continue
        if anew:
            duration = taken  # the machine may be less busy than when it was measured
        database = MotionDatabase(path, encoder=encoder)
        assert database.verify() == []
        assert all_rows(database) == rows
        assert (path / "errors.jsonl").read_bytes() == errors
        assert database.search(text="clip number 23", k=1)[0].clip.metadata["number"] == 23
        assert database.add(many_clips, captions=many_clips / "clips.csv", dry_run=True).added == 0
        if kills == num_kills:
            break
        databases += 1
        path, anew = tmp_path / f"db{databases}", True
    runner.close()
    deadline = time.monotonic() + 20
    while runner.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert runner.alive() == []


def test_killed_while_creating(tmp_path, encoder, runner):
    """A killed creation leaves no folder that looks like a database, and does not stand in the way of the next."""
    runner.index(tmp_path / "warm")
    for number in range(6):
        path = tmp_path / f"db{number}"
        runner.index(path, 0.03 * number)
        if not path.exists():
            MotionDatabase.create(path, encoder=encoder)
        database = MotionDatabase(path, encoder=encoder)
        assert database.verify() == []
        assert set(tree(path)) >= {"manifest.json", "clips.sha256"}
