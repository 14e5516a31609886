"""Machine instructions of the loops of sparse_linear's kernels, counted along the paths that a warp takes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

TRITON = importlib.util.find_spec("triton")
TOOLS = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" if TRITON else None


def step_of(instructions: list[str], labels: dict[str, int]) -> tuple[int, int]:
    """(shortest, longest) number of instructions through row_kernel's step: 8 columns of every row of a lane.

    It is the smallest loop that waits for copies. The shortest path copies nothing; the longest copies the next 256
    values of every row, which on average as many steps do as there are kept weights. Left out is what handles the
    buffer's last few values, which stores to shared memory one by one.
    """
    spans = [(end - start, start, end) for start, end in back_edges(instructions, labels)]
    _, start, end = min(s for s in spans if any("DEPBAR.LE" in line for line in instructions[s[1] : s[2] + 1]))
    inside = set(range(start, end + 1))
    for _, first, last in spans:
        if (
            start < first
            and last < end
            and any(re.search(r"\bSTS\b|\bSTS\.", i) for i in instructions[first : last + 1])
        ):
            inside -= set(range(first, last + 1))
    return paths(instructions, labels, start, end, inside)


def window_of(instructions: list[str], labels: dict[str, int]) -> tuple[int, int]:
    """(row, lot): the shortest numbers of instructions through window_kernel's loops, for a window of 1024 columns.

    row: through the loop over rows, the smallest around all tensor products. lot: outside it, from one lot of rows to
    the next, for a warp that counts the masks of a whole lot and requests the next lot's masks, but stores no sums.
    """
    start, end = row_loop(instructions, labels)
    row = paths(instructions, labels, start, end, set(range(start, end + 1)))[0]
    outside = set(range(len(instructions))) - set(range(start + 1, end + 1))
    reached = distances(instructions, labels, end + 1, outside)
    counted = max(at for at in reached if "SHFL.UP" in instructions[at])
    asked = max(at for at in reached if re.search(r"LDG\.E\.NA\.LTC256B\.CONSTANT", instructions[at]))
    stops = (end + 1, counted, asked, start)
    return row, sum(distances(instructions, labels, a, outside)[b] for a, b in zip(stops, stops[1:], strict=False))


def value_reads(instructions: list[str], labels: dict[str, int]) -> tuple[int, int]:
    """How many values a lane reads from shared memory for each row and window: always, and under a condition."""
    start, end = row_loop(instructions, labels)
    reads = [line for line in instructions[start : end + 1] if "LDS.U16" in line]
    return sum(not line.startswith("@") for line in reads), sum(line.startswith("@") for line in reads)


def row_loop(instructions: list[str], labels: dict[str, int]) -> tuple[int, int]:
    products = [index for index, line in enumerate(instructions) if line.startswith("HMMA")]
    spans = [(end - start, start, end) for start, end in back_edges(instructions, labels)]
    return min(span for span in spans if span[1] < products[0] and products[-1] < span[2])[1:]


def following(instructions: list[str], labels: dict[str, int], at: int) -> list[int]:
    """Where a warp may go after an instruction, if its lanes stay together."""
    if instructions[at].startswith("EXIT"):
        return []
    branch = re.match(r"(@!?U?P\w+\s+)?BRA\b.*(\.L_x_\d+)", instructions[at])
    if not branch or "BRA.DIV" in instructions[at]:  # which is for warps that have come apart
        return [at + 1]
    conditional = branch[1] or re.match(r"BRA\s+!?U?P", instructions[at])
    return [labels[branch[2]], *([at + 1] if conditional else [])]


def distances(instructions: list[str], labels: dict[str, int], start: int, inside: set[int]) -> dict[int, int]:
    """Instruction -> how many come before it at least, from ``start``, through ``inside`` only."""
    found, queue = {start: 0}, [start]
    for at in queue:
        for to in following(instructions, labels, at):
            if to in inside and to not in found:
                found[to] = found[at] + 1
                queue.append(to)
    return found


def tile_of(instructions: list[str], labels: dict[str, int]) -> tuple[int, int]:
    """(instructions of tiles_kernel for a tile, further instructions for a chunk of tiles).

    The first is the longest way through the smallest loop around all tensor products. The second is the shortest way
    through the rest of the loop around that loop, among the ways that request a copy.
    """
    products = [index for index, line in enumerate(instructions) if line.startswith("HMMA")]
    spans = sorted((end - start, start, end) for start, end in back_edges(instructions, labels))
    (_, start, end), *_ = (s for s in spans if s[1] < products[0] and products[-1] < s[2])
    (_, first, last), *_ = (s for s in spans if s[1] < start and end < s[2])
    (copy,) = (i for i in range(end, last) if instructions[i].startswith("UBLKCP"))
    inside = set(range(first, last + 1))
    ways = ((first, start), (end, copy), (copy, last))
    # A way's two ends are counted with it, and again with the next way or with the tile's loop.
    rest = sum(paths(instructions, labels, *way, inside)[0] for way in ways) - len(ways)
    return paths(instructions, labels, start, end, inside)[1], rest


def paths(instructions: list[str], labels: dict[str, int], start: int, end: int, inside: set[int]) -> tuple[int, int]:
    """(shortest, longest) number of instructions forward from start to end, through ``inside`` only."""

    @cache
    def path(at: int) -> tuple[int, int] | None:
        if at == end:
            return 1, 1
        ways = [way for to in following(instructions, labels, at) if to in inside and to > at and (way := path(to))]
        return (1 + min(w[0] for w in ways), 1 + max(w[1] for w in ways)) if ways else None

    return walk(path, start, end)


def walk(path, start: int, end: int) -> tuple[int, int]:
    """``path(start)``, from the end backwards, so that the recursion stays shallow."""
    for at in range(end, start, -1):
        path(at)
    return path(start)


def back_edges(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    return [
        (labels[branch[1]], index)
        for index, line in enumerate(instructions)
        if (branch := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and labels.get(branch[1], index) < index
    ]


def functions(fatbin: Path, arch: str) -> dict[str, tuple[list[str], dict[str, int]]]:
    """symbol -> (instructions, index of each label)"""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [TOOLS / "cuobjdump", "-xelf", f"sm_{arch}", fatbin], cwd=folder, check=True, capture_output=True
        )
        (cubin,) = Path(folder).glob(f"*sm_{arch}*.cubin")
        text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    found = {}
    parts = re.split(r"(?m)^\.text\.(\w+):", text)
    for symbol, body in zip(parts[1::2], parts[2::2], strict=True):
        instructions, labels = [], {}
        for line in body.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
                instructions.append(instruction[1].strip())
        found[symbol] = instructions, labels
    return found
