"""Reading a compiled program's text: its collectives with their bytes and mesh axes, and what it moves through memory.

XLA's own `cost_analysis` counts the body of a loop once; here every loop counts as often as it runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}
# What names or reorders buffers and moves nothing, and what only announces or ends the work of another instruction.
FREE = (
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all opt-barrier partition-id "
    "replica-id iota async-start async-update async-done copy-done all-gather-done all-reduce-done "
    "collective-permute-done send-done recv-done"
).split()
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_SAFE = re.compile(r"/\*.*?\*/")


@dataclass
class Instruction:
    """shape: its text; a tuple's is that of all its parts."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    inner: str  # what stands between the brackets
    rest: str  # and behind them
    root: bool


@dataclass
class Module:
    """Instructions by computation, in order; how often each computation runs in one call of the program."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    times: dict[str, int] = field(default_factory=dict)  # fused computations are left out: they are one instruction


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing bracket: {text[:100]}")


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        left, is_instruction, right = _SAFE.sub("", line).partition(" = ")
        if not is_instruction or not left.startswith("  "):
            continue
        name = left.replace("ROOT", "").strip().lstrip("%")
        end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
        opened = right.index("(", end)
        closed = _closing(right, opened)
        inner, rest = right[opened + 1 : closed], right[closed + 1 :]
        operands = re.findall(r"%([\w.\-]+)", inner)
        current[name] = Instruction(name, right[:end], right[end:opened].strip(), operands, inner, rest, "ROOT" in left)
    module = Module(computations, entry)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for i in computations[name].values():
            if i.opcode == "while":
                runs = trips(module, i)
                visit(_called(i, "body"), count * runs)
            elif i.opcode in ("call", "async-start"):
                visit(_called(i, "to_apply") or _called(i, "calls"), count)
            elif i.opcode == "conditional":  # the branch that does most is not known: all
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = branches[1].replace("%", "").split(", ") if branches else []
                for branch in names or [_called(i, "true_computation"), _called(i, "false_computation")]:
                    visit(branch, count)

    visit(entry, 1)
    module.times = dict(times)
    return module


def _called(i: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", i.rest)
    return found[1] if found else ""


def trips(module: Module, loop: Instruction) -> int:
    """How often a loop's body runs: as XLA wrote down, or the constant that its condition compares with."""
    known = re.search(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = module.computations[_called(loop, "condition")].values()
    return max((int(i.inner) for i in condition if i.opcode == "constant" and i.inner.isdigit()), default=1)


def size(shape: str, *, fast: bool = True) -> float:
    """Bytes of a shape's text; with fast=False only what lies in main memory, not in the chip's fast one."""
    total = 0.0
    for kind, dims, layout in _ARRAY.findall(shape):
        if not fast and "S(" in layout:
            continue
        width = BYTES.get(kind)
        if width is None:
            digits = re.match(r"[a-z]+(\d+)", kind)
            width = int(digits[1]) / 8 if digits else 0
        total += width * math.prod(int(d) for d in dims.split(",") if d)
    return total


def parts(shape: str) -> list[str]:
    """The parts of a tuple's shape, or the shape itself."""
    return [m[0] for m in _ARRAY.finditer(shape)]


# ---- collectives


def group_of(rest: str, devices: int) -> list[int]:
    """The first group of devices that talk to each other, from any of the forms in which XLA writes groups."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        first = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)", pairs[0])]
        return list(next((p for p in first if p[0] != p[1]), first[0]))
    form = re.search(r"replica_groups=(.*)", rest)
    text = form[1] if form else "{}"
    if text.startswith("mesh["):
        head = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\)\))?(?:, device_ids=\(([^{]*)\))? ?\{(.*?)\}", text)
        axes = [(n, int(s)) for n, s in re.findall(r"'(\w+)'=(\d+)", head[1])]
        order = re.match(r"mesh\[.*?\], device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text)
        ids = np.arange(math.prod(s for _, s in axes))
        if order:
            ids = ids.reshape([int(n) for n in order[1].split(",")])
            ids = ids.transpose([int(n) for n in order[2].split(",")]) if order[2] else ids
        split, sizes = [], []
        wanted = dict((n, (p, s)) for n, p, s in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", head[4]))
        for name, length in axes:  # an axis may be used in part, as 'axis':(before)part
            before, part = wanted.get(name, ("", ""))
            if part:
                sizes += [int(before), int(part), length // int(before) // int(part)]
                split += [False, True, False]
            else:
                sizes.append(length)
                split.append(name in wanted)
        ids = ids.reshape(sizes)
        return [int(n) for n in ids[tuple(slice(None) if s else 0 for s in split)].ravel()]
    if listed := re.match(r"\{\{([\d,]*)\}", text):
        return [int(n) for n in listed[1].split(",")]
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape([int(n) for n in iota[2].split(",")])
        ids = ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids
        return [int(n) for n in ids.reshape([int(n) for n in iota[1].split(",")])[0]]
    return list(range(devices))


def axis_of(group: list[int], mesh: Any) -> str:
    """The mesh axes along which a group's devices differ, as "fsdp" or "data × fsdp"."""
    places = np.array(np.unravel_index(group, tuple(mesh.shape.values())))
    return " × ".join(name for name, row in zip(mesh.shape, places, strict=True) if len(set(row.tolist())) > 1)


@dataclass(frozen=True)
class Collective:
    """bytes: what a device gathers in the end (all-gather), or gives in (all others), each time; count: times a step.

    waits: nothing else can run meanwhile, as the compiler did not make it asynchronous.
    """

    kind: str
    axis: str
    bytes: float
    count: int
    group: int
    waits: bool
    dtype: str


def collectives(module: Module, mesh: Any) -> list[Collective]:
    """All collectives of one call of the program, alike ones together, the most bytes first."""
    devices = math.prod(mesh.shape.values())
    found: dict[tuple, int] = defaultdict(int)
    seen: set[tuple] = set()

    def note(i: Instruction, inside: dict[str, Instruction], count: int, kind: str, waits: bool) -> None:
        group = group_of(i.rest, devices)
        if len(group) < 2:
            return
        given = [inside[o].shape for o in i.operands if o in inside]
        shapes = parts(i.shape) if kind == "all-gather" and not i.opcode.endswith("-start") else given
        if kind == "all-gather" and i.opcode.endswith("-start"):
            shapes = parts(i.shape)[len(given) :][: len(given)]
        number = sum(size(s) for s in shapes)
        dtype = _ARRAY.match(parts(shapes[0])[0])[1] if shapes and parts(shapes[0]) else ""
        found[kind, axis_of(group, mesh), number, len(group), waits, dtype] += count

    for name, count in module.times.items():
        for inside, i, fused in _with_fused(module, name):
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            if fused and channel:  # one collective in several fusions, that go on while other work is done
                if (name, channel[1]) in seen:
                    continue
                seen.add((name, channel[1]))
            if kind == "all-reduce" and "all-reduce-scatter" in fused:
                kind = "reduce-scatter"
            note(i, inside, count, kind, waits=not (i.opcode.endswith("-start") or fused))
    out = [Collective(k, axis, b, n, group, waits, d) for (k, axis, b, group, waits, d), n in found.items()]
    return sorted(out, key=lambda c: -c.bytes * c.count)


def _with_fused(module: Module, name: str) -> Iterator[tuple[dict[str, Instruction], Instruction, str]]:
    """(its computation, instruction, name of the fusion that holds it or "") of a computation and its fusions."""
    inside = module.computations[name]
    for i in inside.values():
        yield inside, i, ""
        if i.opcode == "fusion":
            called = _called(i, "calls")
            for deep, j, deeper in _with_fused(module, called):
                yield deep, j, deeper or called


# ---- memory traffic


def traffic(module: Module) -> float:
    """Bytes read from and written to main memory in one call: each instruction's operands and results, in every run.

    Slices count what they take. What stays in the chip's fast memory, as the compiler placed it, counts nothing.
    """
    return sum(
        count * sum(_moved(module, module.computations[name], i) for i in module.computations[name].values())
        for name, count in module.times.items()
    )


def _moved(module: Module, inside: dict[str, Instruction], i: Instruction) -> float:
    if i.opcode in FREE or "AllocateBuffer" in i.rest or "ConcatBitcast" in i.rest:
        return 0.0
    given = [size(inside[o].shape, fast=False) for o in i.operands if o in inside]
    result = size(i.shape, fast=False)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result if given and given[0] else result
    if i.opcode == "dynamic-update-slice":
        return 2 * (size(inside[i.operands[1]].shape) if result else 0)
    if i.opcode == "scatter":
        return 3 * size(inside[i.operands[-1]].shape) if result else 0
    if i.opcode.endswith("-start"):  # (operands, results, and what it needs itself)
        result = sum(size(s, fast=False) for s in parts(i.shape)[:1])
    if i.opcode != "fusion":
        return sum(given) + result
    deep = module.computations[_called(i, "calls")]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for j in deep.values():
        for o in j.operands:
            users[o].append(j)
    total = 0.0
    for j in deep.values():
        if j.opcode != "parameter" or not size(j.shape, fast=False):
            continue
        if all(u.opcode in ("dynamic-slice", "slice", "gather") and u.operands[0] == j.name for u in users[j.name]):
            total += sum(size(u.shape) for u in users[j.name])
        elif all(u.opcode == "dynamic-update-slice" and u.operands[0] == j.name for u in users[j.name]):
            continue  # written in place
        else:
            total += size(j.shape, fast=False)
    roots = [j for j in deep.values() if j.root]
    if roots and roots[0].opcode == "tuple":
        roots = [deep[o] for o in roots[0].operands]
    written = parts(i.shape)
    for root, shape in zip(roots, written, strict=False):
        if root.opcode == "dynamic-update-slice":
            total += size(deep[root.operands[1]].shape) if size(shape, fast=False) else 0
        else:
            total += size(shape, fast=False)
    return total
