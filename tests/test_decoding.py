"""Decoding in processes: order, hangs, crashes, recycling, and that no process is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from motionrag import decoding
from motionrag.decoding import decode_clips, default_num_workers
from motionrag.video import Clip, DecodedClip, VideoError, read_clip
from tests import bad_decoders
from tests.video_files import make_video

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("decoding") / "a.mp4", num_frames=24)


def is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(process_ids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, process_ids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, process_ids))


def run_script(text, tmp_path, **options):
    script = tmp_path / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, script], env=environment, text=True, **options)


def test_results_equal_read_clip_and_keep_their_order(tmp_path):
    clips = [
        Clip(make_video(tmp_path / f"{i}.mp4", num_frames=10 + i, size=(32 + 16 * (i % 3), 32), seed=i))
        for i in range(8)
    ]
    results = list(decode_clips(clips, num_workers=2, num_frames=5))
    assert [index for index, _ in results] == list(range(8))
    for (_, result), clip in zip(results, clips, strict=True):
        expected = read_clip(clip, num_frames=5, reader="pyav")
        assert isinstance(result, DecodedClip)
        np.testing.assert_array_equal(result.frames, expected.frames)
        assert (result.num_frames, result.fps) == (expected.num_frames, expected.fps)


def test_a_slow_clip_does_not_overtake_nor_get_overtaken(video):
    captions = ["slow", "", "", "slow", ""]
    clips = [Clip(video, caption=caption) for caption in captions]
    results = list(decode_clips(clips, num_workers=2, decode=bad_decoders.misbehave))
    assert [index for index, _ in results] == [0, 1, 2, 3, 4]
    assert len({result.reader for _, result in results}) == 2


def test_unreadable_files_are_results_and_the_run_goes_on(tmp_path, video):
    (tmp_path / "empty.mp4").touch()
    clips = [Clip(tmp_path / "missing.mp4"), Clip(video), Clip(tmp_path / "empty.mp4"), Clip(video, 50.0)]
    results = dict(decode_clips(clips, num_workers=1))
    assert isinstance(results[1], DecodedClip)
    for index, reason in {0: "No such file", 2: "zero bytes", 3: "no frame from 50 s"}.items():
        assert isinstance(results[index], VideoError)
        assert clips[index].uri in str(results[index])
        assert reason in str(results[index])


def test_hang_that_holds_the_interpreter_lock_is_killed(video):
    clips = [Clip(video, caption=caption) for caption in ("", "hang", "", "")]
    start = time.monotonic()
    results = dict(decode_clips(clips, num_workers=1, timeout_s=1.0, decode=bad_decoders.misbehave))
    assert time.monotonic() - start < 20
    assert "hung for 1 s and was stopped" in str(results[1])
    readers = [results[i].reader for i in (0, 2, 3)]
    assert readers[0] != readers[1] == readers[2]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("segfault", "crashed (signal 11, Segmentation fault"),
        ("exit", "crashed (exit code 3)"),
        ("bug", "KeyError: 'a fault of the decoder'"),
        ("memory", "MemoryError: Unable to allocate 64.0 PiB"),
    ],
)
def test_crash_costs_one_clip(video, caption, reason):
    clips = [Clip(video), Clip(video, caption=caption), Clip(video)]
    results = dict(decode_clips(clips, num_workers=1, decode=bad_decoders.misbehave))
    assert reason in str(results[1])
    assert isinstance(results[0], DecodedClip)
    assert isinstance(results[2], DecodedClip)


def test_workers_are_recycled(video, monkeypatch):
    monkeypatch.setattr(decoding, "RECYCLE_AFTER", 2)
    results = decode_clips([Clip(video)] * 5, num_workers=1, decode=bad_decoders.tell_process)
    first, second, third, fourth, fifth = (result.reader for _, result in results)
    assert first == second != third == fourth != fifth


def test_a_worker_that_died_while_idle_is_replaced(video):
    results = decode_clips([Clip(video)] * 6, num_workers=1, decode=bad_decoders.tell_process)
    _, first = next(results)
    time.sleep(0.5)  # the clips decoded ahead are ready, the worker is idle
    os.kill(int(first.reader), 9)
    assert wait_until_gone([int(first.reader)], 5)
    assert all(isinstance(result, DecodedClip) for _, result in results)


def test_no_more_than_the_window_is_decoded_ahead(tmp_path):
    paths = [make_video(tmp_path / f"{i}.mp4", num_frames=4, size=(16, 16)) for i in range(8)]
    results = decode_clips([Clip(path) for path in paths], num_workers=1, timeout_s=1.0)
    next(results)
    time.sleep(0.5)
    # The window is two: clips 1 (in any case) and 2 at most were begun, so clip 4 has not been opened yet.
    paths[4].unlink()
    assert "No such file" in str(dict(results)[4])


@pytest.mark.parametrize("ending", ["exhausted", "closed", "dropped", "raised"])
def test_no_process_is_left(video, ending):
    results = decode_clips([Clip(video)] * 8, num_workers=2, decode=bad_decoders.tell_process)
    seen = {int(next(results)[1].reader), int(next(results)[1].reader)}
    assert all(map(is_alive, seen))
    if ending == "exhausted":
        seen |= {int(result.reader) for _, result in results}
    elif ending == "closed":
        results.close()
    elif ending == "dropped":
        del results
    else:
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt)
    assert wait_until_gone(seen, 5)


def test_closing_does_not_wait_for_a_hanging_clip(video):
    results = decode_clips([Clip(video), Clip(video, caption="hang")], num_workers=1, decode=bad_decoders.misbehave)
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 5


def test_killing_a_worker_that_its_own_thread_closes_meanwhile():
    class Closing(decoding._Worker):
        """Has a process when it is first looked at, and none from then on."""

        @property
        def _running(self):
            running, self._left = self._left, None
            return running

        @_running.setter
        def _running(self, running):
            self._left = running

    worker = Closing()
    process, connection = decoding._start_process()
    worker._running = (process, connection)
    worker.kill()
    assert process.wait(5) == -signal.SIGKILL
    connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killing_the_parent_ends_even_a_worker_that_hangs(tmp_path, video):
    hanging, idle = tmp_path / "hanging.mp4", tmp_path / "idle.txt"
    hanging.write_bytes(video.read_bytes())
    script = run_script(
        "from tests import bad_decoders\n"
        "from motionrag.decoding import decode_clips\n"
        "from motionrag.video import Clip\n"
        f"first = decode_clips([Clip({str(video)!r})] * 2, num_workers=1, decode=bad_decoders.tell_process)\n"
        f"open({str(idle)!r}, 'w').write(next(first)[1].reader)\n"
        f"list(decode_clips([Clip({str(hanging)!r})], timeout_s=1, decode=bad_decoders.note_process_and_hang))\n",
        tmp_path,
    )
    noted = Path(f"{hanging}.pid")
    deadline = time.monotonic() + 20
    while not (noted.exists() and noted.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = [int(idle.read_text()), int(noted.read_text())]
    script.kill()
    script.wait()
    assert wait_until_gone(processes[:1], 5)
    assert wait_until_gone(processes, 15)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_script_and_worker_at_once(tmp_path, video):
    hanging = tmp_path / "hanging.mp4"
    hanging.write_bytes(video.read_bytes())
    script = run_script(
        # A shell starts what runs in the background with the signal ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests import bad_decoders\n"
        "from motionrag.decoding import decode_clips\n"
        "from motionrag.video import Clip\n"
        f"list(decode_clips([Clip({str(hanging)!r})], decode=bad_decoders.note_process_and_hang))\n",
        tmp_path,
        stderr=subprocess.PIPE,
    )
    noted = Path(f"{hanging}.pid")
    deadline = time.monotonic() + 20
    while not (noted.exists() and noted.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    script.send_signal(signal.SIGINT)
    # The worker prints nothing, the script its own traceback.
    assert script.communicate(timeout=60)[1].count("KeyboardInterrupt") == 1
    assert wait_until_gone([int(noted.read_text())], 1)


def test_script_without_main_guard_and_standard_input(tmp_path, video):
    text = (
        "print('started')\n"
        "from motionrag.decoding import decode_clips\n"
        "from motionrag.video import Clip\n"
        f"for index, result in decode_clips([Clip({str(video)!r})] * 3, num_workers=2):\n"
        "    print(index, result.frames.shape)\n"
    )
    expected = "started\n" + "".join(f"{i} (16, 48, 64, 3)\n" for i in range(3))
    with run_script(text, tmp_path, stdout=subprocess.PIPE) as script:
        assert script.communicate(timeout=60)[0] == expected
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    from_stdin = subprocess.run(
        [sys.executable, "-"], input=text, capture_output=True, text=True, env=environment, timeout=60
    )
    assert from_stdin.stdout == expected


def test_workers_start_light(tmp_path):
    code = "import sys, motionrag.decoding; print(sorted({'torch', 'PIL', 'av', 'decord'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_arguments_are_checked_at_once(video):
    for wrong in ({"num_workers": 0}, {"num_frames": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is 0; it must be at least 1"):
            decode_clips([Clip(video)], **wrong)
    with pytest.raises(ValueError, match="timeout_s is 0; it must be more than 0 seconds"):
        decode_clips([Clip(video)], timeout_s=0)
    assert list(decode_clips([])) == []
    assert 1 <= default_num_workers() <= 8


def test_decode_function_that_workers_cannot_find():
    def local(clip, num_frames):
        raise NotImplementedError

    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="put it into a module"):
        decode_clips([], decode=local)


def test_worker_that_cannot_start_says_so(video, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="did not start"):
        next(decode_clips([Clip(video)]))
