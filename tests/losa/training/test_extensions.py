"""What methods add to optimiser steps: the joint itself, SoRA's proximal step, AdaLoRA's budget beside PEFT's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.gated_lora import AdaLoRALinear, SoRALinear
from losa.training.adalora import ORTHOGONAL, RankBudget
from losa.training.extension import Extension
from losa.training.sora import GatePenalty, soft_threshold
from tests.helpers.tiny import tiny_llama
from tests.helpers.training import adapters, sequences, snapshot, trainer, wrapped_llama


class Recording(Extension):
    """Pulls every trained parameter towards zero, and notes its calls."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def begin(self, steps, state):
        self.calls.append(("begin", steps, dict(state)))

    def penalty(self):
        return sum(p.square().sum() for p in adapters(self.model)) / 2

    def after_update(self, step, learning_rate):
        self.calls.append((step, learning_rate))


def test_a_penalty_counts_once_a_step_and_updates_are_told():
    """Of a loss without labels at some step, with several batches a step."""
    data = sequences(12)
    data.labels[4:8] = -100

    def gradients(extended):
        model = wrapped_llama(torch.float64)
        run = trainer(model, batch_size=2, gradient_accumulation=2, learning_rate=1e-9)
        run.extension = Recording(model) if extended else None
        run.train(data, round_index=1)
        return model, run

    plain, _ = gradients(False)
    model, run = gradients(True)
    assert run.extension.calls[0] == ("begin", 3, {}) and [c[0] for c in run.extension.calls[1:]] == [1, 3]
    assert [c[1] for c in run.extension.calls[1:]] == [1e-9, pytest.approx(1e-9 / 3)]
    for ours, theirs in zip(adapters(model), adapters(plain), strict=True):
        assert (ours.grad - theirs.grad - ours).abs().max() < 1e-7


def gated_llama(layer):
    model = tiny_llama(layers=1)
    wrap_model(model, layer=layer, rank=4, scaling=2.0)
    for one in wrapped_linears(model).values():
        one.set_mask(torch.ones(one.weight.shape, dtype=torch.bool))
    return model


def test_soras_step_is_the_proximal_map_of_its_penalty():
    g = torch.tensor([-2.0, -0.3, -0.1, 0.0, 0.1, 0.25, 3.0])
    assert soft_threshold(g, 0.25).tolist() == pytest.approx([-1.75, -0.05, 0, 0, 0, 0, 2.75])
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)  # the minimiser of (z - g)^2 / 2 + 0.25 |z|
    best = grid[((grid - g[:, None].double()) ** 2 / 2 + 0.25 * grid.abs()).argmin(1)]
    assert (best - soft_threshold(g.double(), 0.25)).abs().max() < 1.1e-4

    def step(weight):
        model = gated_llama(SoRALinear)
        run = trainer(model, learning_rate=0.1)
        run.extension = GatePenalty(model, weight)
        run.train(sequences(4), round_index=1)
        return snapshot(model)

    free, pulled = step(0.0), step(5.0)
    closed = 0
    for name, value in free.items():
        if name.endswith("gate"):
            expected = value.double().sign() * (value.double().abs() - 0.1 * 5.0).clamp(min=0)
            assert torch.allclose(pulled[name].double(), expected, atol=1e-7), name
            closed += int((pulled[name] == 0).sum())
        else:
            assert torch.equal(pulled[name], value), name
    assert 0 < closed < 4 * 7


STEPS, RANK, SCALING = 20, 2, 2.0
SIZES = {"first": (10, 14), "second": (6, 10)}


