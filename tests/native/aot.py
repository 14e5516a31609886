"""Compile what the Triton launchers launch, for GPUs that are not there, and read the machine code.

The launchers run on meta tensors and their one ``start_kernel`` function is replaced by a recorder, so that what is
compiled has the arguments, alignments and tiles of a real call.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.native import wgmma

TABLE = Path(__file__).with_name("triton_aot.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a program may ask for
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


class Launch:
    """A kernel with the arguments of one launch."""

    def __init__(self, kernel, grid, tile=None, num_warps=None, num_stages=None, **arguments):
        self.kernel, self.tile, self.arguments = kernel, tile, arguments
        self.warps, self.stages = (num_warps, num_stages) if tile is None else (tile.warps, tile.stages)

    def source(self) -> ASTSource:
        """The specialisation that triton.jit would make: 1 is constant, multiples of 16 are known as such."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], whole = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], whole = "fp32", False
            else:
                signature[name], whole = "i32", special and value % 16 == 0
            if whole:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def build(self, arch: int):
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=options)

    def assemble(self, arch: int) -> dict[str, int]:
        """registers, spills (bytes) and shared (bytes) on 8.6 and 8.9: Triton makes the same code for both, and takes
        ten times as long as ptxas."""
        compiled = self.build(86)
        with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
            file.write(compiled.asm["ptx"].encode())
            file.flush()
            command = [TOOLS / "ptxas", "-v", f"-arch=sm_{arch}", "-o", "/dev/null", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return {
            "registers": int(re.search(r"Used (\d+) registers", usage)[1]),
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", usage))),
            "shared": compiled.metadata.shared,
        }

    def compile(self, arch: int) -> dict[str, int]:
        """registers, spills (instructions), shared (bytes), hgmma, hmma (instructions), loop: see ``main_loop``; wrong:
        wgmma with a wrong descriptor."""
        compiled = self.build(arch)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            instructions, loops, twice = _disassembly(_tool("nvdisasm", "-c", file.name))
        counts = Counter(_mnemonic(line) for line in instructions)
        return {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spills": counts["STL"] + counts["LDL"],
            "shared": compiled.metadata.shared,
            "hgmma": counts["HGMMA"],
            "hmma": counts["HMMA"],
            "wrong": len(wgmma.wrong_descriptors(twice)),
            **main_loop(loops),
        }


def main_loop(loops: list[list[str]]) -> dict[str, int]:
    """The first innermost loop that loads from global memory, if any, and preferably multiplies on tensor cores.

    loop: its instructions per warp; loop_mma: how many of them run on tensor cores.
    """
    loops = [[_mnemonic(line) for line in loop] for loop in loops]
    loops = [loop for loop in loops if not {"LDG", "LDGSTS"}.isdisjoint(loop)]
    multiply = [loop for loop in loops if not {"HGMMA", "HMMA"}.isdisjoint(loop)]
    loop = next(iter(multiply or loops), [])
    return {"loop": len(loop), "loop_mma": loop.count("HGMMA") + loop.count("HMMA")}


def record(module, call: Callable[[], object], monkeypatch) -> list[Launch]:
    """What ``call`` launches through ``module.start_kernel``."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "start_kernel", lambda *args, **kwargs: launches.append(Launch(*args, **kwargs)))
        call()
    return launches


def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run here, if it cannot."""
    triton_version, numpy_version = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np))
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} fails on loops with NumPy {np.__version__}"
    return None


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _disassembly(sass: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Instructions; the bodies of innermost loops (a branch back, with none inside); instructions with each of these
    bodies twice in a row."""
    labels, instructions, loops = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    spans = [
        (labels[branch[1]], index)
        for index, line in enumerate(instructions)
        if (branch := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and labels.get(branch[1], index) < index
    ]
    twice, copied = [], 0
    for start, end in sorted(spans):
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            loops.append(instructions[start : end + 1])
            twice += instructions[copied : end + 1] + loops[-1]
            copied = end + 1
    return instructions, loops, twice + instructions[copied:]


def _mnemonic(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def read_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(table: dict) -> None:
    """One case a line."""
    versions = []
    for version, architectures in sorted(table.items()):
        parts = []
        for name, cases in sorted(architectures.items()):
            rows = ",\n".join(f"   {json.dumps(case)}: {json.dumps(row)}" for case, row in sorted(cases.items()))
            parts.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(parts) + "\n }")
    temporary = TABLE.with_name(TABLE.name + ".partial")
    temporary.write_text("{\n" + ",\n".join(versions) + "\n}\n")
    temporary.replace(TABLE)
