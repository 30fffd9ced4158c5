"""One executor for all runs of all visitors: shared, fair, cancellable. Plain Python, no Streamlit.

A run is known by the hash of everything that decides its result; two visitors who ask the same share one job. Each job
has a thread, but only one computes at a time: the *turnstile* is handed over at ``progress`` calls, round-robin by
visitor, so a short run finishes between the chunks of a long one. A visitor watches a job through a *slot*, one per
figure: putting another key into a slot leaves the old job at once, and a job that nobody watches is told to stop. It
stops inside its next ``progress`` call. A job that is stopping is never given to anybody again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from factscope.errors import Cancelled, FactScopeError

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
FINISHED: frozenset[str] = frozenset({"done", "failed", "cancelled"})
_LONGEST = 8
"""A turn in which a job waits more than it computes lasts at most so many times the usual."""
_AGAIN = frozenset({"failed", "cancelled"})


class TooManyRuns(FactScopeError):
    """A visitor, or all of them together, have too many runs under way."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job does.

    Attributes:
        compute: called with what ``prepare`` gives and with ``progress(done, total, partial)``, in its turns.
        prepare: opened before the first turn and closed after the last: to get hold of a model may take long and
            must not keep others from computing. It may call its argument with what it is doing, which also raises
            ``Cancelled`` if nobody waits any more.
        label: what to call it in the log.
        keep: whether the result is kept for whoever asks again; not what takes much memory and is kept elsewhere.
    """

    compute: Callable[[Any, Callable[[int, int, Any], None]], Any]
    prepare: Callable[[Callable[[str], None]], AbstractContextManager[Any]] = nullcontext
    label: str = "run"
    keep: bool = True


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A job as one visitor sees it.

    Attributes:
        done, total: steps; total is 0 until the first is reported.
        partial: the result so far; kept when the run is cancelled.
        result: once the state is "done".
        error: once the state is "failed".
        stage: what it is doing before it computes.
        ahead: runs whose turn comes before this one's, 0 while it computes.
        seconds: since it began to compute. ``seconds_left``: None until it can be told.
    """

    key: str
    state: State
    done: int = 0
    total: int = 0
    partial: Any = None
    result: Any = None
    error: Exception | None = None
    stage: str = ""
    ahead: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.state in FINISHED

    @property
    def value(self) -> Any:
        """The result, or as much of it as there is."""
        return self.result if self.state == "done" else self.partial


@dataclass(eq=False)
class _Job:
    key: str
    owner: str
    work: Work
    watchers: set[tuple[str, str]] = field(default_factory=set)
    state: State = "waiting"
    done: int = 0
    total: int = 0
    partial: Any = None
    result: Any = None
    error: Exception | None = None
    stage: str = ""
    stop: bool = False
    began: float | None = None
    ended: float | None = None
    finished: threading.Event = field(default_factory=threading.Event)


class Turnstile:
    """Lets one job compute at a time; who goes next is decided round-robin by visitor, then by arrival.

    Args:
        turn_seconds: a job that has computed for less in its turn keeps it, so that what is short is done in one
            turn. Processor time, not wall time: on a busy machine the one runs away from the other.
    """

    def __init__(self, turn_seconds: float = 0.0) -> None:
        self._changed = threading.Condition()
        self._turn_seconds = turn_seconds
        self._holder: _Job | None = None
        self._since = 0.0, 0.0
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()

    def take(self, job: _Job) -> None:
        """Wait for this job's turn; if it has it, hand it over first.

        Raises:
            Cancelled: it was told to stop meanwhile; it then holds no turn.
        """
        with self._changed:
            if self._holder is job and not job.stop and self._turn_is_young():
                return
            self._waiting.setdefault(job.owner, deque()).append(job)
            if self._holder is job:  # handed over: queue first, so that its owner has one turn in each round
                self._holder = None
            self._admit()
            self._changed.wait_for(lambda: self._holder is job or job.stop)
            if job.stop:
                self._forget(job)
                raise Cancelled
            self._since = time.thread_time(), time.monotonic()

    def _turn_is_young(self) -> bool:
        """Whether the holder, whose thread asks, has computed little since it got the turn, and not long ago."""
        computed, passed = time.thread_time() - self._since[0], time.monotonic() - self._since[1]
        return computed < self._turn_seconds and passed < _LONGEST * self._turn_seconds

    def give(self, job: _Job) -> None:
        """End this job's turn, if it has it."""
        with self._changed:
            self._forget(job)

    def wake(self) -> None:
        """Let waiting jobs see that they were told to stop."""
        with self._changed:
            self._changed.notify_all()

    def ahead(self, job: _Job) -> int:
        """How many turns come before this job's."""
        with self._changed:
            if self._holder is job or job not in self._waiting.get(job.owner, ()):
                return 0
            place = self._waiting[job.owner].index(job)
            before = list(self._waiting).index(job.owner)
            others = [
                min(len(jobs), place + (i < before))
                for i, (o, jobs) in enumerate(self._waiting.items())
                if o != job.owner
            ]
            return place + sum(others) + (self._holder is not None)

    def _admit(self) -> None:
        if self._holder is None and self._waiting:
            owner, jobs = self._waiting.popitem(last=False)
            self._holder = jobs.popleft()
            if jobs:
                self._waiting[owner] = jobs  # at the end: others go first
            self._changed.notify_all()

    def _forget(self, job: _Job) -> None:
        jobs = self._waiting.get(job.owner)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.owner]
        if self._holder is job:
            self._holder = None
        self._admit()


