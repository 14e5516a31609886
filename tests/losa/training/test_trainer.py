"""The training loop: what it computes per step, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from losa.data.sequences import IGNORED, PackedData
from losa.errors import LosaError, NumericsError
from losa.model.wrapping import wrap_model
from losa.recipe.learning_rate import lr_factor
from tests.helpers.training import (
    LENGTH,
    TIMES,
    adapters,
    break_training,
    lines,
    sequences,
    snapshot,
    trainer,
    untimed,
    wrapped_llama,
)


def test_loss_goes_down_and_only_adapters_move():
    model = wrapped_llama().train()
    # The frozen output layer of an untrained model is too small to prefer any token by much.
    model.lm_head.weight.data *= 20
    before = snapshot(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    run = trainer(model, learning_rate=2e-2, max_grad_norm=1.0)
    data = sequences(16, highest=6)
    first = run.train(data, round_index=1)
    for index in range(2, 8):
        last = run.train(data, round_index=index)
    assert last.loss < 0.8 * first.loss
    assert not model.training and not any(m.training for m in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained), name
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)


def test_first_loss_is_the_mean_over_label_tokens():
    data = sequences(8)
    model = wrapped_llama()
    count = int((data.labels[:, 1:] != IGNORED).sum())
    with torch.no_grad():
        logits = model(data.input_ids).logits[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.labels[:, 1:].flatten(), reduction="sum")
    outcome = trainer(model, batch_size=8).train(data, round_index=1)
    assert (outcome.steps, outcome.tokens) == (1, 8 * LENGTH)
    assert outcome.loss == pytest.approx(nll.item() / count, rel=1e-5)


@pytest.mark.parametrize("batch_size, accumulation", [(1, 8), (2, 4), (3, 3)])
def test_accumulated_gradient_is_the_big_batchs(batch_size, accumulation):
    """In fp64; sequences have very different numbers of labels, and 8 in batches of 3 leaves a smaller one."""
    data = sequences(8)
    gradients = []
    for settings in ({"batch_size": 8}, {"batch_size": batch_size, "gradient_accumulation": accumulation}):
        model = wrapped_llama(torch.float64)
        outcome = trainer(model, **settings).train(data, round_index=1)
        assert outcome.steps == 1
        gradients.append([p.grad for p in adapters(model)])
    for whole, parts in zip(*gradients, strict=True):
        assert (whole - parts).abs().max() <= 1e-12 * whole.abs().max() + 1e-15
        assert whole.abs().max() > 0


def test_last_smaller_batch_is_used(tmp_path):
    data = sequences(11)
    outcome = trainer(wrapped_llama(), tmp_path, gradient_accumulation=2).train(data, round_index=3)
    assert (outcome.steps, outcome.tokens) == (2, 11 * LENGTH)
    written = lines(tmp_path)
    assert [line["tokens"] for line in written] == [8 * LENGTH, 3 * LENGTH]
    assert [line["step"] for line in written] == [1, 2]
    for line in written:
        assert list(line) == ["step", "round", "loss", "lr", "grad_norm", "tokens", *TIMES]
        assert line["round"] == 3 and line["grad_norm"] > 0
        assert line["tokens_per_s_per_device"] == line["tokens_per_s"] > 0
    labels = [int((data.labels[s, 1:] != IGNORED).sum()) for s in (slice(0, 8), slice(8, 11))]
    mean = sum(n * line["loss"] for n, line in zip(labels, written, strict=True)) / sum(labels)
    assert outcome.loss == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("schedule", ["per_round", "global"])
def test_learning_rates_over_rounds(tmp_path, schedule):
    # Rounds of 6 and 10 sequences: 2 + 3 steps of at most 4, where 16 sequences in one round would take 4.
    run = trainer(wrapped_llama(), tmp_path, total=16, lr_schedule=schedule, learning_rate=1e-3, warmup=0.25)
    run.train(sequences(6), round_index=1)
    run.train(sequences(10), round_index=2)
    assert run.global_step == 5
    if schedule == "per_round":
        expected = [lr_factor(k, 2, 0.25) for k in range(2)] + [lr_factor(k, 3, 0.25) for k in range(3)]
    else:
        expected = [lr_factor(min(k, 3), 4, 0.25) for k in range(5)]
    rates = [line["lr"] for line in lines(tmp_path)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected], rel=1e-12)


def test_global_step_makes_a_run_resumable(tmp_path):
    settings = {"lr_schedule": "global", "learning_rate": 1e-2, "total": 24}

    def first_round(folder):
        model = wrapped_llama(dropout_p=0.3)
        run = trainer(model, folder, **settings)
        run.train(sequences(12), round_index=1)
        return model, run

    whole, run = first_round(tmp_path / "whole")
    run.train(sequences(12, seed=1), round_index=2)
    parts, run = first_round(tmp_path / "parts")
    # A second round that broke off: its lines must not stay beside those of its repetition.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "round": 2, "loss": 0.0}) + '\n{"step": 5, "rou')
    torch.manual_seed(99)
    resumed = trainer(parts, tmp_path / "parts", **settings)
    resumed.global_step = run.global_step
    resumed.train(sequences(12, seed=1), round_index=2)
    for a, b in zip(adapters(whole), adapters(parts), strict=True):
        assert torch.equal(a, b)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


def test_dropout_is_on_while_training_and_seeded():
    losses = [
        trainer(wrapped_llama(dropout_p=p, scale_b=0.3)).train(sequences(4), round_index=index).loss
        for p, index in ((0.0, 1), (0.5, 1), (0.5, 1), (0.5, 2))
    ]
    assert losses[1] == losses[2]
    assert len({losses[0], losses[1], losses[3]}) == 3


def test_clipping():
    norms = []
    for limit in (1e9, 1e-3):
        model = wrapped_llama()
        trainer(model, max_grad_norm=limit).train(sequences(4), round_index=1)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in adapters(model)]).item())
    assert norms[0] > 1e-3 and norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_activation_checkpointing_changes_memory_not_results():
    gradients = []
    for enabled in (False, True):
        model = wrapped_llama(torch.float64)
        recomputed = []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=recomputed: seen.append(1))
        trainer(model, activation_checkpointing=enabled).train(sequences(4), round_index=1)
        handle.remove()
        assert not model.is_gradient_checkpointing
        # Once to see how the model makes its logits, once forward, and once more in the backward pass.
        assert len(recomputed) == 2 + enabled
        gradients.append([p.grad for p in adapters(model)])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-13 * a.abs().max() + 1e-16


def test_batches_without_labels_change_nothing(tmp_path):
    data = sequences(12)
    data.labels[4:8] = IGNORED
    with_gap = wrapped_llama()
    outcome = trainer(with_gap, tmp_path, lr_schedule="global", total=12).train(data, round_index=1)
    assert outcome.steps == 2 and outcome.tokens == 12 * LENGTH
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    data.labels[:] = IGNORED
    model = wrapped_llama()
    before = snapshot(model)
    outcome = trainer(model, weight_decay=0.5).train(data, round_index=1)
    assert outcome.steps == 0 and outcome.loss is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_non_finite_numbers_stop_before_the_weights_change(tmp_path, broken):
    model = wrapped_llama()
    data = sequences(12)
    data = PackedData(data.input_ids, data.input_ids.clone())
    break_training(model, data, broken, row=6, backward=2)
    first_step = trainer(wrapped_llama(), total=12, lr_schedule="global")
    first_step.train(data.slice(0, 4), round_index=4)
    run = trainer(model, tmp_path, total=12, lr_schedule="global")
    with pytest.raises(NumericsError, match=f"{broken}.* is (nan|inf) in round 4, step 2 of 3"):
        run.train(data, round_index=4)
    assert len(lines(tmp_path)) == 1 and not model.training
    for ours, expected in zip(adapters(model), adapters(first_step.model), strict=True):
        assert torch.equal(ours, expected)


def test_soft_capped_model_trains():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=98, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=5.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    wrap_model(model, rank=4, scaling=2.0)
    run = trainer(model, learning_rate=2e-2, max_grad_norm=1.0)
    losses = [run.train(sequences(16, highest=6), round_index=i).loss for i in range(1, 6)]
    assert losses[-1] < losses[0]


def test_autocast_trains_in_bfloat16():
    model = wrapped_llama()
    run = trainer(model)
    run.autocast = torch.bfloat16
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    outcome = run.train(sequences(4), round_index=1)
    handle.remove()
    assert torch.bfloat16 in seen and math.isfinite(outcome.loss)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapters(model))


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LosaError, match="DeepSpeed is not supported"):
        trainer(wrapped_llama())


def test_missing_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LosaError, match="TensorBoard is not installed"):
        trainer(wrapped_llama(), tmp_path, tensorboard=True)


def test_tensorboard_gets_the_same_numbers(monkeypatch, tmp_path):
    written = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "tensorboard") and purge_step == 1

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def close(self):
            written["closed"] = True

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    trainer(wrapped_llama(), tmp_path, tensorboard=True).train(sequences(4), round_index=1)
    (line,) = lines(tmp_path)
    assert written["train/loss", 1] == line["loss"] and written["train/lr", 1] == line["lr"] and written["closed"]
