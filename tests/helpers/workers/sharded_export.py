"""For ``tests/losa/output/test_sharded_export.py``: exports models whole and in shards, damaged ones too."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from losa.algorithm.engine import Engine
from losa.algorithm.schedule import Round
from losa.distributed.processes import is_main, process_index
from losa.distributed.sharding import Sharding, make_sharding, shard_module
from losa.distributed.stop import heeding_signals
from losa.errors import LosaError
from losa.evaluation.perplexity import perplexity
from losa.model.loading import load_model
from losa.model.sharded_loading import load_sharded
from losa.model.wrapping import merge_model, sparsity_of, wrap_model
from losa.output import export, sharded_export
from losa.output.checks import mask_records
from losa.output.sharded_export import export_together
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa.recipe.training import TrainConfig
from losa.record import RunRecord
from losa.storage.json_files import read_json
from losa.training.trainer import Trainer
from losa_kernels import unpack_mask
from tests.helpers.exports import prune, pruned
from tests.helpers.memory import peak
from tests.helpers.processes import finish, start_worker
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.training import LENGTH, sequences

IDS = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(1))
NAME = "model.layers.1.self_attn.q_proj"


def sharded(model, masks, sharding):
    """The model in shards, and its masks too."""
    shard_module(model, sharding)
    return {name: sharding.shard(mask) for name, mask in masks.items()}


class Logs(logging.Handler):
    """Keeps what is logged from now on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record) -> None:
        self.messages.append(record.getMessage())


def _nothing(*_):
    pass


