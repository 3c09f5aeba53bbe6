"""Reading experts while others are computed: a few threads, awaited experts first.

    submit --> urgent queue -----------------> threads, a slab each --> finished (rings `fd`)
          `-> quiet queue (nothing urgent) --> threads, at the lowest I/O priority

All methods belong to one thread, the worker's main one; it computes while these read, which goes on
inside its kernels because they release the GIL, as reading, hashing and packing do.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

from ...shm.errors import InternalError, SternaError
from ..messages import ExpertPage, Paged, PageIn, Trouble
from .loader import ExpertLoader, Part
from .reading import Staging
from .threads import MAX_THREADS

log = logging.getLogger("sterna.worker")

SLICE_S = 1.0  # of waiting for work
CLOSE_S = 5.0

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}.get(platform.machine())
_IDLE = 3 << 13  # IOPRIO_CLASS_IDLE: served when nobody else asks
_LIBC = ctypes.CDLL(None)


def _set_io_priority(thread: int, priority: int) -> None:
    """Set a thread's I/O class, 0 is the usual one; a wish, which only some disk schedulers grant."""
    if _IOPRIO_SET is not None:
        _LIBC.syscall(_IOPRIO_SET, 1, thread, priority)


@dataclass(slots=True, eq=False)
class _Job:
    """An expert on its way. Threads take its slabs one by one: a lone miss is read by several."""

    page: ExpertPage
    urgent: bool
    asked: list[tuple[int, int]] = field(default_factory=list)  # (request, when in ns)
    begun: int = 0  # slabs that threads have taken
    parts: list[tuple[int, Part]] = field(default_factory=list)  # (slab, what came of it)
    error: SternaError | None = None
    threads: list[int] = field(default_factory=list)  # at work for it, by the system's numbers


