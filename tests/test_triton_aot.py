"""The Triton kernels compile for sm_80 and sm_90a without a GPU: no spills, tensor cores where they belong.

tests/triton_aot.json holds the figures by Triton version. The versions in it must give the same again; any other is
held to the limits alone. To record the installed Triton's figures, all tiles of all lists included (a few minutes):

    PYTHONPATH=tests python tests/test_triton_aot.py
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

import aot
import triton

from losa_kernels.masked_lora import triton as lora
from losa_kernels.masked_lora import triton_launch, tuning

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = (80, 90)


def arguments(tokens=4096, out=4096, into=4096, rank=16, dtype=BF16, masked=True, factors=FP32):
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    mask = empty(out, -(-into // 8), dtype=torch.uint8) if masked else None
    adapter = (empty(rank, into, dtype=factors), empty(out, rank, dtype=factors))
    return empty(tokens, into), empty(tokens, out), empty(out, into), mask, *adapter, empty(out)


def forward(p=0.0, **shape):
    x, _, weight, mask, A, B, bias = arguments(**shape)
    return lora.forward(x, weight, mask, A, B, 2.0, bias, p, 5)


def backward(needs, p=0.0, **shape):
    x, dy, weight, mask, A, B, _ = arguments(**shape)
    return lora.backward(dy, x, weight, mask, A, B, 2.0, p, 5, needs)


def gradient_x(**options):
    return backward([True, False, False, False], **options)


def gradient_AB(**options):
    return backward([False, True, True, False], **options)


def merge(**shape):
    _, _, weight, mask, A, B, _ = arguments(**shape)
    return lora.merge(weight, mask, A, B, 2.0)


# name: (call, way, whether it runs in every test or only when the table is written)
CASES = {
    "forward r16": (lambda: forward(), "fused", True),
    "forward r8 W != 0 fp16": (lambda: forward(rank=8, dtype=FP16, masked=False), "fused", True),
    "forward r8": (lambda: forward(rank=8), "fused", False),
    "forward r32": (lambda: forward(rank=32), "fused", False),
    "forward r64": (lambda: forward(rank=64), "fused", True),
    "forward r128": (lambda: forward(rank=128), "fused", False),
    "forward bf16 factors": (lambda: forward(factors=BF16), "fused", False),
    "forward 16 tokens": (lambda: forward(tokens=16), "fused", False),
    "forward 64 tokens": (lambda: forward(tokens=64), "fused", False),
    "forward ragged": (lambda: forward(tokens=333, out=1040, into=592), "fused", False),
    "forward unaligned": (lambda: forward(tokens=333, out=577, into=583), "fused", False),
    "forward unaligned r128": (lambda: forward(tokens=333, out=577, into=583, rank=128), "fused", False),
    "forward unaligned dropout": (lambda: forward(p=0.1, tokens=333, out=577, into=583), "fused", False),
    "forward dropout ragged": (lambda: forward(p=0.1, tokens=333, out=1040, into=592), "fused", False),
    "forward dropout r64": (lambda: forward(p=0.1, rank=64), "fused", False),
    "forward dropout": (lambda: forward(p=0.1), "fused", True),
    "forward fp32": (lambda: forward(dtype=FP32), "fused", False),
    "gradient of x r16": (lambda: gradient_x(), "fused", True),
    "gradient of x r8": (lambda: gradient_x(rank=8), "fused", False),
    "gradient of x r64": (lambda: gradient_x(rank=64), "fused", False),
    "gradient of x W != 0": (lambda: gradient_x(masked=False), "fused", False),
    "gradient of x ragged": (lambda: gradient_x(tokens=333, out=1040, into=592), "fused", False),
    "gradient of x unaligned": (lambda: gradient_x(tokens=333, out=577, into=583), "fused", False),
    "gradient of x unaligned dropout": (lambda: gradient_x(p=0.1, tokens=333, out=577, into=583), "fused", False),
    "gradient of x dropout ragged": (lambda: gradient_x(p=0.1, tokens=333, out=1040, into=592), "fused", False),
    "gradient of x dropout r64": (lambda: gradient_x(p=0.1, rank=64), "fused", False),
    "gradient of x dropout": (lambda: gradient_x(p=0.1), "fused", True),
    "gradient of A, B r16": (lambda: gradient_AB(), "fused", True),
    "gradient of A, B r64": (lambda: gradient_AB(rank=64), "fused", False),
    "gradient of A, B r128": (lambda: gradient_AB(rank=128), "fused", True),
    "gradient of A, B W != 0": (lambda: gradient_AB(masked=False), "fused", False),
    "gradient of A, B unaligned": (lambda: gradient_AB(tokens=333, out=577, into=583), "fused", False),
    "gradient of A, B dropout": (lambda: gradient_AB(p=0.1), "fused", False),
    "gradient of A, B unaligned r64": (lambda: gradient_AB(tokens=333, out=577, into=583, rank=64), "fused", False),
    "gradient of A, B from G r16": (lambda: gradient_AB(), "compose", True),
    "gradient of A, B from G r128": (lambda: gradient_AB(rank=128), "compose", False),
    "gradient of A, B from G W != 0": (lambda: gradient_AB(rank=8, masked=False), "compose", False),
    "gradient of A, B from G unaligned": (lambda: gradient_AB(tokens=333, out=577, into=583), "compose", False),
    "gradient of A, B from G fp16": (lambda: gradient_AB(rank=64, dtype=FP16), "compose", True),
    "gradient of A, B from G fp16 W != 0": (lambda: gradient_AB(dtype=FP16, masked=False), "compose", False),
    "gradient of A, B from G fp32": (lambda: gradient_AB(dtype=FP32), "compose", False),
    "gradient of A, B fp32": (lambda: gradient_AB(dtype=FP32), "fused", False),
    "compose r16": (lambda: forward(), "compose", True),
    "compose r8 W != 0": (lambda: forward(rank=8, masked=False), "compose", False),
    "compose ragged": (lambda: forward(tokens=333, out=1040, into=592), "compose", False),
    "compose unaligned": (lambda: forward(tokens=333, out=577, into=583), "compose", True),
    "compose unaligned r64": (lambda: forward(tokens=333, out=577, into=583, rank=64), "compose", False),
    "compose r128": (lambda: forward(rank=128), "compose", True),
    "compose fp32": (lambda: forward(dtype=FP32), "compose", False),
    "compose fp32 r128": (lambda: forward(dtype=FP32, rank=128), "compose", False),
    "merge bf16 r16": (lambda: merge(), "fused", True),
    "merge bf16 r128": (lambda: merge(rank=128), "fused", False),
}
# Kernels without a product of tiles, once each.
SMALL = {"split_kernel": "forward r16", "drop_kernel": "forward dropout", "sum_kernel": "gradient of A, B r16"}


def launches(case: str, arch: int, monkeypatch, every_tile: bool) -> dict[str, aot.Launch]:
    """Row name -> what to compile; of the products the tile that runs untuned, or all candidates."""
    call, way, _ = CASES[case]
    monkeypatch.setenv("LOSA_MASKED_LORA", way)
    chosen = {}
    candidates = [0]
    while candidates:
        index = candidates.pop()

        def tuned(key, tiles, device, run, index=index):
            if every_tile and index + 1 < len(tiles):
                candidates.append(index + 1)
            return tiles[index]

        with monkeypatch.context() as patch:
            patch.setattr(tuning, "tuned", tuned)
            for launch in aot.record(triton_launch, call, arch, monkeypatch):
                name = launch.kernel.__name__
                if SMALL.get(name, case) == case:
                    tile = f"{launch.tile.rows}x{launch.tile.columns}x{launch.tile.step}"
                    chosen.setdefault(f"{case}: {name} {tile} w{launch.tile.warps} s{launch.tile.stages}", launch)
    return chosen


def check(row: str, figures: dict[str, int], arch: int) -> None:
    assert figures["spills"] == 0, (row, figures)
    assert figures["shared"] <= aot.SHARED_LIMIT[arch], (row, figures)
    case, kernel = row.split(": ")[0], row.split(": ")[1].split()[0]
    wgmma, mma = figures["hgmma"], figures["hmma"]
    low_rank = kernel == "compose_kernel" and not re.search("r64|r128", case)
    if kernel in SMALL or "fp32" in case or "merge" in case or low_rank:
        assert wgmma == mma == 0, (row, figures)
    elif kernel == "project_given_kernel":
        assert wgmma == 0 and mma == figures["loop_mma"] > 0, (row, figures)
    elif kernel == "project_kernel" and arch == 90:
        # wgmma in the main loop and nowhere else: ptxas 12.8 computes wrong descriptors for wgmma that read one place
        # of shared memory in two layouts, as the two products with G would.
        assert wgmma == figures["loop_mma"] > 0 and mma > 0, (row, figures)
    else:
        assert (mma, wgmma)[arch == 90] > 0 == (wgmma, mma)[arch == 90], (row, figures)
        assert figures["loop_mma"] > 0 or kernel == "compose_kernel", (row, figures)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", [name for name, (_, _, always) in CASES.items() if always])
def test_machine_code(case, arch, monkeypatch):
    recorded = aot.read_table().get(triton.__version__, {}).get(f"sm_{arch}")
    compiled = {row: launch.compile(arch) for row, launch in launches(case, arch, monkeypatch, False).items()}
    assert compiled
    for row, figures in compiled.items():
        check(row, figures, arch)
        if recorded is not None:
            assert figures == recorded.get(row), row


@pytest.mark.parametrize(
    "call, products",
    [
        (lambda: forward(dtype=FP32), 1),
        (lambda: forward(p=0.1, dtype=FP32), 2),
        (lambda: gradient_x(p=0.1, dtype=FP32), 2),
        (lambda: gradient_AB(dtype=FP32), 1),
    ],
)
def test_fp32_sums_are_added_up_in_chunks(call, products, monkeypatch):
    """No product continues an earlier step's sums, which would pile up roundings along the whole reduction."""
    monkeypatch.setenv("LOSA_MASKED_LORA", "fused")
    launches = aot.record(triton_launch, call, 90, monkeypatch)
    (launch,) = (launch for launch in launches if launch.kernel.__name__ not in SMALL)
    code = launch.build(90).asm["ttgir"]
    zeros = re.findall(r"(%\w+) = arith.constant dense<0.0+e\+00> : tensor<\w+xf32", code)
    accumulators = re.findall(r"= tt\.dot %\w+, %\w+, (%\w+)", code)
    assert len(accumulators) > products and set(accumulators) <= set(zeros)
    assert len(re.findall("= math.fma ", code)) == products


@pytest.mark.parametrize("version", aot.read_table())
def test_recorded_figures_are_within_limits(version):
    for name, rows in aot.read_table()[version].items():
        assert len(rows) >= len(CASES)
        for row, figures in rows.items():
            check(row, figures, int(name.removeprefix("sm_")))


def main() -> None:
    table, rows = aot.read_table(), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for arch in ARCHITECTURES:
            rows[f"sm_{arch}"] = {}
            for case in CASES:
                for row, launch in launches(case, arch, monkeypatch, True).items():
                    rows[f"sm_{arch}"][row] = launch.compile(arch)
                    print(f"sm_{arch}", row, rows[f"sm_{arch}"][row], flush=True)
    aot.write_table(table | {triton.__version__: rows})


if __name__ == "__main__":
    main()
