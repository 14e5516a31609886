"""The Triton kernels compile for every supported GPU without one: no spills, tensor cores where they belong, shared
memory within the device's limit, wgmma with right descriptors (see wgmma.py).

triton_aot.json beside it holds the figures by Triton version. The versions in it must give the same again; any other
is held to the limits alone. It has all tiles of all lists for sm_80 and sm_90a, what runs unmeasured for sm_120, and a
representative few of that for sm_86 and sm_89. To record the installed Triton's figures takes a quarter of an hour:

    python -m tests.native.test_triton_aot [HOW NAMES OF CASES BEGIN]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import triton

from losa_kernels.cka import triton as cka
from losa_kernels.grouped_masked_lora import triton as grouped
from losa_kernels.grouped_masked_lora.groups import Groups
from losa_kernels.masked_lora import triton as lora
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.masked_lora.triton import launch as launchers
from losa_kernels.masked_lora.triton import tuning
from tests.native import aot, wgmma

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def arguments(tokens=4096, out=4096, into=4096, rank=16, dtype=BF16, masked=True, factors=FP32):
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    mask = empty(out, -(-into // 8), dtype=torch.uint8) if masked else None
    adapter = (empty(rank, into, dtype=factors), empty(out, rank, dtype=factors))
    return empty(tokens, into), empty(tokens, out), empty(out, into), mask, *adapter, empty(out)


def forward(p=0.0, **shape):
    x, _, weight, mask, A, B, bias = arguments(**shape)
    return lora.forward(x, Layer(weight, mask, A, B, 2.0), bias, p, 5)


def backward(needs, p=0.0, **shape):
    x, dy, weight, mask, A, B, _ = arguments(**shape)
    return lora.backward(dy, x, Layer(weight, mask, A, B, 2.0), p, 5, needs)


def gradient_x(**options):
    return backward([True, False, False, False], **options)


def gradient_AB(**options):
    return backward([False, True, True, False], **options)


def merge(**shape):
    _, _, weight, mask, A, B, _ = arguments(**shape)
    return lora.merge(Layer(weight, mask, A, B, 2.0))


def groups(count=128, rows=1024, out=768, into=2048, rank=8):
    """x, dy, ends and the layers of so many groups."""
    x, dy, weight, mask, A, B, _ = arguments(rows, out, into, rank)
    ends = torch.empty(count, dtype=torch.int64, device="meta")
    return x, dy, ends, Groups([weight] * count, [mask] * count, [A] * count, [B] * count, 2.0)


def grouped_forward(**shape):
    x, _, ends, layers = groups(**shape)
    return grouped.forward(x, ends, layers)


def grouped_gradient_AB(**shape):
    x, dy, ends, layers = groups(**shape)
    return grouped.backward(dy, x, ends, layers, [False, True, True, False])


def gram(samples, columns=1 << 16, dtype=BF16):
    return cka.gram(torch.empty(4, samples, columns, dtype=dtype, device="meta"))


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
    "forward dropout r128": (lambda: forward(p=0.1, rank=128), "fused", False),
    "forward dropout": (lambda: forward(p=0.1), "fused", True),
    "forward dropout 16 tokens": (lambda: forward(p=0.1, tokens=16), "fused", False),
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
    "gradient of x dropout r128": (lambda: gradient_x(p=0.1, rank=128), "fused", True),
    "gradient of x dropout unaligned r128": (
        lambda: gradient_x(p=0.1, tokens=333, out=577, into=583, rank=128),
        "fused",
        False,
    ),
    "gradient of x dropout": (lambda: gradient_x(p=0.1), "fused", True),
    "gradient of A, B r16": (lambda: gradient_AB(), "fused", True),
    "gradient of A, B r64": (lambda: gradient_AB(rank=64), "fused", False),
    "gradient of A, B r128": (lambda: gradient_AB(rank=128), "fused", True),
    "gradient of A, B W != 0": (lambda: gradient_AB(masked=False), "fused", False),
    "gradient of A, B unaligned": (lambda: gradient_AB(tokens=333, out=577, into=583), "fused", False),
    "gradient of A, B dropout": (lambda: gradient_AB(p=0.1), "fused", False),
    "gradient of A, B dropout r128": (lambda: gradient_AB(p=0.1, rank=128), "fused", False),
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
    "compose dropout": (lambda: forward(p=0.1), "compose", True),
    "compose dropout unaligned r64": (
        lambda: forward(p=0.1, tokens=333, out=577, into=583, rank=64),
        "compose",
        False,
    ),
    "compose unaligned": (lambda: forward(tokens=333, out=577, into=583), "compose", True),
    "compose unaligned r64": (lambda: forward(tokens=333, out=577, into=583, rank=64), "compose", False),
    "compose r128": (lambda: forward(rank=128), "compose", True),
    "compose fp32": (lambda: forward(dtype=FP32), "compose", False),
    "compose fp32 r128": (lambda: forward(dtype=FP32, rank=128), "compose", False),
    "merge bf16 r16": (lambda: merge(), "fused", True),
    "merge bf16 r128": (lambda: merge(rank=128), "fused", False),
    "groups, compose r8": (lambda: grouped_forward(), "auto", True),
    "groups, compose r16": (lambda: grouped_forward(rank=16), "auto", False),
    "groups, compose ragged": (lambda: grouped_forward(out=1040, into=592), "auto", False),
    "groups, gradient of A, B r8": (lambda: grouped_gradient_AB(), "auto", True),
    "groups, gradient of A, B ragged": (lambda: grouped_gradient_AB(out=1040, into=592), "auto", False),
    "Gram 16 x 65536": (lambda: gram(16), "auto", False),
    "Gram 64 x 65536": (lambda: gram(64), "auto", True),
    "Gram 128 x 65536": (lambda: gram(128), "auto", True),
    "Gram 256 x 65536": (lambda: gram(256), "auto", True),
    "Gram 64 x 65536 fp32": (lambda: gram(64, dtype=FP32), "auto", False),
    "Gram 128 x 65536 fp32": (lambda: gram(128, dtype=FP32), "auto", False),
    "Gram 256 x 65536 fp32": (lambda: gram(256, dtype=FP32), "auto", False),
    "Gram 16 x 47": (lambda: gram(16, 47), "auto", True),
    "Gram 60 x 3": (lambda: gram(60, 3), "auto", False),
}
# Kernels without a product of tiles, once each.
SMALL = {
    "split_kernel": "forward r16",
    "drop_kernel": "forward dropout",
    "keep_kernel": "compose dropout",
    "sum_kernel": "gradient of A, B r16",
}
# Of these the table has what every test compiles, and of that no instructions but registers, spills and shared memory.
ASSEMBLED = (86, 89)
# What every test compiles for 12.0: the products of a usual recipe.
ON_120 = ("forward dropout", "gradient of x dropout", "compose dropout", "gradient of A, B from G r16")


def cases(arch: int) -> list[str]:
    """What the table has of an architecture. Groups are multiplied together on 9.0 and 10.0 alone."""
    here = [case for case in CASES if arch == 90 or not case.startswith("groups")]
    return [case for case in here if CASES[case][2] or arch not in ASSEMBLED]


def launches(case: str, arch: int, monkeypatch) -> Iterator[tuple[str, aot.Launch]]:
    """(row name, what to compile) for all candidates of all products, in the order in which they are tried."""
    call, way, _ = CASES[case]
    seen, following, last = set(), 0, False
    while not last:
        last, index = True, following

        def tuned(op, key, tiles, device, run):
            nonlocal last
            last &= index + 1 >= len(tiles)  # noqa: B023
            return run(tiles[min(index, len(tiles) - 1)])  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setenv("LOSA_MASKED_LORA", way)
            patch.setattr(tuning, "tuned", tuned)
            patch.setattr(tuning, "architecture", lambda device: arch)
            patch.setattr(cka, "_capability", lambda device: arch)
            module = cka if case.startswith("Gram") else grouped if case.startswith("groups") else launchers
            recorded = aot.record(module, call, patch)
        for launch in recorded:
            name = launch.kernel.__name__
            row = f"{case}: {name} {launch.tile or f'w{launch.warps} s{launch.stages}'}"
            if SMALL.get(name, case) == case and row not in seen:
                seen.add(row)
                yield row, launch
        following += 1


def check(row: str, figures: dict[str, int], arch: int) -> None:
    assert figures["spills"] == 0, (row, figures)
    if arch in ASSEMBLED:
        return
    assert figures["wrong"] == 0, (row, figures)
    case, kernel = row.split(": ")[0], row.split(": ")[1].split()[0]
    wgmma, mma = figures["hgmma"], figures["hmma"]
    low_rank = kernel in ("compose_kernel", "compose_groups_kernel") and not re.search("r64|r128", case)
    if kernel == "_gram_kernel":
        samples, columns = map(int, re.findall(r"\d+", case)[:2])
        if samples + columns < cka.SPLIT_FROM:
            assert wgmma == mma == 0, (row, figures)  # an error that an fp32 product must bound
        else:
            assert (wgmma if arch == 90 and samples >= 64 else mma) > 0 < figures["loop_mma"], (row, figures)
    elif kernel in SMALL or "fp32" in case or "merge" in case or low_rank:
        assert wgmma == mma == 0, (row, figures)
    elif kernel in ("project_given_kernel", "project_groups_kernel"):
        assert wgmma == 0 and mma == figures["loop_mma"] > 0, (row, figures)
    elif kernel == "project_kernel" and arch == 90:
        # wgmma in the main loop and nowhere else: the two products with G would read one place of shared memory in two
        # layouts, of which ptxas 12.8 makes wrong descriptors (see wgmma.py).
        assert wgmma == figures["loop_mma"] > 0 and mma > 0, (row, figures)
    else:
        assert (mma, wgmma)[arch == 90] > 0 == (wgmma, mma)[arch == 90], (row, figures)
        assert figures["loop_mma"] > 0 or kernel == "compose_kernel", (row, figures)


def product(row: str) -> str:
    """A row's case and kernel without its tile."""
    return re.sub(r" (\d+x\d+x\d+ )?w\d+ s\d+$", "", row)


