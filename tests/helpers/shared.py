"""Files that all processes of a test run share: what one of pytest-xdist's workers has made, the others take."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from losa_kernels import settings

# The folder of a process that no test run has given one by LOSA_TEST_RUN (conftest.py).
_own = tempfile.TemporaryDirectory()


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The file of that name; ``make`` writes it, once a run, to the path that it gets."""
    path = Path(settings.TEST_RUN() or _own.name) / name
    with _lock(path.with_name(f"{name}.lock")):
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            make(partial)
            partial.replace(path)
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
