"""A watch over several processes: one that is killed, hung or lost ends the job with a message that names it.

Nothing can interrupt a process that waits for another one in a collective. So every process has a thread that reports
to the processes' store every few seconds: that the process lives, and where its main thread is (``progress``). Process
0 reads all reports and judges; every other process reads process 0's report and its verdict.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from losa.errors import LosaError, reason

# EX_PROTOCOL of sysexits.h. Like Stopped's exit code it says that the same command with --resume goes on.
LOST_EXIT_CODE = 76

# What gloo, NCCL and the store say when a connection breaks or a collective takes longer than a group allows.
_BROKEN = ("gloo", "nccl", "connection", "broken pipe", "timed out", "recvvalue", "sendbytes", "socket")


class ProcessLost(LosaError):
    """Another process was killed, hangs, or cannot be reached."""

    exit_code = LOST_EXIT_CODE


@dataclass(frozen=True)
class Limits:
    """Seconds. ``period``: between two reports. ``silent``: without a report, after which a process counts as lost.
    ``broken``: the same, once a connection broke. ``grace``: for processes to end by themselves, so that each can say
    what it knows. ``progress``: without progress of any process, after which the job hangs."""

    progress: float
    period: float = 2
    silent: float = 60
    broken: float = 6
    grace: float = 5


@dataclass
class Report:
    """What a process says of itself. ``beat``: number of the report; ``where``, ``since``, ``age``: where its main
    thread is, when it came there by its machine's clock, and for how many seconds; ``waits``: whether it waits there
    for other processes; ``awaited``: all processes wait for this one, however long its work takes; ``broken``: whether
    NCCL met an error; ``ended``: None while it works, "" after its work, else why it failed, with the exit code
    ``code``."""

    index: int
    host: str
    pid: int
    beat: int = 0
    where: str = "the start"
    since: float = 0.0
    age: float = 0.0
    waits: bool = False
    awaited: bool = False
    broken: bool = False
    ended: str | None = None
    code: int = 0

    def name(self) -> str:
        return f"process {self.index} (host {self.host}, pid {self.pid})"


class _Position:
    """Where this process's main thread is."""

    def __init__(self) -> None:
        self.where, self.since, self.waits, self.awaited = "the start", time.monotonic(), False, False


_position = _Position()


def progress(where: str) -> None:
    """Say where the main thread is now, such as "round 2, step 17": ``distributed.timeout`` counts from here. Every
    process calls it, at least once in each stretch of work that takes minutes."""
    _position.where, _position.since = where, time.monotonic()


@contextmanager
def others_wait() -> Iterator[None]:
    """Within the context the other processes wait for this one, and ``distributed.timeout`` does not count."""
    before, _position.awaited = _position.awaited, True
    try:
        yield
    finally:
        _position.awaited, _position.since = before, time.monotonic()


@contextmanager
def waiting() -> Iterator[None]:
    """Within the context this process waits for other processes, so that a job that hangs is not blamed on it."""
    before, _position.waits = _position.waits, True
    try:
        yield
    finally:
        _position.waits = before


_watches = itertools.count()


