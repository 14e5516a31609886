"""Pruning from disk under a limit of memory: a random LLaMA in bf16, of which one block at a time is in memory.

The model's files are written first, block by block. Then ``losa prune --offload disk`` runs in a process that may not
map more memory than --limit (RLIMIT_AS: also what is never touched, such as code of libraries). It is killed (SIGKILL)
--kills times, each time in the middle of a block, and started again with --resume. With --resident the same model is
pruned whole in memory too, without a limit. Ends with 1 where a process fails, the output has another number of zeros
than was asked for, or a run of at least 1 GB does not hold what its plan says: PLANNED more or less; in memory, where
weights are pages of files until they are pruned, PLANNED more that is no page of a file.

checkpoint_gb, limit_gb: of 10^9 bytes. peak_gb: the most resident memory of any of the processes; anonymous_gb: the
most of it, in samples, that is no page of a file, which the system could take back; libraries_gb: of a process that has
imported what a run imports, and has done nothing; plan_gb: what the run holds besides, by its plan; mapped_gb: the most
that any of the processes mapped. block_s: median seconds of a block, its statistics, pruning, writing and comparison.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks._random_model import SIZES
from benchmarks._results import parser, report
from losa.output.inspection import inspect_directory
from losa.packed.shards import write_index, write_shard
from losa.recipe.reading import parse_recipe
from losa.run.estimate import estimate
from losa.storage.files import RECORD

GB = 1e9
LIMITS = {"wanda": 6.0, "sparsegpt": 10.0}  # GB, for an 8B model
PLANNED = 0.15
FINISHED = re.compile(r"block (\d+)/\d+: sparsity \S+, (\d+) s")


def main(argv: list[str]) -> int:
    arguments = parser("offload", __doc__)
    arguments.add_argument("--size", choices=SIZES, default="llama3-8b", help="default: %(default)s")
    arguments.add_argument("--blocks", type=int, default=4, help="instead of all; default: %(default)s")
    arguments.add_argument("--pruner", action="append", help="only this one; may be repeated")
    arguments.add_argument("--limit", type=float, help="GB; default: wanda 6, sparsegpt 10")
    arguments.add_argument("--kills", type=int, default=2, help="default: %(default)s")
    arguments.add_argument("--samples", type=int, default=4, help="of calibration, of 128 tokens; default: %(default)s")
    arguments.add_argument("--resident", action="store_true", help="also whole in memory")
    args = arguments.parse_args(argv)
    size, blocks = ("tiny", 3) if args.quick else (args.size, args.blocks)

    def measured() -> Iterator[dict]:
        libraries, own = memory_of_libraries()
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            weights = save_model(folder / "model", size, blocks)
            (folder / "text.txt").write_text(text())
            for pruner in args.pruner or LIMITS:
                limit = args.limit or LIMITS[pruner]
                for offloaded in (True, False) if args.resident else (True,):
                    run = Run(folder, pruner, limit if offloaded else None, args.samples)
                    for after in range(1, args.kills * offloaded + 1):
                        run.start(kill_at=max(after, after * blocks // (args.kills + 1)))
                    run.start()
                    plan = run.planned()
                    held = run.peak - libraries if offloaded else run.anonymous - own
                    yield {
                        "op": "prune, offloaded" if offloaded else "prune, in memory",
                        "model": size,
                        "layers": blocks,
                        "name": pruner,
                        "checkpoint_gb": weights / GB,
                        "limit_gb": run.limit,
                        "peak_gb": run.peak / GB,
                        "anonymous_gb": run.anonymous / GB,
                        "plan_gb": plan / GB,
                        "libraries_gb": libraries / GB,
                        "mapped_gb": run.mapped / GB,
                        "block_s": statistics.median(run.seconds) if run.seconds else None,
                        "kills": run.kills,
                        "zeros": run.check(),
                    }
                    if plan >= GB and not (1 - PLANNED if offloaded else 0) <= held / plan <= 1 + PLANNED:
                        raise SystemExit(
                            f"offload: {pruner}: the plan says {plan / GB:.2f} GB, and {held / GB:.2f} were held"
                        )
                    shutil.rmtree(run.output)  # the next one needs the room

    report("offload", measured(), args.json, "cpu")
    return 0


@dataclass
class Run:
    """One output, made by several processes after each other; without a ``limit`` the whole model is in memory."""

    folder: Path
    pruner: str
    limit: float | None
    samples: int
    peak: int = 0
    anonymous: int = 0
    mapped: int = 0
    kills: int = 0
    seconds: list[int] = field(default_factory=list)

    def start(self, kill_at: int | None = None) -> None:
        """Go on to the end, or until so many blocks of all are finished and the next one has begun."""
        command = [sys.executable, "-m", "losa", "prune", str(self.folder / "model")]
        command += ["--offload", "disk", "--resume"] if self.limit is not None else []
        command += ["--output", str(self.output), "--data", str(self.folder / "text.txt"), "--pruner", self.pruner]
        command += ["--sparsity", "0.5", "--samples", str(self.samples), "--length", "128"]
        printed = self.folder / f"{self.pruner}.txt"
        with printed.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=self._limited,
                env=os.environ | {"COLUMNS": "999"},
            )
        while process.poll() is None:
            self._watch(process.pid)
            if kill_at is not None and self._finished() >= kill_at:
                time.sleep(0.2)  # the next block has begun
                process.kill()
                break
            time.sleep(0.05)
        self.kills += process.wait() == -signal.SIGKILL
        found = printed.read_text()
        self.seconds += [int(seconds) for _, seconds in FINISHED.findall(found)]
        if process.returncode not in (0, -9) or (kill_at is None and process.returncode):
            raise SystemExit(f"offload: {self.pruner} ended with {process.returncode}:\n{found}")

    def planned(self) -> int:
        """The most that the run holds at a time by its plan, in bytes."""
        settings = {
            "model": str(self.folder / "model"),
            "output": str(self.output),
            "method": "prune_only",
            "offload": None if self.limit is None else "disk",
            "device": "cpu",
            "prune": {"pruner": self.pruner, "sparsity": 0.5},
            "calibration": {"data": str(self.folder / "text.txt"), "samples": self.samples, "length": 128},
        }
        return estimate(parse_recipe(settings, "offload"), probe=False).peak("host")[0]

    def _finished(self) -> int:
        work = self.output.with_name(f"{self.output.name}.work")
        return len(list(work.glob("prune_only/blocks/block-*.json")))

    @property
    def output(self) -> Path:
        return self.folder / f"out-{self.pruner}"

    def check(self) -> float:
        """The share of zeros in the output's pruned linears. Raises SystemExit: it is not a half."""
        masks = json.loads((self.output / RECORD).read_text())["masks"]
        pruned = [t for t in inspect_directory(self.output).tensors if t.name.removesuffix(".weight") in masks]
        share = sum(t.zeros for t in pruned) / sum(t.total for t in pruned)
        if abs(share - 0.5) > 1e-3 or len(pruned) != len(masks):
            raise SystemExit(f"offload: {self.pruner}: expected half of the weights to be zero, got {share:.4%}")
        return share

    def _limited(self) -> None:
        if self.limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (int(self.limit * GB),) * 2)

    def _watch(self, pid: int) -> None:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("Vm", "RssAnon"))}
        self.peak = max(self.peak, 1024 * int(found.get("VmHWM", 0)))
        self.anonymous = max(self.anonymous, 1024 * int(found.get("RssAnon", 0)))
        self.mapped = max(self.mapped, 1024 * int(found.get("VmPeak", 0)))


def memory_of_libraries() -> tuple[int, int]:
    """Resident bytes of a process that has imported what a run imports, and those of them that are no pages of
    files."""
    program = """
import losa.run.offloaded, losa.run.pipeline, transformers.models.llama.modeling_llama
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon"))))
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    resident, anonymous = (1024 * int(size) for size in found.split())
    return resident, anonymous


def save_model(directory: Path, size: str, blocks: int) -> int:
    """A checkpoint with a file for each block, and its tokenizer. Returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, _, heads, key_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_hidden_layers=blocks, num_key_value_heads=key_heads, tie_word_embeddings=False, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"block-{number}.safetensors", []).append(name)
    size_of_all = 0
    for file, names in files.items():
        tensors = {}
        for name in names:
            value = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = value.fill_(1) if value.ndim == 1 else value.normal_(std=0.02, generator=generator)
        size_of_all += write_shard(directory / file, tensors)
    write_index(directory, {name: file for file, names in files.items() for name in names}, size_of_all)
    return size_of_all


def tokenizer():
    """A token for each letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz .\n")}
    made = Tokenizer(models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def text() -> str:
    letters = random.Random(0)
    return "\n".join("".join(letters.choice("abcdefghij klmnop.") for _ in range(80)) for _ in range(200))
