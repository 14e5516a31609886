"""Signals that ask to stop, in one process; ``test_watch.py`` has several."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from losa.distributed import stop
from losa.distributed.stop import Asked, Stopped, heeding_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_save_and_stop(number):
    before = signal.getsignal(number)
    with heeding_signals():
        assert stop.agree() == Asked(save=False, stop=None)
        assert stop.agree(save=True) == Asked(save=True, stop=None)
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.agree() == Asked(save=True, stop=number.name)
        with pytest.raises(Stopped, match=f"stopped by {number.name}; run again with --resume"):
            stop.check()
    assert signal.getsignal(number) == before
    assert stop.agree() == Asked(save=False, stop=None)


def test_a_second_sigterm_does_what_it_did_before(monkeypatch):
    """Some seconds after the first one: a launcher may pass on what a process got already."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with heeding_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [] and stop.agree().stop == "SIGTERM"
            monkeypatch.setattr(stop, "_ONE_REQUEST", 0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone():
    found = []

    def look():
        with heeding_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
