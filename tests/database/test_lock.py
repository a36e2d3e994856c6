"""The writer lock: two processes, two threads, a killed holder, a note that lies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from motionrag.database.lock import NOTE_NAME, DatabaseLocked, writer_lock

HOLDER = """
import sys, time
from pathlib import Path
from motionrag.database.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_process_is_told_who_holds_the_lock(tmp_path, holder):
    started = time.monotonic()
    message = rf"{tmp_path} is being written by process {holder.pid} \(started 20"
    with pytest.raises(DatabaseLocked, match=message), writer_lock(tmp_path):
        pass
    assert time.monotonic() - started < 1


def test_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / NOTE_NAME).exists()
    with writer_lock(tmp_path):
        assert json.loads((tmp_path / NOTE_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NOTE_NAME).exists()


def test_same_process_and_other_thread_are_refused(tmp_path):
    errors = []

    def other():
        try:
            with writer_lock(tmp_path):
                pass
        except DatabaseLocked as error:
            errors.append(str(error))

    with writer_lock(tmp_path):
        with pytest.raises(DatabaseLocked), writer_lock(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in errors[0]
    with writer_lock(tmp_path):
        pass


def test_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), writer_lock(tmp_path):
        _ = 1 / 0
    with writer_lock(tmp_path):
        pass


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": 1}', '{"pid": 999999999, "boot_id": "x", "host": "h"}'])
def test_unreadable_note_does_not_hide_the_lock(tmp_path, holder, note):
    (tmp_path / NOTE_NAME).write_text(note)
    with pytest.raises(DatabaseLocked, match="another process"), writer_lock(tmp_path):
        pass


def test_note_of_an_earlier_holder_is_not_blamed(tmp_path, holder):
    path = tmp_path / NOTE_NAME
    note = json.loads(path.read_text())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.write_text(json.dumps(note | {"pid": dead.pid}))
    with pytest.raises(DatabaseLocked, match="another process"), writer_lock(tmp_path):
        pass
    path.write_text(json.dumps(note | {"boot_id": "before the restart"}))
    with pytest.raises(DatabaseLocked, match="another process"), writer_lock(tmp_path):
        pass
