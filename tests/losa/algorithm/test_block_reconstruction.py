"""Block-wise reconstruction: the steps of a plain loop in fp64, less error, budgets that stay exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from losa.algorithm.block_reconstruction import BlockReconstruction
from losa.algorithm.engine import Engine
from losa.algorithm.schedule import Round
from losa.algorithm.stream import BlockStream
from losa.errors import NumericsError
from losa.model.blocks import find_blocks
from losa.model.norms import train_norms, trained_norms
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa.recipe.training import ReconstructConfig, TrainConfig
from tests.helpers.tiny import EPS, tiny_llama

IDS = torch.randint(0, 90, (6, 12), generator=torch.Generator().manual_seed(1))
STEPS, RATE = 6, 1e-2
SETTINGS = {"steps": STEPS, "learning_rate": RATE, "batch_size": 4}
FACTORS = [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]  # a tenth of the steps, rounded, is warm-up


def build(reconstruct=None, prune=None, dtype=torch.float32, layers=2, seed=0, dropout=0.0, train=None, **allocation):
    model = tiny_llama(layers=layers)
    wrap_model(model, rank=4, scaling=2.0, seed=0, dropout_p=dropout)
    with torch.no_grad():
        for layer in wrapped_linears(model).values():
            layer.lora_B.normal_(std=0.05)
    model.to(dtype)
    if train is not None:
        train_norms(model)
    engine = Engine(
        model,
        IDS,
        PruneConfig(**({"sparsity": 0.5} | (prune or {}))),
        AllocationConfig(**({"mean_rank": 4, "rates": "uniform", "ranks": "uniform"} | allocation)),
        CalibrationConfig(data="unused", samples=len(IDS), length=IDS.shape[1], cka_samples=2, batch_size=2),
        measure_errors=False,
        seed=seed,
        reconstruct=None if reconstruct is None else ReconstructConfig(**reconstruct),
        train=None if train is None else TrainConfig(data="unused", **train),
    )
    return model, engine


def bare(block: nn.Module) -> nn.Module:
    """The block with plain linears in place of the wrapped ones, and the norms as they were given."""
    block = copy.deepcopy(block)
    for name, norm in trained_norms(block).items():
        block.set_submodule(name, norm.norm)
    for name, layer in wrapped_linears(block).items():
        block.set_submodule(name, nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64))
    return block


def by_hand(
    model: nn.Module, masks: dict[str, torch.Tensor], factors: dict[str, float]
) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The adapters, and the trained norms by their names, after AdamW's formula on all samples at once, block by block,
    and each block's losses."""
    dense = sparse = model.model.embed_tokens(IDS)
    position = model.model.rotary_emb(dense, torch.arange(IDS.shape[1])[None])
    adapters, losses = {}, []
    for index, block in enumerate(model.model.layers):
        layers, norms, plain = wrapped_linears(block), trained_norms(block), bare(block)

        def run(hidden, weights, plain=plain):
            named = {f"{name}.weight": weight for name, weight in weights.items()}
            return torch.func.functional_call(plain, named, (hidden,), {"position_embeddings": position})

        def merged(values, layers=layers, norms=norms, index=index):
            return {
                name: masks[f"model.layers.{index}.{name}"]
                * (layer.weight + 2.0 * values[f"{name}.lora_B"] @ values[f"{name}.lora_A"])
                for name, layer in layers.items()
            } | {name: value for name, value in values.items() if name in norms}

        dense = run(dense, {name: layer.weight for name, layer in layers.items()}).detach()
        values = {
            f"{name}.{part}": getattr(layer, part).detach().clone().requires_grad_()
            for name, layer in layers.items()
            for part in ("lora_A", "lora_B")
        } | {name: norm.norm.weight.detach().clone().requires_grad_() for name, norm in norms.items()}
        moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in values.items()}
        seen = []
        for step in range(STEPS + 1):
            size = dense.square().mean(-1, keepdim=True).sqrt()
            error = ((run(sparse, merged(values)) - dense) / size).flatten(0, 1)
            loss = (error.square().mean(0) / (dense / size).flatten(0, 1).square().mean(0)).mean()
            seen.append(loss.item())
            if step == STEPS:
                break
            gradients = torch.autograd.grad(loss, list(values.values()))
            for (name, value), gradient in zip(values.items(), gradients, strict=True):
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                own = next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
                value.data -= own * FACTORS[step] * RATE * mean / (square.sqrt() + 1e-8)
        sparse = run(sparse, merged(values)).detach()
        adapters |= {f"model.layers.{index}.{name}": value.detach() for name, value in values.items()}
        losses.append(seen)
    return adapters, losses


