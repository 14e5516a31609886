"""Transposed linears and stacks of experts: shown as linears, wrapped as linears, and put back."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from transformers.pytorch_utils import Conv1D

from losa.errors import ModelError
from losa.model.blocks import find_blocks
from losa.model.forms import holder_of, views
from losa.model.replacing import as_linears, as_they_were, computes_its_linears
from losa.model.wrapping import matrix_weights, merge_model, sparsity_of, unprunable_of, unwrap_model
from losa.modules.linear_experts import LinearExperts
from losa.modules.masked_lora import MaskedLoRALinear
from tests.helpers.book import matrices
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.tiny import assert_same_function, logits, randomise, wrap

OTHER_FORMS = [
    kind
    for kind in KINDS.values()
    if kind.name in ("GPT2", "Mixtral", "GptOss", "DeepseekV3", "Llama4Text", "JetMoe", "Dbrx", "LongcatFlash")
]
other_forms = pytest.mark.parametrize("kind", OTHER_FORMS, ids=lambda kind: kind.name)


@other_forms
def test_a_model_shows_its_linears(kind):
    model = of_kind(kind)
    blocks = find_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    expected = {name: w for block in blocks for name, w in matrices(block, names).items()}
    linears = blocks.linears()
    routers = expected.keys() - linears.keys()
    assert all(name.endswith(("gate", "router", "router.layer", "router.classifier")) for name in routers)
    assert linears.keys() <= expected.keys()
    for name, linear in linears.items():
        assert torch.equal(linear.weight, expected[name]), name
        assert linear.weight.data_ptr() == expected[name].data_ptr(), "a view"
        assert linear.weight.shape == (linear.out_features, linear.in_features)
    held = [p for m in blocks.holders().values() for n, p in m.named_parameters() if "bias" not in n]
    unread = sum(stack[3:].numel() for name, stack in model.named_parameters() if "gate_up" in name and len(stack) == 5)
    assert sum(p.numel() for p in held) - unread == sum(linear.weight.numel() for linear in linears.values())
    zeros, prunable = sparsity_of(model)
    assert zeros == 0 and prunable == sum(linear.weight.numel() for linear in linears.values())
    others = [p for b in blocks for n, p in b.named_parameters() if p.ndim > 1 and "bias" not in n]
    assert prunable + unprunable_of(model) == sum(p.numel() for p in others) - unread
    assert unprunable_of(model) == sum(p.numel() for p in others if p.ndim == 2 and len(p) in (4, 5)), "routers"


@other_forms
def test_wrapped_and_back(kind):
    model = of_kind(kind)
    before, modules, state = logits(model), dict(model.named_modules()), model.state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    layers = wrap(model)
    assert_same_function(logits(model), before)
    assert all(isinstance(model.get_submodule(name), MaskedLoRALinear) for name in layers)
    assert all(layer.weight.is_contiguous() for layer in layers.values())
    unwrap_model(model)
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    layers = wrap(model)
    randomise(layers)
    trained = logits(model)
    masks = {name: layer.mask_bool() for name, layer in layers.items()}
    merge_model(model)
    assert_same_function(logits(model), trained)
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in modules.items()}
    linears = find_blocks(model).linears()
    assert all(not bool(linears[name].weight[~kept].any()) for name, kept in masks.items())
    # What was given is as it was.
    for name, module in modules.items():
        for part, parameter in module.named_parameters(recurse=False):
            assert torch.equal(parameter, state[f"{name}.{part}"] if name else state[part])


def test_what_did_not_change_is_the_module_that_was_there():
    model = of_kind(KINDS["Mixtral"])
    stack = model.model.layers[0].mlp.experts
    as_linears(model, ["model.layers.0.mlp.experts"], lambda name, view: view)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LinearExperts) and len(experts) == 4
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in model.state_dict()
    as_they_were(model)
    assert model.model.layers[0].mlp.experts is stack
    as_they_were(model)  # nothing is left to do


def test_merging_never_holds_a_stack_twice():
    """But where somebody else holds it."""
    model = of_kind(KINDS["Mixtral"])
    stacks = [layer.mlp.experts for layer in model.model.layers]
    held, stacks = stacks[1], [weakref.ref(stack) for stack in stacks]
    randomise(wrap(model))
    merge_model(model)
    gc.collect()
    assert stacks[0]() is None and stacks[1]() is held and model.model.layers[1].mlp.experts is not held


@pytest.mark.parametrize("name", ["GPT2", "Mixtral"])
def test_shared_forms_stay_dense(name, caplog):
    model = of_kind(KINDS[name])
    if name == "GPT2":
        model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
        left = {f"transformer.h.{i}.mlp.c_fc" for i in range(2)}
    else:
        model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
        left = {
            f"model.layers.{i}.mlp.experts.{e}.{p}_proj"
            for i in range(2)
            for e in range(4)
            for p in ("gate", "up", "down")
        }
    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(model)
    assert not left & layers.keys() and layers and "with a shared weight stay dense" in caplog.text
    assert layers.keys() == find_blocks(of_kind(KINDS[name])).linears().keys() - left


def test_modes_and_gradients_of_what_is_put_back():
    model = of_kind(KINDS["GptOss"]).requires_grad_(True).train()
    layers = wrap(model, dropout_p=0.5)
    assert all(layer.training for layer in layers.values())
    model.eval()
    assert not any(layer.training for layer in layers.values())
    unwrap_model(model)
    assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())


def test_a_copy_is_a_model_of_its_own():
    model = of_kind(KINDS["Mixtral"])
    randomise(wrap(model))
    expected, other = logits(model), copy.deepcopy(model)
    merge_model(model)
    assert_same_function(logits(other), expected)
    assert_same_function(logits(merge_model(other)), expected)


def test_a_refusal_leaves_the_form():
    model = of_kind(KINDS["Mixtral"])
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match="targets: 'nope' matches no linear"):
        wrap(model, targets=["nope"])
    assert dict(model.named_modules()) == before

    class Failing(MaskedLoRALinear):
        def __init__(self, weight, *args, **kwargs):
            if weight.data_ptr() == before["model.layers.1.mlp.experts"].down_proj[2].data_ptr():
                raise MemoryError
            super().__init__(weight, *args, **kwargs)

    with pytest.raises(MemoryError):
        wrap(model, layer=Failing)
    assert dict(model.named_modules()) == before
    assert [name.rpartition(".")[2] for name in wrap(model, targets=["up_proj"])] == ["up_proj"] * 8


@pytest.mark.parametrize(
    ("name", "experts", "dense", "others"),
    [
        ("Mixtral", "model.layers.0.mlp.experts", ("gate_up_proj", "down_proj"), 4),
        ("Dbrx", "transformer.blocks.0.ffn.experts", ("mlp.w1", "mlp.v1", "mlp.w2"), 2),
    ],
)
def test_a_stack_that_computes_something_else_stays(name, experts, dense, others, caplog, monkeypatch):
    model = of_kind(KINDS[name])
    kind = type(model.get_submodule(experts))
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, top_k_index, top_k_weights: 2 * hidden_states)
    with caplog.at_level(logging.INFO, logger="losa"):
        layers = wrap(model)
    assert f"{kind.__name__} are left stacked: their linears compute something else" in caplog.text
    within = experts.partition(".0.")[2]
    assert f"stay dense: {', '.join(f'0.{within}.{tensor}' for tensor in dense)}" in caplog.text
    assert len(layers) == 2 * others


def test_modules_of_other_kinds_stand_for_nothing():
    stack = of_kind(KINDS["Mixtral"]).model.layers[0].mlp.experts
    assert len(views(stack)) == 12 and all(holder_of(linear) is stack for linear in views(stack).values())
    stack._is_expert_parallel = True  # this process has some of them
    assert views(stack) == views(nn.Linear(2, 3)) == views(nn.Embedding(2, 3)) == {}
    plain = nn.Linear(2, 3)
    assert holder_of(plain) is plain
    assert views(Conv1D(3, 2))[""].weight.shape == (3, 2)


def test_tokens_without_an_expert_and_experts_without_tokens():
    model = of_kind(KINDS["Mixtral"])
    stack = model.model.layers[0].mlp.experts
    as_linears(model, ["model.layers.0.mlp.experts"])
    experts = model.model.layers[0].mlp.experts
    x, shares = torch.randn(5, 32), torch.rand(5, 2)
    seen = []
    experts[2].down_proj.register_forward_hook(lambda *_: seen.append(1))
    chosen = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 0], [1, 3]])  # 4: none
    expected = torch.zeros_like(x)
    for token, (pair, weights) in enumerate(zip(chosen, shares, strict=True)):
        for e, share in zip(pair.tolist(), weights, strict=True):
            if e < 4:
                gate, up = stack.gate_up_proj[e].chunk(2)
                inner = stack.act_fn(gate @ x[token]) * (up @ x[token])
                expected[token] += share * (stack.down_proj[e] @ inner)
    assert torch.allclose(experts(x, chosen, shares), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(experts(x, top_k_index=chosen, top_k_weights=shares), experts(x, chosen, shares))
    assert not seen and experts(x[:0], chosen[:0], shares[:0]).shape == (0, 32)


def test_choices_that_are_no_experts_give_a_token_back():
    model = of_kind(KINDS["LongcatFlash"])
    name = "model.layers.0.mlp.experts"
    stack = model.get_submodule(name)
    as_linears(model, [name], lambda _, view: view)
    experts = model.get_submodule(name)
    x, shares = torch.randn(5, 32), torch.rand(5, 2)
    chosen = torch.tensor([[3, 4], [0, 3], [4, 2], [1, 0], [4, 3]])  # 3 and 4 are none
    assert torch.equal(experts(x, chosen, shares)[[0, 4]], (x.unsqueeze(1) * shares.unsqueeze(-1)).sum(1)[[0, 4]])
    assert_same_function(experts(x, chosen, shares), stack(x, chosen, shares))


def test_rows_that_nothing_reads_are_zeros_once_a_stack_has_changed():
    model = of_kind(KINDS["LongcatFlash"])
    first = model.model.layers[0].mlp.experts.gate_up_proj.clone()
    layers = wrap(model)
    unwrap_model(model)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, first)
    layers = wrap(model)
    name = "model.layers.0.mlp.experts.1.up_proj"
    randomise({name: layers[name]})
    merge_model(model)
    changed = model.model.layers[0].mlp.experts.gate_up_proj
    assert bool(first[3:].any()) and not changed[3:].any()
    assert torch.equal(changed[[0, 2]], first[[0, 2]]) and not torch.equal(changed[1], first[1])


def test_a_stack_in_a_module_inside_that_is_shared_stays_dense(caplog):
    model = of_kind(KINDS["Dbrx"])
    one, other = (block.ffn.experts.mlp for block in model.transformer.blocks)
    matrices_before = matrix_weights(model)
    one.v1 = other.v1
    assert matrix_weights(model) == matrices_before - one.v1.numel()
    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(model)
    assert not any("experts" in name for name in layers) and layers
    assert "with a shared weight stay dense: 0.ffn.experts, 1.ffn.experts" in caplog.text


def outside(limit, kind=Step3p7Experts, **options):
    """Experts outside of transformers' interface."""
    settings = {"num_local_experts": 3, "hidden_size": 16, "moe_intermediate_size": 8, "hidden_act": "silu"}
    torch.manual_seed(0)
    experts = kind(SimpleNamespace(**settings), limit, **options)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.2)
    return experts


def test_experts_outside_of_the_interface_have_their_own_gate():
    stack = outside(7.0)
    model = nn.ModuleDict({"experts": stack})
    assert computes_its_linears(stack) and as_linears(model, ["experts"], lambda _, view: view) == []
    x, chosen, shares = 40 * torch.randn(9, 16), torch.randint(3, (9, 2)), torch.rand(9, 2)
    assert_same_function(model["experts"](x, chosen, shares), stack(x, chosen, shares))
    assert not torch.allclose(stack(x, chosen, shares), outside(None)(x, chosen, shares))


def test_experts_with_an_activation_of_their_own_stay():
    """One that shows in large values only, and in one of two modules of a class."""

    class Other(Step3p7Experts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            plain = outside(self.limit)
            plain.load_state_dict(self.state_dict())
            return plain(hidden_states, top_k_index, top_k_weights)

        def _apply_gate(self, gate_up):
            return outside(None)._apply_gate(gate_up)

    limited, free = outside(3.0, Other), outside(None, Other)
    assert computes_its_linears(free) and not computes_its_linears(limited)
    assert as_linears(nn.ModuleDict({"a": limited, "b": free}), ["a", "b"], lambda _, view: view) == ["a"]
