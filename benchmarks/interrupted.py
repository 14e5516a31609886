"""A run that is killed and resumed, beside a run of one process: SmolLM2-135M by two processes that hold it together.

One process runs the recipe first, then two processes with distributed.mode fsdp. The recipe's batch is taken in two
halves: by one process one after the other (train.gradient_accumulation), by two at once. In other batches gradients
round in another way, and one weight that goes in place of another one with the same score changes all losses after it.
At the steps of --kill-at one of the processes is killed (SIGKILL), the last process and process 0 in turn, and all are
started again with --resume. Compared are the losses of all steps, zeros and perplexities, and how the other processes
ended. Ends with 1 where losses differ by more than 1e-4, other weights are zero, or no process noticed and said that
another one was lost. Takes a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from benchmarks._machine import machine, origin
from benchmarks._results import plain_parser
from losa.distributed.watch import LOST_EXIT_CODE
from losa.recipe.reading import load_recipe
from losa.storage.files import write_json
from losa.storage.tensor_files import checkpoint_tensors

ROOT = Path(__file__).parents[1]
METHOD = "losa"
# The demonstration's recipe, one method, and rounds long enough to be interrupted.
SETTINGS = {"compare": [], "rounds.count": 3, "train.max_tokens": 6144, "checkpoint.every_steps": 3}
TOLERANCE = 1e-4  # of a loss, relative
ENDED_WITHIN = 120.0  # seconds that the other processes may take to end
# How the lines of a stack trace of torch's begin.
_TRACE = ("frame #", "Exception raised from ", "<omitting python frames>")
LIMIT = 3600.0  # seconds that processes may take from their start to a step, or to their end


def main(argv: list[str]) -> int:
    parser = plain_parser("interrupted", __doc__ or "")
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "smollm2-cpu.yaml", help="%(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--kill-at", type=int, nargs="*", default=[4, 9], metavar="STEP", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found")
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write what the processes printed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        runs = Runs(Path(directory), options.recipe)
        try:
            one = runs.alone(options.processes)
            many = runs.interrupted(options.processes, options.kill_at)
            found = compare(one, many) | {"kills": runs.kills, "processes": options.processes}
        finally:
            if options.log is not None:
                options.log.write_text("".join(runs.log))
    print(json.dumps(found, indent=1))
    if options.json is not None:
        write_json(options.json, {"benchmark": "interrupted", "machine": machine("cpu"), "origin": origin(), **found})
    wrong = failures(found)
    for failure in wrong:
        print(f"interrupted: {failure}", file=sys.stderr)
    return int(bool(wrong))


class Runs:
    """Runs of one recipe in ``directory``. ``log`` holds what they printed; ``kills`` one entry for each kill."""

    def __init__(self, directory: Path, recipe: Path):
        self.directory, self.recipe = directory, recipe
        self.model = directory / "model"
        self.batch = load_recipe(recipe).train.batch_size
        self.log: list[str] = []
        self.kills: list[dict] = []
        _save_model(recipe, self.model)

    def alone(self, parts: int) -> Path:
        """The output of an uninterrupted run of one process, which takes a batch in so many parts."""
        output = self.directory / "one"
        settings = {"train.batch_size": self.batch // parts, "train.gradient_accumulation": parts}
        self._complete(output, 1, settings, "one process")
        return output

    def interrupted(self, count: int, kill_at: list[int]) -> Path:
        """The output of ``count`` processes, of which one is killed when that many steps are written: the last one and
        process 0, which keeps the processes' store, in turn."""
        output = self.directory / "many"
        settings = {"distributed.mode": "fsdp", "train.batch_size": self.batch // count}
        for number, step in enumerate(kill_at):
            victim = 0 if number % 2 else count - 1
            what, first = f"process {victim} killed after step {step}", len(self.log)
            with self._started(output, count, settings, what) as processes:
                _wait(lambda step=step: _steps(output) >= step, processes, LIMIT)
                written, began = _steps(output), time.perf_counter()
                processes[victim].kill()
                others = [process for process in processes if process is not processes[victim]]
                codes = [process.wait(timeout=ENDED_WITHIN) for process in others]
                took = round(time.perf_counter() - began, 1)
            printed = "".join(self.log[first:]).splitlines()
            self.kills.append(
                {
                    "process": victim,
                    "steps": written,
                    "exit codes of the others": codes,
                    "they ended after s": took,
                    "they said": [line for line in printed if line.startswith("losa: ")],
                }
            )
        self._complete(output, count, settings, f"{count} processes, resumed")
        return output

    def _complete(self, output: Path, count: int, settings: dict, what: str) -> None:
        with self._started(output, count, settings, what) as processes:
            end = time.monotonic() + LIMIT
            codes = [process.wait(timeout=max(0, end - time.monotonic())) for process in processes]
        assert not any(codes), "".join(self.log)[-6000:]

    @contextmanager
    def _started(self, output: Path, count: int, settings: dict, what: str) -> Iterator[list[subprocess.Popen]]:
        """So many processes of a run. What still runs at the end of the context is killed, and what all of them printed
        goes into the log."""
        settings = SETTINGS | {"model": str(self.model), "output": str(output)} | settings
        command = [sys.executable, "-m", "losa", "run", str(self.recipe), "--resume"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared |= {"LOCAL_WORLD_SIZE": str(count)}
        if count == 1:
            shared = {}
        # Sums have another order with another number of threads.
        shared["OMP_NUM_THREADS"] = "1"
        files = [self.directory / f"printed-{rank}.txt" for rank in range(count)]
        processes = []
        try:
            for rank, file in enumerate(files):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                environment = os.environ | shared | own | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
                with file.open("w") as printed:
                    processes.append(
                        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
                    )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()
            self.log.append(f"== {what}\n")
            for rank, (process, file) in enumerate(zip(processes, files, strict=False)):
                text = _readable(file.read_text().replace(str(self.directory), "DIRECTORY"))
                self.log.append(f"-- process {rank}, exit code {process.returncode}\n{text}")


def _readable(text: str) -> str:
    """What a process printed, without torch's C++ stack traces, and each line that follows itself once."""
    lines = [line for line in text.splitlines() if not line.startswith(_TRACE)]
    return "".join(f"{line}\n" for line, _ in groupby(lines))


def _wait(condition: Callable[[], bool], processes: list[subprocess.Popen], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "a process ended before one was to be killed"
        assert time.monotonic() < end, f"no process was to be killed within {seconds:g} s"
        time.sleep(0.05)


def _steps(output: Path) -> int:
    """The steps that an unfinished run has written."""
    path = output.with_name(f"{output.name}.work") / METHOD / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _save_model(recipe: Path, directory: Path) -> None:
    """The recipe's model as safetensors: a GGUF file cannot be read row by row."""
    from losa.model.loading import load_model

    settings = load_recipe(recipe)
    model, tokenizer = load_model(settings.model, gguf_file=settings.gguf_file, dtype=settings.dtype, device="cpu")
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)  # type: ignore[attr-defined]


def compare(one: Path, many: Path) -> dict:
    """How far the losses of ``many`` are from ``one``'s, step by step, and whether the same weights are zero."""
    losses = [_losses(output) for output in (one, many)]
    records = [json.loads((output / "losa_config.json").read_text()) for output in (one, many)]
    results = [record["results"][-1] for record in records]
    return {
        "steps": len(losses[0]),
        "same steps": [step for step, _ in losses[0]] == [step for step, _ in losses[1]],
        "largest relative difference of a loss": max(abs(b - a) / a for (_, a), (_, b) in zip(*losses, strict=False)),
        "weights that are zero in one alone": _differing_zeros(one, many, list(records[0]["masks"])),
        "prunable": results[0]["prunable"],
        "zeros": [result["zeros"] for result in results],
        "perplexity": [result["perplexity"] for result in results],
    }


def _differing_zeros(one: Path, many: Path, linears: list[str]) -> int:
    """Weights of these linears that are zero in one of the two models."""
    with checkpoint_tensors(one) as first, checkpoint_tensors(many) as second:
        names = [f"{linear}.weight" for linear in linears]
        return sum(int(((first.get(name) == 0) != (second.get(name) == 0)).sum()) for name in names)


def failures(found: dict) -> list[str]:
    """What is not as claimed, a sentence each."""
    difference = found["largest relative difference of a loss"]
    claims = {
        "the runs did not take the same steps": found["same steps"],
        f"losses differ by {difference:.1e}, expected at most {TOLERANCE:g}": difference <= TOLERANCE,
        f"{found['weights that are zero in one alone']} zeros differ": found["weights that are zero in one alone"] == 0,
    }
    for kill in found["kills"]:
        codes = kill["exit codes of the others"]
        text = f"process {kill['process']} was killed and the others ended with {codes}, expected {LOST_EXIT_CODE}"
        claims[text] = set(codes) == {LOST_EXIT_CODE}
        named = [line for line in kill["they said"] if f"process {kill['process']} (host " in line]
        claims[f"nobody named process {kill['process']} after it was killed"] = bool(named)
    return [text for text, holds in claims.items() if not holds]


def _losses(output: Path) -> list[tuple[int, float]]:
    lines = (output / f"metrics-{METHOD}.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]
