"""Decode many clips in processes of their own, which can hang, crash and be killed without harm to the caller.

What is decoded, and how, is in `video/`. Workers are started with `subprocess`, not `multiprocessing`: that would
import the user's main script again, which goes wrong in a script without `if __name__ == "__main__"` and in a
program read from standard input. A thread for each worker waits for it, so they decode while the caller computes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from threading import Lock, local

from motionrag.video import Clip, DecodedClip, VideoError, read_clip

Decode = Callable[[Clip, int], DecodedClip]

# Clips decoded ahead of the one the caller is at, for each worker: one in work and one waiting to be taken.
PREFETCH_PER_WORKER = 2
MIN_TIMEOUT_S = 30.0
TIMEOUT_PER_CLIP_SECOND = 5.0
# For a whole file, whose length is not known before it is opened: five times real time at 8 Mbit/s.
TIMEOUT_PER_BYTE_S = 5e-6
# Clips after which a worker is replaced, for decoders leak.
RECYCLE_AFTER = 300
# A worker whose parent was killed ends itself this long after its clip should have been ready.
ORPHAN_GRACE_S = 5
START_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 10.0

_WORKER_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from motionrag.decoding import serve
serve(int(sys.argv[2]))
"""


def read_clip_in_worker(clip: Clip, num_frames: int, reader: str = "auto") -> DecodedClip:
    """`read_clip` in a process that may be killed, so that every reader may be asked for."""
    return read_clip(clip, num_frames=num_frames, reader=reader, in_worker=True)