def compiled(case: str, arch: int, every_tile: bool, monkeypatch) -> dict[str, dict[str, int]]:
    """Figures by row name: of each product all tiles that fit the device, or the first of them, as it runs
    unmeasured. Each product has one."""
    found, wanted = {}, set()
    for row, launch in launches(case, arch, monkeypatch):
        wanted.add(product(row))
        if every_tile or product(row) not in map(product, found):
            figures = launch.assemble(arch) if arch in ASSEMBLED else launch.compile(arch)
            if figures["shared"] <= aot.SHARED_LIMIT[arch]:
                found[row] = figures
    assert wanted == set(map(product, found)), "one tile of each list fits"
    return found


@pytest.mark.parametrize(
    "arch, case",
    [(arch, case) for arch in (80, 90) for case in cases(arch) if CASES[case][2]]
    + [(86, "gradient of A, B r128"), *((120, case) for case in ON_120)],
)
def test_machine_code(case, arch, monkeypatch):
    recorded = aot.read_table().get(triton.__version__, {}).get(f"sm_{arch}")
    for row, figures in compiled(case, arch, False, monkeypatch).items():
        check(row, figures, arch)
        if recorded is not None:
            assert figures == recorded.get(row), row


def test_code_for_8_9_is_that_for_8_6(monkeypatch):
    for _, launch in list(launches("forward dropout", 86, monkeypatch))[:2]:
        codes = {arch: launch.build(arch) for arch in (86, 89)}
        assert codes[89].metadata.shared == codes[86].metadata.shared
        assert codes[89].asm["ptx"].replace("sm_89", "sm_86") == codes[86].asm["ptx"]


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
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    launches = aot.record(launchers, call, monkeypatch)
    (launch,) = (launch for launch in launches if launch.kernel.__name__ not in SMALL)
    code = launch.build(90).asm["ttgir"]
    zeros = re.findall(r"(%\w+) = arith.constant dense<0.0+e\+00> : tensor<\w+xf32", code)
    accumulators = re.findall(r"= tt\.dot %\w+, %\w+, (%\w+)", code)
    assert len(accumulators) > products and set(accumulators) <= set(zeros)
    assert len(re.findall("= math.fma ", code)) == products


