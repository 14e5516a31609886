"""The descriptors of wgmma in machine code, followed back to the constants that they are made of.

A wgmma on sm_90 finds an operand in shared memory by a descriptor of two words in uniform registers. The low word is
made of the operand's address. The high word is known when a kernel is compiled: the stride between groups of eight
rows, and in the top two bits the swizzle, which every layout of Triton for wgmma has. Where two wgmma read one place of
shared memory in two layouts, ptxas 12.8 (Triton 3.6) computes wrong high words: it adds the constant to a uniform
register that nothing has written, instead of to the zero above the address. The product then reads another place.

So every high word is computed here from the machine code. It has to come out as a constant with a swizzle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PRODUCT = re.compile(r"HGMMA\S*\s+R\w+, (R\w+, )?gdesc\[UR(\d+)\]")
MASK = 0xFFFFFFFF


def wrong_descriptors(instructions: list[str]) -> list[str]:
    """The wgmma of one kernel, a loop's body twice in a row, of which a descriptor is not what a layout makes it."""
    known: dict[str, int] = {}
    wrong = []
    for line in instructions:
        if product := PRODUCT.search(line):
            # The block of four registers holds A's descriptor, unless A is in registers, and B's.
            at = int(product[2])
            for low in (at + 2,) if product[1] else (at, at + 2):
                high = known.get(f"UR{low + 1}")
                if high is None or not high >> 30:
                    wrong.append(f"{line}: UR{low + 1} = {high if high is None else hex(high)}")
        else:
            _step(known, line)
    return wrong


def _step(known: dict[str, int], line: str) -> None:
    """Enter what one instruction writes: a constant, or nothing known."""
    body = re.sub(r"^@!?U?P\w+\s+", "", line)
    name, _, rest = body.partition(" ")
    operands = [o for o in re.split(r",\s*", rest.strip()) if not re.fullmatch(r"!?U?P(T|\d+)", o)]
    target = re.fullmatch(r"(U?R)(\d+)", operands[0]) if operands else None
    if not target:
        return
    kind, first = target[1], int(target[2])
    before = known.get(operands[0])
    values = [_value(known, operand) for operand in operands[1:]]
    results: list[int | None] = [None] * _width(name)
    if name == "UIADD3.64":
        results = _pair_sum([_pair(known, operand) for operand in operands[1:]])
    elif name.startswith("CS2R"):
        results = [0 if operands[1] == "SRZ" else None] * (1 if name == "CS2R.32" else 2)
    elif name in ("UMOV", "MOV", "R2UR"):
        results = values[:1]
    elif name.startswith("IMAD") and values[:2] == [0, 0]:
        results = values[2:3]
    elif name in ("UIADD3", "UIADD3.X", "IADD3", "IADD3.X"):
        results = [_sum(values)]
    if body != line and results[0] != before:
        results = [None] * len(results)  # under a predicate: either
    for register, result in enumerate(results, first):
        known.pop(f"{kind}{register}", None)
        if result is not None:
            known[f"{kind}{register}"] = result & MASK


def _value(known: dict[str, int], operand: str) -> int | None:
    operand = operand.removesuffix(".reuse")
    if operand in ("RZ", "URZ"):
        return 0
    if re.fullmatch(r"-?0x[0-9a-f]+", operand):
        return int(operand, 16)
    return known.get(operand)


def _pair(known: dict[str, int], operand: str) -> tuple[int | None, int | None]:
    """The low and the high word of an operand of 64 bits."""
    register = re.fullmatch(r"(-?)UR(\d+)", operand)
    if not register:  # an immediate, extended by its sign
        value = _value(known, operand) or 0
        return value & MASK, value >> 32 & MASK
    low, high = (known.get(f"UR{int(register[2]) + word}") for word in (0, 1))
    if not register[1]:
        return low, high
    if low is None or high is None:
        return None, None
    return -low & MASK, (-(high << 32 | low) >> 32) & MASK


def _pair_sum(pairs: list[tuple[int | None, int | None]]) -> list[int | None]:
    """Words of a sum of an address and constants. An address is small: adding a negative low word carries."""
    lows, highs = zip(*pairs, strict=True)
    carries = sum(low is not None and low >> 31 for low in lows)
    return [_sum(lows), None if None in highs else sum(highs) + carries]


def _sum(values: Sequence[int | None]) -> int | None:
    return None if None in values else sum(values)


def _width(name: str) -> int:
    """How many registers an instruction writes."""
    parts = name.split(".")
    if "128" in parts or (parts[0] == "LDSM" and parts[-1] == "4") or parts[0] == "HMMA":
        return 4
    return 2 if "64" in parts or "WIDE" in parts or (parts[0] == "LDSM" and parts[-1] == "2") else 1
