"""Run by ``test_early_start.py``, outside of Triton's interpreter: what the kernels do before they wait, by their PTX.

A kernel that starts before its predecessor ends must wait before it reads what that one writes, and before it stores
anything (its successor trusts that all before it has ended). For every load and store, on every way to it.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turbomoe.kv.codecs import make_codec
from turbomoe.kv.kernels import decode
from turbomoe.kv.kernels.attend import attend as attend_kernel
from turbomoe.kv.kernels.launch import COMPILER_READ, STAGES
from turbomoe.kv.kernels.layout import chunks, in_bytes

WAIT = "griddepcontrol.wait"
SHAPE = {"HEADS": 8, "KV_HEADS": 2, "GROUP": 4, "EARLY": True}
FLOATS = dict.fromkeys("factors offsets part_top part_total sums totals out signs mean spread turns".split(), "*fp32")
LONGS = dict.fromkeys("starts slots pages".split(), "*i64")
NUMBERS = dict.fromkeys("pages_per_slot query_stride_b query_stride_h".split(), "i32")
OTHERS = {"part_far": "*fp16", "lifts": "*i32", "columns": "*i32", "v_columns": "*i32", "scale": "fp32"}
KINDS = FLOATS | LONGS | NUMBERS | OTHERS


def compiled(
    function: Any, constants: dict[str, Any], kinds: dict[str, str], warps: int, capability: int = 90
) -> tuple[str, list[str]]:  # fmt: skip
    """PTX for a GPU of this compute capability, and the names of its parameters."""
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else (KINDS | kinds).get(name, "*bf16") for name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return made.asm["ptx"], [name for name in names if name not in constants]


def attend(dim: int, k: str, v: str, capability: int = 90, early: bool = True) -> tuple[str, list[str]]:
    k_width, v_width = (make_codec(name, dim).planes[0].width for name in (k, v))
    stages = 1 if COMPILER_READ.isdisjoint((k, v)) else STAGES
    constants = SHAPE | {
        "D": dim, "SINK": 64, "RECENT": 256, "BEHIND": 320, "K_KIND": k, "V_KIND": v, "K_WIDTH": k_width,
        "V_WIDTH": v_width, "HAS_MEAN": True, "SPLITS": 64, "WINDOWS": 6, "CHUNKS": chunks(dim, k, v),
        "STAGES": stages, "EARLY": early, "ASM": True, "PRECISION": "tf32",
    }  # fmt: skip
    kinds = dict.fromkeys("k_scales v_scales k_table v_table".split(), "*fp16")
    kinds |= {"k_codes": "*i8" if k == "q8_0" else "*u8", "v_codes": "*u8", "k_dims": "*i32", "v_dims": "*i32"}
    kinds["turned"] = "*i8" if in_bytes(k) else "*fp16"
    return compiled(attend_kernel, constants, kinds, 4, capability)


def too_early(ptx: str, parameters: list[str], written: set[str]) -> list[str]:
    """Stores, and loads of what the predecessor has ``written``, that some way reaches without a wait."""
    lines = [line.strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    origin = _origins(lines, parameters)
    waited, found, access = _waited(lines), [], re.compile(r"\b(ld|st)\S*global\S*\s.*?\[\s*(%\w+)")
    for line, is_sure in zip(lines, waited, strict=True):
        if not is_sure and (match := access.search(line)) and (
            match[1] == "st" or origin.get(match[2], set()) & written
        ):  # fmt: skip
            found.append(line)
    return found


def _origins(lines: list[str], parameters: list[str]) -> dict[str, set[str]]:
    """The parameters that a register was computed from; what was loaded from memory comes from none."""
    found: dict[str, set[str]] = {}
    for _ in range(3):  # loops hand registers back
        for line in lines:
            match = re.match(r"(?:@!?%\w+\s+)?([a-z]\S*)\s+(%\w+),\s*(.*);", line)
            if match is None or "global" in match[1]:
                continue
            if named := re.search(r"\[\w+_param_(\d+)\]", match[3]):
                number = int(named[1])
                sources = {parameters[number]} if number < len(parameters) else set()
            else:
                sources = set().union(*(found.get(register, set()) for register in re.findall(r"%\w+", match[3])))
            found.setdefault(match[2], set()).update(sources)
    return found


def _waited(lines: list[str]) -> list[bool]:
    """Whether every way to a line passes a wait."""
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$\w+:", line)}
    before: list[bool | None] = [None] * len(lines)
    before[0], todo = False, [0]
    while todo:
        i = todo.pop()
        line, after = lines[i], bool(before[i]) or WAIT in lines[i]
        jump = re.search(r"\bbra\S*\s+(\$\w+)", line)
        ways = [labels[jump[1]]] if jump else []
        if not (jump and not line.startswith("@")) and not re.match(r"(ret|exit|trap)\b", line):
            ways.append(i + 1)
        for way in ways:
            if way < len(lines) and (before[way] is None or (before[way] and not after)):
                before[way] = after
                todo.append(way)
    return [each is not False for each in before]  # what nothing leads to is never run


def main(case: str) -> None:
    name, _, rest = case.partition(":")
    if name == "attend":
        dim, k, v = rest.split(",")
        ptx, parameters = attend(int(dim), k, v)
        written = {"turned", "factors", "lifts", "offsets"}
    elif name == "merge":
        constants = SHAPE | {"D": 256, "BEHIND": 320, "SPLITS": 64, "WINDOWS": 6, "PARTS": 128, "WINDOW_ROWS": 8,
                             "BLOCK": 64, "COLUMNS": 32}  # fmt: skip
        ptx, parameters = compiled(decode.merge, constants, {}, 4)
        written = {"part_top", "part_total", "part_far"}
    else:
        constants = SHAPE | {"D": 256, "SINK": 64, "RECENT": 256, "ROTATED": True, "HAS_MEAN": True}
        ptx, parameters = compiled(decode.finish, constants, {}, 1)
        written = {"sums", "totals"}
    assert not too_early(ptx, parameters, written), too_early(ptx, parameters, written)[:5]
    loads = too_early("\n".join(line for line in ptx.splitlines() if WAIT not in line), parameters, written)
    assert any("ld" in line for line in loads) and any("st" in line for line in loads), "the search finds nothing"
    print("waits in time")


if __name__ == "__main__":
    main(sys.argv[1])
