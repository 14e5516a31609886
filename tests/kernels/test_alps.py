"""ALPS finds what its paper's formulas find, solves least squares on its support, and loses less than other pruners."""

from __future__ import annotations

import itertools

import pytest
import torch

from losa_kernels import alps_prune, pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.pruning import SingularHessianError, scaled_spectrum
from tests.helpers.column_sweep_problems import hessian, tied
from tests.helpers.pruning import expected_nested

GOALS = [{"sparsity": 0.7}, {"keep_n": 2, "m": 4}]


def correlated(columns, tokens, dtype=torch.float64, seed=0):
    """X^T X of tokens whose features share a few directions and differ in size by a factor of 30."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x += torch.randn(tokens, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, columns, generator=generator, dtype=torch.float64
    )
    x *= torch.logspace(0, -1.5, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return (x.T @ x).to(dtype)


def damped(h, damping=0.01):
    h = h.clone()
    h.diagonal()[h.diagonal() == 0] = 1
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def largest(values, gone, sparsity=None, keep_n=None, m=None):
    """The support of P, by sorting: what ``gone`` lacks is pruned first."""
    shape = (1, -1) if m is None else (-1, m)
    count = int(sparsity * values.numel()) if m is None else m - keep_n
    order = values.abs().masked_fill(gone, -1).reshape(shape).sort(dim=1, stable=True).indices
    kept = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :count], False)
    return kept.reshape(values.shape) & ~gone


def paper(weight, h, gone, **goal):
    """(support, B) of the paper's Algorithm 1 to its end: plain inverses, V unscaled; rows of B are least squares. The
    support's change counts what came and what went."""
    scale = damped(h).diagonal().sqrt()
    G, W = damped(h) / scale / scale[:, None], weight * scale
    rho, D, V, before = 0.1, W, torch.zeros_like(W), torch.ones_like(gone)
    for step in itertools.count(1):
        B = (W @ G - V + rho * D) @ torch.linalg.inv(G + rho * torch.eye(len(G), dtype=G.dtype))
        kept = largest(B + V / rho, gone, **goal)
        D = (B + V / rho) * kept
        V = V + rho * (B - D)
        if step % 3 == 0:
            change = int((kept ^ before).sum())
            if change == 0:
                return kept, least_squares(weight, damped(h), kept)
            rho *= 1.3 if change >= 0.1 * kept.sum() else 1.2 if change >= 0.005 * kept.sum() else 1.1
            before = kept


def our_rule(weight, h, gone, **goal):
    """``paper`` with the growth of rho and the end that ``alps_prune`` has."""
    scale = damped(h).diagonal().sqrt()
    G, W = damped(h) / scale / scale[:, None], weight * scale
    rho, V, before = 0.1, torch.zeros_like(W), largest(W, gone, **goal)
    # A first step from D = W and V = 0 gives B = W.
    D = W * before
    V = rho * (W - D)
    for step in range(1, 301):
        B = (W @ G - V + rho * D) @ torch.linalg.inv(G + rho * torch.eye(len(G), dtype=G.dtype))
        kept = largest(B + V / rho, gone, **goal)
        D = (B + V / rho) * kept
        V = V + rho * (B - D)
        if step % 3 == 0:
            share = int((kept ^ before).sum()) / 2 / int(kept.sum())
            if share < 0.005:
                break
            rho *= 1.3 if share >= 0.1 else 1.2
            before = kept
    return kept, least_squares(weight, damped(h), kept)


def least_squares(weight, h, kept):
    """Normal equations of each row: H_ss b_s = (H w)_s."""
    found = torch.zeros_like(weight)
    for row, support in enumerate(kept):
        found[row, support] = torch.linalg.solve(h[support][:, support], (h @ weight[row])[support])
    return found


