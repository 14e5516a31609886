"""Finished runs in one JSON file that several commands may fill at once, each with several worker processes."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks._jobs import Job, ready
from benchmarks._results import read_document
from losa.errors import LosaError, OutputError
from losa.storage.files import write_text
from losa.storage.lock import claimed

Start = Callable[[Job, float], "Future[dict]"]
PATIENCE = 5.0  # seconds between two looks at runs that another command makes


class Store:
    """The file of results: what all its runs share, and the runs by ``Job.key``. ``command`` is named in messages."""

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command

    def read(self) -> dict:
        """The document; without a file an empty one. Raises SystemExit: it is no JSON object."""
        if not self.path.exists():
            return {"runs": {}}
        document = read_document(self.command, self.path)
        document.setdefault("runs", {})
        return document

    def merge(self, shared: dict, runs: dict) -> dict:
        """Add runs to the file as it is now, and return it. Raises SystemExit: its runs had another ``setup``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            document = self.read()
            setup, wanted = document.get("setup", shared["setup"]), shared["setup"]
            if document["runs"] and setup != wanted:
                differing = [key for key in wanted | setup if setup.get(key) != wanted.get(key)]
                found = "; ".join(f"{key}: {setup.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
                raise SystemExit(
                    f"{self.command}: {self.path}: its runs had another setup ({found}); give another file"
                )
            document = {**document, **shared, "runs": document["runs"] | runs}
            write_text(self.path, as_text(document))
        return document

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


def work(store: Store, shared: dict, wanted: Iterable[Job], start: Start, slots: int) -> list[str]:
    """Make all runs of ``wanted`` that the file lacks, and the tuning that they wait for, ``slots`` at a time. Each is
    merged into the file when it ends. Returns the keys of runs that ended with an error, which is printed.

    Another command may do the same at the same time: each run is made by one of the two.
    """
    running: dict[Future[dict], tuple[Job, ExitStack]] = {}
    failed: dict[str, str] = {}
    while True:
        runs = store.merge(shared, {})["runs"]
        busy = {job.key for job, _ in running.values()}
        elsewhere = False
        for job, rate in ready(wanted, runs):
            if len(running) >= slots:
                break
            if job.key in busy or job.key in failed:
                continue
            claim = store.claim(job)
            if claim is None or job.key in store.read()["runs"]:  # it may have ended elsewhere meanwhile
                elsewhere = True
                if claim is not None:
                    claim.close()
                continue
            print(f"== {job.key}" + (f" at learning rate {rate:g}" if job.trains else ""), flush=True)
            busy.add(job.key)
            running[start(job, rate)] = job, claim
        if not running:
            if not elsewhere:
                return sorted(failed)
            time.sleep(PATIENCE)
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, claim = running.pop(future)
            with claim:
                try:
                    run = future.result()
                except LosaError as error:
                    failed[job.key] = str(error)
                    print(f"   {job.key}: {error}", flush=True)
                    continue
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
def workers(count: int):
    """A pool that makes each run in a process of its own, so that runs share neither weights nor a peak of memory.
    Each has its part of the cores, or OMP_NUM_THREADS."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
