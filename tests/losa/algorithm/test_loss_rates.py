"""Expected losses against autograd in fp64 and sums over masks, and rates that make them least."""

from __future__ import annotations

import copy

import pytest
import torch

from losa.algorithm.expected_loss import Energies, energies_of, loss_curve
from losa.algorithm.importance import fisher_importance
from losa.algorithm.loss_rates import STEPS, box, rates_of_blocks, rates_of_linears
from losa.algorithm.measures import losses
from losa.algorithm.schedule import Round
from losa.errors import NumericsError
from losa.model.wrapping import merge_model, wrap_model, wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.sections import AllocationConfig
from losa.training.loss import TokenLoss
from losa_kernels import unpack_mask, wanda_mask
from tests.helpers.expected_loss import COMPARED, IDS, LAYERS, build, engine_of
from tests.helpers.tiny import EPS, randomise, tiny_llama, twice, wrap


@pytest.mark.parametrize("change", [lambda model: model, twice], ids=["as it is", "a linear that runs twice"])
def test_energies_are_autograd_s_of_the_model_as_it_is(change):
    model = tiny_llama(layers=LAYERS)
    wrap(model)
    layers = wrapped_linears(change(model))
    randomise(layers)
    with torch.no_grad():
        found = energies_of(model, layers, IDS, 0)
    exact = change(merge_model(copy.deepcopy(model)).double())
    exact.get_input_embeddings().weight.requires_grad_(True)
    seen = {name: ([], []) for name in layers}

    def watch(name, args, output):
        if not output.requires_grad:
            return
        output.retain_grad()
        seen[name][0].append(args[0])
        seen[name][1].append(output)

    for name in layers:
        exact.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: watch(name, args, output))
    for index, sample in enumerate(IDS):
        # The very labels that were drawn: in fp32 and fp64 the same number falls on the same token.
        labels = TokenLoss(exact).drawn_labels(sample[None], torch.Generator().manual_seed(index))
        (exact(sample[None], labels=labels).loss * (len(sample) - 1)).backward()
    assert found.keys() == layers.keys()
    for name, energies in found.items():
        inputs = torch.cat([x.detach().flatten(0, -2) for x in seen[name][0]])
        gradients = torch.cat([y.grad.flatten(0, -2) for y in seen[name][1]])
        # A backward pass of fp32 through three blocks.
        for ours, truth in (
            (energies.inputs, inputs.square().mean(0)),
            (energies.outputs, gradients.square().sum(0) / IDS.numel()),
        ):
            assert ours.dtype == torch.float64 and (ours - truth).abs().max() <= 128 * EPS * truth.max(), name
    assert not any(layer._forward_hooks for layer in layers.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [10, 600])
def test_a_curve_is_what_wanda_s_masks_cost(rows, nested):
    """600 rows: every third gives the shape, and all of them the height."""
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLoRALinear(torch.randn(rows, 20, generator=generator), rank=2, generator=generator)
    layer.lora_B.data = torch.randn(rows, 2, generator=generator) / 5
    inputs, outputs = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (20, rows))
    layer.set_mask(wanda_mask(layer.dense_weight(), torch.rand(20, generator=generator), sparsity=0.25))
    curve = loss_curve(layer, Energies(inputs, outputs), nested)
    dense = (layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).detach()
    costs = 0.5 * dense.square() * outputs[:, None] * inputs
    part = slice(None, None, 3 if rows > 256 else 1)
    for count in range(21):
        norms = inputs.sqrt().float()
        kept = torch.zeros(rows, 20, dtype=torch.bool)
        if count < 20:
            before = layer.mask.data if nested else None
            kept = unpack_mask(wanda_mask(layer.dense_weight(), norms, sparsity=count / 20, mask=before), 20)
        truth = (costs * ~kept)[part].sum() / costs[part].sum() * costs.sum()
        assert float(curve[count]) == pytest.approx(float(truth), rel=64 * EPS, abs=1e-12)
    assert bool((curve.diff().diff() >= -64 * EPS * curve[-1]).all()), "convex"