def error(weight, found, h):
    off = (weight - found).double()
    return float(((off @ h.double()) * off).sum())


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("share_gone", [0.0, 0.3])
def test_support_and_values_are_those_of_plain_inverses(goal, share_gone):
    weight, h = torch.randn(24, 32, dtype=torch.float64), correlated(32, 200)
    gone = torch.rand(24, 32) < share_gone
    if "m" in goal:
        gone &= torch.arange(32) % 4 == 1  # a group that has lost more keeps its zeros, see below
    found = alps_prune(weight, h, mask=pack_mask(~gone), cg_steps=100, **goal)
    kept, exact = our_rule(weight, h, gone, **goal)
    assert torch.equal(unpack_mask(found.mask, 32), kept)
    assert kept.sum() == (24 * 32 - int(0.7 * 24 * 32) if "m" not in goal else 24 * 16)
    assert torch.allclose(found.weight, exact, 1e-8, 1e-10)
    off = weight - exact
    assert torch.allclose(found.loss, ((off @ damped(h)) * off).sum(1) / 2, 1e-8)
    assert found.damping == 0.01


@pytest.mark.parametrize("goal", [*GOALS, {"sparsity": 0.5}])
def test_the_loss_is_the_papers(goal):
    """Within a per cent, though its rule goes on until no weight is exchanged."""
    generator = torch.Generator().manual_seed(0)
    weight, h = torch.randn(48, 64, generator=generator, dtype=torch.float64), correlated(64, 300)
    kept, exact = paper(weight, h, torch.zeros(48, 64, dtype=torch.bool), **goal)
    found = alps_prune(weight, h, cg_steps=100, **goal)
    assert unpack_mask(found.mask, 64).sum() == kept.sum()
    assert 2 * float(found.loss.sum()) == pytest.approx(error(weight, exact, damped(h)), rel=0.01)
    ours = least_squares(weight, damped(h), unpack_mask(found.mask, 64))
    assert torch.allclose(found.weight, ours, 1e-7, 1e-9)


@pytest.mark.parametrize("goal", [*GOALS, {"sparsity": 0.5}])
@pytest.mark.parametrize("seed", range(2))
def test_error_is_below_that_of_wanda_and_sparsegpt(goal, seed, device):
    h = correlated(64, 300, torch.float32, seed).to(device)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)).to(device)
    found = alps_prune(weight, h, **goal)
    masked = weight * unpack_mask(wanda_mask(weight, h.diagonal().sqrt(), **goal), 64)
    swept = sparsegpt_prune(weight, h, **goal).weight
    ours, wanda, sparsegpt = (error(weight, one, h) for one in (found.weight, masked, swept))
    assert ours < 0.8 * sparsegpt and ours < 0.6 * wanda
    # The support of fp32 may differ in near-ties, which cost next to nothing.
    exact = alps_prune(weight.double(), h.double(), **goal)
    assert found.weight.dtype == torch.float32 and exact.weight.dtype == torch.float64
    assert float(found.loss.sum()) == pytest.approx(float(exact.loss.sum()), rel=0.01)
    steps = [float(alps_prune(weight, h, cg_steps=n, **goal).loss.sum()) for n in (0, 2, 10)]
    assert steps[0] > steps[1] > steps[2] == float(found.loss.sum())


def test_least_squares_for_a_given_mask():
    """Also where fewer tokens than inputs make the Hessian singular, and a column was never active."""
    weight, kept = torch.randn(9, 40, dtype=torch.float64), torch.rand(9, 40) < 0.6
    h = correlated(40, 12)
    h[3], h[:, 3] = 0, 0
    found = alps_prune(weight, h, sparsity=0, mask=pack_mask(kept), cg_steps=200)
    weight[:, 3] = 0
    assert torch.allclose(found.weight, least_squares(weight, damped(h), kept), 1e-7, 1e-9)
    assert torch.equal(unpack_mask(found.mask, 40), kept)
    single = alps_prune(weight.float(), h.float(), sparsity=0, mask=pack_mask(kept), cg_steps=200)
    assert error(weight, single.weight, damped(h)) <= 1.001 * error(weight, found.weight, damped(h))


