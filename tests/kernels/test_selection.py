"""Which entries go: exact counts, ties lowest column first, N:M groups, nested masks, the same on every device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_kernels import pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.pruning import checks_together, cuda, inverse_factor, reference, wanda
from losa_kernels.pruning.reference import block_counts, prune_count, smallest, smallest_of_groups
from tests.helpers.column_sweep_problems import hessian


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.95), st.sampled_from([4, 16, 128]), st.integers(0, 99))
def test_unstructured_count_is_exact(rows, columns, sparsity, block_size, seed):
    """Earlier zeros stay and count, however unevenly they lie; only where they exceed the target is it exceeded."""
    g = torch.Generator().manual_seed(seed)
    weight, h = torch.randn(rows, columns, generator=g), hessian(columns, tokens=80, dtype=torch.float32)
    target = int(sparsity * rows * columns + 1e-6)
    result = sparsegpt_prune(weight, h, sparsity=sparsity, block_size=block_size)
    assert int((~unpack_mask(result.mask, columns)).sum()) == target
    gone = torch.rand(rows, columns, generator=g) < torch.rand(columns, generator=g).sort().values
    result = sparsegpt_prune(weight, h, sparsity=sparsity, block_size=block_size, mask=pack_mask(~gone))
    pruned = ~unpack_mask(result.mask, columns)
    assert not bool((gone & ~pruned).any())
    assert int(pruned.sum()) == max(target, int(gone.sum()))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.floats(0, 1, exclude_max=True), st.integers(0, 9), st.lists(st.integers(1, 9), max_size=6))
def test_block_counts_fit_their_blocks(data, sparsity, rows, widths):
    gone = [data.draw(st.integers(0, rows * width)) for width in widths]
    counts = block_counts(sparsity, rows, widths, gone)
    assert all(g <= n <= rows * w for g, n, w in zip(gone, counts, widths, strict=True))
    assert sum(counts) == max(prune_count(sparsity, rows * sum(widths)), sum(gone))


def test_block_counts_carry_the_remainder():
    assert block_counts(0.5, 1, [3, 3, 3], [0, 0, 0]) == [1, 2, 1]
    assert block_counts(0.5, 4, [8, 8], [0, 32]) == [0, 32]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 0.95), st.sampled_from([3, 8, 128]), st.integers(0, 99))
def test_sweep_breaks_ties_by_column_then_row(rows, columns, sparsity, block_size, seed):
    """Integers and an identity Hessian: scores tie everywhere and nothing is updated."""
    weight = torch.randint(-2, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    result = sparsegpt_prune(weight, torch.eye(columns), sparsity=sparsity, block_size=block_size)
    expected, done = torch.zeros(columns, rows, dtype=torch.bool), 0
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        count = int(sparsity * rows * end + 1e-6) - done
        done += count
        order = weight.T[start:end].reshape(-1).abs().argsort(stable=True)
        expected[start:end].view(-1)[order[:count]] = True
    assert torch.equal(unpack_mask(result.mask, columns), ~expected.T)
    assert torch.equal(result.weight, weight.masked_fill(expected.T, 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 7), st.integers(0, 40), st.floats(0, 0.99), st.booleans(), st.integers(0, 99))
def test_wanda_chooses_from_the_whole_matrix(rows, columns, sparsity, masked, seed):
    """Ties go in row-major order; what is pruned already goes first and counts."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (columns, rows), generator=g).float().T  # not contiguous, and full of ties
    norms = torch.randint(0, 3, (columns,), generator=g).float()
    gone = torch.rand(rows, columns, generator=g) < (0.3 if masked else 0)
    mask = pack_mask(~gone) if masked else None
    found = ~unpack_mask(wanda_mask(weight, norms, sparsity=sparsity, mask=mask, whole=True), columns)
    order = (weight.abs() * norms).masked_fill(gone, -1).flatten().argsort(stable=True)
    expected = gone.flatten()
    expected[order[: int(sparsity * rows * columns + 1e-6)]] = True
    assert torch.equal(found.flatten(), expected)


def test_the_whole_matrix_takes_scores_beyond_the_largest_number():
    weight = torch.tensor([[3e38, 1.0], [2.0, -3e38]])
    kept = unpack_mask(wanda_mask(weight, torch.tensor([1e10, 1e10]), sparsity=0.5, whole=True), 2)
    assert kept.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_whole_matrix_in_other_types(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(12, 20, generator=generator).to(dtype), torch.rand(20, generator=generator).double()
    kept = unpack_mask(wanda_mask(weight, norms, sparsity=0.4, whole=True), 20)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.ones(240, dtype=torch.bool)
    expected[(weight.to(wide).abs() * norms.to(wide)).flatten().argsort(stable=True)[:96]] = False
    assert torch.equal(kept.flatten(), expected)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"keep_n": 1, "m": 2}, "whole: .*1:2"),
        ({"sparsity": 0.5, "norm": -1.0}, "input_norms"),
        ({"sparsity": 0.5, "weight": torch.tensor([[1.0, 2, 3, torch.nan]])}, "weight: .*finite"),
    ],
)
def test_the_whole_matrix_has_a_sparsity_and_right_numbers(arguments, said):
    norms, weight = torch.full((4,), arguments.pop("norm", 1.0)), arguments.pop("weight", torch.ones(2, 4))
    with pytest.raises(ValueError, match=said):
        wanda_mask(weight, norms, whole=True, **arguments)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.sampled_from([(1, 4), (2, 4), (3, 8), (7, 8)]), st.booleans())
