"""What smoke.py runs: every native operator and every Triton kernel, at an odd and at a LLaMA shape, against fp64.

A case names the operators and kernels that it runs, and its function returns (error, what the dtype's error model
allows). A new operator or kernel gets a case in ``cases``; tests/tools/test_gpu_command.py fails without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from losa_kernels import (
    bitmask,
    gram,
    masked_lora_linear,
    pack_bitmask,
    pack_mask,
    pack_nm,
    sparsegpt_prune,
    unpack_mask,
    wanda_mask,
)
from losa_kernels.native import product_dtype
from losa_kernels.packing import reference as packing
from losa_kernels.pruning import accumulate_hessian, complete_hessian, inverse_factor
from losa_kernels.pruning import reference as pruning
from losa_kernels.tensors import as_bits
from tests.gpu import checks_decode
from tests.gpu.case import (
    BF16,
    FP16,
    FP32,
    Case,
    Sizes,
    Verdict,
    bounded,
    differing,
    goal_text,
    kept_at_half,
    kept_groups,
    text,
    worst,
)
from tests.gpu.case import LLAMA as LLAMA
from tests.gpu.case import SMALL as SMALL
from tests.helpers.grouped_problems import by_formula, by_op, doubled, grouped_problem, moved, run_grouped
from tests.helpers.masked_lora_problems import double, dropout_formula, formula, merge, problem, run, tensors


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    on_gpu = device != "cpu"
    yield from checks_decode.cases(sizes, device)
    for shape in (sizes.odd, (3, sizes.wide[1] + 3), sizes.tall):
        yield Case(f"mask {text(shape)}", ("pack_mask", "unpack_mask"), partial(masks, shape, device))
    for dtype in (torch.float8_e4m3fn, torch.float64, FP32, BF16):
        for shape in (sizes.odd, (3, sizes.wide[1]), sizes.tall) if dtype in (BF16, FP32) else (sizes.odd,):
            label = f"pack bitmask {text(shape)} {text(dtype)}"
            yield Case(label, ("pack_bitmask", "unpack_bitmask"), partial(bitmasks, shape, dtype, device))
    for pattern in ((2, 4), (4, 8), (5, 16)):
        for shape in (sizes.groups, sizes.square):
            label = f"pack {pattern[0]}:{pattern[1]} {text(shape)} bf16"
            yield Case(label, ("pack_nm", "largest_group"), partial(groups, shape, pattern, device))
    for goal in ((0.5, None, None), (None, 2, 4), (None, 6, 16)):
        for shape, dtype in ((sizes.groups, FP16), (sizes.square, BF16), (sizes.wide, FP32)):
            label = f"wanda {goal_text(goal)} {text(shape)} {text(dtype)}"
            yield Case(label, ("wanda_select",), partial(wanda, shape, dtype, goal, device))
    for shape in (sizes.groups, sizes.square):
        yield Case(f"hessian {shape[1]} bf16", (), partial(hessians, shape[1], BF16, device))
        yield Case(f"hessian {shape[1]} fp32", (), partial(hessians, shape[1], FP32, device))
        for way, ops in (("torch", ()), ("blocked", ("factor_panel",)), ("in_place", ())):
            yield Case(f"inverse factor {way} {shape[1]}", ops, partial(factors, way, shape[1], device))
        for goal, masked in (((0.5, None, None), False), ((0.5, None, None), True), ((None, 2, 4), False)):
            ops = ("sweep_block", *(() if goal[2] else ("select_block",)), *(("pruned_per_block",) if masked else ()))
            label = f"sparsegpt {goal_text(goal)} {text(shape)}{', masked' if masked else ''}"
            yield Case(label, ops, partial(sweep, shape, goal, masked, device))
    for way in ("fused", "compose"):
        for shape, rank, tokens, dtype in (
            (sizes.odd, 7, 50, BF16),
            (sizes.odd, 7, 50, FP16),
            (sizes.odd, 7, 50, FP32),
            (sizes.square, 16, sizes.tokens, BF16),
            (sizes.wide, 8, 64, BF16),
        ):
            kernels = ["linear_kernel", "project_kernel"]
            if way == "compose":
                kernels = ["compose_kernel", "project_given_kernel"]
            label = f"masked LoRA {way} {text(shape)} r {rank} T {tokens} {text(dtype)}"
            run_case = partial(lora, way, shape, rank, tokens, dtype, device)
            yield Case(label, (*kernels, "split_kernel", "sum_kernel"), run_case)
    for shape, rank in ((sizes.groups, 7), (sizes.square, 16)):
        outputs, inputs = (n // 8 * 8 for n in shape)  # what a grouped GEMM reads
        label = f"grouped masked LoRA {outputs}x{inputs} r {rank} T {sizes.tokens} bf16"
        run_case = partial(grouped, (outputs or 8, inputs), rank, sizes.tokens, device)
        yield Case(label, ("compose_groups_kernel", "project_groups_kernel"), run_case)
    if on_gpu:  # the CPU draws another mask
        for way, kernels in (("fused", ("drop_kernel",)), ("compose", ("drop_kernel", "keep_kernel"))):
            for shape, rank, tokens in ((sizes.odd, 7, 50), (sizes.square, 16, sizes.tokens)):
                label = f"masked LoRA {way} with dropout {text(shape)} r {rank} T {tokens} bf16"
                yield Case(label, kernels, partial(dropout, way, shape, rank, tokens, BF16, device))
    for shape, rank in ((sizes.odd, 7), (sizes.square, 16)):
        yield Case(f"merge {text(shape)} r {rank} bf16", ("compose_kernel",), partial(merged, shape, rank, device))
    for samples in sizes.samples:
        for dtype in (BF16, FP32):
            label = f"gram {samples} samples {text(dtype)}"
            yield Case(label, ("_gram_kernel",), partial(grams, samples, sizes.features + samples % 2, dtype, device))


def masks(shape, device) -> Verdict:
    kept = kept_at_half(shape, device)
    packed = pack_mask(kept)
    return worst([differing(packed, bitmask.pack_reference(kept)), differing(unpack_mask(packed, shape[1]), kept)])


def bitmasks(shape, dtype, device) -> Verdict:
    weight, kept = torch.randn(shape, device=device).to(dtype), kept_at_half(shape, device)
    packed = pack_bitmask(weight, pack_mask(kept))
    values, offsets = packing.pack_bitmask(weight, pack_mask(kept))
    dense = torch.where(kept, as_bits(weight), 0)
    return worst(
        [
            differing(as_bits(packed.values), as_bits(values)),
            differing(packed.row_offsets, offsets),
            differing(as_bits(packed.unpack()), dense),
        ]
    )


def groups(shape, pattern, device) -> Verdict:
    weight, kept = torch.randn(shape, device=device).to(BF16), kept_groups(shape, *pattern, device)
    packed = pack_nm(weight, pack_mask(kept), *pattern)
    return differing(as_bits(packed.unpack()), torch.where(kept, as_bits(weight), 0))


def wanda(shape, dtype, goal, device) -> Verdict:
    weight, norms = torch.randn(shape, device=device).to(dtype), torch.rand(shape[1], device=device)
    verdicts = []
    for mask in (None, pack_mask(torch.rand(shape, device=device) < 0.7)):
        found = wanda_mask(weight, norms, sparsity=goal[0], keep_n=goal[1], m=goal[2], mask=mask)
        verdicts.append(differing(found, pruning.wanda_mask(weight, norms, *goal, mask)))
    return worst(verdicts)


def hessians(width, dtype, device, tokens: int = 300) -> Verdict:
    x = torch.randn(tokens, width, device=device).to(dtype)
    found, plain = torch.zeros(width, width, device=device), x.float().T @ x.float()
    accumulate_hessian(found, x)
    error, allowed = bounded(complete_hessian(found), plain, x.double().T @ x.double(), FP32)
    # Tensor cores add 16 terms at a time, and cut the sum where fp32 units round it.
    return error, allowed + (tokens / 16 * torch.finfo(FP32).eps if dtype != FP32 else 0)


def hessian_of(columns: int, device: str) -> Tensor:
    """fp64, of inputs whose scales differ tenfold."""
    x = torch.randn(3 * columns, columns, dtype=torch.float64, device=device)
    x *= torch.logspace(0, -1, columns, dtype=torch.float64, device=device)
    return x.T @ x


def factors(way, columns, device) -> Verdict:
    hessian = hessian_of(columns, device)
    truth = pruning.inverse_factor(hessian, 0.01)[0]
    plain = pruning.inverse_factor(hessian.float(), 0.01)[0]
    with patch.dict(os.environ, LOSA_FACTOR=way):
        return bounded(inverse_factor(hessian.float(), 0.01)[0], plain, truth, FP32)


def sweep(shape, goal, masked, device) -> Verdict:
    """Share of mask entries other than fp64's: nearly tied scores round to either side."""
    weight, hessian = torch.randn(shape, device=device), hessian_of(shape[1], device)
    mask = pack_mask(torch.rand(shape, device=device) < 0.7) if masked else None
    settings = {"sparsity": goal[0], "keep_n": goal[1], "m": goal[2], "mask": mask}
    found = sparsegpt_prune(weight, hessian.float(), **settings)
    exact = sparsegpt_prune(weight.double(), hessian, **settings)
    ours, theirs = (unpack_mask(result.mask, shape[1]) for result in (found, exact))
    other = float((ours != theirs).double().mean())
    return (other if int(ours.sum()) == int(theirs.sum()) else float("inf")), max(5e-4, 2 / weight.numel())


