"""What processes do each for itself, and fail at together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from losa.distributed.processes import from_everyone, process_count, process_index, told_error
from losa.errors import LosaError

_T = TypeVar("_T")


def together(work: Callable[[], _T]) -> list[_T]:
    """Run ``work`` in every process, and wait until all are done: a process that failed would leave the next collective
    call to the others, which would wait for it.

    Args:
        work: makes no collective calls that another process could wait in while this one fails. Its result can be
            pickled.

    Returns:
        every process's result, in the order of the processes.

    Raises:
        LosaError, ValueError: in every process, with the message of the first process that failed. Of another error
            the other processes say in which process it was.
    """
    if process_count() == 1:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    told = None if error is None else told_error(error)
    everyone = from_everyone((result, told))
    first = next((index for index, (_, told) in enumerate(everyone) if told is not None), None)
    if first is None:
        return [result for result, _ in everyone]
    if first == process_index() and error is not None:
        raise error
    kind, message = everyone[first][1]
    if kind is not None:
        raise kind(message) from error
    raise LosaError(f"process {first}: {message}") from error