def test_nm_is_exact(rows, groups, pattern, wanda):
    """A group that has lost more than asked keeps its zeros and loses nothing else."""
    keep_n, m = pattern
    columns = groups * m
    weight, norms, h = torch.randn(rows, columns), torch.rand(columns), hessian(columns, tokens=99, dtype=torch.float32)

    def prune(mask):
        if wanda:
            packed = wanda_mask(weight, norms, keep_n=keep_n, m=m, mask=mask)
        else:
            packed = sparsegpt_prune(weight, h, keep_n=keep_n, m=m, block_size=2 * m, mask=mask).mask
        return unpack_mask(packed, columns).reshape(-1, m)

    assert bool((prune(None).sum(1) == keep_n).all())
    before = torch.rand(rows, columns) < 0.5
    after, before_groups = prune(pack_mask(before)), before.reshape(-1, m)
    assert not bool((after & ~before_groups).any())
    assert torch.equal(after.sum(1), before_groups.sum(1).clamp(max=keep_n))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 12), st.integers(1, 4), st.data())
def test_selection_is_a_stable_sort(rows, columns, levels, data):
    seed, count = data.draw(st.integers(0, 99)), data.draw(st.integers(0, columns))
    scores = torch.randint(-1, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    order = scores.argsort(dim=1, stable=True)
    expected = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :count], True)
    assert torch.equal(smallest(scores, count), expected)
    assert torch.equal(smallest_of_groups(scores.T.contiguous(), count).T, expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 0.95), st.integers(1, 5), st.integers(0, 99))