def lora_problem(shape, rank, tokens, dtype, device) -> tuple[dict, Tensor]:
    args = tensors(problem(*shape, rank, tokens=tokens, dtype=dtype), lambda t: t.to(device))
    return args, torch.randn(tokens, shape[0], device=device).to(dtype)


def step_verdict(ours: dict, plain: dict, truth: dict, dtype: torch.dtype, rounds_gradient: bool) -> Verdict:
    """y and the gradients. Gradients of the factors are nearly fp32's, unless the vendor's product rounded G."""
    found = [bounded(ours[name], plain[name], truth[name], dtype) for name in truth if not name.startswith("lora")]
    share = torch.finfo(dtype).eps if rounds_gradient else 2**-13
    for name in ("lora_A", "lora_B"):
        size = float(truth[name].abs().max())
        found.append((float((ours[name].double() - truth[name]).abs().max()) / size, share))
    return worst(found)


def lora(way, shape, rank, tokens, dtype, device) -> Verdict:
    args, grad = lora_problem(shape, rank, tokens, dtype, device)
    with patch.dict(os.environ, LOSA_MASKED_LORA=way):
        ours = run(masked_lora_linear, args, grad)
    truth = run(formula, double(args), grad.double())
    # A CPU that multiplies bf16 rounds G in either way, and any other CPU in neither.
    rounds_gradient = way == "compose" if device != "cpu" else product_dtype(BF16) == BF16
    return step_verdict(ours, run(formula, args, grad), truth, dtype, rounds_gradient and dtype == BF16)


