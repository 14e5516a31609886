"""For ``tests/losa/distributed/test_sharded_forms.py``: linears of other forms in a model that processes hold
together."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from losa.distributed.processes import process_index
from losa.distributed.sharding import Sharding, gathered, make_sharding, shard_module, whole
from losa.errors import LosaError
from losa.model import replacing
from losa.model.blocks import find_blocks
from losa.model.forms import views
from losa.model.wrapping import merge_model, sparsity_of, wrapped_linears
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.processes import finish, start_worker
from tests.helpers.tiny import randomise, wrap

# By what they are called here: a kind, and further settings.
MODELS = {name: (name, {}) for name in ("GPT2", "GptOss", "Llama4Text", "JetMoe", "Dbrx", "LongcatFlash", "Mixtral")}
MODELS["Mixtral of two"] = "Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}
# How many processes hold one copy of the model, by how many there are.
SHARD_SIZES = {3: 3, 4: 2}


@torch.no_grad()
def wrapped_and_merged(name: str, sharding: Sharding, targets=None) -> dict:
    """A model in shards beside one that is whole."""
    kind, settings = MODELS[name]
    one, model = of_kind(KINDS[kind], **settings), of_kind(KINDS[kind], **settings)
    shard_module(model, sharding)
    kinds = {module: type(each) for module, each in model.named_modules()}
    found = {"dense": sparsity_of(model) == sparsity_of(one)}
    originals = [weakref.ref(holder) for holder in find_blocks(model).holders().values() if _is_form(holder)]
    layers, expected = wrap(model, targets=targets), wrap(one, targets=targets)
    gc.collect()
    found["dropped"] = bool(originals) and not any(original() for original in originals)
    found["names"] = list(layers) == list(expected)
    found["sharded"] = _all_sharded(model)
    with gathered(model):
        randomise(layers)
    randomise(expected)
    found["pruned"] = sparsity_of(model) == sparsity_of(one)
    merge_model(model)
    merge_model(one)
    found["merged"] = sparsity_of(model) == sparsity_of(one)
    found["sharded again"] = _all_sharded(model) and not any(p.requires_grad for p in model.parameters())
    found["forms"] = kinds == {module: type(each) for module, each in model.named_modules()}
    state = whole_state(model)
    found["bits"] = state.keys() == one.state_dict().keys()
    found["bits"] &= all(torch.equal(state[tensor], value) for tensor, value in one.state_dict().items())
    return found


def _is_form(module: nn.Module) -> bool:
    return bool(views(module))


def _all_sharded(model: nn.Module) -> bool:
    return all(isinstance(p, DTensor) for p in model.parameters())


def failing(sharding: Sharding, trial: Callable[..., bool]) -> list:
    """What comes of a trial that goes otherwise in process 1, in the second stack: the error, and whether the model is
    as it was. All processes call ``trial`` where it says so."""
    model = of_kind(KINDS["Mixtral"])
    shard_module(model, sharding)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before, real, calls = whole_state(model), replacing._computes_the_same, []

    def tried(*arguments) -> bool:
        calls.append(arguments)
        there = process_index() == 1 or trial is no_stack
        return trial(*arguments) if there and len(calls) == 2 else real(*arguments)

    replacing._computes_the_same = tried
    try:
        error = sorted(name.partition(".experts.")[0] for name in wrap(model) if name.endswith(".3.up_proj"))
    except LosaError as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        replacing._computes_the_same = real
    put_back = kinds == {name: type(module) for name, module in model.named_modules()}
    put_back = put_back and all(torch.equal(value, before[name]) for name, value in whole_state(model).items())
    return [error, put_back and not wrapped_linears(model) and _all_sharded(model)]


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def no_stack(*_) -> bool:
    """In all processes."""
    return False


def no_memory(*_) -> bool:
    raise MemoryError("a test's")


def main() -> None:
    start_worker()
    sharding = make_sharding(torch.device("cpu"), SHARD_SIZES[torch.distributed.get_world_size()])
    found: dict = {name: wrapped_and_merged(name, sharding) for name in MODELS}
    found["some"] = wrapped_and_merged("Mixtral", sharding, targets=["up_proj", "q_proj"])
    found["no memory"] = failing(sharding, no_memory)
    found["no stack"] = failing(sharding, no_stack)
    found["another answer"] = failing(sharding, lambda *_: False)
    finish(found)
