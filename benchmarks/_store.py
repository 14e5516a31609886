"""Finished runs in one JSON file that several commands may fill at once, each with several worker processes."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks._jobs import Job, finished, ready
from benchmarks._results import read_document
from losa.errors import LosaError, OutputError
from losa.storage.files import write_text
from losa.storage.lock import claimed

Start = Callable[[Job, float], "Future[dict]"]
PATIENCE = 5.0  # seconds between two looks at runs that another command makes


class Store:
    """The file of results: what all its runs share, the runs by ``Job.key``, and in ``errors`` the last line of the
    traceback of each run that ended with an error and was not made since. ``command`` is named in messages."""

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command

    def read(self, new: bool = False) -> dict:
        """The document; a file that may be ``new`` is empty. Raises SystemExit: no such file, or no JSON object."""
        if new and not self.path.exists():
            return {"runs": {}}
        document = read_document(self.command, self.path)
        document.setdefault("runs", {})
        return document

    def merge(self, shared: dict, runs: dict, errors: dict[str, str] | None = None) -> dict:
        """Add runs and errors to the file as it is now, and return it. Raises SystemExit: see ``check_setup``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            document = self.read(new=True)
            self.check_setup(document, shared)
            left = {key: error for key, error in document.get("errors", {}).items() if key not in runs} | (errors or {})
            document = {**document, **shared, "errors": left, "runs": document["runs"] | runs}
            if not left:
                del document["errors"]
            write_text(self.path, as_text(document))
        return document

    def check_setup(self, document: dict, shared: dict) -> None:
        """Raises SystemExit: the runs of ``document`` had another ``setup``."""
        setup, wanted = document.get("setup", shared["setup"]), shared["setup"]
        if document["runs"] and setup != wanted:
            differing = [key for key in wanted | setup if setup.get(key) != wanted.get(key)]
            found = "; ".join(f"{key}: {setup.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
            raise SystemExit(f"{self.command}: {self.path}: its runs had another setup ({found}); give another file")

    def claim(self, job: Job) -> ExitStack | None:
        """Held until it is closed or this process ends; None: another command has the run."""
        stack = ExitStack()
        name = re.sub(r"[^\w.-]+", "_", job.key)
        try:
            stack.enter_context(claimed(self.path.with_name(f"{self.path.name}.{name}")))
        except OutputError:
            return None
        return stack


def as_text(document: dict) -> str:
    """JSON with a line for each run, in the order of their keys."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in sorted(document["runs"].items()))
    text = json.dumps({key: value for key, value in document.items() if key != "runs"} | {"runs": {}}, indent=1)
    return text.removesuffix("{}\n}") + (f"{{\n{lines}\n }}\n}}\n" if lines else "{}\n}\n")


@contextmanager
def _locked(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def work(store: Store, shared: dict, wanted: Iterable[Job], start: Start, slots: int) -> dict[str, str]:
    """Make all runs of ``wanted`` that the file lacks, and the tuning that they wait for, ``slots`` at a time. Each is
    merged into the file when it ends. Returns the errors of runs that ended with one, by key; the other runs go on.

    Another command may do the same at the same time: each run is made by one of the two.
    """
    running: dict[Future[dict], tuple[Job, ExitStack]] = {}
    failed: dict[str, str] = {}
    made: set[str] = set()
    store.merge(shared, {})
    while True:
        busy = {job.key for job, _ in running.values()}
        elsewhere = False
        for job, rate in ready(wanted, store.read()["runs"]):
            if len(running) >= slots:
                break
            if job.key in busy or job.key in failed or job.key in made:
                continue
            claim = store.claim(job)
            if claim is None or finished(job, store.read()["runs"]):  # it may have ended elsewhere meanwhile
                elsewhere = True
                if claim is not None:
                    claim.close()
                continue
            print(f"== {job.key}" + (f" at learning rate {rate:g}" if job.trains else ""), flush=True)
            busy.add(job.key)
            running[start(job, rate)] = job, claim
        if not running:
            if not elsewhere:
                return failed
            time.sleep(PATIENCE)
            continue
        # A run that ends elsewhere may be what a free slot waits for.
        for future in wait(running, None if len(running) == slots else PATIENCE, FIRST_COMPLETED).done:
            job, claim = running.pop(future)
            with claim:
                try:
                    run = future.result()
                except Exception as error:
                    if not isinstance(error, (LosaError, BrokenProcessPool)):
                        traceback.print_exception(error)
                    failed[job.key] = traceback.format_exception_only(error)[-1].strip()
                    store.merge(shared, {}, {job.key: failed[job.key]})
                    print(f"   {job.key}: {error}", flush=True)
                    continue
                made.add(job.key)
                store.merge(shared, {job.key: run})
                print(f"   {job.key}: {said(run)}", flush=True)


def said(run: dict) -> str:
    if run.get("failed"):
        return run["failed"]
    unmerged = run.get("perplexity_unmerged")
    parts = [f"perplexity {run['perplexity']:.2f}"]
    parts += [f"{unmerged:.2f} unmerged"] if unmerged is not None else []
    parts += [f"{run['seconds']:.0f} s"] if "seconds" in run else []
    return ", ".join(parts)


@contextmanager
def processes(count: int, run: Callable[[Job, float], dict]) -> Iterator[Start]:
    """A way to start ``run`` in a process of its own for each job, so that runs share neither weights nor a peak of
    memory, and one that is killed takes no other with it. Each of ``count`` at a time has its part of the cores, or
    OMP_NUM_THREADS. None outlives the context, or this process."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    context = multiprocessing.get_context("spawn")

    def start(job: Job, rate: float) -> Future[dict]:
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
        future = pool.submit(run, job, rate)
        pool.shutdown(wait=False)
        return future

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield start
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in multiprocessing.active_children():
            child.terminate()


def _end_with_parent() -> None:
    def wait_for_it() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()