def test_a_nested_curve_begins_with_what_is_lost():
    """Also where rows have lost different numbers: it takes its k from each row."""
    layer = MaskedLoRALinear(torch.ones(2, 8), rank=1)
    lost = torch.zeros(2, 8, dtype=torch.bool)
    lost[0, :6] = True
    layer.set_mask(~lost)
    ones = Energies(torch.ones(8).double(), torch.ones(2).double())
    expected = [3 + 0.5 * (max(count - 6, 0) + count) for count in range(9)]
    assert loss_curve(layer, ones, True).tolist() == expected
    assert loss_curve(layer, ones, False).tolist() == list(range(9))


def test_rows_without_gradients_do_not_hide_the_others():
    """Of 600 rows every third gives the shape; gradients reached the row after the first alone."""
    layer = MaskedLoRALinear(torch.ones(600, 8), rank=1)
    outputs = torch.zeros(600).double()
    outputs[1] = 1
    curve = loss_curve(layer, Energies(torch.ones(8).double(), outputs), False)
    assert torch.allclose(curve, torch.linspace(0, 4, 9).double(), rtol=8 * EPS, atol=0)


def test_what_no_token_reached_is_expected_to_cost_nothing():
    """As an expert that no router chose."""
    _, engine = build(per="linear")
    with torch.no_grad():
        curves = losses(engine.rates.measured)
        name, linear = next(iter(engine.blocks[0].linears.items()))
        none = Energies(torch.zeros(linear.in_features).double(), torch.zeros(linear.out_features).double())
        curves[0][name] = loss_curve(linear, none, True)
    assert not curves[0][name].any()
    rates = rates_of_linears(engine.blocks, curves, 0.5, 0.3, False)[0]
    assert rates.patterns[name].sparsity == pytest.approx(0.65, abs=1 / 32), "the top of the box"
    assert rates.removed[name] == rates.patterns[name].sparsity and all(0 < r < 1 for r in rates.removed.values())


def expected(curves, rates):
    """The loss that is expected of rates, of each linear by block and name; between counts the curve is a line."""
    total = 0.0
    for block, own in zip(curves, rates, strict=True):
        for name, curve in block.items():
            place = own[name] * (len(curve) - 1)
            low = min(int(place + 1e-9), len(curve) - 2)
            total += float(curve[low] + (place - low) * (curve[low + 1] - curve[low]))
    return total


def test_rates_of_linears_have_the_count_of_one_rate_and_less_loss():
    _, engine = build(per="linear")
    with torch.no_grad():
        curves = losses(engine.rates.measured)
    rates = rates_of_linears(engine.blocks, curves, 0.5, 0.3, True)
    low, high = box(0.5, 0.3)
    assert (low, high) == pytest.approx((0.2, 0.65))
    gone, own = 0, []
    for block, each in zip(engine.blocks, rates, strict=True):
        own.append({name: pattern.sparsity for name, pattern in each.patterns.items()})
        for name, linear in block.linears.items():
            assert low - 1 / linear.in_features <= own[-1][name] <= high + 1 / linear.in_features
            gone += round(own[-1][name] * linear.weight.numel())
    assert gone == sum(linear.weight.numel() for block in engine.blocks for linear in block.linears.values()) // 2
    alike = [dict.fromkeys(block, 0.5) for block in curves]
    assert expected(curves, own) < 0.99 * expected(curves, alike)
    # What one more column costs is nowhere below what one less would save elsewhere.
    items = [(curves[i][name], own[i][name]) for i, block in enumerate(own) for name in block]
    weights = [linear.out_features for block in engine.blocks for linear in block.linears.values()]
    costs, savings = [], []
    for (curve, rate), rows in zip(items, weights, strict=True):
        count = round(rate * (len(curve) - 1))
        if rate < high - 1 / 32:
            costs.append(float(curve[count + 1] - curve[count]) / rows)
        if rate > low + 1 / 32:
            savings.append(float(curve[count] - curve[count - 1]) / rows)
    # But for the last steps, which must fit what the count has left.
    assert sum(cost < max(savings) for cost in costs) <= 2