def test_figures_of_two_tritons_are_recorded():
    assert {version[:3] for version in aot.read_table()} >= {"3.6", "3.9"}


@pytest.mark.parametrize("version", aot.read_table())
def test_recorded_figures_are_within_limits(version):
    table = aot.read_table()[version]
    assert sorted(table) == sorted(f"sm_{arch}" for arch in aot.ARCHITECTURES)
    for arch in aot.ARCHITECTURES:
        rows = table[f"sm_{arch}"]
        assert {row.split(": ")[0] for row in rows} == set(cases(arch))
        for row, figures in rows.items():
            check(row, figures, arch)
            assert figures["shared"] <= aot.SHARED_LIMIT[arch], (row, figures)
        # Every product of another architecture has a tile here, too.
        everywhere = {product(row) for row in table["sm_90"] if row.split(": ")[0] in cases(arch)}
        assert set(map(product, rows)) == everywhere


def test_a_high_word_of_a_register_that_nothing_wrote_is_found():
    """The machine code that ptxas 12.8 makes of the fault, and what is right."""
    right = ["USGXT.U32 UR4, UR4, 0xe", "UMOV UR5, URZ", "UIADD3 UR6, UP0, UR4, 0x40, URZ"]
    right += ["UIADD3.X UR7, UR5, -0x7fffffe0, URZ, UP0, !UPT", "UIADD3.64 UR10, UR6, 0x2, URZ"]
    product = "HGMMA.64x32x16.F32.BF16 R24, R48, gdesc[UR8], R24"
    assert wgmma.wrong_descriptors([*right, product]) == []
    assert wgmma.wrong_descriptors([right[0], *right[2:], product]) == [f"{product}: UR11 = None"]
    assert wgmma.wrong_descriptors([*right, "UMOV UR11, UR10", product]) == [f"{product}: UR11 = None"]
    assert wgmma.wrong_descriptors([*right, "UMOV UR11, 0x40", product]) == [f"{product}: UR11 = 0x40"]
    both = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, R24"
    assert wgmma.wrong_descriptors([*right, both]) == [f"{both}: UR9 = None"]
    # In a second round of a loop a register holds what its end has left.
    assert len(wgmma.wrong_descriptors([*right, product, "UMOV UR11, UR4", product])) == 1


def main(begin: str = "") -> None:
    """Record cases whose names begin so, and leave the others as they are."""
    table = aot.read_table()
    rows = dict(table.get(triton.__version__, {})) if begin else {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for arch in aot.ARCHITECTURES:
            known = rows.get(f"sm_{arch}", {})
            rows[f"sm_{arch}"] = {row: figures for row, figures in known.items() if not row.startswith(begin)}
            for case in cases(arch):
                if not case.startswith(begin):
                    continue
                rows[f"sm_{arch}"] |= compiled(case, arch, arch in (80, 90), monkeypatch)
                print(f"sm_{arch}", case, flush=True)
    aot.write_table(table | {triton.__version__: rows})


if __name__ == "__main__":
    main(*sys.argv[1:])
