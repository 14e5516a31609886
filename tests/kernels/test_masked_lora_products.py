"""The native operators of sparse products of groups, called past their Python functions, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import native, pack_mask, unpack_mask

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason="the native CPU library is not built")


@pytest.fixture(autouse=True)
def every_isa(isa):
    """Every test here runs with the code of each instruction set."""


def layers(**changes):
    """Arguments of two groups, (4, 8) each, with five rows altogether."""
    two = {"weights": (4, 8), "masks": (4, 1), "lora_A": (2, 8), "lora_B": (4, 2)}
    made = {
        name: [torch.zeros(shape, dtype=torch.uint8 if name == "masks" else torch.float32)] * 2
        for name, shape in two.items()
    }
    return {"ends": [3, 5], **made, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ends": [3]}, "ends: expected 2 numbers"),
        ({"ends": [3, 6]}, "ends: expected 2 numbers from 0 to 5"),
        ({"ends": [3, 2]}, "ends: expected .* none less"),
        ({"ends": [-1, 2]}, "ends: expected"),
        ({"weights": []}, "expected one of each for every group, got 0, 2"),
        ({"weights": [torch.zeros(4, 8)]}, "expected one of each for every group, got 1, 2"),
        ({"weights": [torch.zeros(4, 8), torch.zeros(4, 9)]}, "weights: expected float32"),
        ({"weights": [torch.zeros(4, 8), torch.zeros(4, 8).half()]}, "weights: expected float32"),
        ({"masks": [torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)]}, "mask: expect"),
        ({"lora_A": [torch.zeros(2, 8), torch.zeros(2, 7)]}, "lora_A: expected"),
        ({"lora_B": [torch.zeros(4, 2), torch.zeros(4, 3)]}, "lora_B: expected"),
    ],
)
def test_errors_of_sparse_products_name_the_argument(changes, message):
    groups = layers(**changes)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.losa.multiply_masked_lora.default(torch.zeros(5, 8), *groups.values(), [], torch.zeros(5, 4))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.losa.differentiate_masked_lora.default(
            torch.zeros(5, 4), None, *groups.values(), torch.zeros(5, 8), [], []
        )


def test_errors_of_rows_and_results_name_the_argument():
    run, derive = torch.ops.losa.multiply_masked_lora.default, torch.ops.losa.differentiate_masked_lora.default
    groups, x, y = layers().values(), torch.zeros(5, 8), torch.zeros(5, 4)
    A, B = [torch.zeros(2, 8)] * 2, [torch.zeros(4, 2)] * 2
    for call, message in (
        (lambda: run(x.double(), *groups, [], y), " x: expected float32"),
        (lambda: run(x, *groups, [], torch.zeros(5, 5)), " out: expected float32"),
        (lambda: run(x, *groups, [], torch.zeros(6, 4)), " out: expected 5 tokens"),
        (lambda: run(x, *groups, [torch.zeros(4)], y), " biases: expected 2 or none"),
        (lambda: run(x, *groups, [torch.zeros(4), torch.zeros(5)], y), " biases: expected contiguous"),
        (lambda: derive(x, None, *groups, x, [], []), " dy: expected float32"),
        (lambda: derive(y, None, *groups, None, A, []), " x: expected a tensor"),
        (lambda: derive(y, torch.zeros(4, 8), *groups, None, A, []), " x: expected 5 tokens"),
        (lambda: derive(y, None, *groups, torch.zeros(4, 8), [], []), " dx: expected 5 tokens"),
        (lambda: derive(y, x, *groups, None, A[:1], []), " dA: expected 2 or none"),
        (lambda: derive(y, x, *groups, None, A, B[:1]), " dB: expected 2 or none"),
        (lambda: derive(y, x, *groups, None, B, []), " dA: expected float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_tokens_in_several_waves():
    """Rows of three groups that are more than is laid out at a time, in pieces of at most 1024."""
    rows, columns, rank, ends = 900, 1300, 3, [1500, 1500, 2600]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, columns, generator=generator) for _ in ends]
    masks = [pack_mask(torch.rand(rows, columns, generator=generator) < 0.1) for _ in ends]
    A = [torch.randn(rank, columns, generator=generator) for _ in ends]
    B = [torch.randn(rows, rank, generator=generator) for _ in ends]
    x, dy = (torch.randn(ends[-1] + 2, n, generator=generator) for n in (columns, rows))
    y, dx = torch.full((len(x), rows), 7.0), torch.full((len(x), columns), 7.0)
    dA, dB = [torch.zeros_like(t) for t in A], [torch.zeros_like(t) for t in B]
    torch.ops.losa.multiply_masked_lora.default(x, ends, weights, masks, A, B, [], y)
    torch.ops.losa.differentiate_masked_lora.default(dy, x, ends, weights, masks, A, B, dx, dA, dB)
    assert bool((y[ends[-1] :] == 7).all()) and bool((dx[ends[-1] :] == 7).all()), "rows of no group"
    assert not dA[1].any() and not dB[1].any()
    for group, part in ((0, slice(0, 1500)), (2, slice(1500, 2600))):
        kept = unpack_mask(masks[group], columns)
        effective = (weights[group].double() + B[group].double() @ A[group].double()).where(kept, 0)
        G = (dy[part].double().T @ x[part].double()).where(kept, 0)
        for found, exact, terms in (
            (y[part], x[part].double() @ effective.T, columns),
            (dx[part], dy[part].double() @ effective, rows),
            (dA[group], B[group].double().T @ G, 1100 + rows),
            (dB[group], G @ A[group].double().T, 1100 + columns),
        ):
            assert (found - exact).abs().max() <= terms**0.5 * 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_the_share_that_masks_keep_is_of_all_places_in_a_head():
    """By a sample of rows, which must not meet the same place in every head of 64."""
    kept = torch.zeros(4096, 40, dtype=torch.bool)
    kept[::64] = True
    few = torch.ops.losa.kept_share.default([pack_mask(kept)], 40)
    assert few <= 4 / 64
    both = torch.ops.losa.kept_share.default(
        [pack_mask(kept[:64]), pack_mask(torch.ones(64, 40, dtype=torch.bool))], 40
    )
    assert both == pytest.approx((1 + 64) / 128), "few rows are all counted"
    assert torch.ops.losa.kept_share.default([pack_mask(kept[:0])], 40) == 0