def test_rates_of_blocks_meet_the_mean_and_have_less_loss():
    _, engine = build()
    with torch.no_grad():
        curves = losses(engine.rates.measured)
        # As between real blocks, one matters more.
        curves[1] = {name: 3 * curve for name, curve in curves[1].items()}
    rates = rates_of_blocks(engine.blocks, curves, 0.5, 0.3, False)
    assert sum(rates) / LAYERS == pytest.approx(0.5, abs=1 / STEPS) and rates[1] == min(rates) < 0.45
    own = [dict.fromkeys(block, rate) for block, rate in zip(curves, rates, strict=True)]
    alike = [dict.fromkeys(block, 0.5) for block in curves]
    assert expected(curves, own) < expected(curves, alike)
    for other in (0.01, -0.01):
        moved = [rates[0] + other, rates[1] - other, rates[2]]
        assert expected(curves, own) <= expected(
            curves, [dict.fromkeys(block, rate) for block, rate in zip(curves, moved, strict=True)]
        )


@pytest.mark.parametrize(
    "per, pruner",
    [("linear", "wanda"), ("block", "wanda"), ("linear", "pruner_zero"), ("row", "wanda"), ("row", "pruner_zero")],
)
def test_rounds_prune_to_these_rates_and_nest(per, pruner):
    model, engine = build({"sparsity": 0.5, "pruner": pruner}, per=per)
    masks = None
    for index, target in enumerate((0.25, 0.5), start=1):
        record = engine.run_round(Round(index, target, 4, 0))
        layers = wrapped_linears(model)
        assert sum(record.sparsity) / LAYERS == pytest.approx(target, abs=1 / 32 if per == "block" else 1e-9)
        assert record.importance is None and record.delta is None and record.similarity is None
        if per != "block":
            assert record.linear_sparsity == {name: layer.sparsity for name, layer in layers.items()}
            assert len(set(record.linear_sparsity.values())) > 3 and len(set(record.linear_ranks.values())) > 1
        now = [layer.mask_bool().clone() for layer in layers.values()]
        assert masks is None or all(bool((a <= b).all()) for a, b in zip(now, masks, strict=True))
        masks = now


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_energies_are_the_dense_model_s_in_every_round(pruner):
    model, engine = build({"sparsity": 0.5, "pruner": pruner}, per="linear")
    dense = tiny_llama(layers=LAYERS)
    wrap_model(dense, rank=1, scaling=1.0)
    with torch.no_grad():
        truth = energies_of(dense, wrapped_linears(dense), IDS[:COMPARED], 0)
    engine.run_round(Round(1, 0.25, 4, 0))
    randomise(wrapped_linears(model))
    kept = dict(engine.measured_once)
    engine.measured_once.clear()  # as where masks were put back without it
    with torch.no_grad():
        found = engine.rates.measured.energies()
    for name, energies in found.items():
        assert torch.equal(energies.inputs, truth[name].inputs), name
        assert torch.equal(energies.outputs, truth[name].outputs), name
    assert kept.keys() == engine.measured_once.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in engine.measured_once.items())


def test_labels_follow_the_seed():
    model = tiny_llama(layers=LAYERS)
    layers = wrap(model)
    with torch.no_grad():
        first, again, *others = (energies_of(model, layers, IDS, seed) for seed in (0, 0, 1, 1 << 12, (1 << 32) - 1))
    for name, energies in first.items():
        assert torch.equal(energies.outputs, again[name].outputs), name
        for other in others:
            assert torch.equal(energies.inputs, other[name].inputs), name
            assert not torch.equal(energies.outputs, other[name].outputs), name


