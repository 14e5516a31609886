"""The token loss against the loss of all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from losa.data.sequences import IGNORED
from losa.training import loss as loss_module
from losa.training.loss import TokenLoss, label_positions
from tests.helpers.causal_models import MODELS, VOCABULARY
from tests.helpers.tiny import tiny_llama


def test_which_models_take_the_chunked_loss():
    plain = {name: TokenLoss(build()).plain for name, build in MODELS.items()}
    assert plain == {"llama": True, "tied": True, "bias": True, "softcapping": False, "scaled": False}


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


@pytest.mark.parametrize("name", MODELS)
def test_drawn_labels_have_the_model_s_distribution(name, monkeypatch):
    """Of 1,000 copies of a text, in chunks of rows that do not divide them."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 77)
    model, copies = MODELS[name]().eval(), 1000
    text = torch.randint(0, VOCABULARY, (1, 3), generator=torch.Generator().manual_seed(2))
    loss = TokenLoss(model)
    labels = loss.drawn_labels(text.expand(copies, -1).contiguous(), torch.Generator().manual_seed(0))
    assert labels.shape == (copies, 3) and labels.dtype == torch.int64 and bool((labels[:, 0] == IGNORED).all())
    with torch.no_grad():
        expected = model(text, use_cache=False).logits[0, :-1].softmax(-1)  # behind the first and the second token
    for column, p in zip((1, 2), expected, strict=True):
        share = labels[:, column].bincount(minlength=VOCABULARY) / copies
        assert bool(((share - p).abs() <= 5 * (p * (1 - p) / copies).sqrt() + 1 / copies).all())
    again = loss.drawn_labels(text, torch.Generator().manual_seed(0))
    assert torch.equal(again, loss.drawn_labels(text, torch.Generator().manual_seed(0)))
