"""The inverse factor: the ways of CUDA, whose arithmetic runs on the CPU, and the CPU's own; and who decides what, on
which stream, by fakes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from losa_kernels import native
from losa_kernels.pruning import (
    SingularHessianError,
    cpu,
    factor,
    in_place,
    inverse_factor,
    inverse_factors,
    reference,
)
from tests.helpers.memory import peak

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))

EPS = torch.finfo(torch.float32).eps


def by_cpu(hessian, diagonal):
    found = cpu.factor_with(hessian, diagonal)
    return (hessian, torch.tensor(False)) if found is None else (found, torch.isfinite(found).all())


METHODS = {"torch": factor.by_torch, "blocked": factor.by_blocks, "in_place": factor.in_place, "cpu": by_cpu}


def hessian(columns, seed=0, spread=1.0):
    x = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(0, -spread, columns, dtype=torch.float64)
    return x.T @ x


def difficult(columns):
    """Needs a damping of 0.1."""
    h = hessian(columns)
    h -= 1.05 * torch.linalg.eigvalsh(h)[0] * torch.eye(columns)
    return (h - 0.05 * h.diagonal().mean() * torch.eye(columns)).float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("columns", [1, 100, 128, 129, 256, 300, 700])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_error_is_that_of_the_reference(method, columns, spread):
    exact = hessian(columns, spread=spread)
    h = exact.float()
    truth, _ = reference.inverse_factor(exact, 0.01)
    plain, _ = reference.inverse_factor(h, 0.01)
    before = h.clone()
    found, right = METHODS[method](h, reference.damped_diagonal(h, 0.01))
    assert bool(right) and torch.equal(h, before) and torch.equal(found, found.triu())
    assert (found - truth).norm() <= 2 * (plain - truth).norm() + EPS * truth.norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_upper_triangle_is_read(method):
    h = hessian(200).float()
    diagonal = reference.damped_diagonal(h, 0.01)
    expected, _ = METHODS[method](h, diagonal)
    spoilt = h.triu() + torch.full_like(h, float("nan")).tril(-1)
    assert torch.equal(METHODS[method](spoilt.T.contiguous().T, diagonal)[0], expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 130, 199])
def test_what_has_no_factor_is_told(method, place):
    h = torch.eye(200)
    h[place, place] = -1
    assert not bool(METHODS[method](h, h.diagonal().clone())[1])


@pytest.mark.parametrize("setting", ["torch", "blocked", "in_place", "auto", ""])
def test_settings_and_escalation(monkeypatch, setting):
    """Each Hessian has a damping of its own, and the device is asked once a round."""
    monkeypatch.setenv("LOSA_FACTOR", setting)
    hopeless = -torch.eye(200)
    problems, rounds = [hessian(200).float(), difficult(200), hopeless, hessian(150).float()], []
    run = factor._attempts
    monkeypatch.setattr(factor, "_attempts", lambda given: rounds.append(len(given)) or run(given))
    found = factor.inverse_factors(problems, 0.01)
    assert rounds == [4, 2, 1]
    assert [found[i][1] for i in (0, 1, 3)] == [0.01, pytest.approx(0.1), 0.01]
    assert isinstance(found[2], SingularHessianError) and "damping 1 of" in str(found[2])
    for index in (0, 1, 3):
        expected, used = reference.inverse_factor(problems[index], 0.01)
        assert found[index][1] == pytest.approx(used)
        assert (found[index][0] - expected).norm() <= 1e-4 * expected.norm()


def test_a_wrong_setting_and_what_torch_serves_alone(monkeypatch):
    h = hessian(200).float()
    monkeypatch.setenv("LOSA_FACTOR", "fast")
    with pytest.raises(ValueError, match="LOSA_FACTOR: expected auto, torch, blocked or in_place, got 'fast'"):
        factor.inverse_factors([h], 0.01)
    monkeypatch.setenv("LOSA_FACTOR", "blocked")
    monkeypatch.setattr(factor, "by_blocks", lambda *given: pytest.fail("blocks"))
    for served in (h.double(), h[:100, :100]):
        assert factor.inverse_factors([served], 0.01)[0][1] == 0.01


def test_measurement_chooses(monkeypatch):
    h, asked = hessian(200).float(), []

    def fastest(op, key, candidates, device, table):
        asked.append((op, key, sorted(candidates), table))
        for run in candidates.values():
            assert bool(run()[1])
        return "blocked"

    monkeypatch.setattr(factor.measured, "fastest", fastest)
    expected = factor.by_blocks(h, reference.damped_diagonal(h, 0.01))[0]
    assert torch.equal(factor.inverse_factors([h], 0.01)[0][0], expected)
    assert asked == [("inverse_factor", (200,), ["blocked", "torch"], "torch")]


def test_a_large_one_is_factored_in_place(monkeypatch):
    h = hessian(200).float()
    assert factor.in_place(h, h.diagonal())[0].is_contiguous()
    monkeypatch.setattr(factor, "TOGETHER", h.nbytes - 1)
    monkeypatch.setattr(factor.measured, "fastest", lambda *given: pytest.fail("five copies"))
    expected = factor.in_place(h, reference.damped_diagonal(h, 0.01))[0]
    assert torch.equal(factor.inverse_factors([h], 0.01)[0][0], expected)


def test_not_more_at_a_time_than_memory_allows(monkeypatch):
    problems = [hessian(40, seed).float() for seed in range(5)]
    monkeypatch.setattr(factor, "TOGETHER", 2 * problems[0].nbytes)
    rounds, run = [], factor._attempts
    monkeypatch.setattr(factor, "_attempts", lambda given: rounds.append(len(given)) or run(given))
    found = factor.inverse_factors(problems, 0.01)
    assert rounds == [2, 2, 1]
    for h, (upper, used) in zip(problems, found, strict=True):
        assert used == 0.01 and torch.allclose(upper, reference.inverse_factor(h, 0.01)[0], rtol=1e-4, atol=1e-6)


def test_public_function(monkeypatch):
    problems = [hessian(30).float(), -torch.eye(20)]
    upper, used = inverse_factors(problems, 0.01)[0]
    expected, damping = inverse_factor(problems[0], 0.01)
    assert torch.equal(upper, expected) and used == damping
    assert isinstance(inverse_factors(problems, 0.01)[1], SingularHessianError) and inverse_factors([], 0.01) == []
    with pytest.raises(ValueError, match="hessian: expected floating point"):
        inverse_factors([torch.eye(3), torch.ones(2, 3)], 0.01)
    with pytest.raises(ValueError, match="damping: expected"):
        inverse_factors(problems, 2.0)


class FakeStreams:
    """torch.cuda as far as factoring on streams uses it; ``log`` has who waited for whom."""

    def __init__(self, monkeypatch):
        self.log, self.current = [], self.stream("user")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(factor, "_streams", lambda device: [self.stream("a"), self.stream("b")])
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: self.log.append(("keeps", s.name)))

    def stream(self, name):
        stream = SimpleNamespace(name=name)
        stream.wait_stream = lambda other: self.log.append((name, "waits for", other.name))
        return stream

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_streams(monkeypatch):
    fake, ran = FakeStreams(monkeypatch), []

    def run(h, diagonal):
        ran.append((fake.current.name, len(h)))
        return h, torch.tensor(True)

    sizes = (3, 5, 4)
    prepared = [(run, torch.eye(n), torch.ones(n)) for n in sizes]
    found = factor._on_streams(prepared, torch.device("cuda:0"))
    assert [len(upper) for upper, _ in found] == list(sizes), "in the order of the Hessians"
    assert ran == [("a", 5), ("b", 4), ("a", 3)], "the largest first, in turns"
    forks, joins = fake.log[:2], fake.log[2:4]
    assert forks == [("a", "waits for", "user"), ("b", "waits for", "user")]
    assert joins == [("user", "waits for", "a"), ("user", "waits for", "b")]
    assert fake.log[4:] == 6 * [("keeps", "user")]
    del fake.log[:]
    prepared[1] = (lambda h, diagonal: 1 / 0, *prepared[1][1:])
    with pytest.raises(ZeroDivisionError):
        factor._on_streams(prepared, torch.device("cuda:0"))
    assert fake.log[2:] == joins, "also after a failure"


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["torch", "blocked", "in_place", "auto"])
def test_on_gpu(monkeypatch, setting):
    monkeypatch.setenv("LOSA_FACTOR", setting)
    exact = [hessian(columns, columns) for columns in (100, 300, 1000, 1024)]
    given = [h.float().cuda() for h in exact] + [difficult(200).cuda(), -torch.eye(200, device="cuda")]
    for _ in range(3):
        found = inverse_factors(given, 0.01)
        for h, (upper, used) in zip(exact, found, strict=False):
            truth, plain = reference.inverse_factor(h, 0.01)[0], reference.inverse_factor(h.float(), 0.01)[0]
            assert used == 0.01
            assert (upper.cpu() - truth).norm() <= 4 * (plain - truth).norm() + EPS * truth.norm()
        assert found[4][1] == pytest.approx(0.1) and isinstance(found[5], SingularHessianError)


@pytest.mark.parametrize("columns", [1, 64, 129, 300])
def test_values_that_are_reversed_in_pieces(columns, monkeypatch):
    monkeypatch.setattr(in_place, "CHUNK", 7)
    values = torch.arange(columns)
    in_place._reverse_(values)
    assert torch.equal(values, torch.arange(columns).flip(0))


@pytest.mark.parametrize("run", [cpu.factor_with, factor.in_place])
def test_a_factor_takes_the_memory_of_a_copy_and_a_quarter(run):
    h = hessian(16, seed=1).float().repeat(192, 192)
    h.diagonal().add_(1000)
    diagonal = reference.damped_diagonal(h, 0.01)
    run(h, diagonal)  # whatever is allocated once
    peak()
    before = peak()
    run(h, diagonal)
    # The diagonals, and a leaf.
    assert peak() - before <= 1.25 * h.nbytes + (8 << 20)


@pytest.mark.parametrize("columns", [1, 64, 129, 300])
def test_a_factor_in_place_has_the_bits_of_one_from_copies(columns):
    """LAPACK gets the very matrix that it would get as a copy."""
    h = hessian(columns).float()
    diagonal = reference.damped_diagonal(h, 0.01)
    flipped = h.flip(0, 1)
    flipped.diagonal().copy_(diagonal.flip(0))
    expected = cpu.invert_upper_(torch.linalg.cholesky(flipped).flip(0, 1))
    assert torch.equal(cpu.factor_with(h, diagonal), expected)
