"""For ``tests/losa/training/test_several_processes.py``: rounds of a tiny model, whole and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.distributed.processes import is_main
from losa.distributed.sharding import gathered, make_sharding, shard_module, whole
from losa.errors import LosaError
from losa.modules.gated_lora import SoRALinear
from losa.modules.lora import LoRALinear
from losa.modules.masked_linear import MaskedLinear
from losa.recipe.machines import DistributedConfig
from losa.recipe.training import TrainConfig
from losa.training import shell
from losa.training.loss import TokenLoss
from losa.training.position import StepDone, TrainState, empty_moments
from losa.training.sora import GatePenalty
from losa.training.trainer import Trainer
from tests.helpers.processes import finish, start_worker
from tests.helpers.training import LENGTH, distillation, odd_llama, sequences, untimed

# Steps of 6, 6 and 4 sequences.
SEQUENCES, STEP = 16, 6
LEARNING_RATE = 1e-2


def trainer(
    model: nn.Module,
    directory: Path | None,
    distributed: dict | None = None,
    loss_factory: Callable = TokenLoss,
    fused: bool = False,
    **settings: Any,
) -> Trainer:
    """A trainer that takes 6 sequences a step, whatever the number of processes. ``fused``: as on a GPU."""
    config = {"data": "unused", "length": LENGTH, "batch_size": 2, "warmup": 0.0, "learning_rate": LEARNING_RATE}
    made = Trainer(
        model,
        TrainConfig(**config | settings),
        seed=0,
        output_dir=directory,
        total_sequences=2 * SEQUENCES,
        device="cpu",
        loss_factory=loss_factory,
        distributed=DistributedConfig(**(distributed or {})),
    )
    made.sequences_per_step = STEP
    made.fused = fused
    return made


def sharded(shard_size: int | None = None, **settings: Any) -> nn.Module:
    model = odd_llama(**settings)
    shard_module(model, make_sharding(torch.device("cpu"), shard_size))
    return model


def values(model: nn.Module, what: Callable[[nn.Parameter], Tensor | None], trained: bool = True) -> dict[str, Tensor]:
    """Something of the parameters that are trained, or of those that are not, whole and in copies."""
    chosen = {name: what(p) for name, p in model.named_parameters() if p.requires_grad == trained}
    return {name: whole(t).detach().clone() for name, t in chosen.items() if t is not None}


def listed(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: t.double().flatten().tolist() for name, t in tensors.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def written(directory: Path) -> list[dict]:
    """The main process's lines of metrics, but for times."""
    return untimed(directory) if is_main() else []


