"""The queue: one job after the other on the accelerator, in an order that is fair to clients."""

import collections
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ldm_jax.runtime.log import LOG
from ldm_jax.sample.web.limits import RefusedError


class CancelledError(Exception):
    """The job was cancelled, and has no result."""


class Watch:
    """What a running job tells, and what it is told; read and written by several threads.

    Fields are single values, each replaced at once.
    """

    def __init__(self) -> None:
        self.doing = "waiting"
        """waiting, loading, compiling, sampling, decoding, done."""
        self.since = time.monotonic()
        """When that began."""
        self.began: float | None = None
        """When sampling began; None before."""
        self.step = self.steps = 0
        """Levels that ran, and all of them, of every call and pass of the job."""
        self.images = self.count = 0
        """Pictures that are done, and all of them."""
        self.preview: np.ndarray | None = None
        """uint8 [B, H, W, c], the pictures as predicted so far; None before the first."""
        self.compiled = self.paused = 0.0
        """Seconds that compiling took in this job, and those of them after `began`."""
        self.wants_preview = False
        """Somebody looks at the job."""
        self.stop: str | None = None
        """"interrupt": ends with the pictures as they are; "skip": so with this call, and goes on;
        "cancel": ends without; "last": this call is the last one."""

    def does(self, what: str) -> None:
        """The job begins something else."""
        self.doing, self.since = what, time.monotonic()
        if what == "sampling" and self.began is None:
            self.began = self.since

    @property
    def fraction(self) -> float:
        """Part of the job that is done, 0..1."""
        return self.step / self.steps if self.steps else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds that are left; None while that is unknown."""
        if self.began is None or not self.step:
            return None
        spent = time.monotonic() - self.began - self.paused
        return max(0.0, spent * (self.steps - self.step) / self.step)


class Job:
    """One request in the queue."""

    def __init__(self, number: int, name: str, client: str, work: Callable[[Watch], Any]) -> None:
        self.number, self.name, self.client, self.work = number, name, client, work
        self.watch = Watch()
        self.future: concurrent.futures.Future = concurrent.futures.Future()
        self.submitted = time.time()

    def cancel(self) -> None:
        """End the job without a result, within a segment of levels if it runs."""
        self.watch.stop = "cancel"


class Queue:
    """Jobs of several clients, run by one thread; a client's second job waits for all others'."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.running: Job | None = None
        self.done = 0
        """Jobs that ended."""
        self._waiting: collections.OrderedDict[str, collections.deque[Job]] = (
            collections.OrderedDict()
        )
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, name: str, client: str, work: Callable[[Watch], Any]) -> Job:
        """Put `work(watch) -> result` into the queue. RefusedError if that is full or closed."""
        with self._changed:
            if self._closed:
                raise RefusedError(503, "the server is stopping")
            if len(self) >= self.most:
                raise RefusedError(
                    503, f"{self.most} requests wait already, which is all of --queue: try later"
                )
            job = Job(next(self._numbers), name, client, work)
            self._waiting.setdefault(client, collections.deque()).append(job)
            self._changed.notify_all()
        return job

    def __len__(self) -> int:
        """Number of jobs that wait."""
        return sum(map(len, self._waiting.values()))

    def place(self, job: Job) -> int:
        """Jobs that run before this one, among those that wait now; 0 if it runs or has run."""
        with self._changed:
            rows = [list(jobs) for jobs in self._waiting.values()]
        order = [one for round_ in itertools.zip_longest(*rows) for one in round_ if one]
        return order.index(job) + 1 if job in order else 0

    def close(self) -> None:
        """Take no more jobs; the running one ends after its running batch, others are refused."""
        with self._changed:
            self._closed = True
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            if self.running is not None and self.running.watch.stop is None:
                self.running.watch.stop = "last"
            self._changed.notify_all()
        for job in waiting:
            job.future.set_exception(RefusedError(503, "the server is stopping"))

    def join(self, timeout: float | None = None) -> None:
        """Wait until the running job of a closed queue has ended."""
        self._thread.join(timeout)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:  # to the end of the row
                self._waiting[client] = jobs
            self.running = job
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                if job.watch.stop == "cancel":
                    raise CancelledError("the request was cancelled")
                result = job.work(job.watch)
            except BaseException as error:  # whatever fails is told to who asked; the server lives
                if not isinstance(error, ValueError | CancelledError):
                    LOG.exception(f"{job.name} number {job.number} failed")
                self.running = None
                job.watch.does("done")
                job.future.set_exception(error)
            else:
                self.running = None
                job.watch.does("done")
                job.future.set_result(result)
            self.done += 1
            del job  # with its arrays, while the queue is empty
