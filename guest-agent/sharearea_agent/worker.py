"""One thread for everything that may wait for a disk.

Jobs that somebody waits for go before the next step of the pass that is under way. What a job or a step wants done with
its result runs on the main thread, which takes it when it is woken.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

Then = Callable[[], None]
"""Runs on the main thread."""

Job = Callable[[], Then | None]
"""Runs on the worker; what it returns runs on the main thread."""

Steps = Iterator[Then | None]
"""Each step runs on the worker when it is asked for."""


class Worker:
    """The thread and its queues. All methods belong to the main thread; `wake` is called on the worker."""

    def __init__(self, wake: Then, failed: Callable[[Exception], None], last: Then) -> None:
        """`last` is the last thing that runs on the thread."""
        self._wake = wake
        self._failed = failed
        self._last = last
        self._jobs: deque[Job] = deque()
        self._passes: deque[Steps] = deque()
        self._ready = threading.Condition()
        self._done: deque[Then] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sharearea-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job that somebody waits for."""
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def work_through(self, steps: Steps) -> None:
        """Queue a pass: its steps run one by one whenever there is no job. Passes run one after the other."""
        with self._ready:
            self._passes.append(steps)
            self._ready.notify()

    def results(self) -> list[Then]:
        """Return what finished work wants done now."""
        found: list[Then] = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._done.popleft())
        return found

    def stop(self) -> None:
        """Let the job or step under way end, and the thread with it."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not (self._stopping or self._jobs or self._passes):
                    self._ready.wait()
                if self._stopping:
                    break
                job = self._jobs.popleft() if self._jobs else None
                steps = self._passes[0] if self._passes else None
            then = self._one(job, steps)
            if then is not None:
                self._done.append(then)
                self._wake()
        self._last()

    def _one(self, job: Job | None, steps: Steps | None) -> Then | None:
        try:
            if job is not None:
                return job()
            assert steps is not None
            return next(steps)
        except StopIteration:
            with self._ready:
                self._passes.popleft()
            return None
        except Exception as error:  # a fault in one job must not end the agent's eyes
            failure = error
            if job is None:
                with self._ready:
                    self._passes.popleft()
            return lambda: self._failed(failure)