def two_rounds(model: nn.Module, directory: Path, **settings: Any) -> dict:
    """The gradients of a single step; then two rounds of three steps, the rank and the mask of a layer changed between
    them: what was trained, and the numbers of each step."""
    run = trainer(model, directory, **settings)
    frozen = values(model, lambda p: p, trained=False)
    kinds = {name: (p.dtype, p.shape) for name, p in model.named_parameters()}
    run.train(sequences(SEQUENCES, 1, highest=50), round_index=1)
    found: dict[str, Any] = {"frozen": same(values(model, lambda p: p, trained=False), frozen)}
    found["kinds"] = kinds == {name: (p.dtype, p.shape) for name, p in model.named_parameters()}
    block = model.model.layers[1]
    with gathered(block):
        block.mlp.down_proj.set_rank(7, torch.Generator().manual_seed(3))
        block.mlp.down_proj.set_mask(torch.rand(36, 50, generator=torch.Generator().manual_seed(4)) < 0.4)
    outcome = run.train(sequences(SEQUENCES, 2, highest=50), round_index=2)
    found |= {
        "loss of round 2": outcome.loss,
        "trained": listed(values(model, lambda p: p)),
        "steps": written(directory),
    }
    found["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    found["modes"] = [m.training for m in model.modules()].count(True)
    return found


def first_gradients(model: nn.Module, **settings: Any) -> dict[str, list[float]]:
    """After one step of 6 sequences, unclipped."""
    run = trainer(model, None, max_grad_norm=1e9, **settings)
    run.train(sequences(STEP, 3, highest=50), round_index=1)
    return listed(values(model, lambda p: p.grad))


def distilled_gradients(model: nn.Module) -> dict[str, list[float]]:
    """Of the whole distillation loss, with trained norms and a teacher whose weights pruning has replaced. Of three
    batches one process of two gets a sequence that fills up."""
    config = {"weight": 0.6, "hidden": 0.5}
    return first_gradients(model, loss_factory=distillation(model, config), distill=config)


def round_of_experts(model: nn.Module, directory: Path) -> dict:
    """A round in which some experts are reached by no token of a process, or of a step."""
    trainer(model, directory).train(sequences(SEQUENCES, 1, highest=50), round_index=1)
    return {"trained": listed(values(model, lambda p: p)), "steps": written(directory)}


def clipped_round(model: nn.Module, gate_penalty: float | None = None) -> dict[str, list[float]]:
    """Five clipped steps in fp32, of two batches, the last of one sequence. All processes begin with the adapters of
    the first, whatever the others have."""
    if not isinstance(next(model.parameters()), DTensor) and not is_main():
        for parameter in model.parameters():
            parameter.data += parameter.requires_grad
    run = trainer(model, None, max_grad_norm=0.1)
    run.extension = None if gate_penalty is None else GatePenalty(model, gate_penalty)
    run.sequences_per_step = 4
    run.train(sequences(17, 1, highest=50), round_index=1)
    return listed(values(model, lambda p: p))


class Stop(Exception):
    pass


def going_on(make: Callable[[], nn.Module], directory: Path) -> dict:
    """A round under dropout that is stopped after its second step and goes on in new objects, and one that is not."""
    data = sequences(SEQUENCES, 1, highest=50)
    model = make()
    trainer(model, directory / "whole").train(data, round_index=1)
    kept: dict[str, Any] = {}

    def stop(done: StepDone) -> None:
        if done.global_step == 2:
            state = done.state()
            kept["position"] = state.position
            kept["moments"] = {name: t.clone() for name, t in state.moments.items()}
            kept["trained"] = {name: p.detach().clone() for name, p in stopped.named_parameters() if p.requires_grad}
            raise Stop

    stopped = make()
    run = trainer(stopped, directory / "parts")
    try:
        run.train(data, round_index=1, after_step=stop)
    except Stop:
        lines_then = len(written(directory / "parts"))
    again = make()
    parameters = dict(again.named_parameters())
    with torch.no_grad():
        for name, tensor in kept["trained"].items():
            parameters[name].copy_(tensor)
    moments = empty_moments(again, kept["moments"])
    for name, tensor in kept["moments"].items():
        moments[name].copy_(tensor)
    torch.manual_seed(99)
    run = trainer(again, directory / "parts")
    run.global_step = 2
    steps: list[int] = []
    outcome = run.train(
        data,
        round_index=1,
        start=TrainState(kept["position"], moments),
        after_step=lambda done: steps.append(done.state().position.step),
    )
    return {
        "lines": [lines_then, len(written(directory / "parts"))],
        "steps": [outcome.steps, *steps],
        "same lines": written(directory / "whole") == written(directory / "parts"),
        "same values": same(values(model, lambda p: p), values(again, lambda p: p)),
    }


class FailsLater(TokenLoss):
    """In its fourth pass, of two processes: in the second step, after the first pass of it."""

    calls = 0

    def forward(self, *arguments: Tensor) -> Tensor:
        FailsLater.calls += 1
        if FailsLater.calls == 4:
            raise MemoryError
        return super().forward(*arguments)


class Projected(TokenLoss):
    """A loss with a parameter of its own."""

    trained = False

    def __init__(self, model: nn.Module, autocast: torch.dtype | None):
        super().__init__(model, autocast)
        self.own = nn.Parameter(torch.ones(3), requires_grad=self.trained)

    def forward(self, *arguments: Tensor) -> Tensor:
        return super().forward(*arguments) * self.own.sum() / 3


def failures(directory: Path) -> dict:
    found: dict[str, Any] = {}
    data = sequences(SEQUENCES, 1, highest=50)
    expected = sharded()
    trainer(expected, None, lr_schedule="global").train(data.slice(0, STEP), round_index=1)
    model = sharded()
    run = trainer(model, directory, lr_schedule="global", loss_factory=FailsLater)
    try:
        run.train(data, round_index=1)
    except MemoryError:
        found["steps"] = [line["step"] for line in written(directory)]
    found["kept"] = same(values(model, lambda p: p), values(expected, lambda p: p))
    found["goes on"] = trainer(model, None).train(data.slice(0, STEP), round_index=2).steps

    broken = sharded()
    with gathered(broken), torch.no_grad():
        broken.model.embed_tokens.weight[51] = math.nan
        broken.lm_head.weight = nn.Parameter(torch.ones(53, 36, dtype=torch.float64), requires_grad=False)
    at_fault = replace(data, input_ids=data.input_ids.clone())
    at_fault.input_ids[13, 3] = 51
    start = values(broken, lambda p: p)
    try:
        trainer(broken, None).train(at_fault, round_index=1)
    except LosaError as error:
        found["not finite"] = str(error)
    found["finite"] = all(bool(t.isfinite().all()) for t in values(broken, lambda p: p).values())
    found["moved"] = not same(start, values(broken, lambda p: p))

    one = data.slice(0, STEP)
    found["own"] = trainer(sharded(), None, loss_factory=Projected).train(one, round_index=1).loss
    found["without"] = trainer(sharded(), None).train(one, round_index=1).loss
    Projected.trained = True
    for name, factory in {"own trained": Projected, "no model": lambda model, autocast: nn.Identity()}.items():
        try:
            trainer(sharded(), None, loss_factory=factory).train(data, round_index=1)
        except LosaError as error:
            found[name] = str(error)
    return found


def every_case(directory: Path) -> dict[str, Any]:
    """The cases of this number of processes."""
    count = dist.get_world_size()
    modes: dict[str, Callable[..., nn.Module]] = {"ddp": odd_llama, "fsdp": sharded}
    settings: dict[str, Any] = {}
    if count == 4:
        modes = {"hsdp": lambda **settings: sharded(2, **settings)}
        settings |= {"batch_size": 1, "fused": True}  # two passes of a process in each step
    found: dict[str, Any] = {}
    for name, make in modes.items():
        found[name] = two_rounds(make(), directory / name, **settings)
        if count != 3:
            found[name]["gradients"] = first_gradients(make(), **settings)
        if count == 2:
            found[name]["experts"] = round_of_experts(make(experts=True), directory / f"{name} experts")
            found[name]["distilled"] = distilled_gradients(make())
            found[name]["clipped"] = clipped_round(make(dtype=torch.float32))
            found[name]["weights"] = clipped_round(make(dtype=torch.float32, layer=MaskedLinear))
            found[name]["gates"] = clipped_round(make(dtype=torch.float32, layer=SoRALinear), 5.0)
    if count == 2:
        apart = odd_llama()
        apart.model.norm.weight.data += dist.get_rank()
        trainer(apart, None).train(sequences(STEP, 1, highest=50), round_index=1)
        found["norm"] = apart.model.norm.weight.mean().item()
        found["checkpoints"] = two_rounds(
            sharded(),
            directory / "checkpoints",
            distributed={"activation_checkpointing": True, "reshard_after_forward": False},
            batch_size=4,
            fused=True,
        )
        found["dense adapters"] = two_rounds(sharded(layer=LoRALinear), directory / "dense adapters")
        found["bfloat16"] = two_rounds(sharded(dtype=torch.bfloat16), directory / "bfloat16")
        found["ddp goes on"] = going_on(lambda: odd_llama(dropout_p=0.3), directory / "ddp goes on")
        found["fsdp goes on"] = going_on(lambda: sharded(dropout_p=0.3), directory / "fsdp goes on")
        found["failures"] = failures(directory / "failures")
    if count == 3:
        own = shell.sharding_of
        shell.sharding_of = lambda module: replace(own(module), offload=True)
        found["offload"] = two_rounds(sharded(), directory / "offload")
        shell.sharding_of = own
    return found


def main(directory: str) -> None:
    start_worker()
    finish(every_case(Path(directory) / str(dist.get_world_size())))