def decode_clips(
    clips: Sequence[Clip],
    *,
    num_frames: int = 16,
    num_workers: int | None = None,
    timeout_s: float | None = None,
    decode: Decode = read_clip_in_worker,
) -> Generator[tuple[int, DecodedClip | VideoError], None, None]:
    """Decode clips in worker processes and yield them in their order, a few ahead of the caller.

    A clip that cannot be read, hangs or crashes its worker yields a VideoError; the others go on in a new worker.
    Leaving the loop early, closing the generator and Ctrl-C end all workers; so does the death of this process.

    Args:
        clips: what to decode.
        num_frames: frames to sample from each.
        num_workers: processes; default: one for each core but one, at most 8.
        timeout_s: seconds a clip may take; default: 30, or 5 for each second of the clip, or 5 for each megabyte
            of a whole file, whichever is more.
        decode: what a worker does with a clip and `num_frames`: a function that a module can be asked for by name.

    Returns:
        An iterator over the position in `clips` and the decoded clip or the error.

    Raises:
        ValueError: for a number that makes no sense.
        RuntimeError: where processes cannot inherit a socket (Windows), or if a worker does not start.
    """
    num_workers = default_num_workers() if num_workers is None else num_workers
    for name, value in (("num_workers", num_workers), ("num_frames", num_frames)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if timeout_s is not None and timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be more than 0 seconds, or None.")
    if getattr(decode, "__module__", None) == "__main__":
        raise ValueError("decode is defined in the main script, which workers do not import; put it into a module.")
    if os.name != "posix":
        raise RuntimeError("decode_clips needs a POSIX system; call read_clip for each clip instead.")
    return _decode_in_order(clips, num_frames, num_workers, timeout_s, decode)


def default_num_workers() -> int:
    """One worker for each core this process may use but one, at least 1 and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores - 1))


def _decode_in_order(
    clips: Sequence[Clip],
    num_frames: int,
    num_workers: int,
    timeout_s: float | None,
    decode: Decode,
) -> Generator[tuple[int, DecodedClip | VideoError], None, None]:
    workers: list[_Worker] = []
    of_thread = local()

    def own_worker() -> None:
        # Held by the thread, so that the garbage collector cannot finalise its pipe before this generator.
        of_thread.worker = _Worker()
        workers.append(of_thread.worker)

    def decode_one(clip: Clip) -> DecodedClip | VideoError:
        return of_thread.worker.decode(_Job(decode, clip, num_frames, timeout_s or _default_timeout_s(clip)))

    pending: deque[Future[DecodedClip | VideoError]] = deque()
    threads = ThreadPoolExecutor(num_workers, "motionrag-decode", initializer=own_worker)
    try:
        remaining = iter(clips)
        for index in range(len(clips)):
            while len(pending) < PREFETCH_PER_WORKER * num_workers and (clip := next(remaining, None)) is not None:
                pending.append(threads.submit(decode_one, clip))
            yield index, pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in workers:
            worker.kill()
        threads.shutdown()
        for worker in workers:
            worker.close()


def _default_timeout_s(clip: Clip) -> float:
    if clip.end_s is not None:
        return max(MIN_TIMEOUT_S, TIMEOUT_PER_CLIP_SECOND * (clip.end_s - clip.start_s))
    try:
        return max(MIN_TIMEOUT_S, TIMEOUT_PER_BYTE_S * os.stat(clip.uri).st_size)
    except (OSError, ValueError):
        # The worker will say what is wrong with the path.
        return MIN_TIMEOUT_S


@dataclass(frozen=True)
class _Job:
    decode: Decode
    clip: Clip
    num_frames: int
    timeout_s: float


class _Worker:
    """A decoding process, started when needed and replaced when it is used up, hangs or crashes.

    `decode` is called by one thread at a time; `kill` may be called by another at any moment.
    """

    def __init__(self) -> None:
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._served = 0
        self._may_start = True
        self._starting = Lock()

    def decode(self, job: _Job) -> DecodedClip | VideoError:
        """Have the process decode a clip; a process that does not answer is killed and forgotten."""
        process, connection = self._ready()
        self._served += 1
        try:
            connection.send(job)
            if connection.poll(job.timeout_s):
                return connection.recv()
            reason = f"its decoder hung for {job.timeout_s:g} s and was stopped"
        except (EOFError, OSError):
            reason = f"its decoder crashed ({_describe_exit(process)})"
        self.close()
        return VideoError(f"{job.clip.uri} cannot be decoded: {reason}.")

    def kill(self) -> None:
        """End the process now and for ever; `decode`, if it waits in another thread, returns."""
        with self._starting:
            self._may_start = False
            running = self._running  # the worker's own thread may close it meanwhile
            if running is not None:
                running[0].kill()

    def close(self) -> None:
        """End the process and release its pipe."""
        if self._running is not None:
            process, connection = self._running
            process.kill()
            process.wait()
            connection.close()
            self._running = None

    def _ready(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._running is not None and self._running[0].poll() is None and self._served < RECYCLE_AFTER:
            return self._running
        self.close()
        with self._starting:
            if not self._may_start:
                raise RuntimeError("This worker was stopped.")
            process, connection = self._running = _start_process()
        self._served = 0
        try:
            # The worker reports that it is up; what takes long after that is the fault of a clip.
            if connection.poll(START_TIMEOUT_S) and connection.recv():
                return process, connection
        except (EOFError, OSError):
            pass  # said below, as for a worker that is silent
        self.close()
        raise RuntimeError("A decoding process did not start; what it printed to standard error says why.")


def _start_process() -> tuple[subprocess.Popen[bytes], Connection]:
    connection, childs_end = Pipe()
    search_path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
    with childs_end:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_PROGRAM, search_path, str(childs_end.fileno())],
            pass_fds=[childs_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # One core each: the workers are the parallelism, and pools of threads cost time and memory to start.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            # Ctrl-C is for the parent, which then ends the workers.
            start_new_session=True,
        )
    return process, connection


def _describe_exit(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "it closed its pipe but did not exit"
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


def serve(file_descriptor: int) -> None:
    """Decode what is asked for over a pipe until it closes; this is the main program of a worker.

    Args:
        file_descriptor: the worker's end of the pipe.
    """
    # The system's own action is to end the process, which works even if a decoder holds the interpreter lock.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A pipe without a parent at its other end means that there is nobody to work for.
    with contextlib.suppress(EOFError, ConnectionError), Connection(file_descriptor) as connection:
        connection.send(True)
        while True:
            job: _Job = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, job.timeout_s + ORPHAN_GRACE_S)
            connection.send(_decode_or_explain(job))
            signal.setitimer(signal.ITIMER_REAL, 0)


def _decode_or_explain(job: _Job) -> DecodedClip | VideoError:
    try:
        return job.decode(job.clip, job.num_frames)
    except VideoError as error:
        return error
    except Exception as error:
        # A clip may not stop a run of thousands; the caller receives the error in its place.
        return VideoError(f"{job.clip.uri} cannot be decoded: {type(error).__name__}: {error}")
