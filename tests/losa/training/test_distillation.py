"""Distillation against the formula, written out with all logits; the teacher is the dense model throughout."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from losa.data.sequences import IGNORED, PackedData
from losa.errors import LosaError
from losa.model.blocks import find_blocks
from losa.model.norms import train_norms, trained_norms
from losa.model.originals import dense_passes
from losa.model.wrapping import wrapped_linears
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.training import DistillConfig
from losa.training import loss as loss_module
from losa.training.distillation import DistillationLoss
from losa.training.loss import TokenLoss, label_positions
from tests.helpers.causal_models import MODELS, VOCABULARY
from tests.helpers.tiny import randomise, wrap
from tests.helpers.training import adapters, distillation, sequences, trainer, wrapped_llama

IDS = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(2))
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) >= 0.4, IGNORED)
LABELS[0] = IGNORED  # a prompt alone
WEIGHTS = 2.5, 1.0  # of a label and of a position


def changed(name="llama", layer=MaskedLoRALinear, dtype=torch.float64):
    """The dense model; the same wrapped, pruned, with new weights and trained norms; and the dense model's weights."""
    dense = MODELS[name]().to(dtype)
    model = MODELS[name]().to(dtype)
    wrap(model, layer=layer)
    originals = distillation(model, {}, scale=1.3).keywords["originals"]
    layers = wrapped_linears(model)
    generator = torch.Generator().manual_seed(4)
    for each in layers.values():
        each.lora_A.data, each.lora_B.data = (t.data.to(dtype) for t in (each.lora_A, each.lora_B))
    randomise(layers)
    for norm in trained_norms(model).values():
        norm.trained_weight.data += 0.2 * torch.randn(norm.weight.shape, generator=generator)
    return dense, model, originals


