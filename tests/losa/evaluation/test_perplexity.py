"""Perplexity and the token loss against independent fp64 computations."""

from __future__ import annotations

import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from losa.data.sequences import IGNORED
from losa.errors import DataError, LosaError, NumericsError
from losa.evaluation.perplexity import evaluation_windows, perplexity, warn_of_missing_start
from losa.evaluation.tasks import _metrics, evaluate_tasks
from losa.training import loss as loss_module
from losa.training.loss import TokenLoss, label_positions
from tests.helpers.tiny import CHARACTERS, tiny_llama, tiny_tokenizer

VOCABULARY = len(CHARACTERS) + 2
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.randint(0, VOCABULARY, (203,), generator=torch.Generator().manual_seed(0))


def tiny_gemma2():
    torch.manual_seed(0)
    # A cap of 0.2 on logits that large bends them visibly.
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.2)).eval()
    model.model.embed_tokens.weight.data.mul_(20)
    return model


def tiny_cohere():
    torch.manual_seed(0)
    settings = {k: v for k, v in SMALL.items() if k != "head_dim"}
    return CohereForCausalLM(CohereConfig(**settings, logit_scale=3.0, pad_token_id=0)).eval()


def with_bias():
    model = tiny_llama(layers=2)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)))
    return model


def tied():
    return tiny_llama(layers=2, tie_word_embeddings=True)


MODELS = {"llama": tiny_llama, "tied": tied, "bias": with_bias, "softcapping": tiny_gemma2, "scaled": tiny_cohere}


def reference(model, tokens, length, windows):
    """Mean NLL in fp64, one window and one position at a time."""
    total, count = 0.0, 0
    model = model.double()
    for w in range(windows):
        window = tokens[w * length : (w + 1) * length]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for t in range(length - 1):
            total -= torch.log_softmax(logits[t], -1)[window[t + 1]].item()
            count += 1
    return total / count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size, max_windows", [(1, None), (3, None), (2, 3)])
def test_perplexity_is_the_papers(name, batch_size, max_windows, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 5 * VOCABULARY * 4)
    model = MODELS[name]().train()
    result = perplexity(model, TOKENS, 20, batch_size, max_windows)
    windows = max_windows or 10
    assert (result.windows, result.tokens, result.length) == (windows, windows * 20, 20)
    assert model.training
    expected = reference(model.eval(), TOKENS, 20, windows)
    # fp32 against fp64: sums of at most 98 terms per logit and per normaliser, through two layers.
    assert result.nll == pytest.approx(expected, rel=200 * torch.finfo(torch.float32).eps)
    assert result.value == pytest.approx(math.exp(result.nll), rel=1e-12)


def test_which_models_take_the_chunked_loss():
    plain = {name: TokenLoss(build()).plain for name, build in MODELS.items()}
    assert plain == {"llama": True, "tied": True, "bias": True, "softcapping": False, "scaled": False}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_names_the_window(value):
    model = tiny_llama(layers=1)
    model.model.embed_tokens.weight.data[96] = value
    tokens = torch.arange(60) % 50
    tokens[45] = 96
    with pytest.raises(NumericsError, match="windows 4..5 of 6"):
        perplexity(model, tokens, 10, batch_size=2)
    with pytest.raises(NumericsError, match="window 4 of 6"):
        perplexity(model, tokens, 10)
    assert not model.training
    assert perplexity(model, tokens, 10, max_windows=4).windows == 4


def test_bad_arguments():
    model = tiny_llama(layers=1)
    with pytest.raises(DataError, match="9 tokens are less than one window of evaluate.length, 10"):
        perplexity(model, torch.arange(9), 10)
    for arguments in ({"length": 1}, {"length": 4, "batch_size": 0}, {"length": 4, "max_windows": 0}):
        with pytest.raises(ValueError, match="expected at least"):
            perplexity(model, torch.arange(9), **arguments)


def test_windows_beyond_the_models_positions_are_pointed_out(caplog):
    with caplog.at_level(logging.WARNING, "losa"):
        perplexity(tiny_llama(layers=1), torch.arange(300) % 90, 300)
    assert "256 positions" in caplog.text


@pytest.mark.parametrize("lead", [[], [1]])
def test_windows_may_begin_with_a_token_of_their_own(lead):
    """The text's tokens are predicted all, the first of a window from that token alone; one in front is not doubled."""
    model = tiny_llama(layers=2)
    tokens = torch.cat([torch.tensor(lead, dtype=torch.int64), TOKENS])
    found = perplexity(model, tokens, 20, 3, bos=1)
    assert (found.windows, found.tokens, found.length) == (10, 190, 20)
    begun = torch.cat([torch.ones(10, 1, dtype=torch.int64), TOKENS[:190].reshape(10, 19)], 1)
    assert torch.equal(evaluation_windows(tokens, 20, bos=1), begun)
    expected = reference(model, begun.flatten(), 20, 10)
    assert found.nll == pytest.approx(expected, rel=200 * torch.finfo(torch.float32).eps)
    with pytest.raises(DataError, match="9 tokens are less than one window"):
        perplexity(model, torch.arange(9) + 2, 11, bos=1)
    assert perplexity(model, torch.arange(9) + 2, 10, bos=1).windows == 1