@pytest.mark.parametrize("goal", [{"sparsity": 0.6}, {"keep_n": 2, "m": 4}])
def test_independent_inputs_leave_the_largest_scores(goal):
    """With a diagonal Hessian the scaled weights decide, and kept weights stay as they are. Ties are the rule."""
    weight, gone = tied(7, 24), torch.rand(7, 24) < 0.3
    found = alps_prune(weight, torch.eye(24), mask=pack_mask(~gone), **goal)
    shape, count = ((1, -1), int(0.6 * weight.numel())) if "sparsity" in goal else ((-1, 4), 2)
    kept = expected_nested(weight.abs().reshape(shape), gone.reshape(shape), count).reshape(7, 24)
    assert torch.equal(unpack_mask(found.mask, 24), kept)
    assert torch.allclose(found.weight, weight * kept, 1e-6, 0)
    assert not found.weight.view(torch.int32)[~kept].any(), "pruned entries are +0.0"


def test_arguments_are_left_alone_and_a_spectrum_serves_several_weights():
    h = hessian(24, dtype=torch.float32)
    spectrum = scaled_spectrum(h.triu(), 0.05)  # its upper triangle is read
    for weight in (torch.randn(10, 24), torch.randn(24, 10).T, torch.randn(10, 24).bfloat16()):
        before = weight.clone(), h.clone(), spectrum.vectors.clone()
        shared = alps_prune(weight, h, sparsity=0.5, spectrum=spectrum)
        alone = alps_prune(weight, h, sparsity=0.5, damping=0.05)
        assert torch.equal(shared.weight, alone.weight) and torch.equal(shared.mask, alone.mask)
        assert shared.damping == 0.05 and shared.weight.dtype == torch.float32
        assert all(map(torch.equal, before, (weight, h, spectrum.vectors)))


def test_damping_grows_where_rounding_is_not_what_is_wrong():
    h = torch.eye(8)
    h[0, 1] = h[1, 0] = 1.05
    found = scaled_spectrum(h, 0.01)
    assert found.damping == pytest.approx(0.1)
    G = found.vectors @ torch.diag(found.values) @ found.vectors.T
    assert torch.allclose(G * found.scale * found.scale[:, None], damped(h, 0.1), 1e-5, 1e-5)
    # An eigenvalue of -0.025 beside one of 495 is more than rounding.
    h = torch.block_diag(torch.full((510, 510), 0.98).fill_diagonal_(1), torch.tensor([[1, 1.035], [1.035, 1]]))
    assert scaled_spectrum(h, 0.01).damping == pytest.approx(0.1)
    ill = hessian(40, spread=4.0, dtype=torch.float32, tokens=10)
    assert scaled_spectrum(ill, 1e-7).damping == 1e-7 and bool((scaled_spectrum(ill, 1e-7).values >= 0).all())
    for bad in (-torch.eye(4), torch.full((4, 4), 9.0).fill_diagonal_(1)):
        with pytest.raises(SingularHessianError, match="singular even with damping 1 "):
            alps_prune(torch.randn(2, 4), bad, sparsity=0.5)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_empty_weights(shape):
    found = alps_prune(torch.zeros(shape), torch.eye(shape[1]), sparsity=0.5)
    assert found.weight.shape == shape and len(found.loss) == shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.full((4, 8), float("nan"))}, "weight: expected finite"),
        ({"weight": torch.full((4, 8), 3e38)}, "weight: too large"),
        ({"hessian": torch.eye(7)}, r"hessian: expected \(8, 8\)"),
        ({"hessian": torch.full((8, 8), float("inf"))}, "hessian: expected finite"),
        ({"damping": 0.0}, "damping: expected 0 < damping <= 1"),
        ({"sparsity": None}, "sparsity: give sparsity, or keep_n and m"),
        ({"cg_steps": -1}, "cg_steps: expected a count >= 0, got -1"),
        ({"spectrum": 1}, "spectrum: expected what scaled_spectrum returns, got int"),
        ({"spectrum": scaled_spectrum(torch.eye(7), 0.01)}, r"spectrum: expected torch.float32 \(8,\)"),
        ({"spectrum": (-torch.ones(8), torch.eye(8), torch.ones(8), 0.01)}, "spectrum: expected finite values"),
        ({"spectrum": (torch.ones(8), torch.eye(8), torch.ones(8), 7)}, "spectrum: expected a damping of 0 to 1"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"weight": torch.randn(4, 8), "hessian": 4 * torch.eye(8), "sparsity": 0.5} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        alps_prune(**given)
