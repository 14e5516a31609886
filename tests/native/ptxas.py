"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them, and the instructions of
sparse_linear's kernels.

``python -m tests.native.ptxas`` prints what differs from tests/native/ptxas.json, for all architectures, and ends with
1 if anything does within one nvcc release; ``--write`` writes a new table.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

from tests.helpers import shared
from tests.native import sass

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".json")
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
NVCC = shutil.which("nvcc")
ARCHS = ("80", "86", "89", "90a", "120")
# What the tests compile for: what losa_cuda is built for unless told. The others take twice as long again.
TESTED = ("80", "90a")
PARTS = ("steps", "windows", "tiles")  # instructions

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


def version() -> str:
    """nvcc's release, such as "13.0": register counts are comparable within one."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\S+),", text).group(1)


def known(archs: Iterable[str]) -> list[str]:
    """Those that nvcc compiles for."""
    codes = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in archs if f"sm_{arch.rstrip('a')}" in codes]


@cache
def compiled(source: Path, archs: tuple[str, ...] = TESTED) -> tuple[Path, str]:
    """(fatbin for those of the architectures that nvcc knows, what ptxas reported); once in a run of the tests."""
    fatbin = shared.made(f"{source.stem}-{'-'.join(archs)}.fatbin", partial(_compile, source, archs))
    return fatbin, fatbin.with_suffix(".ptxas").read_text()


def _compile(source: Path, archs: tuple[str, ...], fatbin: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known(archs)]
    flags = ["-std=c++20", "-O3", "-DLOSA_KERNELS_ONLY", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-fatbin", "-t", "0"]
    result = subprocess.run([NVCC, *flags, *targets, source, "-o", fatbin], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    fatbin.with_name(f"{source.stem}-{'-'.join(archs)}.ptxas").write_text(result.stderr)


def measure(source: Path, archs: tuple[str, ...] = TESTED) -> dict[str, dict[str, list[int]]]:
    """kernel -> architecture -> [registers, bytes spilled, bytes of static shared memory]."""
    found: dict[str, dict[str, list[int]]] = {}
    for entry in ENTRY.finditer(compiled(source, archs)[1]):
        shared = re.search(r"(\d+) bytes smem", entry["more"])
        spilled = int(entry["stores"]) + int(entry["loads"])
        numbers = [int(entry["registers"]), spilled, int(shared[1]) if shared else 0]
        found.setdefault(readable(entry["name"]), {})[entry["arch"]] = numbers
    return {name: {arch: row[arch] for arch in ARCHS if arch in row} for name, row in sorted(found.items())}


@cache
def sparse_linear_code() -> dict[str, tuple[list[str], dict[str, int]]]:
    """Kernel of sparse_linear.cu or tiles.cu -> its code on sm_90a, see sass.py."""
    fatbins = [compiled(path)[0] for path in SOURCES if path.stem in ("sparse_linear", "tiles")]
    found = {symbol: code for fatbin in fatbins for symbol, code in sass.functions(fatbin, "90a").items()}
    return {readable(symbol): code for symbol, code in sorted(found.items())}


def steps() -> dict[str, list[int]]:
    """row_kernel<...> -> [rows of the weight, shortest, longest path through a step]; sass.step_of."""
    found = {}
    for name, code in sparse_linear_code().items():
        if match := re.match(r"row_kernel<(\d+), (\d+), (\d+), (\d+)>", name):
            tensor, _, batch, _ = match.groups()
            found[name] = [4 if tensor == "1" and batch == "8" else 2, *sass.step_of(*code)]
    return found


def windows() -> dict[str, list[int]]:
    """window_kernel<...> -> [instructions for a row, for a lot of rows, values read for a row: always, at times].

    All for a window; see sass.window_of and sass.value_reads.
    """
    codes = {name: code for name, code in sparse_linear_code().items() if name.startswith("window_kernel<")}
    return {name: [*sass.window_of(*code), *sass.value_reads(*code)] for name, code in codes.items()}


def tiles() -> dict[str, list[int]]:
    """tiles_kernel<...> -> [instructions for a tile, further instructions for a chunk of 4]; sass.tile_of."""
    return {n: list(sass.tile_of(*code)) for n, code in sparse_linear_code().items() if n.startswith("tiles_kernel<")}


def readable(symbol: str) -> str:
    """A kernel's name and template arguments, without return type, namespaces and parameters."""
    names, text = [], symbol.removeprefix("_ZN") if symbol.startswith("_ZN") else symbol.removeprefix("_Z")
    while match := re.match(r"\d+", text):
        end = match.end() + int(match[0])
        names.append(text[match.end() : end])
        text = text[end:]
    arguments = []
    if text.startswith("I"):
        # Literals only, the kind our kernels have: L, a type, the value, E.
        for literal in re.findall(r"L(?:[a-z]|N?\w*?E)(\d+)E", text.split("EEv")[0] + "E"):
            arguments.append(literal)
    return names[-1] + (f"<{', '.join(arguments)}>" if arguments else "")


def text_of(table: dict) -> str:
    """JSON with one line per kernel."""

    def lines(rows: dict, indent: str) -> str:
        return ",\n".join(f"{indent}{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())

    sources = [f"  {json.dumps(name)}: {{\n{lines(rows, '   ')}\n  }}" for name, rows in table["kernels"].items()]
    parts = [f' "nvcc": {json.dumps(table["nvcc"])}', f' "columns": {json.dumps(table["columns"])}']
    parts.append(' "kernels": {\n' + ",\n".join(sources) + "\n }")
    parts += [f' "{part}": {{\n{lines(table[part], "  ")}\n }}' for part in PARTS]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str]) -> int:
    if NVCC is None:
        print("nvcc is not installed")
        return 1
    kernels = {source.stem: measure(source, ARCHS) for source in SOURCES}
    columns = ["registers", "spilled bytes", "static shared bytes"]
    table = {"nvcc": version(), "columns": columns, "kernels": kernels, "steps": steps(), "windows": windows()}
    table["tiles"] = tiles()
    if "--write" in arguments:
        partial = TABLE.with_name(TABLE.name + ".partial")
        partial.write_text(text_of(table))
        partial.replace(TABLE)
        return 0
    committed = json.loads(TABLE.read_text())
    before, changed = committed["kernels"], 0
    for part in PARTS:
        if committed.get(part) != table[part]:
            print(f"{part}: {committed.get(part)} -> {table[part]}")
            changed = 1
    for source in sorted(before | kernels):
        old, new = before.get(source, {}), kernels.get(source, {})
        for name in sorted(old | new):
            if old.get(name) != new.get(name):
                print(f"{source} {name}: {old.get(name)} -> {new.get(name)}")
                changed = 1
    if committed["nvcc"] != table["nvcc"]:
        print(f"the table is of nvcc {committed['nvcc']}, this is {table['nvcc']}, whose numbers may be others")
        return 0
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
