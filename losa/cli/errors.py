"""What the command line says when a command fails: one sentence, or a short report with the traceback in a file."""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer
from typer.core import TyperGroup

from losa.errors import LosaError

DEBUG = "LOSA_DEBUG"
UNEXPECTED = "unexpected error"
RESUMABLE = ("run", "prune")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "typer")
MEMORY_HINTS = {
    "run": "lower train.batch_size or train.length, set train.activation_checkpointing: true, or hold the model in "
    "shards (distributed.mode: fsdp, distributed.cpu_offload: true); `losa plan` shows where memory goes",
    "prune": "take --offload disk, which holds one block of the model at a time, lower --samples, --length or "
    "--statistics-gb, prune in --dtype bfloat16, or take --pruner wanda, which needs least",
    "eval": "lower --batch-size or --length, or load in --dtype bfloat16",
    "bench": "load in --dtype bfloat16",
    "generate": "lower --max-new-tokens, or load in --dtype bfloat16",
}
# What torch says in a plain RuntimeError when the host's or the device's memory is used up.
_EXHAUSTED = ("DefaultCPUAllocator", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Commands(TyperGroup):
    """Turns every exception into a message on stderr: errors of losa's own and used-up memory into a sentence (exit
    code 1, or the error's own), Ctrl-C into another sentence (130), and any other exception into a report (1). With
    --debug every exception goes through that would end with 1."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            resume = "; --resume goes on" if ctx.invoked_subcommand in RESUMABLE else ""
            _say(f"losa: interrupted{resume}")
            raise typer.Exit(130) from error
        except Exception as error:
            if _is_usage(error) or _is_broken_pipe(error):
                raise
            code = error.exit_code if isinstance(error, LosaError) else 1
            if code == 1 and _shows_all(ctx.params.get("debug", False)):
                raise
            _say(message_for(error, ctx.invoked_subcommand) or report(error))
            raise typer.Exit(code) from error

    def main(self, args=None, *rest, standalone_mode: bool = True, **extra):
        """The same for what fails before a command starts."""
        try:
            return super().main(args, *rest, **extra, standalone_mode=standalone_mode)  # type: ignore[misc]
        except Exception as error:
            if not standalone_mode or _shows_all("--debug" in (sys.argv if args is None else args)):
                raise
            _say(message_for(error, None) or report(error))
            raise SystemExit(1) from error


@contextmanager
def told_to_all() -> Iterator[None]:
    """A LosaError of the context, which a process meets before it has joined the other ones, ends all of them with the
    same message: they would wait for this process."""
    try:
        yield
    except LosaError as error:
        if os.environ.get("WORLD_SIZE", "1").strip() != "1":
            from losa.distributed.launch import end_together

            end_together(str(error))
        raise


def debugging(option: bool) -> bool:
    """Whether tracebacks are wanted: by the option or by LOSA_DEBUG, whose bad value is an error."""
    if option or DEBUG not in os.environ:
        return option
    # losa_kernels imports torch, which takes seconds.
    from losa_kernels import settings

    return settings.DEBUG()


def _shows_all(option: bool) -> bool:
    """``debugging`` while an error is reported, which may be the error of LOSA_DEBUG."""
    try:
        return debugging(option)
    except ValueError:
        return False


def message_for(error: BaseException, command: str | None) -> str | None:
    """The sentence for an error that is understood, with the command's own advice; None for any other error."""
    if any(_is_exhausted(cause) for cause in _chain(error)):
        on_gpu = any("CUDA" in str(cause) or "CUBLAS" in str(cause) for cause in _chain(error))
        hint = MEMORY_HINTS.get(command or "", "this needs a machine with more")
        return f"losa: out of {'GPU ' if on_gpu else ''}memory; {hint}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"losa: cannot write {error.filename or 'standard output'}: {error.strerror}"
    # By name: torch is not to be imported for this.
    understood = isinstance(error, LosaError) or type(error).__name__ == "SettingError"
    return f"losa: {error}" if understood else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_exhausted(error: BaseException) -> bool:
    # By name: torch is not to be imported for this.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _EXHAUSTED)


def _is_usage(error: BaseException) -> bool:
    """Typer's own: wrong arguments, exits. It shows these itself."""
    return type(error).__module__.startswith(("typer.", "click."))


def _is_broken_pipe(error: BaseException) -> bool:
    """Whoever read stdout has seen enough. Typer ends quietly."""
    return isinstance(error, BrokenPipeError)


def report(error: BaseException) -> str:
    """Versions, command and the error on a few lines; the traceback goes into a file that the last line names."""
    text = str(error).strip()
    first = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    lines = [
        f"losa: {UNEXPECTED}: {first}",
        f"  versions: {_versions()}",
        f"  command: {shlex.join(['losa', *sys.argv[1:]])}",
    ]
    details = "".join(traceback.format_exception(error))
    path = _write_details("\n".join([*lines, "", details]))
    if path is None:
        return "\n".join([*lines, "  no file could be written for the traceback, so here it is:", details])
    return "\n".join([*lines, f"  the traceback is in {path}; please send it with your report of this error"])


def _versions() -> str:
    from losa import __version__

    found = [f"losa {__version__}"]
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([*found, f"Python {platform.python_version()}", platform.platform()])


def _write_details(text: str) -> Path | None:
    """Into the current directory or, failing that, the directory for temporary files; None where neither works."""
    # Processes of several machines write into one directory, and may have the same process id.
    rank = f"-rank{os.environ['RANK'].strip()}" if os.environ.get("RANK", "").strip().isdecimal() else ""
    name = f"losa-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{rank}.txt"
    for directory in (os.curdir, tempfile.gettempdir()):
        path = Path(directory) / name
        partial = path.with_name(f".{name}.partial")
        try:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(partial, path)
            return path.resolve()
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    return None


def _say(message: str) -> None:
    """On stderr, in characters that it can show. An error of writing there is dropped: nobody could be told."""
    with suppress(OSError, ValueError):
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        sys.stderr.write(message.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stderr.flush()


def set_up_messages(debug: bool) -> None:
    """Give every warning, of losa or of a library, one line that says it is a warning. With ``debug`` also show what
    losa logs, and the tracebacks of libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s") if debug else _OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if debug:
        for name in ("losa", "losa_kernels"):
            logging.getLogger(name).setLevel(logging.INFO)
        return
    warnings.showwarning = _show_warning
    threading.excepthook = _thread_failed


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()} from {record.name}: {record.getMessage()}"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _say(f"warning from {Path(filename).stem}: {category.__name__}: {message}")


def _thread_failed(failure) -> None:
    """A library's background thread (transformers asks the hub in one) is not the command."""
    if failure.exc_type is not SystemExit:
        _say(f"warning from thread {getattr(failure.thread, 'name', '?')}: {failure.exc_type.__name__}")
