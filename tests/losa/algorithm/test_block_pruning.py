"""A block's linears pruned in parts, where their statistics take more memory than a pass may."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.block_pruning import GB, BlockPruning
from losa.algorithm.engine import Engine
from losa.algorithm.schedule import make_schedule
from losa.algorithm.statistics import fed_together
from losa.algorithm.stream import BlockStream
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.pruners import get_pruner
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig, RoundsConfig
from tests.helpers.kinds import KINDS, of_kind

IDS = torch.randint(2, 90, (6, 24), generator=torch.Generator().manual_seed(1))
ALLOCATION = AllocationConfig(mean_rank=2, rank_max=4)


def engine_of(name, prune, statistics_gb, **allocation):
    model = of_kind(KINDS[name]).eval()
    wrap_model(model, rank=2, scaling=2.0)
    calibration = CalibrationConfig(
        data="unused", samples=6, length=24, cka_samples=6, batch_size=2, statistics_gb=statistics_gb
    )
    return Engine(model, IDS, prune, ALLOCATION.model_copy(update=allocation), calibration)


def pruned(engine):
    """What two rounds leave, with adapters that are trained in between."""
    config = RoundsConfig(count=2)
    records = []
    for this_round in make_schedule(config, engine.allocation, engine.prune_config.final_sparsity, 0, 0.1):
        records.append(engine.run_round(this_round))
        generator = torch.Generator().manual_seed(len(records))
        for layer in wrapped_linears(engine.model).values():
            layer.lora_B.data.normal_(std=0.02, generator=generator)
    return {name: (m.mask.clone(), m.weight.clone()) for name, m in wrapped_linears(engine.model).items()}, records


def parts_of(engine, index=0):
    stream = BlockStream(engine.model, engine.decoder, IDS, 2)
    with torch.no_grad():
        return engine.pruning._parts(index, engine.blocks[index], stream)


ONE_HESSIAN = 32 * 32 * 4 / GB


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Falcon"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "alps", "wanda"])
@pytest.mark.parametrize("budget", [ONE_HESSIAN / 1000, 2 * ONE_HESSIAN])
def test_parts_change_no_bit(name, pruner, budget):
    prune = PruneConfig(pruner=pruner, sparsity=0.6)
    engine = engine_of(name, prune, budget)
    assert len(parts_of(engine)) > 1 or (pruner == "wanda" and budget > ONE_HESSIAN)
    (found, records), (expected, others) = pruned(engine), pruned(engine_of(name, prune, 8))
    for linear, tensors in expected.items():
        assert all(map(torch.equal, found[linear], tensors)), linear
    for ours, theirs in zip(records, others, strict=True):
        assert ours.damping == theirs.damping and ours.sparsity == theirs.sparsity and ours.errors == theirs.errors


def test_a_part_holds_what_fits_and_linears_of_one_input_stay_together():
    prune = PruneConfig(pruner="sparsegpt", sparsity=0.5)
    qkv, o, gate_up, down = (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],  # whose Hessian is four times as large
    )
    for hessians, expected in (
        (0.1, [qkv, o, gate_up, down]),
        (2, [qkv + o, gate_up, down]),
        (3, [qkv + o + gate_up, down]),
        (5, [qkv + o + gate_up, down]),
        (7, [qkv + o + gate_up + down]),
    ):
        assert parts_of(engine_of("Llama", prune, hessians * ONE_HESSIAN)) == expected, hessians


@pytest.mark.parametrize(
    "prune, allocation",
    [
        (PruneConfig(pruner="magnitude", sparsity=0.5), {}),
        (PruneConfig(pruner="pruner_zero", sparsity=0.5), {}),
        (PruneConfig(pruner="sparsegpt", sparsity=0.5), {"per": "linear"}),
    ],
)
def test_what_is_decided_together_is_one_part(prune, allocation):
    engine = engine_of("Llama", prune, 1e-9, **allocation)
    assert parts_of(engine) == [list(engine.blocks[0].linears)]


def test_a_pruner_of_whole_blocks_gets_them():
    class Whole(type(get_pruner(PruneConfig(pruner="wanda", sparsity=0.5)))):
        def prune_block(self, *args):
            return super().prune_block(*args)

    engine = engine_of("Llama", PruneConfig(sparsity=0.5), 1e-9)
    assert len(parts_of(engine)) == 4
    engine.pruning = BlockPruning(engine.prune_config, ALLOCATION, Whole(engine.prune_config), engine.calibration)
    assert parts_of(engine) == [list(engine.blocks[0].linears)]


def test_linears_without_a_token_are_alone():
    engine = engine_of("Mixtral", PruneConfig(sparsity=0.5), 8)
    block = engine.blocks[0]
    assert fed_together(block.linears, block.name, lambda: "", lambda: None) == [[name] for name in block.linears]
