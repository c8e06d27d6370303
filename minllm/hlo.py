"""The compiler's own text of a compiled step, as a tree: modules hold computations, computations hold instructions in the order they run.

    %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"window_config":{...}}

`jax.stages.Compiled.as_text()` writes it: the grammar of HLO's text (openxla/xla, hlo/parser), as scheduled for one device of a
partitioned program. Only what a planner needs is kept: shapes, operands, the computations called, loop trips and the backend's notes.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0,
}  # fmt: skip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One array: its element type, dims and memory space (0: HBM, 1: the core's own vector memory, 5: the host)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        return float(math.prod(self.dims) * _BYTES.get(self.dtype, 1))  # every float8 is one byte


_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, tuples flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """name, opcode, the names of its operands, and the rest of its line; `out` are the arrays that it gives."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str = field(repr=False)
    root: bool = False

    @cached_property
    def out(self) -> tuple[Shape, ...]:
        return shapes(self.type)

    @property
    def bytes(self) -> float:
        return float(sum(s.bytes for s in self.out))

    def attribute(self, name: str) -> str | None:
        """The name or number behind `name=`: a computation, an index, a target."""
        found = re.search(rf"\b{name}=%?\"?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """The computations that this one runs, in no particular order."""
        one = re.findall(r"\b(?:calls|body|to_apply|async_computation)=%([\w.\-]+)", self.rest)
        many = re.search(r"(?:branch|called)_computations=\{([^}]*)\}", self.rest)
        branches = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.rest)
        return tuple(one + branches + (re.findall(r"%([\w.\-]+)", many.group(1)) if many else []))

    @property
    def op_name(self) -> str:
        """Where in the traced function this comes from: jit(step)/jvp()/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @cached_property
    def backend(self) -> dict[str, Any]:
        """The backend's notes. Empty where there are none or they are not JSON."""
        at = self.rest.find("backend_config=")
        if at < 0:
            return {}
        try:
            value = json.JSONDecoder().raw_decode(self.rest[at + len("backend_config=") :])[0]
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def cycles(self) -> int | None:
        """What the compiler's cost model thinks that this takes on one core; None where it has no opinion."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found and int(found.group(1)) > 0 else None


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions) if i.root)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def inside(self, name: str) -> Iterator[Instruction]:
        """Every instruction of a computation and of those that it calls, once each."""
        todo, seen = [name], set()
        while todo:
            here = todo.pop()
            if here in seen:
                continue
            seen.add(here)
            for instruction in self[here]:
                yield instruction
                todo.extend(instruction.calls)

    def collective(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, or that a fusion or an async start wraps."""
        if kind_of(instruction.opcode):
            return instruction
        if instruction.opcode in ("fusion", "async-start", "custom-call-start") and instruction.calls:
            return next((i for i in self.inside(instruction.calls[0]) if kind_of(i.opcode)), None)
        return None

    def trips(self, loop: Instruction, parent: Computation) -> int | None:
        """How often a while loop runs: (limit - start) / step of the counter that its condition compares. None if it is not a counter."""
        known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest)
        if known:
            return int(known.group(1))
        condition, body = self[_named(loop, "condition")], self[_named(loop, "body")]
        test = self._through_fusion(condition.root, condition)
        if test is None or test[0].opcode != "compare":
            return None
        compare, sides = test
        index = [int(i.attribute("index") or -1) for i in sides if i.opcode == "get-tuple-element"]
        limits = [v for i in sides if (v := _constant(i)) is not None]
        if len(index) == 2:  # both are carried: one of them is never changed
            moving = [n for n in index if _carried(body, n) != n]
            if len(moving) != 1:
                return None
            fixed = next(n for n in index if n not in moving)
            start_of = lambda n: self._initial(loop, parent, n)
            index, limits = moving, [start_of(fixed)]
        if len(index) != 1 or len(limits) != 1 or limits[0] is None:
            return None
        start, step = self._initial(loop, parent, index[0]) or 0, self._step(body, index[0])
        span = abs(limits[0] - start) + (compare.attribute("direction") in ("LE", "GE"))
        return max(0, -(-span // step))

    def _through_fusion(self, root: Instruction, computation: Computation) -> tuple[Instruction, list[Instruction]] | None:
        """A comparison and what it compares, seen through the fusion that may hold it."""
        outer = [computation.by_name[o] for o in root.operands if o in computation.by_name]
        if root.opcode != "fusion":
            return root, [_source(i, computation) for i in outer]
        inner = self[root.calls[0]]
        if inner.root.opcode != "compare":
            return None
        sides = []
        for name in inner.root.operands:
            side = _source(inner.by_name[name], inner)
            sides.append(_source(outer[int(side.operands[0])], computation) if side.opcode == "parameter" else side)
        return inner.root, sides

    def _initial(self, loop: Instruction, parent: Computation, index: int) -> int | None:
        value = parent.by_name.get(loop.operands[0])
        if value is None or value.opcode != "tuple":
            return None
        return _constant(_source(parent.by_name[value.operands[index]], parent))

    def _step(self, body: Computation, index: int) -> int:
        root = body.root
        if root.opcode != "tuple" or index >= len(root.operands):
            return 1
        value = _source(body.by_name[root.operands[index]], body)
        inside = self[value.calls[0]] if value.opcode == "fusion" else body
        value = inside.root if value.opcode == "fusion" else value
        steps = [v for o in value.operands if o in inside.by_name and (v := _constant(_source(inside.by_name[o], inside)))]
        return abs(steps[0]) if value.opcode in ("add", "subtract") and len(steps) == 1 else 1


def _named(instruction: Instruction, name: str) -> str:
    value = instruction.attribute(name)
    assert value is not None, (instruction.name, name)
    return value


def kind_of(opcode: str) -> str | None:
    """The collective that an opcode begins: all-gather-start -> all-gather; fusion -> None."""
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _source(instruction: Instruction, computation: Computation) -> Instruction:
    """What a chain of copies and bitcasts begins with."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start") and instruction.operands[0] in computation.by_name:
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    return int(instruction.operands[0]) if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0]) else None


def _carried(body: Computation, index: int) -> int | None:
    """Which element of the loop state becomes element `index`."""
    if body.root.opcode != "tuple":
        return None
    value = _source(body.by_name[body.root.operands[index]], body)
    return int(value.attribute("index") or -1) if value.opcode == "get-tuple-element" else None


# --- parsing ----------------------------------------------------------------------------------------------------------------

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")


def parse(text: str) -> Module:
    """A module from its text. Raises ValueError where there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        if name is None:
            head = _HEAD.match(line)
            if head:
                name, lines = head.group(2), []
                entry = name if head.group(1) else entry
        elif line.startswith("}") and not line.startswith("}}"):
            computations[name], name = Computation(name, tuple(lines)), None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                lines.append(instruction)
            elif lines:  # a kernel's metadata may hold line breaks
                lines[-1] = replace(lines[-1], rest=lines[-1].rest + line)
    if entry is None:
        raise ValueError("this text has no ENTRY computation: it is not the HLO of a compiled program")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if head is None:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)  # a tuple's type has spaces
    opcode = _OPCODE.match(line, end + 1)
    if opcode is None:
        return None
    stop = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : stop - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(filter(None, [inside.strip()]))
    return Instruction(head.group(2), opcode.group(1), line[at:end], operands, line[stop:], bool(head.group(1)))


def _closing(line: str, at: int) -> int:
    """The place behind the bracket that closes the one at `at`."""
    depth = 0
    for found in re.finditer(r"[()]", line[at:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return at + found.end()
    raise ValueError(f"a bracket is not closed: {line[:120]}")


# --- who talks with whom ----------------------------------------------------------------------------------------------------


def groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """The groups of devices, by their number in the program, among which a collective exchanges. For a permutation: its pairs."""
    rest = instruction.rest
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        split, order, used = [], [], []
        # an axis may be used in part: 'x':(2)4 is the 4 of x after the first 2
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(2)):
            used.append((name, int(before or 1), int(size or sizes[name])))
        for name, size in sizes.items():
            cuts, done = [], 1
            for _, before, part in sorted(u for u in used if u[0] == name):
                if before > done:
                    cuts.append((before // done, None))
                cuts.append((part, (name, before)))
                done = before * part
            if size > done:
                cuts.append((size // done, None))
            for length, key in cuts:
                order.append(key)
                split.append(length)
        ids = ids.reshape(split)
        inner = [order.index((name, before)) for name, before, _ in used]
        outer = [n for n in range(len(order)) if n not in inner]
        count = math.prod(split[n] for n in inner)
        return ids.transpose(outer + inner).reshape(-1, count).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims = ([int(n) for n in iota.group(k).split(",")] for k in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            ids = ids.transpose([int(n) for n in iota.group(3).split(",")])
        return ids.reshape(shape).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
    found = [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([\d,]*)\}", listed.group(1))] if listed else []
    return found or [list(range(devices))]