class Experts(torch.nn.Module):
    """Three MLPs in place of one: each token goes to the first or the second by a sign, and none to the third."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

    def forward(self, x):
        first = x[..., :1] > 0
        y = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (first, ~first), strict=False):
            y = y.masked_scatter(chosen, expert(x[chosen.squeeze(-1)]))
        return y


@pytest.mark.parametrize("per", ["linear", "block"])
def test_blocks_of_other_sizes_meet_the_count_together(per):
    """The second block has three MLPs, of which one is never used."""
    model = tiny_llama(layers=LAYERS)
    model.model.layers[1].mlp = Experts(model.model.layers[1].mlp)
    linears = wrap(model)
    engine = engine_of(model, per=per)
    record = engine.run_round(Round(1, 0.5, 4, 0))
    sizes = [sum(linear.weight.numel() for linear in block.linears.values()) for block in engine.blocks]
    assert sizes[1] > 2 * sizes[0]
    gone = sum(linear.sparsity * linear.weight.numel() for linear in linears.values()) / sum(sizes)
    assert gone == pytest.approx(0.5, abs=1e-9 if per == "linear" else 1 / 32)
    if per == "linear":
        idle = {name: value for name, value in record.linear_sparsity.items() if "experts.2" in name}
        assert idle and all(value == pytest.approx(0.75, abs=1 / 32) for value in idle.values()), "the top of the box"
    else:
        assert record.sparsity[1] == max(record.sparsity), "a third of it costs nothing"


@pytest.mark.parametrize("change", [{"layers": 1}, {"targets": ["mlp.down_proj"]}, {"dtype": torch.bfloat16}], ids=str)
def test_one_block_some_linears_and_bf16_have_rates_too(change):
    change = {"layers": LAYERS, "targets": None, "dtype": torch.float32} | change
    model = tiny_llama(layers=change["layers"]).to(change["dtype"])
    linears = wrap(model, targets=change["targets"])
    record = engine_of(model, per="linear").run_round(Round(1, 0.5, 4, 0))
    gone = sum(linear.sparsity * linear.weight.numel() for linear in linears.values())
    assert gone == sum(linear.weight.numel() for linear in linears.values()) // 2
    assert len(set(record.linear_sparsity.values())) > 1 and record.linear_sparsity.keys() == linears.keys()


def test_keep_counts_follow_the_order_of_importance():
    _, engine = build({"pattern": "4:8", "mixed": True})
    record = engine.run_round(Round(1, 0.5, 4, 0))
    assert record.keep_n == [4] * LAYERS, "the narrow box of other rates"
    _, engine = build({"pattern": "4:8", "mixed": True}, delta=0.3)
    with torch.no_grad():
        importance = fisher_importance(losses(engine.rates.measured))
    counts = torch.tensor(engine.run_round(Round(1, 0.5, 4, 0)).keep_n)
    assert importance.shape == (LAYERS,) and counts.sum() == 4 * LAYERS and len(counts.unique()) > 1
    assert bool((counts[importance.argsort()].diff() >= 0).all()), "what matters more keeps more"


def test_importance_forgets_what_is_pruned_already():
    """A block that has lost most of its weights has lost what matters least."""
    _, engine = build({"pattern": "1:4", "mixed": True}, delta=0.3)
    with torch.no_grad():
        before = fisher_importance(losses(engine.rates.measured))
        for linear in engine.blocks[0].linears.values():
            linear.set_mask(torch.arange(linear.in_features).expand_as(linear.weight) % 4 == 0)
        assert torch.equal(fisher_importance(losses(engine.rates.measured)), before)
    assert engine.run_round(Round(2, 0.75, 4, 0)).importance == before.tolist()


def test_what_is_not_finite_is_named():
    model, engine = build()
    model.model.layers[1].mlp.down_proj.weight.data *= 1e30  # the loss is finite: a norm divides by as much
    with pytest.raises(NumericsError, match="calibration: model.layers.1.mlp.down_proj: expected squares of weights"):
        engine.run_round(Round(1, 0.25, 4, 0))
    model, engine = build()
    model.model.layers[1].input_layernorm.register_full_backward_hook(lambda _, into, out: (into[0] * float("inf"),))
    with pytest.raises(NumericsError, match="calibration: model.layers.0.self_attn.q_proj: expected finite inputs and"):
        engine.run_round(Round(1, 0.25, 4, 0))
    model, engine = build()
    model.model.norm.weight.data *= float("nan")
    with pytest.raises(NumericsError, match="calibration: the loss is nan at sample 0"):
        engine.run_round(Round(1, 0.25, 4, 0))


def test_curves_need_expected_losses():
    with pytest.raises(ValueError, match="allocation.fill: curves needs expected losses, which rates 'cka' do"):
        AllocationConfig(rates="cka", fill="curves")
    smooth = build(fill="smooth", delta=0.1)[1].run_round(Round(1, 0.5, 4, 0))
    assert max(smooth.sparsity) - min(smooth.sparsity) == pytest.approx(0.2, abs=1 / 32)
    # By default as wide as the rule says, and not as the box about expected losses is.
    for fill in ("lp", "smooth"):
        narrow = build({"sparsity": 0.7}, fill=fill)[1].run_round(Round(1, 0.7, 4, 0))
        assert max(narrow.sparsity) - min(narrow.sparsity) <= 0.06 + 1 / 32
    assert AllocationConfig(rates="fisher", delta=0.5).delta == 0.5