class Sink(torch.nn.Module):
    """Knows the next token where it sees token 1 in front, and nothing without it; or does not care."""

    def __init__(self, cares):
        super().__init__()
        self.cares = cares
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self):
        return None

    def forward(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        if not self.cares or ids[0, 0] == 1:
            logits[..., :-1, :].scatter_(-1, ids[:, 1:, None], 20.0)
        return SimpleNamespace(logits=logits)


def test_models_that_need_the_first_token_are_pointed_out(caplog):
    tokenizer = SimpleNamespace(bos_token_id=1)
    text = torch.cat([torch.tensor([1]), TOKENS.clamp(min=2)])
    with caplog.at_level(logging.WARNING, "losa"):
        warn_of_missing_start(Sink(False), tokenizer, text, 20)
        warn_of_missing_start(Sink(True), tokenizer, text[1:], 20)
        warn_of_missing_start(Sink(True), tokenizer, text[:30], 20)
        warn_of_missing_start(Sink(True), SimpleNamespace(bos_token_id=None), text, 20)
        assert not caplog.records
        warn_of_missing_start(Sink(True), tokenizer, text, 20)
    assert f"perplexity is 1 with it and {VOCABULARY} without. --bos" in caplog.text


def full_loss(model, ids, labels):
    """Plain PyTorch: all logits, then the cross-entropy."""
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_at_label_positions_is_the_full_loss(name, trained_head, share, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 7 * VOCABULARY * 4)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (3, 16), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 16, generator=generator) >= share, IGNORED)

    def gradients(compute, dtype):
        model = MODELS[name]().to(dtype)
        model.requires_grad_(trained_head)
        trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        value = compute(model)
        value.backward()
        return [value.detach().double()] + [
            p.grad.double() for p in (trained, *model.lm_head.parameters()) if p.requires_grad
        ]

    exact = gradients(lambda m: full_loss(m, ids, labels), torch.float64)
    plain = gradients(lambda m: full_loss(m, ids, labels), torch.float32)
    ours = gradients(lambda m: TokenLoss(m)(ids, *label_positions(labels)), torch.float32)
    ours_wide = gradients(lambda m: TokenLoss(m)(ids, *label_positions(labels)), torch.float64)
    assert len(exact) == 2 + trained_head * (1 + (name == "bias"))
    for e, p, o, w in zip(exact, plain, ours, ours_wide, strict=True):
        rounding = torch.finfo(torch.float32).eps * e.abs().max()
        assert (o - e).abs().max() <= 2 * (p - e).abs().max() + rounding
        assert (w - e).abs().max() <= 100 * torch.finfo(torch.float64).eps * e.abs().max()


def test_chunked_loss_sees_no_full_logits(monkeypatch):
    """The output layer runs on no token of its own, and each product on one chunk."""
    model = tiny_llama(layers=1).requires_grad_(False)
    sizes = []
    linear = F.linear
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 4)
    loss = TokenLoss(model)

    def spy(x, weight, bias=None):
        if weight.shape[0] == VOCABULARY:
            sizes.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    monkeypatch.setattr(loss_module.F, "linear", spy)
    ids = torch.arange(20).reshape(2, 10)
    loss(ids, *label_positions(ids.masked_fill(ids < 9, IGNORED)))
    assert sizes[0] == 0 and sum(sizes) == 10 and max(sizes) <= 4


def test_autocast_loss_is_as_good_as_plain_autocast():
    model = tiny_llama(layers=2).requires_grad_(False)
    trained = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))

    def gradient(compute):
        trained.grad = None
        value = compute()
        value.backward()
        return value.item(), trained.grad.double()

    def plain():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")

    value_plain, grad_plain = gradient(plain)
    value, grad = gradient(lambda: TokenLoss(model, torch.bfloat16)(ids, *label_positions(ids)))
    wide = tiny_llama(layers=2).double().requires_grad_(False)
    exact_weight = wide.model.layers[0].mlp.up_proj.weight.requires_grad_()
    exact = full_loss(wide, ids, ids)
    exact.backward()
    rounding = torch.finfo(torch.bfloat16).eps
    assert abs(value - exact.item()) <= 2 * abs(value_plain - exact.item()) + rounding
    error, error_plain = ((g - exact_weight.grad).abs().max() for g in (grad, grad_plain))
    assert error <= 2 * error_plain + rounding * exact_weight.grad.abs().max()


def test_tasks_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LosaError, match=r"pip install 'losa\[eval\]'"):
        evaluate_tasks(tiny_llama(layers=1), tiny_tokenizer(), ["piqa"])


def test_metrics_are_plain_accuracy():
    found = {
        "alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6, "acc_norm_stderr,none": "N/A",
        "exact_match,strict": 1, "sample_len": 20,
    }  # fmt: skip
    assert _metrics(found) == {"acc": 0.5, "exact_match,strict": 1.0}


def test_local_task_through_lm_eval(tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.models.huggingface")
    rows = [{"q": f"item {i} is", "choices": ["big", "small and red"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "losa_local", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{q}}", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    model, tokenizer = tiny_llama(layers=1), tiny_tokenizer()
    # Untrained, the model finds the shorter continuation likelier everywhere.
    assert evaluate_tasks(model, tokenizer, ["losa_local"], [tmp_path / "tasks"]) == {"losa_local": {"acc": 0.5}}
    with pytest.raises(LosaError, match="lm-eval knows no nope"):
        evaluate_tasks(model, tokenizer, ["nope"])
    with pytest.raises(LosaError, match="no such directory"):
        evaluate_tasks(model, tokenizer, ["losa_local"], [tmp_path / "none"])