@contextmanager
def watched(limits: Limits) -> Iterator[None]:
    """A watch over all processes within the context, which they enter and leave together. Nothing for a process that
    is alone.

    A process that finds another one lost while its own main thread waits for it prints a sentence and ends with
    ``LOST_EXIT_CODE``, or with 1 where the other process failed with a message of its own.

    Raises:
        ProcessLost: a connection broke, because another process was lost.
        LosaError: a connection broke, because another process failed; names the process and its error.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    global _position
    _position = _Position()
    watch = _Watch(limits, f"losa/watch/{next(_watches)}")
    try:
        yield
    except BaseException as error:
        known = watch.explain() if _is_broken(error) else None
        watch.leave(known or error)
        if known is not None:
            raise known from error
        raise
    watch.leave(None)


def _is_broken(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _BROKEN):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Watch:
    def __init__(self, limits: Limits, prefix: str):
        self.limits = limits
        self.count = dist.get_world_size()
        self.me = Report(dist.get_rank(), socket.gethostname(), os.getpid())
        # A store serves one call at a time, and a call of the main thread may take long. A clone has a connection of
        # its own. The main thread's clone is made now: later, nobody may listen, and to find that out takes a minute.
        self.store, self.last_store = (_clone(prefix, limits.silent) for _ in range(2))
        self.reports: dict[int, Report] = {}
        # When the number of a process's report last changed, by this process's clock. All begin as just heard.
        self.heard = dict.fromkeys(range(self.count), time.monotonic())
        self.failed_since: float | None = None
        self.broken_since: float | None = None
        self.answered = time.monotonic()
        self.done = threading.Event()
        # Also finds out here, where it can be told, whether this torch can be asked.
        self._report(_nccl_is_broken())
        if self.me.index:
            self.store.wait(["0"])
            self._read(self.store, range(1))
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._guard)]
        for thread in self.threads:
            thread.start()

    def _report(self, broken: bool) -> None:
        me, position = self.me, _position
        me.beat += 1
        me.where, me.waits, me.awaited = position.where, position.waits, position.awaited
        me.age, me.broken = time.monotonic() - position.since, broken
        me.since = time.time() - me.age
        self.store.set(str(me.index), json.dumps(asdict(me)))

    def _read(self, store: Any, indices: range) -> None:
        """Read the reports of the processes that have reported."""
        for index in indices:
            # To get what nobody has set would wait.
            if index not in self.reports and not store.check([str(index)]):
                continue
            report = Report(**json.loads(store.get(str(index))))
            if index not in self.reports or report.beat != self.reports[index].beat:
                self.heard[index] = time.monotonic()
            self.reports[index] = report

    def _silence(self, index: int) -> float:
        return time.monotonic() - self.heard[index]

    def _working(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.reports or self.reports[i].ended is None]

    def _name(self, index: int) -> str:
        return self.reports[index].name() if index in self.reports else f"process {index}"

    def _lost(self, index: int, limit: float) -> str:
        return f"{self._name(index)} has not been heard for {limit:g} s: killed, hung, or its machine is gone"

    def _failed(self) -> tuple[int, str] | None:
        """Exit code and sentence for another process that failed."""
        for index, report in list(self.reports.items()):
            if report.ended and index != self.me.index:
                return report.code, _sentence(report)
        return None

    def _without_store(self, what: str) -> tuple[int, str]:
        """Exit code and sentence where the store cannot be asked any more."""
        keeper = f"{self._name(0)}, or the launcher that keeps the store"
        return self._failed() or (LOST_EXIT_CODE, f"the processes' store {what}: {keeper}, is gone or hangs")

    def _exchange(self) -> None:
        """Report, read, judge or obey. A thread."""
        while not self.done.wait(self.limits.period):
            try:
                broken = _nccl_is_broken()
            except Exception as error:
                self._end(1, f"NCCL cannot be asked for errors ({type(error).__name__}: {reason(error)})")
                return
            try:
                self._report(broken)
                self._read(self.store, range(self.count if self.me.index == 0 else 1))
                self.answered = time.monotonic()
                if self.me.index == 0:
                    self._judge()
                elif self.store.check(["verdict"]):
                    self._end(*json.loads(self.store.get("verdict")))
            except RuntimeError as error:
                # The main thread may know more.
                if not self.done.wait(self.limits.grace):
                    self._end(*self._without_store(f"is gone ({reason(error)})"))

    def _guard(self) -> None:
        """Notice silence, also while a call of the store waits for an answer that never comes. A thread."""
        silent = self.limits.silent
        while not self.done.wait(self.limits.period):
            if time.monotonic() - self.answered > silent:
                self._end(*self._without_store(f"has not answered for {silent:g} s"))
            if self.me.index and 0 in self._working() and self._silence(0) > silent:
                self._end(LOST_EXIT_CODE, self._lost(0, silent))

    def _judge(self) -> None:
        limits, working = self.limits, self._working()
        broken = [report.name() for report in self.reports.values() if report.broken]
        silent = limits.broken if broken else limits.silent
        for index in working:
            if self._silence(index) > silent:
                self._condemn(LOST_EXIT_CODE, self._lost(index, silent))
        failed = self._failed()
        if failed is not None:
            self.failed_since = self.failed_since or time.monotonic()
            # Processes that all fail alike end by themselves.
            if time.monotonic() - self.failed_since > limits.grace:
                self._condemn(*failed)
        if broken:
            self.broken_since = self.broken_since or time.monotonic()
            # A process that was killed goes silent meanwhile, and is named above.
            if time.monotonic() - self.broken_since > limits.broken + limits.grace:
                self._condemn(LOST_EXIT_CODE, f"NCCL met an error, which it logs, in {', '.join(broken)}")
        reports = [self.reports[i] for i in working if i in self.reports]
        ages = {r.index: r.age + self._silence(r.index) for r in reports}
        if min(ages.values()) > limits.progress and not any(r.awaited for r in reports):
            self._condemn(LOST_EXIT_CODE, _standstill(reports, ages))

    def _condemn(self, code: int, sentence: str) -> None:
        """End all processes."""
        self.store.set("verdict", json.dumps([code, sentence]))
        # The store may be in this process, and all processes are to read the verdict.
        time.sleep(2 * self.limits.period)
        self._end(code, sentence)

    def _end(self, code: int, sentence: str) -> None:
        """End this process, unless its main thread does."""
        if not self.done.is_set():
            sys.stderr.write(f"losa: {sentence}; process {self.me.index} ends\n")
            sys.stderr.flush()
            os._exit(code)

    def explain(self) -> LosaError | None:
        """The error of a broken connection: which process is to blame; None where all are well. The main thread."""
        limits, began = self.limits, time.monotonic()
        try:
            while time.monotonic() - began < limits.broken + 2 * limits.period:
                self._read(self.last_store, range(self.count))
                for index in self._working():
                    if self._silence(index) > limits.broken:
                        return ProcessLost(self._lost(index, limits.broken))
                if failed := self._failed():
                    return _error(*failed)
                time.sleep(limits.period / 4)
        except RuntimeError as error:
            return _error(*self._without_store(f"is gone ({reason(error)})"))
        return None

    def leave(self, error: BaseException | None) -> None:
        """Report how this process ends. Process 0, which may keep the store, waits for the others to do the same. The
        main thread."""
        limits, me, began = self.limits, self.me, time.monotonic()
        self.done.set()
        # A report that is on its way could replace the last one.
        self.threads[0].join(limits.grace)
        me.beat += 1
        if error is None:
            me.ended = ""
        elif isinstance(error, LosaError):
            me.ended, me.code = str(error), error.exit_code
        else:
            me.ended, me.code = f"{type(error).__name__}: {reason(error)}", 1
        try:
            self.last_store.set(str(me.index), json.dumps(asdict(me)))
            limit = limits.silent if error is None else limits.grace
            while me.index == 0 and time.monotonic() - began < limit:
                self._read(self.last_store, range(1, self.count))
                if all(i == 0 or self._silence(i) > limits.broken for i in self._working()):
                    return
                time.sleep(limits.period / 20)
            if me.index == 0 and me.ended:
                # Nobody judges any more, and a process that waits for this one cannot find out by itself.
                self.last_store.set("verdict", json.dumps([me.code, _sentence(me)]))
                time.sleep(2 * limits.period)
        except RuntimeError:
            return  # Nobody keeps the store any more.


def _sentence(report: Report) -> str:
    """How another process quotes one that failed."""
    # A process that failed because of another one has said which.
    return str(report.ended) if report.code == LOST_EXIT_CODE else f"{report.name()} failed: {report.ended}"


def _nccl_is_broken() -> bool:
    """Whether NCCL met an error: its own watchdog, which is told not to end the process, notes the first one."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    backends = [group._get_backend(device) for group in groups for device in group._device_types]
    return any(backend.get_error().name != "SUCCESS" for backend in backends if backend.name() == "nccl")


def _error(code: int, sentence: str) -> LosaError:
    return ProcessLost(sentence) if code == LOST_EXIT_CODE else LosaError(sentence)


def _clone(prefix: str, timeout: float) -> Any:
    default: Any = dist.distributed_c10d._get_default_store()
    store: Any = dist.PrefixStore(prefix, default.clone())
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _standstill(reports: list[Report], ages: dict[int, float]) -> str:
    """Where all processes are. Who does not wait for others comes first, and of those who came to its place first."""
    places: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda report: (report.waits, report.since)):
        places.setdefault(f"{'waiting for others ' if report.waits else ''}at {report.where}", []).append(report)
    told = []
    for place, group in places.items():
        who = group[0].name() if len(group) == 1 else f"processes {', '.join(map(str, sorted(r.index for r in group)))}"
        told.append(f"{who} {place} for {max(ages[r.index] for r in group):.0f} s")
    return f"no process makes progress: {'; '.join(told)}"