def outputs(model, ids):
    """Logits (batch, length, vocabulary) and every block's output."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
        for block in find_blocks(model)
    ]
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def written_out(dense, model, config):
    """From the formula, times the step's positions: Kullback and Leibler's sum, token by token; and the label loss."""
    with torch.no_grad():
        teacher, given = outputs(dense, IDS)
    student, found = outputs(model, IDS)
    labels = F.cross_entropy(student[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="sum")
    p = (teacher / config.temperature).softmax(-1)
    q = (student / config.temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum()
    errors = [((s - t) ** 2).sum(-1) / (t**2).sum(-1) for s, t in zip(found, given, strict=True)]
    hidden = torch.stack(errors).mean(0).sum()
    far = config.weight * config.temperature**2 * divergence + config.hidden * hidden
    return WEIGHTS[0] * (1 - config.weight) * labels + far, labels


CONFIGS = [
    {"weight": 0.4},
    {"weight": 1.0},
    {"weight": 0.4, "temperature": 2.5, "hidden": 0.7},
    {"weight": 0.0, "hidden": 3.0},
]


@pytest.mark.parametrize(
    ("name", "config"), [*(("bias", config) for config in CONFIGS), ("softcapping", CONFIGS[2])], ids=str
)
def test_loss_and_gradient_are_the_formulas(name, config, monkeypatch):
    """With an output layer in chunks, and with a model that does more to its logits."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 2 * 7 * VOCABULARY * 4)
    dense, model, originals = changed(name)
    settings = DistillConfig(**config)
    loss = DistillationLoss(model, config=settings, originals=originals)
    assert loss.plain == (name == "bias")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > 2 * len(wrapped_linears(model))
    expected, expected_labels = written_out(dense, model, settings)
    slopes = torch.autograd.grad(expected, trained)
    value, label_loss = loss(IDS, *label_positions(LABELS), *WEIGHTS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert label_loss.item() == pytest.approx(expected_labels.item(), rel=1e-12) and not label_loss.requires_grad
    # The models compute norms and the softmax of attention in fp32.
    for ours, exact in zip(torch.autograd.grad(2 * value, trained), slopes, strict=True):
        assert (ours / 2 - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert exact.abs().max() > 0
    labels_alone, _ = loss(IDS, *label_positions(LABELS), 1.0, 0.0)
    assert not model.training and labels_alone.item() == pytest.approx(
        (1 - settings.weight) * TokenLoss(model)(IDS, *label_positions(LABELS)).item()
    )


@pytest.mark.parametrize("layer", [MaskedLoRALinear, LoRALinear])
def test_the_teacher_is_the_dense_model(layer):
    """New weights, a mask in the weights, and other norms change nothing of it."""
    dense, model, originals = changed(layer=layer, dtype=torch.float32)
    with torch.no_grad():
        before, expected = model(IDS).logits, dense(IDS).logits
        for _ in range(2):
            with dense_passes(model, originals):
                assert torch.equal(model(IDS).logits, expected)
            assert torch.equal(model(IDS).logits, before) and not torch.equal(before, expected)
        broken = model.model.layers[1].mlp
        handle = broken.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), dense_passes(model, originals):
            model(IDS)
        handle.remove()
        assert torch.equal(model(IDS).logits, before)


def test_no_logits_beyond_a_chunk(monkeypatch):
    """Every product with the output layer is of a chunk, half as many tokens as of the label loss."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 2 * 5 * VOCABULARY * 4)
    _, model, originals = changed(dtype=torch.float32)
    loss = DistillationLoss(model, config=DistillConfig(), originals=originals)
    sizes, linear = [], F.linear

    def spy(x, weight, bias=None):
        sizes.extend([x.numel() // x.shape[-1]] * (weight.shape[0] == VOCABULARY))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    loss(IDS, *label_positions(LABELS), *WEIGHTS)
    # Of the two passes the output layer itself runs on no token.
    assert sizes[:2] == [0, 0] and sum(sizes) == 2 * IDS.numel() and max(sizes) == 5


def test_under_autocast_it_is_as_good_as_plain_autocast():
    dense, model, originals = changed(dtype=torch.float32)
    config = DistillConfig(weight=0.6)
    exact = written_out(*changed()[:2], config)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        plain = written_out(dense, model, config)[0].item()
    ours = DistillationLoss(model, torch.bfloat16, config=config, originals=originals)
    value = ours(IDS, *label_positions(LABELS), *WEIGHTS)[0].item()
    assert abs(value - exact) <= 2 * abs(plain - exact) + torch.finfo(torch.bfloat16).eps * abs(exact)


def test_a_step_weighs_every_token_alike():
    """However many batches it has, and whether activations are kept or computed again. Divergence counts per token, the
    label loss per label."""
    config, data = {"weight": 0.7, "temperature": 2.0, "hidden": 0.2}, sequences(8)
    data.labels[:3] = IGNORED  # a batch of prompts alone
    found, again = [], {"activation_checkpointing": True}
    for settings in ({"batch_size": 8}, {"batch_size": 3, "gradient_accumulation": 3, **again}):
        model = wrapped_llama(torch.float64)
        run = trainer(model, loss_factory=distillation(model, config), distill=config, **settings)
        places, targets = label_positions(data.labels)
        label_loss = TokenLoss(model)(data.input_ids, places, targets).item() / len(targets)
        outcome = run.train(data, round_index=1)
        # A step's losses are read in fp32.
        assert outcome.steps == 1 and outcome.label_loss == pytest.approx(label_loss, rel=1e-6)
        found.append((outcome.loss, [p.grad for p in adapters(model)]))
    (loss, whole), (other, parts) = found
    assert other == pytest.approx(loss, rel=1e-6)
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() <= 8 * torch.finfo(torch.float32).eps * a.abs().max() and a.abs().max() > 0


@pytest.mark.parametrize("config", [{"weight": 1.0}, {"weight": 0.0, "hidden": 1.0}], ids=str)
def test_a_step_without_labels_learns_from_the_teacher(config):
    """From prompts as from answers, and with the weight 1 the very same: it asks for no label."""
    prompts, losses = sequences(4), []
    for labels in (prompts.labels, torch.full_like(prompts.labels, IGNORED)):
        model = wrapped_llama()
        before = [(p, p.detach().clone()) for p in adapters(model)]
        run = trainer(model, loss_factory=distillation(model, config), distill=config)
        outcome = run.train(PackedData(prompts.input_ids, labels), round_index=1)
        assert outcome.steps == 1 and not any(torch.equal(now, then) for now, then in before)
        losses.append(outcome.loss)
        assert (outcome.label_loss is None) == (labels is not prompts.labels)
    assert losses[1] > 0 and (losses[1] == pytest.approx(losses[0], rel=1e-6)) == (config["weight"] == 1)


def test_the_next_token_loss_cannot_distill():
    with pytest.raises(LosaError, match="^loss_factory: expected .*DistillationLoss"):
        trainer(wrapped_llama(), distill=DistillConfig())


def test_rates_and_decay_of_the_groups():
    """AdamW's first step is the learning rate, whatever the gradient, after the decay of what decays."""
    model = wrapped_llama(torch.float64)
    train_norms(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rate, decay = 1e-3, 0.5
    trainer(model, learning_rate=rate, weight_decay=decay, lora_plus=4.0, norms=0.1).train(sequences(4), round_index=1)
    for name, p in model.named_parameters():
        own = rate * (4 if name.endswith("lora_B") else 0.1 if "norm" in name else 1)
        kept = 1.0 if "norm" in name else 1 - own * decay
        moved = (p.detach() - kept * before[name]).abs()
        if p.requires_grad:
            assert moved.median().item() == pytest.approx(own, rel=0.02), name  # eps of AdamW
            assert moved.max() <= own * (1 + 1e-6)
        else:
            assert torch.equal(p, before[name])