@pytest.mark.parametrize("train", [None, {"lora_plus": 4.0, "norms": 0.1}])
def test_the_steps_are_those_of_a_plain_loop_in_fp64(train):
    """Every step takes all samples, in passes of two of them; dropout is off. Norms, and B, have rates of their own."""
    model, engine = build(SETTINGS | {"batch_size": 9}, dtype=torch.float64, dropout=0.3, train=train)
    before = copy.deepcopy(model)
    record = engine.run_round(Round(1, 0.5, 4, 0))
    layers = wrapped_linears(model)
    factors = {} if train is None else {"lora_B": train["lora_plus"], "layernorm": train["norms"]}
    adapters, losses = by_hand(before, {name: layer.mask_bool() for name, layer in layers.items()}, factors)
    # The model's norms compute in fp32, and Adam makes all gradients of one size, with their relative errors.
    bound = STEPS * RATE * max(factors.values(), default=1) * 64 * EPS
    for name, norm in trained_norms(model.model.layers).items():
        moved = norm.merge().weight - adapters[f"model.layers.{name}"]
        assert moved.abs().max() < bound < (norm.merge().weight - norm.norm.weight).abs().max(), name
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            assert (getattr(layer, part) - adapters[f"{name}.{part}"]).abs().max() < bound, (name, part)
            assert getattr(layer, part).grad is None
    assert record.loss_pruned == pytest.approx([seen[0] for seen in losses], rel=1e-6)
    assert record.loss_reconstructed == pytest.approx([seen[-1] for seen in losses], rel=1e-6)
    assert "reconstruct" in record.seconds


@pytest.mark.parametrize(
    "prune", [{}, {"pruner": "sparsegpt"}, {"sparsity": None, "pattern": "2:4", "pruner": "magnitude", "regrow": True}]
)
def test_less_error_and_the_same_counts(prune):
    found = {}
    for reconstruct in (None, SETTINGS):
        model, engine = build(reconstruct, prune, ranks="error")
        records = [engine.run_round(Round(index, sparsity, 4, 0)) for index, sparsity in ((1, 0.25), (2, 0.5))]
        found[reconstruct is not None] = records, [sum(record.sparsity) for record in records]
    (plain, counts), (ours, same) = found[False], found[True]
    assert counts == same
    assert plain[0].loss_pruned is plain[0].loss_reconstructed is None and "reconstruct" not in plain[0].seconds
    for record, other in zip(ours, plain, strict=True):
        pairs = list(zip(record.loss_pruned, record.loss_reconstructed, strict=True))
        assert all(0 < after < before for before, after in pairs)
        assert sum(record.errors) < 0.9 * sum(other.errors)


def test_the_seed_and_the_round_decide_the_order():
    def adapters(seed, index=1):
        model, engine = build(SETTINGS | {"steps": 2}, seed=seed, layers=1)
        engine.run_round(Round(index, 0.5, 4, 0))
        return torch.cat([layer.lora_B.detach().flatten() for layer in wrapped_linears(model).values()])

    assert torch.equal(adapters(0), adapters(0))
    assert not torch.equal(adapters(0), adapters(1)) and not torch.equal(adapters(0), adapters(0, index=2))


def test_steps_go_through_all_samples():
    batches = BlockReconstruction(ReconstructConfig(batch_size=3), (6, 12), 4)._batches(0)
    order = [sorted(next(batches) + next(batches)) for _ in range(3)]
    assert order == [[0, 1, 2, 3, 4, 5]] * 3
    few = BlockReconstruction(ReconstructConfig(batch_size=4), (6, 12), 1)._batches(0)
    assert all(len(set(next(few))) == 4 for _ in range(5))


def test_massive_and_silent_numbers_do_not_decide():
    """Each channel gets 1/H of the loss that an output of zeros has, and each token about as much as another."""
    model, _ = build()
    dense = BlockStream(model, find_blocks(model), IDS, 2)
    for hidden in dense.hidden:
        hidden[..., 0] = 0
        hidden[..., 1] = 1e3
        hidden[0, 0] *= 1e4
        hidden[1, 3] = 0
    weights = BlockReconstruction(ReconstructConfig(), tuple(IDS.shape), 2)._channel_weights(dense)
    output = torch.cat(dense.hidden).double().flatten(0, 1)
    sizes = output.square().mean(1, keepdim=True)
    squares = torch.where(sizes > 0, output.square() / sizes, 0.0)
    shares = weights * squares / len(output)
    assert weights[0] == 0
    assert torch.allclose(shares.sum(0)[1:], torch.full((31,), 1 / 32).double(), rtol=64 * EPS)
    assert shares.sum(1).max() < 8 / len(output)


def test_a_loss_that_breaks_names_the_block():
    _, engine = build({"steps": 1, "learning_rate": 1e30}, layers=1)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: reconstruction: .*reconstruct\.learning_rate"):
        engine.run_round(Round(1, 0.5, 4, 0))


def test_a_block_whose_loss_rises_stays_as_it_was():
    """All of its parameters count as written, whatever kind of step wrote them."""
    model, engine = build({"steps": 1, "learning_rate": 10.0}, layers=1)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: (parameter.detach().clone(), parameter._version) for name, parameter in parameters.items()}
    record = engine.run_round(Round(1, 0.5, 4, 0))
    assert record.loss_reconstructed == record.loss_pruned and record.loss_pruned[0] > 0
    assert all(torch.equal(p, before[name][0]) and p._version > before[name][1] for name, p in parameters.items())


def test_hidden_states_in_half_precision():
    """Differences are taken in fp32, and adapters stay fp32."""
    model, engine = build({"steps": 2}, layers=1)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    record = engine.run_round(Round(1, 0.5, 4, 0))
    assert all(math.isfinite(a) and a < b for b, a in zip(record.loss_pruned, record.loss_reconstructed, strict=True))
    assert {layer.lora_B.dtype for layer in wrapped_linears(model).values()} == {torch.float32}
