"""Experts whose linears run together: the same numbers as one after another, unless someone must see each linear."""

from __future__ import annotations

import pytest
import torch

from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules import linear_experts
from losa.modules.linear_experts import GroupedRows, LinearExperts, _TakeRows, lay_together
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa_kernels.grouped_masked_lora.groups import as_stack
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.tiny import randomise

IDS = torch.randint(2, 90, (3, 20), generator=torch.Generator().manual_seed(1))
MIXTURES = ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "Llama4Text", "JetMoe", "Dbrx", "LongcatFlash"]


def wrapped(name, dtype=torch.float32, **options):
    model = of_kind(KINDS[name]).eval()
    wrap_model(model, rank=3, scaling=2.0, **options)
    layers = wrapped_linears(model)
    randomise(layers)
    return model.to(dtype), layers


def linears_of_experts(model):
    return [
        linear
        for experts in model.modules()
        if isinstance(experts, LinearExperts)
        for expert in experts
        for linear in expert.children()
    ]


def count_calls(monkeypatch):
    calls, own = [], linear_experts.grouped_masked_lora_linear
    monkeypatch.setattr(linear_experts, "grouped_masked_lora_linear", lambda *a: calls.append(a) or own(*a))
    return calls


def logits_and_gradients(model, layers):
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum().backward()
    found = {"logits": logits.detach()}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            gradient = getattr(layer, part).grad
            found[f"{name}.{part}"] = torch.zeros_like(getattr(layer, part)) if gradient is None else gradient.clone()
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_together_they_give_what_each_gives_alone(name, monkeypatch):
    """In fp64, where orders of summation are not seen. A hook asks for every linear to be called."""
    model, layers = wrapped(name, torch.float64)
    calls = count_calls(monkeypatch)
    together = logits_and_gradients(model, layers)
    experts = [module for module in model.modules() if isinstance(module, LinearExperts)]
    assert len(calls) == sum(len(list(each[0].children())) for each in experts)
    calls.clear()
    seen = []
    for linear in linears_of_experts(model):
        linear.register_forward_hook(lambda *_: seen.append(1))
    alone = logits_and_gradients(model, layers)
    assert seen and not calls
    for what, expected in alone.items():
        # Models compute norms, routers and the softmax of attention in fp32.
        error = (together[what] - expected).abs().max()
        assert error <= 64 * torch.finfo(torch.float32).eps * expected.abs().max(), what


def test_dropout_and_other_layers_are_called_one_by_one(monkeypatch):
    model, layers = wrapped("Mixtral", dropout_p=0.5)
    calls = count_calls(monkeypatch)
    model(IDS, use_cache=False)
    assert len(calls) == 2 * 3, "no dropout in evaluation"
    calls.clear()
    model.train()
    model(IDS, use_cache=False)
    assert not calls
    model.eval()
    linears = linears_of_experts(model)
    linears[4].adapter_enabled = False
    model(IDS, use_cache=False)
    assert len(calls) == 5
    calls.clear()
    linears[4].adapter_enabled = True
    linears[5].scaling = 1.0
    model(IDS, use_cache=False)
    assert len(calls) == 5
    calls.clear()
    model = of_kind(KINDS["Mixtral"]).eval()
    wrap_model(model, layer=LoRALinear, rank=3, scaling=2.0)
    model(IDS, use_cache=False)
    assert not calls


def test_who_watches_a_linear_sees_it_called(monkeypatch):
    """By a forward of the module's own, as accelerate gives it, and by a hook of all modules."""
    model, _ = wrapped("Mixtral")
    calls, linear, seen = count_calls(monkeypatch), linears_of_experts(model)[0], []
    own = linear.forward
    linear.forward = lambda x: seen.append(linear) or own(x)
    model(IDS, use_cache=False)
    assert seen and len(calls) == 5
    del linear.forward
    calls.clear()
    everything = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(IDS, use_cache=False)
    finally:
        everything.remove()
    assert not calls and len(seen) > 20
    backward = torch.nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None)
    try:
        model(IDS, use_cache=False)
    finally:
        backward.remove()
    assert not calls


def test_autocast_gives_the_same_types_either_way():
    model, layers = wrapped("Mixtral")
    experts = model.model.layers[0].mlp.experts
    rows = GroupedRows(torch.randn(8, 32), torch.tensor([2, 2, 5, 8]))
    with torch.autocast("cpu", torch.bfloat16):
        together = rows.through(experts.linears("up_proj"))
        for linear in experts.linears("up_proj"):
            linear.register_forward_hook(lambda *_: None)
        alone = rows.through(experts.linears("up_proj"))
    assert together.dtype == alone.dtype == rows.cast.dtype == torch.bfloat16
    assert (together - alone).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * alone.abs().max()


def test_weights_that_a_pruner_replaced_are_laid_together():
    model, layers = wrapped("Mixtral")
    linears = model.model.layers[0].mlp.experts.linears("up_proj")
    before = [linear.weight.data_ptr() for linear in linears]
    lay_together(linears)
    assert [linear.weight.data_ptr() for linear in linears] == before, "they lie in the model's stack"
    for linear in linears:
        linear.replace_weight(linear.weight + 1)
    expected = [linear.weight.clone() for linear in linears]
    assert as_stack([linear.weight for linear in linears]) is None
    with torch.inference_mode():
        lay_together(linears)
    assert not any(linear.weight.is_inference() for linear in linears), "training saves them for its backward pass"
    assert as_stack([linear.weight for linear in linears]) is not None
    assert all(torch.equal(linear.weight, was) for linear, was in zip(linears, expected, strict=True))


def test_linears_of_one_input_get_one_tensor():
    """Statistics know by it that they can share a Hessian."""
    model, _ = wrapped("Mixtral")
    seen = {}
    for name, linear in model.model.layers[0].mlp.experts.named_modules():
        if isinstance(linear, MaskedLoRALinear):
            linear.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0]))
    model(IDS, use_cache=False)
    experts = {name.split(".")[0] for name in seen}
    assert experts and all(seen[f"{e}.gate_proj"] is seen[f"{e}.up_proj"] for e in experts)


def test_rows_of_no_linear_are_zero():
    linears = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    rows = GroupedRows(torch.randn(5, 3), torch.tensor([0, 4]))
    y = rows.through(linears)
    assert torch.equal(y, torch.cat([linears[1](rows.x[:4]), torch.zeros(1, 2)]))
    none = GroupedRows(torch.randn(2, 3), torch.tensor([0, 0])).through(linears)
    assert torch.equal(none, torch.zeros(2, 2))


def test_rows_that_are_taken_several_times_add_up_their_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 4, 5])
    back = order.argsort()
    assert torch.autograd.gradcheck(lambda t: _TakeRows.apply(t, order // 2, back, 2), x)
    assert torch.equal(_TakeRows.apply(x, order // 2, back, 2), x[order // 2])
    rows = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _TakeRows.apply(t, back, order, 1), rows)