def grouped(shape, rank, tokens, device) -> Verdict:
    """Groups of many rows, of none, of one, and rows of no group."""
    args = moved(grouped_problem([tokens, 0, 1, 2 * tokens], *shape, [rank] * 4, BF16), device)
    grad = torch.randn(len(args["x"]), shape[0], device=device).to(BF16)
    ours, plain = run_grouped(by_op, args, grad), run_grouped(by_formula, args, grad)
    truth = run_grouped(by_formula, doubled(args), grad.double())
    # A group without rows, and the bias of one, have nothing that rounding could be compared with.
    named = {name: value for name, value in truth.items() if bool(value.any())}
    return worst([bounded(ours[name], plain[name], value, BF16) for name, value in named.items()])


def dropout(way, shape, rank, tokens, dtype, device) -> Verdict:
    from losa_kernels.masked_lora.triton import launch as launchers

    args, grad = lora_problem(shape, rank, tokens, dtype, device)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()).item())  # as the public function draws it
    drawn = launchers.draw(tokens, shape[1], 0.1, seed, torch.device(device))
    keep = unpack_mask(drawn, shape[1]).double() / (1 - round(0.1 * 65536) / 65536)
    truth = run(partial(dropout_formula, keep=keep), double(args), grad.double())

    def plain(**a):
        narrow = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}
        return dropout_formula(**narrow, keep=keep.to(dtype))

    torch.manual_seed(5)
    with patch.dict(os.environ, LOSA_MASKED_LORA=way):
        ours = run(partial(masked_lora_linear, dropout_p=0.1), args, grad)
    return step_verdict(ours, run(plain, args, grad), truth, dtype, rounds_gradient=True)


def merged(shape, rank, device) -> Verdict:
    args, _ = lora_problem(shape, rank, 1, BF16, device)
    found, exact = merge(args), merge(double(args))
    if not torch.equal(found == 0, ~unpack_mask(args["mask"], shape[1])):
        return float("inf"), 0.0
    return bounded(found, exact.to(BF16), exact, BF16)


def grams(samples, features, dtype, device) -> Verdict:
    """A common component of 30 times the deviation."""
    x = torch.randn(2, samples, features, device=device)
    x = (x + 30 * torch.randn(2, 1, features, device=device)).to(dtype)

    def centred(wide: Tensor) -> Tensor:
        wide = wide - wide.mean(1, keepdim=True)
        return wide @ wide.mT

    return bounded(gram(x), centred(x.float()), centred(x.double()), FP32)
