"""Plans of models that differ from LLaMA: without attention, with experts, with logits of their own."""

from __future__ import annotations

import pytest
import torch
import transformers

from losa.model.blocks import find_blocks
from losa.model.forms import holder_of, tensors_of
from losa.recipe.training import DistillConfig
from losa.run import estimate_memory
from losa.run.estimate import estimate
from losa.run.estimate_tables import estimate_tables
from losa.run.placement import Placement
from losa.run.planned import Planned, planned_model
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.planned_recipe import recipe


def configured(tmp_path, kind, **settings):
    common = {"vocab_size": 98, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 1}
    getattr(transformers, f"{kind}Config")(**common | settings).save_pretrained(tmp_path / kind)
    return recipe(tmp_path / kind, evaluate={"data": "e.txt", "length": 16, "max_windows": 2})


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "Rwkv"])
def test_models_without_attention_have_none_of_its_work(tmp_path, kind):
    settings = {"num_heads": 8, "head_dim": 8, "n_groups": 1} if kind == "Mamba2" else {}
    found = estimate(configured(tmp_path, kind, **settings), probe=False)
    linears = found.prunable
    evaluation = next(stage for stage in found.stages if stage.what == "dense: evaluation")
    # Two windows of 16 tokens through the prunable linears and the head, two operations a weight.
    assert evaluation.flops == 2 * 16 * 2.0 * (linears + 98 * 32)
    assert estimate_tables(found)