class Executor:
    """Runs jobs for visitors.

    Args:
        grace: seconds for which a visitor who left may come back before his runs are stopped.
        keep: finished results kept for whoever asks again; the least recently used go first.
        per_visitor: runs under way for one visitor. ``in_all``: for all of them.
        turn_seconds: how long a run computes before others have their turn.
    """

    def __init__(
        self,
        *,
        grace: float = 4.0,
        keep: int = 128,
        per_visitor: int = 24,
        in_all: int = 96,
        turn_seconds: float = 0.15,
    ) -> None:
        self._grace, self._keep, self._per_visitor, self._in_all = grace, keep, per_visitor, in_all
        self._lock = threading.RLock()
        self._turnstile = Turnstile(turn_seconds)
        self._active: dict[str, _Job] = {}
        self._results: OrderedDict[str, Any] = OrderedDict()
        self._slots: dict[str, dict[str, _Job | Snapshot]] = {}
        self._leaving: dict[str, threading.Timer] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def submit(self, visitor: str, slot: str, key: str, work: Work, *, again: bool = False) -> Snapshot:
        """Make a slot show the job of a key: the one that runs, a kept result, or a new one.

        Args:
            again: start anew although the slot's run of this key failed or was cancelled.

        Raises:
            TooManyRuns: too many are under way.
        """
        with self._lock:
            self._stay(visitor)
            slots = self._slots.setdefault(visitor, {})
            shown = slots.get(slot)
            if shown is not None and shown.key == key and not (again and self._see(shown).state in _AGAIN):
                return self._see(shown)
            if shown is not None:
                self.release(visitor, slot)
            if key in self._results:
                self._results.move_to_end(key)
                slots[slot] = Snapshot(key=key, state="done", result=self._results[key])
                return self._see(slots[slot])
            job = self._active.get(key)
            if job is None:
                self._refuse_too_many(visitor)
                job = self._start(_Job(key=key, owner=visitor, work=work))
            job.watchers.add((visitor, slot))
            slots[slot] = job
            return self._see(job)

    def look(self, visitor: str, slot: str) -> Snapshot | None:
        """What a slot shows, or None."""
        with self._lock:
            shown = self._slots.get(visitor, {}).get(slot)
            return None if shown is None else self._see(shown)

    def wait(self, visitor: str, slot: str, timeout: float) -> Snapshot | None:
        """Look, after waiting until the job has finished or the time is over."""
        with self._lock:
            shown = self._slots.get(visitor, {}).get(slot)
        if isinstance(shown, _Job):
            shown.finished.wait(timeout)
        return self.look(visitor, slot)

    def cancel(self, visitor: str, slot: str) -> None:
        """Stop a slot's run and keep showing what it had. Others who watch the same job keep it."""
        with self._lock:
            shown = self._slots.get(visitor, {}).get(slot)
            if not isinstance(shown, _Job) or shown.state in FINISHED:
                return
            shown.watchers.discard((visitor, slot))
            if shown.watchers:
                seen = self._see(shown)
                frozen = Snapshot(
                    key=seen.key, state="cancelled", done=seen.done, total=seen.total, partial=seen.partial
                )
                self._slots[visitor][slot] = frozen
            else:
                self._tell_to_stop(shown)

    def release(self, visitor: str, slot: str) -> None:
        """Empty a slot; a job that nobody watches any more stops at once."""
        with self._lock:
            shown = self._slots.get(visitor, {}).pop(slot, None)
            if isinstance(shown, _Job):
                shown.watchers.discard((visitor, slot))
                if not shown.watchers:
                    self._tell_to_stop(shown)

    def release_all(self, visitor: str, *, but: Callable[[str], bool] = lambda slot: False) -> None:
        """Empty all slots of a visitor, those that ``but`` spares left out: he asks something else now."""
        with self._lock:
            for slot in list(self._slots.get(visitor, {})):
                if not but(slot):
                    self.release(visitor, slot)

    def leave(self, visitor: str) -> None:
        """A visitor's session ended: empty his slots unless he comes back within the grace time. Returns at once."""
        with self._lock:
            if visitor in self._leaving or self._closed:
                return
            timer = threading.Timer(self._grace, self._drop, [visitor])
            timer.daemon = True
            self._leaving[visitor] = timer
            timer.start()

    def kept(self, key: str) -> Any | None:
        """A finished result under a key, if it is still kept."""
        with self._lock:
            return self._results.get(key)

    def under_way(self) -> int:
        """How many jobs have not finished, stopping ones included."""
        with self._lock:
            return len(self._threads)

    def shutdown(self, timeout: float = 2.0) -> None:
        """Tell all jobs to stop and wait a little for them."""
        with self._lock:
            self._closed = True
            for timer in self._leaving.values():
                timer.cancel()
            for job in list(self._active.values()):
                self._tell_to_stop(job)
            threads = list(self._threads)
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _stay(self, visitor: str) -> None:
        timer = self._leaving.pop(visitor, None)
        if timer is not None:
            timer.cancel()

    def _drop(self, visitor: str) -> None:
        with self._lock:
            if self._leaving.pop(visitor, None) is None:
                return  # came back
            self.release_all(visitor)
            self._slots.pop(visitor, None)

    def _refuse_too_many(self, visitor: str) -> None:
        if self._closed:
            raise TooManyRuns("the server is stopping and starts no more runs", "start it again")
        mine = sum(job.owner == visitor for job in self._active.values())
        if mine >= self._per_visitor:
            raise TooManyRuns(
                f"{mine} of your runs are under way, as many as one visitor may have", "cancel one or wait for it"
            )
        if len(self._active) >= self._in_all:
            raise TooManyRuns(
                f"{len(self._active)} runs are under way, as many as this server takes", "try again in a minute"
            )

    def _start(self, job: _Job) -> _Job:
        thread = threading.Thread(target=self._run, args=[job], name=f"job-{job.key[:8]}", daemon=True)
        self._active[job.key] = job
        self._threads.add(thread)
        thread.start()
        return job

    def _run(self, job: _Job) -> None:
        state: State = "cancelled"
        result, error = None, None
        try:
            with job.work.prepare(lambda stage: self._prepare(job, stage)) as prepared:
                self._turnstile.take(job)
                with self._lock:
                    job.state, job.began = "running", time.monotonic()
                result = _read_only(job.work.compute(prepared, lambda *step: self._progress(job, *step)))
            state = "done"
        except Cancelled:
            logger.debug("%s %s: cancelled", job.work.label, job.key[:8])
        except FactScopeError as refused:
            state, error = "failed", refused
        except Exception as broken:
            logger.exception("%s %s failed", job.work.label, job.key[:8])
            state, error = "failed", broken
        finally:
            self._turnstile.give(job)
            self._finish(job, state, result, error)

    def _prepare(self, job: _Job, stage: str) -> None:
        job.stage = stage
        if job.stop:
            raise Cancelled

    def _progress(self, job: _Job, done: int, total: int, partial: Any) -> None:
        with self._lock:
            job.done, job.total = done, total
            if partial is not None:
                job.partial = _read_only(partial)
        self._turnstile.take(job)

    def _finish(self, job: _Job, state: State, result: Any, error: Exception | None) -> None:
        with self._lock:
            job.state, job.result, job.error, job.ended = state, result, error, time.monotonic()
            if self._active.get(job.key) is job:
                del self._active[job.key]
            if state == "done":
                job.partial = None
                if job.work.keep:
                    self._results[job.key] = result
                while len(self._results) > self._keep:
                    self._results.popitem(last=False)
            self._threads.discard(threading.current_thread())
        job.finished.set()

    def _tell_to_stop(self, job: _Job) -> None:
        if job.state in FINISHED:
            return
        job.stop = True
        if self._active.get(job.key) is job:
            del self._active[job.key]
        self._turnstile.wake()

    def _see(self, shown: _Job | Snapshot) -> Snapshot:
        if isinstance(shown, Snapshot):
            return shown
        stopping = shown.stop and shown.state not in FINISHED
        seconds = 0.0 if shown.began is None else (shown.ended or time.monotonic()) - shown.began
        running = shown.state == "running" and shown.done > 0
        return Snapshot(
            key=shown.key,
            state="cancelled" if stopping else shown.state,
            done=shown.done,
            total=shown.total,
            partial=shown.partial,
            result=shown.result,
            error=shown.error,
            stage=shown.stage,
            ahead=0 if shown.state in FINISHED else self._turnstile.ahead(shown),
            seconds=seconds,
            seconds_left=seconds / shown.done * (shown.total - shown.done) if running else None,
        )


def _read_only(value: Any) -> Any:
    """The same object, its arrays locked: results are shared by all who watch."""
    for attribute in getattr(value, "__dict__", {}).values():
        if callable(lock := getattr(attribute, "setflags", None)):
            lock(write=False)
    return value
