"""A run that is killed and resumed, beside a run of one process: SmolLM2-135M by two processes that hold it together.

One process runs the recipe first. Then two processes run it with distributed.mode fsdp, each with half of the batch.
The last one is killed (SIGKILL) at the steps of --kill-at, and both are started again with --resume. Compared are the
losses of all steps, zeros and perplexities, and how long the other process took to end. Takes a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._machine import machine, origin
from benchmarks._results import plain_parser
from losa.recipe.reading import load_recipe
from losa.storage.files import write_json

ROOT = Path(__file__).parents[1]
METHOD = "losa"
# The demonstration's recipe, one method, and rounds long enough to be interrupted.
SETTINGS = {"compare": [], "rounds.count": 3, "train.max_tokens": 6144, "checkpoint.every_steps": 3}
ENDED_WITHIN = 120.0  # seconds that the other process may take


def main(argv: list[str]) -> None:
    parser = plain_parser("interrupted", __doc__ or "")
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "smollm2-cpu.yaml", help="%(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--kill-at", type=int, nargs="*", default=[4, 9], metavar="STEP", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found")
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write what the processes printed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        runs = Runs(Path(directory), options.recipe)
        one = runs.alone()
        many = runs.interrupted(options.processes, options.kill_at)
        found = compare(one, many) | {"kills": runs.kills, "processes": options.processes}
    print(json.dumps(found, indent=1))
    if options.json is not None:
        write_json(options.json, {"benchmark": "interrupted", "machine": machine("cpu"), "origin": origin(), **found})
    if options.log is not None:
        options.log.write_text("".join(runs.log))


class Runs:
    """Runs of one recipe in ``directory``. ``log`` holds what they printed; ``kills`` one entry for each kill."""

    def __init__(self, directory: Path, recipe: Path):
        self.directory, self.recipe = directory, recipe
        self.model = directory / "model"
        self.batch = load_recipe(recipe).train.batch_size
        self.log: list[str] = []
        self.kills: list[dict] = []
        _save_model(recipe, self.model)

    def alone(self) -> Path:
        """The output of an uninterrupted run of one process."""
        output = self.directory / "one"
        (process,) = self._start(output, 1, {})
        self._finish([process], "one process")
        return output

    def interrupted(self, count: int, kill_at: list[int]) -> Path:
        """The output of ``count`` processes, of which the last one is killed when that many steps are written."""
        output = self.directory / "many"
        settings = {"distributed.mode": "fsdp", "train.batch_size": self.batch // count}
        for step in kill_at:
            processes = self._start(output, count, settings)
            while self._steps(output) < step:
                assert all(p.poll() is None for p in processes), "a process ended before it was to be killed"
                time.sleep(0.05)
            written = self._steps(output)
            processes[-1].kill()
            began = time.perf_counter()
            for process in processes[:-1]:
                process.wait(timeout=ENDED_WITHIN)
            self.kills.append({"steps": written, "the others ended after s": round(time.perf_counter() - began, 1)})
            self._note(processes, f"process {count - 1} killed after step {written}")
        self._finish(self._start(output, count, settings), f"{count} processes, resumed")
        return output

    def _start(self, output: Path, count: int, settings: dict) -> list[subprocess.Popen]:
        settings = SETTINGS | {"model": str(self.model), "output": str(output)} | settings
        command = [sys.executable, "-m", "losa", "run", str(self.recipe), "--resume"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        if count == 1:
            shared = {}
        processes = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | shared | own | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""},
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return processes

    def _finish(self, processes: list[subprocess.Popen], what: str) -> None:
        self._note(processes, what)
        failed = [p.returncode for p in processes if p.returncode]
        assert not failed, "".join(self.log)[-6000:]

    def _note(self, processes: list[subprocess.Popen], what: str) -> None:
        self.log.append(f"== {what}\n")
        for rank, process in enumerate(processes):
            printed, _ = process.communicate()
            self.log.append(f"-- process {rank}, exit code {process.returncode}\n{printed}")

    def _steps(self, output: Path) -> int:
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
    masks = [record["masks"] for record in records]
    same = sum(masks[0][name]["sha256"] == masks[1][name]["sha256"] for name in masks[0])
    results = [record["results"][-1] for record in records]
    return {
        "steps": len(losses[0]),
        "same steps": [step for step, _ in losses[0]] == [step for step, _ in losses[1]],
        "largest relative difference of a loss": max(abs(b - a) / a for (_, a), (_, b) in zip(*losses, strict=True)),
        "masks": len(masks[0]),
        "equal masks": same,
        "zeros": [result["zeros"] for result in results],
        "perplexity": [result["perplexity"] for result in results],
        "seconds": [record["seconds"] for record in records],
    }


def _losses(output: Path) -> list[tuple[int, float]]:
    lines = (output / f"metrics-{METHOD}.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]
