"""What code outside the package can add without touching it: pruners, importances of blocks, statistics of inputs."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.engine import Engine
from losa.algorithm.importance import register_importance
from losa.algorithm.schedule import Round
from losa.algorithm.statistics import Statistic, register_statistic
from losa.errors import NumericsError, RecipeError
from losa.model.wrapping import wrap_model
from losa.pruners import LinearShape, Memory, Pruned, Pruner, PruningShape, register
from losa.recipe.reading import parse_recipe
from losa.run.estimate import estimate
from losa_kernels import pack_mask
from tests.helpers.tiny import tiny_llama

IDS = torch.randint(0, 90, (4, 16), generator=torch.Generator().manual_seed(1))


class InputMaxima(Statistic):
    """The largest |x| of every input column, (in,) fp32."""

    def __init__(self, in_features, device):
        self.largest = torch.zeros(in_features, device=device)

    def update(self, x):
        self.largest = torch.maximum(self.largest, x.float().abs().amax(0))
        return self.largest

    def result(self):
        return self.largest

    @staticmethod
    def flat(in_features, device):
        return torch.ones(in_features, device=device)


class ByMaxima(Pruner):
    """|W_ij| max |x_j| over the whole matrix."""

    statistic = "input_maxima"

    def __init__(self, config):
        self.seen = []

    def prune(self, weight, statistic, pattern, mask):
        self.seen.append((weight, statistic))
        scores = (weight.abs() * statistic).flatten()
        kept = torch.ones(len(scores), dtype=torch.bool)
        kept[scores.argsort()[: int(pattern.sparsity * len(scores))]] = False
        return Pruned(pack_mask(kept.view(weight.shape)))


class WholeNeurons(Pruner):
    """Structured: hidden units of the MLP go as a whole, by the norm of all that belongs to them; attention stays."""

    def __init__(self, config):
        pass

    def prune_block(self, weights, statistics, pattern, masks):
        assert not any(statistics.values()) and set(masks) == set(weights)
        gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
        size = weights[gate].square().sum(1) + weights[up].square().sum(1) + weights[down].square().sum(0)
        kept = torch.ones(len(size), dtype=torch.bool)
        kept[size.argsort()[: int(pattern.sparsity * len(size))]] = False
        for name in weights:
            rows, columns = weights[name].shape
            keep = {gate: kept[:, None], up: kept[:, None], down: kept[None]}.get(name, torch.ones(1, 1).bool())
            yield name, Pruned(pack_mask(keep.expand(rows, columns).contiguous()))

    def memory(self, shape):
        return [Memory("sizes of neurons", 4 * max(linear.outputs for linear in shape.linears), "4 bytes a neuron")]

    def flops(self, shape):
        return 7.0 * shape.tokens


def recipe_of(tmp_path, **sections):
    settings = {
        "model": str(tmp_path),
        "output": "out",
        "device": "cpu",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt", "samples": 4, "length": 16, "cka_samples": 4, "batch_size": 2},
        "train": {"data": "t.txt"},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "rounds": {"count": 2},
    }
    return parse_recipe({key: value | sections.get(key, {}) if isinstance(value, dict) else value
                         for key, value in settings.items()})  # fmt: skip


def engine_of(recipe):
    model = tiny_llama(layers=4)
    wrap_model(model, rank=2, scaling=2.0)
    return Engine(model, IDS, recipe.prune, recipe.allocation, recipe.calibration)


def test_a_statistic_and_a_pruner_of_ones_own(own_names, tmp_path):
    register_statistic("input_maxima")(InputMaxima)
    register("by-maxima", ByMaxima)
    engine = engine_of(recipe_of(tmp_path, prune={"pruner": "by-maxima"}, allocation={"rates": "uniform"}))
    inputs = []
    engine.blocks[0].linears["self_attn.q_proj"].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    record = engine.run_round(Round(1, 0.5, 2, 0))
    assert record.sparsity == [0.5] * 4 and sum(record.ranks) == 8
    linears = [linear for block in engine.blocks for linear in block.linears.values()]
    assert [(w.shape, s.shape) for w, s in engine.pruner.seen] == [
        (linear.weight.shape, (linear.in_features,)) for linear in linears
    ]
    assert torch.equal(engine.pruner.seen[0][1], torch.cat(inputs).abs().amax((0, 1)))


def test_a_pruner_of_whole_blocks(own_names, tmp_path):
    register("neurons", WholeNeurons)
    tiny_llama(layers=4).config.save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, prune={"pruner": "neurons"}, allocation={"rates": "uniform"})
    engine = engine_of(recipe)
    engine.run_round(Round(1, 0.25, 2, 0))
    for block in engine.blocks:
        masks = {name: linear.mask_bool() for name, linear in block.linears.items()}
        kept = masks["mlp.down_proj"][0]
        assert int(kept.sum()) == 48 and bool((masks["mlp.down_proj"] == kept).all())
        assert bool((masks["mlp.up_proj"] == kept[:, None]).all() and (masks["mlp.gate_proj"] == kept[:, None]).all())
        assert all(bool(mask.all()) for name, mask in masks.items() if name.startswith("self_attn"))
    found = estimate(recipe, probe=False)
    assert found.size("sizes of neurons") == 4 * 64
    assert next(stage for stage in found.stages if "pruning" in stage.what).flops % 16 == 2 * 7 * 64 % 16
    assert "pruning one linear" not in {holding.what for holding in found.holdings}


def test_what_a_pruner_costs_by_default():
    shape = PruningShape([LinearShape(8, 4), LinearShape(4, 16)], blocks=1, tokens=10, on_gpu=False)
    (memory,) = ByMaxima(None).memory(shape)
    assert (memory.what, memory.size, ByMaxima(None).flops(shape)) == ("pruning one linear", 5 * 4 * 64, 0)


def test_an_importance_of_ones_own(own_names, tmp_path):
    seen = []

    @register_importance("later-first", needs="linears")
    def later_first(linears):
        """Blocks matter less the deeper they are."""
        seen.append([list(names) for names in linears])
        return torch.arange(len(linears), 0, -1)

    @register_importance("alike", needs="similarity")
    def alike(similarity):
        seen.append(similarity.shape)
        return similarity.sum(1)

    engine = engine_of(recipe_of(tmp_path, allocation={"rates": "later-first", "delta": 0.1}))
    record = engine.run_round(Round(1, 0.5, 2, 0))
    assert record.importance == [4, 3, 2, 1] and record.similarity is None
    assert record.sparsity[0] < 0.45 and record.sparsity == sorted(record.sparsity)
    assert seen.pop() == [list(block.linears) for block in engine.blocks]
    engine = engine_of(recipe_of(tmp_path, allocation={"rates": "alike"}))
    record = engine.run_round(Round(1, 0.5, 2, 0))
    assert (
        seen == [(4, 4)] and record.importance == torch.tensor(record.similarity, dtype=torch.float64).sum(1).tolist()
    )
    with pytest.raises(RecipeError, match="calibration.samples: allocation.rates 'alike' compares samples .* got 1"):
        recipe_of(tmp_path, allocation={"rates": "alike"}, calibration={"samples": 1})
    assert recipe_of(tmp_path, allocation={"rates": "later-first"}, calibration={"samples": 1})


def test_mistakes_are_named(own_names, tmp_path):
    class Forgetful(WholeNeurons):
        def prune_block(self, *args):
            yield next(super().prune_block(*args))

    class Unsure(WholeNeurons):
        def prune_block(self, *args):
            raise NumericsError("nothing to choose from")
            yield

    class Narrow(WholeNeurons):
        def prune_block(self, *args):
            yield from ((name, Pruned(pruned.mask[:, 1:])) for name, pruned in super().prune_block(*args))

    register("forgetful", Forgetful)
    register("unsure", Unsure)
    register("narrow", Narrow)
    register("by-maxima", ByMaxima)
    register_importance("short", needs="linears")(lambda linears: torch.ones(3))
    for change, error, message in (
        ({"prune": {"pruner": "forgetful"}}, ValueError, r"Forgetful.prune_block: expected outcomes for self_attn"),
        ({"prune": {"pruner": "narrow"}}, ValueError, "^model.layers.0.self_attn.q_proj: mask: expected bool "),
        ({"prune": {"pruner": "unsure"}}, NumericsError, r"^model.layers.0: nothing to choose from$"),
        ({"allocation": {"rates": "short"}}, ValueError, r"'short': expected importance \(4,\), got \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            engine_of(recipe_of(tmp_path, **change)).run_round(Round(1, 0.5, 2, 0))
    with pytest.raises(RecipeError, match="'by-maxima': statistic: unknown 'input_maxima'; expected one of gradient"):
        engine_of(recipe_of(tmp_path, prune={"pruner": "by-maxima"}))
