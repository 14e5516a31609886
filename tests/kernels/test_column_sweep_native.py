"""Native selection and sweep against the reference: the same decisions, the same weights, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from losa_kernels import native, pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.pruning import blocks, cpu, in_place, inverse_factor, reference
from tests.helpers.column_sweep_problems import hessian, operands, tied

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))

given = pytest.importorskip("hypothesis").given
from hypothesis import settings, strategies  # noqa: E402

PATTERNS = [(1, 4), (2, 4), (4, 8), (2, 8), (5, 16), (2, 3), (1, 1), (3, 20)]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def both(monkeypatch):
    """The results of a call with the native and with the reference backend."""

    def call(function):
        results = []
        for backend in ("auto", "reference"):
            monkeypatch.setenv("LOSA_BACKEND", backend)
            results.append(function())
        return results

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (3, 129), (17, 240), (2, 960)])
def test_wanda_equals_the_reference(isa, both, shape, dtype, poisoned_native_memory):
    rows, columns = shape
    norms = torch.rand(columns)
    norms[::7] = 0
    norms[::13] = -0.0
    before = torch.rand(shape) < torch.linspace(0.1, 1, rows)[:, None]
    patterns = [(n, m) for n, m in PATTERNS if columns % m == 0]
    goals = [{"sparsity": s} for s in (0, 0.1, 0.5, 0.97)] + [{"keep_n": n, "m": m} for n, m in patterns]
    for values in (torch.randn(shape), tied(*shape), 1e-7 * torch.randn(shape), torch.zeros(shape)):
        weight = values.to(dtype)
        for goal in goals:
            for mask in (None, pack_mask(before)):
                ours, theirs = both(lambda w=weight, g=goal, m=mask: wanda_mask(w, norms, mask=m, **g))
                assert torch.equal(ours, theirs), (goal, mask is None)


def test_wanda_takes_strided_arguments_and_fp64(both):
    weight, norms = torch.randn(48, 24).t()[::2], torch.rand(96)[::2]
    mask = pack_mask(torch.rand(12, 48) < 0.7).repeat(1, 2)[:, :6]
    ours, theirs = both(lambda: wanda_mask(weight, norms.double(), sparsity=0.5, mask=mask))
    assert torch.equal(ours, theirs)
    # Scores that fp32 cannot tell apart.
    fine = torch.tensor([[1 + 2e-12, 1 + 1e-12, 1.0, 2.0]], dtype=torch.float64)
    assert unpack_mask(wanda_mask(fine, torch.ones(4), sparsity=0.5), 4).tolist() == [[True, False, False, True]]


@settings(max_examples=60, deadline=None)
@given(
    strategies.integers(1, 40),
    strategies.integers(1, 30),
    strategies.floats(0, 0.95),
    strategies.sampled_from([3, 8, 11, 128]),
    strategies.booleans(),
    strategies.integers(0, 999),
)
def test_sweep_equals_the_reference_where_nothing_rounds(rows, columns, sparsity, block_size, masked, seed):
    """Integers under an identity: ties everywhere; blocks begin inside bytes of the mask."""
    weight, factor = tied(rows, columns, seed), torch.eye(columns)
    generator = torch.Generator().manual_seed(seed)
    mask = pack_mask(torch.rand(rows, columns, generator=generator) < 0.8) if masked else None
    expected = reference.column_sweep(weight, factor, sparsity, None, None, block_size, mask)
    found = cpu.column_sweep(weight.clone(), factor, sparsity, None, None, block_size, mask)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nm_sweep_equals_the_reference_where_nothing_rounds(isa, pattern):
    """Choices come from updated weights: two of three columns send half of their error to the next."""
    keep_n, m = pattern
    columns = 12 * m
    factor = torch.eye(columns) + torch.diag(0.5 * (torch.arange(1, columns) % 3 > 0), 1)
    for rows in (1, 16, 37):
        weight = tied(rows, columns, rows)
        for mask in (None, pack_mask(torch.rand(rows, columns) < 0.6)):
            for block_size in (m, 3 * m, 8 * m):
                expected = reference.column_sweep(weight, factor, None, keep_n, m, block_size, mask)
                found = cpu.column_sweep(weight.clone(), factor, None, keep_n, m, block_size, mask)
                assert all(map(torch.equal, found, expected)), (rows, block_size)


@pytest.mark.parametrize(
    "goal", [{"sparsity": 0.5}, {"keep_n": 2, "m": 4}, {"keep_n": 3, "m": 8}, {"keep_n": 6, "m": 16}]
)
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["well", "ill"])
@pytest.mark.parametrize("shape", [(37, 208), (130, 80)])
def test_agrees_with_fp64(isa, goal, spread, shape):
    """Near-ties aside the decisions of fp64, and its weights in rows that were decided alike."""
    rows, columns = shape
    weight, h = torch.randn(shape), hessian(columns, spread, torch.float32)
    for mask in (None, pack_mask(torch.rand(shape) < 0.7)):
        found = sparsegpt_prune(weight, h, mask=mask, **goal)
        truth = sparsegpt_prune(weight.double(), h.double(), mask=mask, **goal)
        ours, exact = unpack_mask(found.mask, columns), unpack_mask(truth.mask, columns)
        assert int(ours.sum()) == int(exact.sum())
        assert (ours == exact).double().mean() >= 0.9995
        alike = (ours == exact).all(1)
        assert alike.double().mean() > 0.8
        error = (found.weight.double() - truth.weight)[alike].norm() / truth.weight[alike].norm()
        assert error <= (2e-4 if spread else 1e-5)
        assert bool((found.weight[~ours].view(torch.int32) == 0).all())
        assert torch.allclose(found.loss[alike].double(), truth.loss[alike], rtol=1e-3)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_error_is_that_of_the_reference(isa, both, spread):
    """Everything is decided beforehand, so only the arithmetic differs."""
    weight, h = torch.randn(40, 300), hessian(300, spread, torch.float32)
    mask = pack_mask(torch.rand(40, 300) < 0.5)
    truth = sparsegpt_prune(weight.double(), h.double(), sparsity=0.0, mask=mask)
    ours, plain = both(lambda: sparsegpt_prune(weight, h, sparsity=0.0, mask=mask))
    for a, b, c in ((ours.weight, plain.weight, truth.weight), (ours.loss, plain.loss, truth.loss)):
        assert (a - c).norm() <= 2 * (b - c).norm() + EPS * c.norm()


SCORES = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "wide": lambda g, n: torch.randn(n, generator=g) * 10 ** (18 * torch.randn(n, generator=g).clamp(-1, 1)),
    "equal": lambda g, n: torch.full((n,), 0.75),
    "two": lambda g, n: torch.rand(n, generator=g).round() + 1,
    "zeros": lambda g, n: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.3),
    "infinite": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.4, 3e30, torch.randn(n, generator=g)),
    "neighbours": lambda g, n: (torch.randint(0, 9, (n,), generator=g) + 0x3F800000).int().view(torch.float32),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("rows", "start", "end"), [(1, 0, 1), (3, 5, 18), (300, 8, 136)])
def test_block_selection_is_a_stable_sort(isa, kind, rows, start, end):
    """select_block and sweep_block: the first `count` in the order of (pruned already, score, column, row)."""
    columns, width = end + 3, end - start
    weight = SCORES[kind](torch.Generator().manual_seed(1), rows * columns).view(rows, columns)
    factor = torch.diag(torch.rand(columns) + 0.5).mT
    for share in (0, 0.3):
        gone = torch.rand(rows, columns) < share
        mask = pack_mask(~gone) if share else None
        scores = (weight / factor.diagonal()).square()[:, start:end]
        order = torch.where(gone[:, start:end], -1.0, scores).T.reshape(-1).argsort(stable=True)
        lost, total = int(gone[:, start:end].sum()), rows * width
        for count in sorted({lost, min(lost + 1, total), (lost + total) // 2, total - 1, total} - set(range(lost))):
            expected = torch.ones(width * rows, dtype=torch.bool)
            expected[order[:count]] = False
            scratch, state = torch.full((rows, width), -7.0), torch.zeros(blocks.STATE, dtype=torch.int32)
            torch.ops.losa.select_block(weight, factor, start, end, torch.tensor([-1, count]), 1, mask, scratch, state)
            swept, kept, loss = weight.clone(), torch.full((rows, (columns + 7) // 8), 0xA5).byte(), torch.ones(rows)
            around = unpack_mask(kept, columns)
            torch.ops.losa.sweep_block(swept, factor, start, end, 0, 0, state, mask, kept, scratch, loss)
            around[:, start:end] = expected.view(width, rows).T
            assert torch.equal(unpack_mask(kept, columns), around), "and no bit of another block changes"
            assert torch.equal(swept[:, :start], weight[:, :start]) and torch.equal(swept[:, end:], weight[:, end:])
            inside = around[:, start:end]
            assert torch.equal(swept[:, start:end], weight[:, start:end].masked_fill(~inside, 0))
            errors = (weight / factor.diagonal())[:, start:end].masked_fill(inside, 0)
            assert torch.equal(scratch, errors)
            assert torch.allclose(loss, 1 + errors.square().sum(1) / 2, rtol=1e-4)


def test_threads_do_not_change_a_bit(monkeypatch):
    weight, norms, h = torch.randn(700, 272), torch.rand(272), hessian(272, 1.0, torch.float32)
    factor, mask = inverse_factor(h, 0.01)[0], pack_mask(torch.rand(700, 272) < 0.8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([wanda_mask(weight, norms, sparsity=0.5, mask=mask), wanda_mask(weight, norms, keep_n=4, m=8)])
            for goal in ((0.5, None, None), (None, 2, 4)):
                found[-1] += cpu.column_sweep(weight.clone(), factor, *goal, 128, mask)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("columns", [1, 64, 129, 321])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_inverse_by_halves(columns, spread, monkeypatch):
    monkeypatch.setattr(in_place, "LEAF", 64)
    monkeypatch.setattr(in_place, "PANEL", 48)
    upper = torch.linalg.cholesky(hessian(columns, spread)).mT.float()
    exact = torch.linalg.inv(upper.double())
    ours, plain = cpu.invert_upper_(upper.clone()).double(), reference.invert_upper(upper).double()
    assert torch.equal(ours, ours.triu())
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + EPS * exact.norm()


def test_fp64_takes_the_reference(both):
    weight, h = torch.randn(9, 64, dtype=torch.float64), hessian(64, 1.0)
    ours, theirs = both(lambda: sparsegpt_prune(weight, h, keep_n=2, m=4))
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.mask, theirs.mask)


def test_pruned_per_block(isa):
    kept = torch.rand(13, 277) < 0.6
    for block_size in (1, 5, 8, 24, 77, 128, 500):
        expected = [int((~part).sum()) for part in kept.split(block_size, dim=1)]
        assert torch.ops.losa.pruned_per_block(pack_mask(kept), 277, block_size).tolist() == expected


@pytest.mark.parametrize("goal", [(0.5, None, None), (None, 2, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sweep_reads_nothing_back(goal, masked):
    """On tensors without values, where reading one fails: all blocks are queued while the device works on the first."""
    with FakeTensorMode():
        weight, factor = torch.empty(16, 64), torch.empty(64, 64)
        mask = torch.empty(16, 8, dtype=torch.uint8) if masked else None
        swept, kept, loss = blocks.column_sweep(weight, factor, *goal, 24, mask)
        assert swept.shape == (16, 64) and kept.shape == (16, 8) and loss.shape == (16,)


@settings(max_examples=150, deadline=None)
@given(
    strategies.integers(1, 5000),
    strategies.integers(1, 70),
    strategies.integers(1, 30),
    strategies.floats(0, 1, exclude_max=True),
    strategies.floats(0, 1),
    strategies.integers(0, 999),
)
def test_counts_on_the_device_are_the_host_s(rows, columns, block_size, sparsity, share, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = min(rows, 9000 // columns)
    for mask in (None, pack_mask(torch.rand(rows, columns, generator=generator) < share)):
        widths = [min(block_size, columns - start) for start in range(0, columns, block_size)]
        lost = [0] * len(widths)
        if mask is not None:
            lost = torch.ops.losa.pruned_per_block(mask, columns, block_size).tolist()
        found = blocks.block_counts(sparsity, torch.empty(rows, columns), block_size, mask)
        assert found.tolist() == reference.block_counts(sparsity, rows, widths, lost)


def test_budgets_of_many_entries_round_as_on_the_host():
    """Products that are integers but for rounding, on tensors too large to hold."""
    for sparsity in (0.1, 0.29, 0.57, 0.7, 1 / 3, 0.999):
        for rows, columns in ((11008, 4096), (150000, 5120), (1 << 20, 1 << 10)):
            widths = [128] * (columns // 128)
            expected = reference.block_counts(sparsity, rows, widths, [0] * len(widths))
            weight = torch.empty(1).expand(rows, columns)
            assert blocks.block_counts(sparsity, weight, 128, None).tolist() == expected


@pytest.mark.parametrize("goal", [(0.5, None, None), (None, 2, 4)])
@pytest.mark.parametrize("panel", [0, 16, 40, 48, 1000])
def test_panels_are_whole_blocks_and_the_same_sweep(goal, panel, monkeypatch):
    """Where nothing rounds the result is that of a product for every block."""
    factor = torch.eye(104) + torch.diag(0.5 * (torch.arange(1, 104) % 3 > 0), 1)
    shapes, run = [], blocks.update_rest

    def update(rest, errors, upper):
        shapes.append((rest.shape[1], errors.shape[1]))
        run(rest, errors, upper)

    monkeypatch.setattr(blocks, "update_rest", update)
    for mask in (None, pack_mask(torch.rand(20, 104) < 0.7)):
        weight = tied(20, 104)
        expected = reference.column_sweep(weight, factor, *goal, 16, mask)
        found = blocks.column_sweep(weight.clone(), factor, *goal, 16, mask, panel)
        assert all(map(torch.equal, found, expected))
        split = blocks.column_sweep(weight.clone(), factor, *goal, 16, mask, panel, split=True)
        assert all(map(torch.equal, split, expected)), "what fits into TF32 is not changed by its parts"
        shapes[-6:] = []
    deep = {0: 16, 16: 16, 40: 32, 48: 48, 1000: 112}[panel]
    ends = [(104 - end, deep) if end % deep == 0 else (min(end // deep * deep + deep, 104) - end, 16)
            for end in range(16, 104, 16)]  # fmt: skip
    assert shapes == 2 * ends


def test_opcheck():
    o, ops, check = operands(), torch.ops.losa, torch.library.opcheck
    check(ops.wanda_select.default, (o["weight"], torch.ones(24), 7, 0, o["mask"]))
    check(ops.wanda_select.default, (o["weight"].half(), torch.ones(24), 2, 4, None, None))
    check(ops.pruned_per_block.default, (o["mask"], 24, 8))
    counts = torch.tensor([3, 20])
    check(ops.select_block.default, (o["weight"], o["factor"], 8, 16, counts, 1, o["mask"], o["scratch"], o["state"]))
    out = (o["kept"], o["scratch"], o["loss"])
    check(ops.sweep_block.default, (o["weight"], o["factor"], 8, 16, 4, 2, None, None, *out))
    panel = (torch.eye(24), 8, 16, torch.zeros(8, 8), torch.zeros(1, dtype=torch.int32))
    check(ops.factor_panel.default, panel)
    check(ops.sweep_block.default, (o["weight"], o["factor"], 8, 16, 0, 0, o["state"], o["mask"], *out))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(5, 24).double()}, "weight: expected"),
        ({"weight": torch.randn(24, 5).t()}, "weight: expected"),
        ({"factor": torch.eye(23)}, "factor: expected"),
        ({"mask": torch.zeros(5, 2, dtype=torch.uint8)}, "mask"),
        ({"scratch": torch.zeros(5, 7)}, "scratch: expected|errors: expected"),
        ({"scratch": torch.zeros(8, 5).mT}, "scratch: expected|errors: expected"),
        ({"state": torch.zeros(9)}, "state: expected"),
    ],
)
def test_operators_check_their_arguments(change, message):
    o = operands() | change
    with pytest.raises(RuntimeError, match=message):
        counts = torch.tensor([9])
        torch.ops.losa.select_block(o["weight"], o["factor"], 8, 16, counts, 0, o["mask"], o["scratch"], o["state"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.losa.sweep_block(
            o["weight"], o["factor"], 8, 16, 0, 0, o["state"], o["mask"], o["kept"], o["scratch"], o["loss"]
        )