def test_wanda_is_a_stable_sort(rows, columns, sparsity, levels, seed):
    """Few distinct values, so that ties are everywhere: the lowest columns go first."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=g).float()
    norms = torch.randint(0, 3, (columns,), generator=g).float()
    count = int(sparsity * columns + 1e-6)
    order = (weight.abs() * norms).argsort(dim=1, stable=True)
    expected = torch.ones(rows, columns, dtype=torch.bool).scatter_(1, order[:, :count], False)
    assert torch.equal(unpack_mask(wanda_mask(weight, norms, sparsity=sparsity), columns), expected)


def test_smallest_halves_are_ordered_while_denormals_are_flushed(isa):
    """An fp16 subnormal is a normal number in fp32."""
    patterns = torch.randperm(1024, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    torch.set_flush_denormal(True)
    try:
        mask = wanda_mask(patterns.view(torch.float16)[None], torch.ones(1024), sparsity=0.5)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(unpack_mask(mask, 1024)[0], patterns >= 512)


def test_decisions_are_the_same_on_every_device(device, poisoned_native_memory):
    """In deterministic mode, with ties; an identity Hessian and one factor of it, so that no rounding differs."""
    weight, norms, h = torch.randint(-5, 6, (64, 256)).float(), torch.randint(1, 4, (256,)).float(), torch.eye(256)
    gone = pack_mask(torch.rand(64, 256) < 0.8)
    factor, damping = inverse_factor(h, 0.01)
    for goal in ({"sparsity": 0.55}, {"keep_n": 2, "m": 8}):
        for mask in (None, gone):
            there = None if mask is None else mask.to(device)
            found = wanda_mask(weight.to(device), norms.to(device), mask=there, **goal)
            assert torch.equal(found.cpu(), wanda_mask(weight, norms, mask=mask, **goal))
            moved = (factor.to(device), damping)
            found = sparsegpt_prune(weight.to(device), h.to(device), mask=there, factor=moved, **goal)
            assert found.weight.device.type == device.type
            expected = sparsegpt_prune(weight, h, mask=mask, factor=(factor, damping), **goal)
            assert torch.equal(found.mask.cpu(), expected.mask)
            assert torch.equal(found.weight.cpu(), expected.weight)


def test_floor_of_a_decimal_sparsity():
    for sparsity, columns, expected in ((0.7, 10, 7), (0.3, 10, 3), (0.95, 20, 19), (0.6, 5, 3), (0.55, 576, 316)):
        mask = wanda_mask(torch.randn(3, columns), torch.ones(columns), sparsity=sparsity)
        assert bool(((~unpack_mask(mask, columns)).sum(1) == expected).all())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "first, then", [({"sparsity": 0.3}, {"sparsity": 0.6}), ({"keep_n": 6, "m": 8}, {"keep_n": 2, "m": 8})]
)
def test_masks_are_nested(method, first, then):
    weight, h = torch.randn(12, 64), hessian(64, dtype=torch.float32)

    def prune(w, goal, mask=None):
        if method == "wanda":
            return wanda_mask(w, h.diagonal().sqrt(), mask=mask, **goal)
        return sparsegpt_prune(w, h, mask=mask, **goal).mask

    early = prune(weight, first)
    late = prune(torch.randn(12, 64), then, early)
    early_kept, late_kept = unpack_mask(early, 64), unpack_mask(late, 64)
    assert not bool((late_kept & ~early_kept).any())
    assert int(late_kept.sum()) == (
        12 * 16 if "m" in then else 12 * 64 - (12 * int(0.6 * 64) if method == "wanda" else int(0.6 * 12 * 64))
    )
    assert torch.equal(prune(weight, {"sparsity": 0.1}, early), early), "more than asked has gone: it stays as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wanda_errors_name_the_argument(device, dtype):
    weight, norms = torch.randn(4, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    huge = norms.double() * (float("inf") if dtype == torch.float64 else 1e300)
    for wrong in (norms[:7], -norms, norms * float("nan"), norms / 0, huge, norms.to("meta")):
        with pytest.raises(ValueError, match="input_norms: expected"):
            wanda_mask(weight, wrong, sparsity=0.5)
    for goal in ({"sparsity": 0.5}, {"keep_n": 2, "m": 4}, {"keep_n": 1, "m": 2}):
        for value in (float("nan"), -float("inf")):
            wrong = weight.clone()
            wrong[3, 7] = value
            with pytest.raises(ValueError, match="weight: expected finite values, got nan or inf"):
                wanda_mask(wrong, norms, **goal)
            with pytest.raises(ValueError, match="input_norms: expected finite values >= 0"):
                wanda_mask(wrong, -norms, **goal)
    assert wanda_mask(weight[:0], norms, sparsity=0.5).shape == (0, 1)
    with pytest.raises(ValueError, match="input_norms: expected finite values >= 0"):
        wanda_mask(weight[:0], -norms, sparsity=0.5)


@pytest.fixture
def kernel(monkeypatch):
    """Wanda on CUDA with a kernel that only tells faults, by the weight's first entry; ``filled`` counts new flags."""
    filled, zeros = [], torch.zeros

    def run(weight, norms, sparsity, keep_n, m, mask, faults):
        assert int(faults) == 0
        faults += int(weight[0, 0])
        return weight[:, :1]

    monkeypatch.setattr(cuda.blocks, "wanda_mask", run)
    monkeypatch.setattr(cuda, "wanda_faults", wanda.Faults())
    monkeypatch.setattr(torch, "zeros", lambda *shape, **more: filled.append(shape) or zeros(*shape, **more))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "one")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return filled


def masked(fault):
    return cuda.wanda_mask(torch.full((2, 8), float(fault)), torch.ones(8), 0.5, None, None, None)


def test_faults_are_read_after_each_call(kernel):
    for _ in range(3):
        masked(0)
    assert kernel == [(1,)], "a flag that was zero serves again"
    with pytest.raises(ValueError, match="input_norms"):
        masked(reference.BAD_NORMS | reference.BAD_WEIGHT)
    masked(0)
    assert kernel == 2 * [(1,)]


def test_faults_of_several_calls_are_read_together(kernel):
    with cuda.wanda_faults.together():
        with cuda.wanda_faults.together():
            masked(0)
        masked(0)
    with pytest.raises(ValueError, match="weight: expected finite"), cuda.wanda_faults.together():
        masked(0)
        masked(reference.BAD_WEIGHT)
        masked(reference.BAD_NORMS)
        reached = True
    assert reached
    with pytest.raises(KeyError), cuda.wanda_faults.together():
        masked(reference.BAD_WEIGHT)
        raise KeyError
    with pytest.raises(ValueError, match="input_norms"):
        masked(reference.BAD_NORMS)
    with checks_together():
        pass


@pytest.mark.gpu
def test_checks_together_on_gpu():
    weight, norms = torch.randn(64, 256, device="cuda"), torch.rand(256, device="cuda")
    expected = wanda_mask(weight, norms, sparsity=0.5)
    with checks_together():
        found = [wanda_mask(weight, norms, sparsity=0.5) for _ in range(3)]
    assert all(torch.equal(mask, expected) for mask in found)
    side = torch.cuda.Stream()
    with pytest.raises(ValueError, match="input_norms"), checks_together():
        wanda_mask(weight, norms, sparsity=0.5)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            wanda_mask(weight, -norms, sparsity=0.5)