class Pager:
    """Threads that carry out `PageIn` messages; `fd` becomes readable when `finished` has answers.

    threads: 1 to MAX_THREADS, or 0 for what `calibrate` says; it is called with a page by the first
    thread before it loads that. Nothing is started before the first page.
    """

    def __init__(
        self, loader: ExpertLoader, threads: int, calibrate: Callable[[ExpertPage], int] | None = None
    ) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.outstanding = 0
        """Requests that have no answer yet."""
        self._loader = loader
        self._calibrate = None if threads else calibrate
        self._limit = 1 if self._calibrate else min(max(1, threads), MAX_THREADS)
        self._changed = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._quiet: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}  # by slot, queued or running
        self._running: list[_Job] = []
        self._done: list[Paged | Trouble] = []
        self._bug: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._stagings: list[Staging] = []
        self._closing = False

    @property
    def mode(self) -> str:
        """How the file is read: "direct" or "buffered"."""
        return self._loader.file.mode

    @property
    def num_threads(self) -> int:
        """Threads that were started."""
        return len(self._threads)

    @property
    def staging_nbytes(self) -> int:
        """Memory that the threads hold to read into."""
        return sum(staging.nbytes for staging in self._stagings)

    def submit(self, message: PageIn) -> None:
        """Have an expert read; `finished` gives the answer.

        A second request for what is under way is answered with the first, and makes it urgent if it is.
        """
        page, asked = message.page, (message.seq, time.perf_counter_ns())
        self.outstanding += 1
        with self._changed:
            job = self._jobs.get(page.slot)
            if job is None:
                self._add(_Job(page, message.urgent, [asked]))
            elif (job.page.layer, job.page.expert, job.page.precision) != (
                page.layer, page.expert, page.precision,
            ):  # fmt: skip
                text = f"slot {page.slot} is still being filled with expert {job.page.expert} of layer"
                self._answer(
                    Trouble(seq=message.seq, code=InternalError.code, text=f"{text} {job.page.layer}")
                )
            else:
                job.asked.append(asked)
                if message.urgent and not job.urgent:
                    self._hurry(job)
        self._start()

    def finished(self) -> list[Paged | Trouble]:
        """Return the answers since the last call, in the order in which they came about.

        Raises what broke in a thread if it was no SternaError: a bug, on which the process should end.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        with self._changed:
            done, self._done = self._done, []
            if self._bug is not None:
                raise self._bug
        self.outstanding -= len(done)
        return done

    def close(self) -> None:
        """End the threads, each after what it is reading; what is queued is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_S)
        os.close(self.fd)

    # ---- under the lock ----

    def _add(self, job: _Job) -> None:
        (seq, _), page = job.asked[0], job.page
        try:
            if not self._loader.begin(page):
                self._answer(Paged(seq=seq, nbytes=0, read_ns=0, busy_ns=0))
                return
        except SternaError as error:
            self._answer(Trouble(seq=seq, code=error.code, text=str(error)))
            return
        self._jobs[page.slot] = job
        (self._urgent if job.urgent else self._quiet).append(job)
        self._changed.notify(len(page.slabs))

    def _answer(self, answer: Paged | Trouble) -> None:
        self._done.append(answer)
        os.eventfd_write(self.fd, 1)

    def _hurry(self, job: _Job) -> None:
        """Make a quiet job urgent, be it queued or under way."""
        job.urgent = True
        for thread in job.threads:
            _set_io_priority(thread, 0)
        if job in self._quiet:
            self._quiet.remove(job)
            self._urgent.append(job)
            self._changed.notify(len(job.page.slabs))

    def _next(self) -> _Job | None:
        """Return a job with a slab to be read now, None if there is none.

        No quiet job begins while an urgent one runs, nor on the last thread, which is kept for the next
        request.
        """
        quiet = sum(not job.urgent for job in self._running)
        if self._urgent:
            queue = self._urgent
        elif self._quiet and quiet == len(self._running) and quiet < max(1, self._limit - 1):
            queue = self._quiet
        else:
            return None
        job = queue[0]
        if job.begun == len(job.page.slabs) - 1:
            queue.popleft()
        return job

    def _release(self, job: _Job) -> None:
        """Note that a thread is no longer at work for `job`; it looks for more itself."""
        self._running.remove(job)
        if self._quiet:  # may have waited for that
            self._changed.notify_all()

    # ---- the threads ----

    def _start(self) -> None:
        with self._changed:
            while len(self._threads) < self._limit and not self._closing:
                staging = Staging()
                name = f"page-in {len(self._threads)}"
                thread = threading.Thread(target=self._work, args=(staging,), name=name, daemon=True)
                self._stagings.append(staging)
                self._threads.append(thread)
                thread.start()

    def _work(self, staging: Staging) -> None:
        try:
            while (taken := self._take()) is not None:
                job, index = taken
                if self._calibrate is not None:
                    calibrate, self._calibrate = self._calibrate, None
                    self._limit = min(max(1, calibrate(job.page)), MAX_THREADS)
                    log.info("reading.threads count=%d mode=%s", self._limit, self.mode)
                    self._start()
                part: Part | SternaError
                try:
                    part = self._loader.part(job.page, index, staging)
                except SternaError as error:
                    part = error
                if self._put(job, index, part):
                    self._finish(job, staging)
        except BaseException as error:  # the main thread raises it
            with self._changed:
                self._bug = error
                os.eventfd_write(self.fd, 1)

    def _take(self) -> tuple[_Job, int] | None:
        """Wait for a slab to be read and return it, None when there will be no more."""
        with self._changed:
            while not self._closing:
                if (job := self._next()) is not None:
                    thread = threading.get_native_id()
                    job.threads.append(thread)
                    job.begun += 1
                    self._running.append(job)
                    if not job.urgent:
                        _set_io_priority(thread, _IDLE)
                    return job, job.begun - 1
                self._changed.wait(SLICE_S)
        return None

    def _put(self, job: _Job, index: int, part: Part | SternaError) -> bool:
        """Note what came of a slab; return whether it was the last one: then `_finish` is to be called."""
        with self._changed:
            if isinstance(part, SternaError):
                job.error = job.error or part
                if job.begun < len(job.page.slabs):  # the others are no longer needed
                    job.begun = len(job.page.slabs)
                    (self._urgent if job.urgent else self._quiet).remove(job)
            else:
                job.parts.append((index, part))
            thread = threading.get_native_id()
            job.threads.remove(thread)
            if not job.urgent:
                _set_io_priority(thread, 0)
            last = job.begun == len(job.page.slabs) and not job.threads
            if not last:
                self._release(job)
            return last

    def _finish(self, job: _Job, staging: Staging) -> None:
        """Publish the expert and answer whoever asked."""
        nbytes = read_ns = 0
        if job.error is None:
            try:
                parts = [part for _, part in sorted(job.parts, key=itemgetter(0))]
                nbytes, read_ns = self._loader.finish(job.page, parts, staging)
            except SternaError as error:
                job.error = error
        now_ns = time.perf_counter_ns()
        with self._changed:
            self._release(job)
            del self._jobs[job.page.slot]
            for seq, asked_ns in job.asked:
                if job.error is not None:
                    self._done.append(Trouble(seq=seq, code=job.error.code, text=str(job.error)))
                else:
                    busy_ns = now_ns - asked_ns
                    self._done.append(Paged(seq=seq, nbytes=nbytes, read_ns=read_ns, busy_ns=busy_ns))
                nbytes = read_ns = 0  # read once
            os.eventfd_write(self.fd, 1)