def test_models_that_change_their_logits_need_all_of_them(tmp_path):
    """As resident memory grew where this model had a vocabulary of 65,536: 8.1, 19.1 and 37.3 bytes a logit; with bf16
    products in training 16.1 and 40.2."""
    sizes = {"intermediate_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2}
    capped = configured(tmp_path, "Gemma2", head_dim=8, **sizes)
    taught = capped.model_copy(update={"train": capped.train.model_copy(update={"distill": DistillConfig(weight=0.5)})})
    hidden = 2 * 32 * 32 * 4
    for found, phase, each in (
        (estimate(capped, probe=False), "evaluation", 8),
        (estimate(capped, probe=False), "training", 20),
        (estimate(taught, probe=False), "training", 40 + 32 * 4 / 98),
    ):
        (loss,) = (held for held in found.holdings if (held.what, held.phase) == ("loss", phase))
        tokens = 16 if phase == "evaluation" else 32
        assert loss.size == each * 98 * tokens + hidden * tokens // 32
    assert "of all of both models" in loss.how
    train = taught.train.model_copy(update={"precision": "bfloat16"})
    mixed = estimate(taught.model_copy(update={"train": train}), probe=False)
    held = {held.phase: held.size for held in mixed.holdings if held.what == "loss"}
    # Beside the output layer in bf16, and the teacher's hidden states.
    assert held["training"] == 42 * 98 * 32 + hidden // 2 + 98 * 32 * 2 + 32 * 32 * 2
    assert held["evaluation"] == 8 * 98 * 16 + hidden // 2, "autocast is training's"


def test_experts_do_not_hide_what_the_rest_does_to_logits(tmp_path):
    """They cannot run without numbers."""
    sizes = {"intermediate_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2}
    for kind, scaling, how in (("GraniteMoe", {"logits_scaling": 4.0}, "all"), ("Mixtral", {}, "a chunk of")):
        found = estimate(configured(tmp_path, kind, **sizes, **scaling), probe=False)
        assert {held.how.split(" logits")[0] for held in found.holdings if held.what == "loss"} == {how}


def test_settings_of_each_layer_do_not_stop_the_plan(tmp_path):
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    settings |= {"global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    settings |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 98}
    found = estimate(configured(tmp_path, "Gemma4Text", **settings), probe=False)
    evaluation = next(stage for stage in found.stages if stage.what == "dense: evaluation")
    # Four heads of the wider kind in both blocks, q k^T and p v over half a window each.
    attention = 2.0 * 16 * (4 * 16) * 2
    assert evaluation.flops == 2 * 16 * (2.0 * (found.prunable + 98 * 32) + attention)


def test_statistics_of_all_tokens_are_the_work_of_all_experts(tmp_path):
    """Eight experts of which a token chooses two: three linears (32, 64) of each of the six others."""
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    routed = configured(tmp_path, "Mixtral", **sizes)
    every = routed.model_copy(update={"calibration": routed.calibration.model_copy(update={"experts": "all"})})

    def work(recipe) -> float:
        return next(s.flops for s in estimate(recipe, probe=False).stages if s.kind == "pruning")

    calibration, rounds, blocks = routed.calibration, routed.rounds.count, 2
    tokens = calibration.samples * calibration.length
    assert work(every) - work(routed) == rounds * tokens * 2 * blocks * 6 * 3 * 32 * 64


def test_experts_that_a_gpu_multiplies_together_are_counted(tmp_path, monkeypatch):
    """Eight experts' weights of one kind in bf16, in training their gradients too, up to a limit."""
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    mixture = configured(tmp_path, "Mixtral", **sizes)

    def products(device, precision, **changes):
        train = mixture.train.model_copy(update={"precision": precision})
        changes |= {"device": device, "train": train, "dtype": "float32"}
        found = estimate(mixture.model_copy(update=changes), probe=False)
        held = {h.phase: h.size for h in found.holdings if h.what == "experts' products"}
        assert not any(h.certain for h in found.holdings if h.what == "experts' products")
        assert found.size("one linear's product") == 2 * 4 * 32 * 64
        return held

    stack = 2 * 8 * 32 * 64
    assert products("cuda", "bfloat16") == {"training": 2 * stack}
    assert products("cpu", "bfloat16") == products("cuda", "float32") == {}
    drops = mixture.lora.model_copy(update={"dropout": 0.1})
    assert products("cuda", "bfloat16", lora=drops) == {}, "training alone has dropout"
    low = estimate(mixture.model_copy(update={"device": "cuda", "dtype": "bfloat16"}), probe=False)
    dropped = estimate(mixture.model_copy(update={"device": "cuda", "dtype": "bfloat16", "lora": drops}), probe=False)
    for each in (low, dropped):
        assert {h.size for h in each.holdings if (h.what, h.phase) == ("experts' products", "evaluation")} == {stack}
    monkeypatch.setattr(estimate_memory, "STACK_BYTES", 20_000)
    assert products("cuda", "bfloat16") == {"training": 2 * 20_000}


@pytest.mark.parametrize("kind", ["Mixtral", "LongcatFlash"])
def test_stacks_of_experts_on_more_processes_than_experts(tmp_path, kind):
    """Against what the model's own tensors have: a stack has a row for each choice, its linears one for each output."""
    of_kind(KINDS[kind]).config.save_pretrained(tmp_path / kind)
    # Nobody compares with another method, and one does.
    evaluate = {"data": "e.txt", "length": 16, "max_windows": 2}
    alone, compared = (recipe(tmp_path / kind, compare=names, evaluate=evaluate) for names in ([], ["prune_only"]))
    model, placement = of_kind(KINDS[kind]), Placement(16, 16)

    def own(tensors):
        """Bytes of the first of 16 processes."""
        return sum(-(-len(t) // 16) * t[0].numel() * t.element_size() for t in tensors)

    def held(recipe_of):
        planned = Planned.of(recipe_of, planned_model(recipe_of), torch.device("cpu"), {})
        return {(h.phase, h.what): h.size for h in planned.holdings(placement)}

    found, blocks = held(alone), find_blocks(model)
    stacks = [tensor for holder in blocks.holders().values() for tensor in tensors_of(holder).values()]
    linears = [m.weight for m in blocks.linears().values() if holder_of(m) is not m]
    rest = [p for p in model.parameters() if not any(p is stack for stack in stacks)]
    assert found["throughout", "weights"] == own(rest) + own(linears)
    more = own(stacks) - own(linears)
    stored = "stacks and transposed linears"
    assert more > 0 and {found[phase, stored] for phase in ("loading", "evaluation", "export")} == {more}
    # One row of each stack from each of 16 processes, though there are three to five rows.
    on_its_way = 16 * max(own(block.parameters()) for block in blocks)
    assert found["evaluation", "one block on its way"] == on_its_way
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    assert found["export", "one block, twice"] == largest + on_its_way
    assert ("pruning", stored) not in found
    both = held(compared)
    assert both["pruning", stored] == both["training", stored] == own(stacks)
    # A pruner that gives new weights has the old ones among its dense weights; LoRA needs no dense stream beside.
    plain = {"method": "lora", "compare": ["prune_only"], "prune": {"pruner": "sparsegpt"}}
    updating = held(recipe(tmp_path / kind, evaluate=evaluate, **plain))
    assert ("pruning", stored) not in updating
    assert updating["throughout", "dense weights"] == own(m.weight for m in blocks.linears().values())
