"""Signals that ask a run to save and stop, and how all processes heed them at the same step.

A signal may reach one process or all of them, each at another moment. ``agree`` makes the processes exchange what they
were asked; they call it together, at a step or any other boundary, and so stop together.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from losa.distributed.processes import control_group, process_count
from losa.distributed.watch import waiting
from losa.errors import LosaError

# SIGTERM: whoever manages the machine wants it back. SIGUSR1: a batch system's warning ahead of the time limit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# Seconds: SIGTERMs that come closer to each other are one request, which a launcher passes on to a process that the
# machine's manager has asked too.
_ONE_REQUEST = 5.0

# The number of the signal that came last; 0: none.
_came = 0


class Stopped(LosaError):
    """A signal asked the run to stop. The same command with --resume goes on.

    Args:
        signal: its name.
        saved: whether the run saved its state at this moment. If not, it goes on from an earlier state.
    """

    # EX_TEMPFAIL of sysexits.h: batch scripts run the command again.
    exit_code = 75

    def __init__(self, signal: str, *, saved: bool = False):
        super().__init__(f"stopped by {signal}{' after saving' if saved else ''}; run again with --resume")


@dataclass(frozen=True)
class Asked:
    """What the processes were asked, the same in every process.

    ``save``: at least one process wants to save, or to stop, before which a run saves. ``stop``: the name of the signal
    that asks to stop; None: go on.
    """

    save: bool
    stop: str | None


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Within the context SIGTERM and SIGUSR1 only ask to stop (``agree``); afterwards they do what they did before.

    A second SIGTERM within the context, some seconds after the first one, does what SIGTERM did before: by default it
    ends the process. Python takes signals in the main thread alone, between two of its instructions: a process that
    waits in a collective call takes none. In any other thread the context changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    asked: float | None = None

    def note(number, frame) -> None:
        global _came
        nonlocal asked
        _came = number
        if number != signal.SIGTERM:
            return
        if asked is None:
            asked = time.monotonic()
        elif time.monotonic() - asked > _ONE_REQUEST:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield
    finally:
        _forget()
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget() -> None:
    global _came
    _came = 0


def agree(save: bool = False) -> Asked:
    """What the processes were asked. All processes call it together; with several it is one small message to each.

    Args:
        save: whether this process wants all of them to save.
    """
    flags = torch.tensor([int(save), _came])
    if process_count() > 1:
        with waiting():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=control_group())
    wanted, number = flags.tolist()
    return Asked(bool(wanted or number), signal.Signals(number).name if number else None)


def check() -> None:
    """A boundary outside of training, such as a block or a window. All processes call it together.

    Raises:
        Stopped: in every process, where a signal asks to stop.
    """
    asked = agree()
    if asked.stop is not None:
        raise Stopped(asked.stop)