class Pair(nn.Module):
    """Two linears, and a loss; the model that PEFT and losa fine-tune."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (outputs, inputs) in SIZES.items():
            linear = nn.Linear(inputs, outputs)
            for parameter in linear.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
            setattr(self, name, linear)

    def forward(self, x, target):
        loss = (self.second(self.first(x).tanh()) - target).square().mean()
        return SimpleNamespace(loss=loss)


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 14, generator=generator), torch.randn(8, 6, generator=generator)


def values(model, named) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in named(model)}


def of_peft(model):
    parts = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "gate"}
    for name in SIZES:
        for part, ours in parts.items():
            yield f"{name}.{ours}", getattr(getattr(model, name), part)["default"]


def of_losa(model):
    for name in SIZES:
        for part in AdaLoRALinear.adapter_parts:
            yield f"{name}.{part}", getattr(getattr(model, name), part)


def peft_run() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Values at first and after each step of PEFT's own model, as its documentation says to train it."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=2 * RANK,
        target_r=RANK,
        lora_alpha=SCALING * (2 * RANK + 1e-5),
        target_modules=list(SIZES),
        tinit=STEPS // 10,
        tfinal=3 * STEPS // 10,
        deltaT=1,
        total_step=STEPS,
        orth_reg_weight=ORTHOGONAL,
    )
    torch.manual_seed(2)
    tuned = peft.AdaLoraModel(Pair(), config, "default")
    first = values(tuned.model, of_peft)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step, batch in enumerate(batches(), start=1):
        tuned(*batch).loss.backward()
        optimizer.step()
        tuned.update_and_allocate(step)
        optimizer.zero_grad()
        found.append(values(tuned.model, of_peft))
    return first, found


def test_adalora_is_pefts_own_step_by_step_and_goes_on_anywhere():
    first, expected = peft_run()
    model = Pair()
    for name in SIZES:
        setattr(model, name, AdaLoRALinear.from_linear(getattr(model, name), 2 * RANK, scaling=SCALING))
        for parameter in getattr(model, name).parameters():
            parameter.requires_grad_(False)
    trained = dict(of_losa(model))
    for name, value in first.items():
        trained[name].requires_grad_().data.copy_(value)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    budget = RankBudget(model, RANK)
    budget.begin(STEPS, {})
    ranks = []
    for step, (batch, truth) in enumerate(zip(batches(), expected, strict=True), start=1):
        (model(*batch).loss + budget.penalty()).backward()
        optimizer.step()
        budget.after_update(step, 1e-2)
        optimizer.zero_grad()
        for name, value in truth.items():
            # AdamW makes a step of any size of a gradient that is a rounding error.
            assert torch.allclose(trained[name], value, rtol=1e-4, atol=1e-5), (step, name)
            assert torch.equal(trained[name] == 0, value == 0), (step, name)
        ranks.append(sum(int((trained[f"{name}.gate"] != 0).sum()) for name in SIZES))
        # Another process, with what a resume state holds.
        state = {name: tensor.clone() for name, tensor in budget.state().items()}
        shapes = {name: tensor.shape for name, tensor in trained.items()}
        assert all(tensor.shape == shapes[name.rpartition(".")[0]] for name, tensor in state.items())
        budget = RankBudget(model, RANK)
        budget.begin(STEPS, state)
    assert ranks[: STEPS // 10] == [4 * RANK] * (STEPS // 10) and ranks[-1] == 2 * RANK
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 3
    # Too few steps to know what matters: nothing is closed.
    budget.begin(1, {})
    budget.after_update(1, 1e-2)
    assert budget.state() == {}


def by_hand(first: dict[str, torch.Tensor], penalty, after_step) -> list[dict[str, torch.Tensor]]:
    """Values after each step of training in fp64, from the formula of gated adapters:
    y = x W^T + bias + s ((x A^T) * g) B^T.

    Args:
        first: values at first, as ``of_losa`` names them.
        penalty: (A, B, gates by linear) -> what is added to the loss.
        after_step: (step, A, B, gates) -> None.
    """
    plain = Pair().double()
    leaves = {name: value.double().requires_grad_() for name, value in first.items()}
    A, gates, B = ({name: leaves[f"{name}.{part}"] for name in SIZES} for part in ("lora_A", "gate", "lora_B"))

    def linear(name, x):
        weight, bias = (p.detach() for p in getattr(plain, name).parameters())
        return x @ weight.T + bias + SCALING * ((x @ A[name].T) * gates[name].T) @ B[name].T

    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2)
    found = []
    for step, (x, target) in enumerate(batches(), start=1):
        loss = (linear("second", linear("first", x.double()).tanh()) - target.double()).square().mean()
        (loss + penalty(A, B)).backward()
        optimizer.step()
        with torch.no_grad():
            after_step(step, A, B, gates)
        optimizer.zero_grad()
        found.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
    return found


class AlgorithmOne:
    """AdaLoRA's budget by the paper (Zhang et al. 2023, Algorithm 1, Eq. 8 to 12), with both betas 0.85."""

    def __init__(self):
        self.averages: dict[str, torch.Tensor] = {}
        self.spreads: dict[str, torch.Tensor] = {}
        self.scores: dict[str, torch.Tensor] = {}
        self.open: dict[str, torch.Tensor] | None = None

    def penalty(self, A, B):
        distances = [
            (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).square().sum().sqrt()
            for name in SIZES
            for rows in (A[name], B[name].T)
        ]
        return ORTHOGONAL * sum(distances) / len(distances)

    def score(self, name: str, value: torch.Tensor) -> torch.Tensor:
        importance = (value * value.grad).abs()
        average = 0.85 * self.averages.get(name, torch.zeros_like(value)) + 0.15 * importance
        spread = 0.85 * self.spreads.get(name, torch.zeros_like(value)) + 0.15 * (importance - average).abs()
        self.averages[name], self.spreads[name] = average, spread
        return average * spread

    def after_step(self, step, A, B, gates):
        begins, ends = STEPS // 10, STEPS - 3 * STEPS // 10
        if step < ends:
            self.scores = {
                name: self.score(f"{name}.E", gates[name])[:, 0]
                + self.score(f"{name}.P", A[name]).mean(1)
                + self.score(f"{name}.Q", B[name]).mean(0)
                for name in SIZES
            }
        whole, target = 4 * RANK, 2 * RANK
        budget = whole
        if step > begins:
            budget = int(target + (whole - target) * max(0.0, 1 - (step - begins) / (ends - begins)) ** 3)
        if step <= begins:
            return
        if self.open is None or step < ends:
            every = torch.cat([*self.scores.values()])
            least = every.sort(descending=True).values[budget - 1]
            self.open = {name: own >= least for name, own in self.scores.items()}
        for name, kept in self.open.items():
            gates[name][~kept] = 0


