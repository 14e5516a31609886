"""What importances are computed from is what whole forward passes in fp64 give, and rates of a round follow from it."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from losa.algorithm.engine import Engine
from losa.algorithm.importance import dlp_importance, owl_importance
from losa.algorithm.measures import MEASURES
from losa.algorithm.rates import FILLS
from losa.algorithm.schedule import Round
from losa.errors import RecipeError
from losa.model.wrapping import merge_model, wrap_model, wrapped_linears
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.rates import RATES, TRIED_WIDTHS, passes_for
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from tests.helpers.tiny import EPS, randomise, tiny_llama

IDS = torch.randint(0, 90, (8, 24), generator=torch.Generator().manual_seed(1))
LAYERS = 3


def build(rates="uniform", prune=None, loss=None, layer=MaskedLoRALinear, **allocation):
    model = tiny_llama(layers=LAYERS)
    wrap_model(model, layer=layer, rank=4, scaling=2.0)
    allocation = AllocationConfig(mean_rank=4, rank_max=12, rates=rates, **allocation)
    calibration = CalibrationConfig(data="unused", samples=8, length=24, cka_samples=5, batch_size=2)
    prune = PruneConfig(**(prune or {"sparsity": 0.5}))
    return model, Engine(model, IDS, prune, allocation, calibration, loss=loss)


@pytest.fixture(scope="module")
def trained():
    """A model with masks and adapters; inputs of its linears, hidden states before and after each block, in fp64."""
    model, engine = build()
    randomise(wrapped_linears(model))
    exact = merge_model(copy.deepcopy(model)).double()
    inputs, hidden = {}, []
    for name, module in exact.named_modules():
        if name in wrapped_linears(model):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
    for block in exact.model.layers:
        block.register_forward_hook(lambda _, args, output: hidden.append((args[0], output)))
    with torch.no_grad():
        exact(IDS[:5], use_cache=False)
    return model, engine, inputs, hidden


def measure(engine, needs):
    with torch.no_grad():
        found = MEASURES[needs](engine.rates.measured)
        return found if isinstance(found, torch.Tensor) else list(found)


def test_scores_are_wanda_s_of_dense_values_on_the_inputs_of_the_model_as_it_is(trained):
    model, engine, inputs, _ = trained
    found = measure(engine, "scores")
    for index, scores in enumerate(found):
        for name, ours in zip(engine.blocks[index].linears, scores, strict=True):
            layer = engine.blocks[index].linears[name]
            dense = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
            norms = inputs[f"model.layers.{index}.{name}"].norm(dim=0)
            truth = (dense.abs() * norms).detach()
            # A product of 4 terms, and norms of sums over 120 tokens behind three blocks of fp32 arithmetic.
            assert (ours - truth).abs().max() <= 256 * EPS * truth.abs().max()
    # A score that is as near to the limit as its rounding may count on either side.
    flat = [torch.cat([each.flatten() for each in scores]).double() for scores in found]
    shares = [float((each > 2 * each.mean()).double().mean()) for each in flat]
    assert owl_importance(found, multiple=2.0).tolist() == pytest.approx(shares, abs=1.5 / len(flat[0]))
    medians = torch.stack([each.sort().values[(len(each) - 1) // 2] for each in flat])
    assert torch.allclose(dlp_importance(found), 1 - medians / medians.sum(), rtol=1e-12)


def test_cosines_are_means_over_tokens(trained):
    _, engine, _, hidden = trained
    truth = [torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in hidden]
    assert measure(engine, "cosines").tolist() == pytest.approx(truth, rel=0, abs=256 * EPS)


def test_normalised_similarity_compares_tokens_of_one_size(trained):
    """24 tokens of each of five samples; the feature form of linear CKA."""
    _, engine, _, hidden = trained
    features = []
    for _, after in hidden:
        rows = after.flatten(0, 1)
        rows = rows / rows.square().mean(1, keepdim=True).sqrt()
        features.append(rows - rows.mean(0))
    truth = torch.stack(
        [
            torch.stack([(a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()) for b in features])
            for a in features
        ]
    )
    assert torch.allclose(measure(engine, "normalised similarity"), truth, rtol=0, atol=1024 * EPS)


def test_massive_activations_hide_nothing_from_normalised_similarity():
    """One block makes a channel of the first token large, and later blocks hand it on: samples then seem alike."""
    model, engine = build()
    first = model.model.layers[0]
    first.register_forward_hook(lambda _, args, output: output.index_add(1, torch.tensor([0]), _massive(args[0])))
    plain, normalised = (measure(engine, needs) for needs in ("similarity", "normalised similarity"))
    off = ~torch.eye(LAYERS, dtype=torch.bool)
    assert plain[off].min() > 0.9999 > 0.999 > normalised[off].max()


def _massive(hidden):
    """(batch, 1, hidden): what makes one channel of the first token large, and different from sample to sample."""
    added = torch.zeros_like(hidden[:, :1])
    added[:, 0, 3] = 1000 * hidden[:, 0, 5].sign() * (1 + hidden[:, 0, 7].abs())
    return added


@pytest.mark.parametrize("rates", [name for name in RATES if name not in ("uniform", "cka", "atp", "fisher")])
def test_rates_of_two_rounds_meet_their_means_and_nest(rates):
    model, engine = build(rates)
    masks, reached, row = None, [0.0] * LAYERS, RATES[rates]
    delta = row.delta if isinstance(row.delta, float) else None
    for index, target in enumerate((0.25, 0.5), start=1):
        record = engine.run_round(Round(index, target, 4, 0))
        floor = torch.tensor(reached, dtype=torch.float64)
        wanted = FILLS[row.fill](torch.tensor(record.importance, dtype=torch.float64), target, delta, floor)
        assert wanted.mean().item() == pytest.approx(target, abs=1e-12) and len(set(record.sparsity)) > 1
        # Of every row as many whole weights go as the rate allows.
        for rate, block, reached in zip(wanted.tolist(), engine.blocks, record.sparsity, strict=True):
            gone = [m.out_features * int(rate * m.in_features + 1e-6) for m in block.linears.values()]
            assert reached == pytest.approx(sum(gone) / sum(m.weight.numel() for m in block.linears.values()), abs=1e-9)
        assert len(record.importance) == LAYERS and record.delta is None
        now = [layer.mask_bool().clone() for layer in wrapped_linears(model).values()]
        assert masks is None or all(bool((a <= b).all()) for a, b in zip(now, masks, strict=True))
        masks, reached = now, record.sparsity


def test_fill_and_delta_of_a_recipe_come_first():
    smooth = build("cka", fill="smooth", delta=0.2)[1].run_round(Round(1, 0.5, 4, 0))
    assert max(smooth.sparsity) - min(smooth.sparsity) == pytest.approx(0.4, abs=1 / 32)
    assert len(set(smooth.sparsity)) == LAYERS
    plateaus = build("owl", fill="lp", delta=0.125)[1].run_round(Round(1, 0.5, 4, 0))
    assert sorted(plateaus.sparsity) == pytest.approx([0.375, 0.5, 0.625], abs=1e-9)


@pytest.mark.parametrize("prune", [{"sparsity": 0.5}, {"pattern": "4:8", "mixed": True}])
def test_the_slope_with_the_least_loss_is_taken(prune):
    """The loss, made up, is lowest where the first block has lost 3/8 of its weights."""
    seen, tokens = [], []

    def loss(ids):
        tokens.append(ids)
        layers = wrapped_linears(model)
        seen.append([layer.mask_bool().clone() for layer in layers.values()])
        return abs(next(iter(layers.values())).sparsity - 0.375)

    model, engine = build("atp", prune=prune, loss=loss)
    record = engine.run_round(Round(1, 0.5, 4, 0))
    assert len(TRIED_WIDTHS) == passes_for("atp", None) - 1 and torch.equal(tokens[0], IDS[:5])
    # Of widths that give the same keep counts one is tried.
    assert len(seen) == (len(TRIED_WIDTHS) if "sparsity" in prune else 2)
    widths = [0.5 * share for share in TRIED_WIDTHS]
    assert record.delta == (widths[1] if "sparsity" in prune else record.delta)
    if "sparsity" in prune:
        # Counts of 32 and 64 columns, floored.
        step = record.delta
        assert record.sparsity == pytest.approx([0.5 - step, 0.5, 0.5 + step], abs=1 / 32)
    else:
        assert sum(record.keep_n) == 4 * LAYERS and record.keep_n == sorted(record.keep_n, reverse=True)
    # While losses were taken, later blocks were the sparser the wider the box; afterwards Wanda's own masks stand.
    first = [1 - math.fsum(mask.float().mean().item() for mask in masks[:7]) / 7 for masks in seen]
    assert first == sorted(first, reverse=True) and first[0] > first[-1]


@pytest.mark.parametrize("layer", [MaskedLoRALinear, LoRALinear])
def test_trial_masks_are_taken_back_and_nest(layer):
    """So are the weights of a layer that sets them to zero with its mask."""
    seen, losses = [], iter([3.0, 2.0, 1.0, 2.0, 3.0])

    def loss(ids):
        seen.append([m.mask.data.clone() for m in wrapped_linears(model).values()])
        return next(losses)

    model, engine = build("atp", loss=loss, layer=layer)
    randomise(wrapped_linears(model))
    own = [layer.mask.data.clone() for layer in wrapped_linears(model).values()]
    before = dict(model.named_parameters())
    weights = {name: parameter.detach().clone() for name, parameter in before.items()}
    with torch.no_grad():
        decided = engine.rates.decide(Round(1, 0.75, 4, 0))
    assert decided.delta == 0.25 * TRIED_WIDTHS[2] and len(seen) == len(TRIED_WIDTHS)
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(wrapped_linears(model).values(), own, strict=True))
    assert all(bool(((mask & was) == mask).all()) for masks in seen for mask, was in zip(masks, own, strict=True))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in before.items())


def test_widths_that_give_one_and_the_same_patterns_are_not_tried():
    _, engine = build("atp", prune={"pattern": "4:8"}, loss=lambda ids: pytest.fail("there is nothing to choose"))
    record = engine.run_round(Round(1, 0.5, 4, 0))
    assert record.keep_n == [4] * LAYERS and record.delta is None


def test_a_width_that_nobody_can_choose_is_refused():
    with pytest.raises(RecipeError, match="allocation.rates: 'atp' chooses its width by a loss: expected allocation.d"):
        build("atp")
    record = build("atp", delta=0.25)[1].run_round(Round(1, 0.5, 4, 0))
    assert record.delta is None and record.sparsity == pytest.approx([0.25, 0.5, 0.75], abs=1e-9)


def test_hidden_states_that_are_not_finite_are_named():
    model, engine = build("update")
    engine.run_round(Round(1, 0.25, 4, 0))  # the stream knows its calls
    block = model.model.layers[1]
    block.register_forward_hook(lambda _, args, output: output * float("inf"))
    with pytest.raises(Exception, match="calibration: output of model.layers.1: expected finite values"):
        measure(engine, "cosines")