def exports(root: Path, sharding, names: Iterable[str]) -> dict:
    """Each model is exported by one process, then by all."""
    found = {}
    models = {name: load_model(str(root / name), device="cpu")[0] for name in names}
    models["bfloat16"] = pruned(torch.bfloat16, tie_word_embeddings=True)[0]
    draw = export.write_figures
    for name, model in models.items():
        export.write_figures = draw if name == "llama" else _nothing  # pictures take most of the time
        _, masks, record = prune(model)
        model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
        whole, parts = root / "out" / f"{name}-whole", root / "out" / name
        # transformers reads this tokenizer otherwise for models of other kinds.
        tokenizer = tiny_tokenizer() if model.config.model_type == "llama" else None
        export_together(model, tokenizer, whole, record, masks, sample_ids=IDS)
        rows = sharded(model, masks, sharding)
        assert sparsity_of(model) == (record.results[0].zeros, record.results[0].prunable)
        sizes = {linear: model.get_submodule(linear).in_features for linear in masks}
        extra = {"notes": root / "notes"}
        export_together(model, tokenizer, parts, record, rows, sample_ids=IDS, extra_files=extra)
        found[name] = {
            "masks": mask_records(rows, sizes) == record.masks,
            "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        }
    return found


def recorded_count(tensors, record, model, masks):
    record.masks[NAME].kept -= 1


def minus_zero(tensors, record, model, masks):
    """Both in the file and in memory."""
    row, column = (~unpack_mask(masks[NAME], 32)).nonzero()[0].tolist()
    tensors[f"{NAME}.weight"][row, column] = -0.0
    weight = model.get_parameter(f"{NAME}.weight")
    rows = Sharding.of(weight).rows(len(weight))
    if row in rows:
        weight.to_local().data[row - rows.start, column] = -0.0


def block(tensors, record, model, masks):
    tensors[f"{NAME}.weight"][0, 0] += 1


def embedding(tensors, record, model, masks):
    tensors["model.embed_tokens.weight"][-1, -1] += 1e-7


def not_finite(tensors, record, model, masks):
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")


def recorded_zeros(tensors, record, model, masks):
    record.results[0].zeros -= 1


def missing_mask(tensors, record, model, masks):
    del record.masks[NAME]


def other_function(tensors, record, model, masks):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1


def other_positions(tensors, record, model, masks):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def missing_tensor(tensors, record, model, masks):
    del tensors["model.norm.weight"]


DAMAGES = [
    recorded_count, minus_zero, block, embedding, not_finite, recorded_zeros, missing_mask, missing_tensor,
    other_function, other_positions,
]  # fmt: skip


def tamper(directory: Path, change, *arguments) -> None:
    """Change the written tensors, and what the processes hold."""
    files = sorted(directory.glob("*.safetensors"))
    places = {name: file for file in files for name in load_file(file)}
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    dist.barrier()
    change(tensors, *arguments)
    if is_main():
        for file in files:
            kept = {name: tensors[name] for name, place in places.items() if place == file and name in tensors}
            save_file(kept, file, {"format": "pt"})
    dist.barrier()


def error(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except (LosaError, OSError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"


def damages(root: Path, sharding) -> dict:
    found = {}
    check, write = sharded_export.check_sharded_export, sharded_export.write_shard
    for damage in DAMAGES:
        model, masks, record = pruned()
        rows = sharded(model, masks, sharding)

        def tampered(directory, *arguments, damage=damage, masks=masks, model=model, record=record):
            tamper(directory, damage, record, model, masks)
            return check(directory, *arguments)

        sharded_export.check_sharded_export = tampered
        found[damage.__name__] = error(export_together, model, tiny_tokenizer(), root / "bad", record, rows)
    sharded_export.check_sharded_export = check

    def full(path, tensors):
        if process_index() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, tensors)

    model, masks, record = pruned()
    rows = sharded(model, masks, sharding)
    sharded_export.write_shard = full
    found["full disk"] = error(export_together, model, None, root / "bad", record, rows)

    def asked(path, tensors):
        if process_index() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return write(path, tensors)

    sharded_export.write_shard = asked
    with heeding_signals():
        found["asked to stop"] = error(export_together, model, None, root / "bad", record, rows)
    sharded_export.write_shard = write
    found["exists"] = error(export_together, model, None, root / "llama", record, rows)
    found["other tokenizer"] = error(
        sharded_export.check_sharded_export, root / "out" / "bfloat16", *other_tokenizer(sharding)
    )
    return found


def other_tokenizer(sharding):
    model, masks, record = prune(pruned(torch.bfloat16, tie_word_embeddings=True)[0])
    return model, tiny_tokenizer("other"), record, sharded(model, masks, sharding)


def memory(root: Path, sharding) -> dict[str, int]:
    """What each step of a run takes for a while beyond what it had, and the size of the model, in bytes."""
    model, tokenizer = load_sharded(str(root / "deep"), sharding)
    found = {"model": sum(p.nbytes for p in model.parameters())}
    record = RunRecord.from_dict(read_json(root / "out" / "bfloat16" / "losa_config.json"))
    record.masks, record.results = {}, []
    train = TrainConfig(data="unused", length=LENGTH, batch_size=2)

    def prune_round() -> None:
        allocation, calibration = AllocationConfig(mean_rank=2, rank_max=4), CalibrationConfig(data="unused")
        Engine(model, IDS, PruneConfig(sparsity=0.5), allocation, calibration).run_round(Round(1, 0.5, 2, 0))

    def train_step() -> None:
        Trainer(model, train, seed=0, output_dir=None, total_sequences=4, device="cpu").train(
            sequences(4), round_index=1
        )

    steps: dict[str, Callable[[], object]] = {
        "wrap": lambda: wrap_model(model, rank=2, scaling=2.0),
        "prune": prune_round,
        "train": train_step,
        "evaluate": lambda: perplexity(model, IDS.flatten(), 20),
        "merge": lambda: merge_model(model),
        "export": lambda: export_together(model, tokenizer, root / "out" / "deep", record, {}),
    }
    for name, step in steps.items():
        peak()
        before = peak()
        step()
        found[name] = peak() - before
    return found


def main(directory: str, *names: str) -> None:
    start_worker()
    root = Path(directory)
    sharding = make_sharding(torch.device("cpu"))
    logs = Logs()
    logging.getLogger("transformers").addHandler(logs)
    found: dict = {"exports": exports(root, sharding, names), "said": logs.messages}
    found["damages"] = damages(root, sharding)
    found["memory"] = memory(root, sharding)
    dist.barrier()
    finish(found)