def gated_pair(layer) -> tuple[Pair, dict[str, torch.Tensor]]:
    """The model with adapters in fp64 that do something from the start, and what is trained."""
    model = Pair()
    generator = torch.Generator().manual_seed(5)
    for name in SIZES:
        gated = layer.from_linear(getattr(model, name), 2 * RANK, scaling=SCALING)
        for parameter in gated.parameters():
            parameter.requires_grad_(False)
        setattr(model, name, gated)
    model.double()
    trained = dict(of_losa(model))
    for parameter in trained.values():
        parameter.requires_grad_().data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, trained


def train_gated(model, trained, extension) -> list[dict[str, torch.Tensor]]:
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    extension.begin(STEPS, {})
    found = []
    for step, (x, target) in enumerate(batches(), start=1):
        loss = model(x.double(), target.double()).loss
        penalty = extension.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        extension.after_update(step, 1e-2)
        optimizer.zero_grad()
        found.append({name: p.detach().clone() for name, p in trained.items()})
    return found


def assert_same_steps(found, expected):
    for step, (ours, truth) in enumerate(zip(found, expected, strict=True), start=1):
        for name, value in truth.items():
            assert torch.equal(ours[name] == 0, value == 0), (step, name)
            assert torch.allclose(ours[name], value, rtol=1e-9, atol=1e-11), (step, name)


def test_adalora_is_the_papers_algorithm():
    pytest.importorskip("peft")
    model, trained = gated_pair(AdaLoRALinear)
    first, paper = {name: p.detach().clone() for name, p in trained.items()}, AlgorithmOne()
    expected = by_hand(first, paper.penalty, paper.after_step)
    found = train_gated(model, trained, RankBudget(model, RANK))
    assert_same_steps(found, expected)
    assert sum(int((found[-1][f"{name}.gate"] != 0).sum()) for name in SIZES) == 2 * RANK


def test_soras_training_is_the_papers():
    """Eq. 5 and 7: AdamW of the loss, then the gates' proximal step with its learning rate."""
    model, trained = gated_pair(SoRALinear)
    first = {name: p.detach().clone() for name, p in trained.items()}

    def shrink(step, A, B, gates):
        for gate in gates.values():
            gate.copy_(torch.where(gate > 0.02, gate - 0.02, torch.where(gate < -0.02, gate + 0.02, 0.0)))

    expected = by_hand(first, lambda A, B: 0.0, shrink)
    found = train_gated(model, trained, GatePenalty(model, 2.0))
    assert_same_steps(found, expected)
    closed = sum(int((found[-1][f"{name}.gate"] == 0).sum()) for name in SIZES)
    assert 0 < closed < 4 * RANK


def test_the_penalty_asks_for_orthogonal_factors():
    pytest.importorskip("peft")
    model = gated_llama(AdaLoRALinear)
    distances = []
    for layer in wrapped_linears(model).values():
        for rows in (layer.lora_A.detach().double(), layer.lora_B.detach().double().T):
            distances.append(float((rows @ rows.T - torch.eye(4)).square().sum().sqrt()))
    assert float(RankBudget(model, 2).penalty().detach()) == pytest.approx(ORTHOGONAL * sum(distances) / len(distances))
