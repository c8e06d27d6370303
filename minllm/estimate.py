"""How long a compiled step takes on a chip that is not here.

    time(computation) = the core walks its schedule; an asynchronous start puts work on a link or a memory channel, its done waits for it

Every instruction of the optimized HLO costs what the compiler's own model says (estimated_cycles / clock), a loop its body times its
trips, a collective its bytes over the links of the torus that its group spans, a kernel what its own work says. Measured, not published,
are the shares of their peaks that links and matrix units reach, and the rates of attention kernels. Nothing is fitted to a model or a row.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minllm import hlo
from minllm.chips import Topology
from minllm.hlo import Computation, Instruction, Module
from minllm.metrics import peak_flops

# "How to Scale Your Model", part 2 and 3: what an all-gather reaches of a link's rate, and the time of one hop.
LINK_SHARE = 0.9
HOP = 1e-6

# The most of its peak that a matmul is seen to reach: 183 of v5e's 197 TFLOP/s (openxla/tokamax, data/autotuning, ragged dot).
MATRIX_SHARE = 0.93

# Classes of work, in the order in which they are shown.
CLASSES = ("matmul", "attention", "kernel", "vector", "copy", "collective", "network", "host", "wait")


@dataclass(frozen=True)
class Exchange:
    """One collective: its kind, bytes that enter or leave one device, devices of a group, seconds, what it runs over, and its dtype."""

    kind: str
    bytes: float
    size: int
    seconds: float
    axes: tuple[str, ...]  # "x" "y" "z": dims of the torus; "network": between slices
    dtype: str


@dataclass(frozen=True)
class Span:
    """A stretch of one iteration, for the timeline: lane "core" or the resource of an asynchronous piece of work."""

    lane: str
    kind: str
    name: str
    begin: float
    end: float


@dataclass
class Cost:
    """What a computation takes. `busy` counts seconds on the core by class, waiting for others included; `hidden` what ran beside it."""

    seconds: float = 0.0
    busy: Counter = field(default_factory=Counter)
    hidden: Counter = field(default_factory=Counter)
    exchanges: list[tuple[Exchange, float, bool]] = field(default_factory=list)  # how often, and whether the core waited for all of it
    ops: Counter = field(default_factory=Counter)
    spans: list[Span] = field(default_factory=list)
    loops: list[tuple[str, int, "Cost"]] = field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """What another computation does on the core and beside it, so many times. Its seconds are for the caller to place."""
        for mine, theirs in ((self.busy, other.busy), (self.hidden, other.hidden), (self.ops, other.ops)):
            for key, value in theirs.items():
                mine[key] += value * times
        self.exchanges += [(e, n * times, waited) for e, n, waited in other.exchanges]
        self.loops += other.loops


@dataclass(frozen=True)
class Estimator:
    """coords: (slice, x, y, z) of each device of the program, in the program's order."""

    module: Module
    topology: Topology
    coords: Sequence[tuple[int, ...]]

    def step(self) -> Cost:
        return self._walk(self.module[self.module.entry])

    # --- the schedule -------------------------------------------------------------------------------------------------------

    def _walk(self, computation: Computation) -> Cost:
        cost, now = Cost(), 0.0
        free: dict[str, float] = defaultdict(float)  # when each link or channel has done what it was given
        ready: dict[str, float] = {}  # when what a start gave will be there
        begun: dict[str, tuple[str, float, float, str]] = {}
        moving: dict[str, str] = {}  # collectives that fusions carry on: channel -> its start

        def background(i: Instruction, seconds: float, lanes: Sequence[str], kind: str) -> None:
            begin = max([now] + [free[lane] for lane in lanes])
            for lane in lanes:
                free[lane] = begin + seconds
            ready[i.name] = begin + seconds
            cost.spans.append(Span("+".join(lanes), kind, _short(i), begin, begin + seconds))
            begun[i.name] = (kind, begin, seconds, _short(i))

        def wait(start: str) -> None:
            nonlocal now
            kind, begin, seconds, name = begun.pop(start)
            late = max(0.0, ready[start] - now)
            if late:
                cost.busy["wait"] += late
                cost.ops[f"wait: {kind} {name}"] += late
                cost.spans.append(Span("core", "wait", name, now, now + late))
                now += late
            cost.hidden[kind] += max(0.0, seconds - late)

        for i in computation:
            if i.opcode == "while":
                trips = self.module.trips(i, computation) or 1
                body = self._walk(self.module[i.attribute("body") or ""])
                cost.add(body, trips)
                cost.loops.append((i.op_name, trips, body))
                longest = max(body.busy, key=body.busy.__getitem__, default="vector")
                cost.spans.append(Span("core", longest, f"{trips} x {_short(i)}", now, now + body.seconds * trips))
                now += body.seconds * trips
                continue
            if i.opcode in ("call", "conditional"):
                branches = [self._walk(self.module[name]) for name in i.calls]
                longest = max(branches, key=lambda c: c.seconds, default=Cost())
                cost.add(longest)
                now += longest.seconds
                continue
            target = self._target(i)
            if target == "AsyncCollectiveDone" or i.opcode.endswith("-done"):
                start = self._start_of(i, computation, begun, moving)
                if start:
                    wait(start)
                continue
            if target == "AsyncCollectiveStart" or i.opcode.endswith("-start"):
                self._begin(i, cost, background, moving)
                continue
            collective = self.module.collective(i)
            if collective is not None and not self._carried(i, collective, moving):
                exchange = self.exchange(i, collective)
                cost.exchanges.append((exchange, 1, True))
                kind, seconds = "network" if "network" in exchange.axes else "collective", exchange.seconds
            else:
                kind, seconds = self.compute(i, computation)
            if seconds:
                cost.busy[kind] += seconds
                cost.ops[f"{kind}: {_short(i)}"] += seconds
                cost.spans.append(Span("core", kind, _short(i), now, now + seconds))
                now += seconds
        cost.seconds = now
        return cost

    def _target(self, i: Instruction) -> str | None:
        """The custom call that a fusion or call comes to."""
        if i.opcode == "custom-call":
            return i.attribute("custom_call_target")
        if i.opcode == "fusion":
            root = self.module[i.calls[0]].root
            return root.attribute("custom_call_target") if root.opcode == "custom-call" else None
        return None

    def _channel(self, collective: Instruction) -> str:
        return collective.attribute("channel_id") or collective.name

    def _carried(self, i: Instruction, collective: Instruction, moving: dict[str, str]) -> bool:
        """Whether a fusion only takes some steps of a collective that is under way."""
        return i.opcode == "fusion" and "async_collective_fusion_config" in collective.rest and self._channel(collective) in moving

    def _begin(self, i: Instruction, cost: Cost, background: Callable, moving: dict[str, str]) -> None:
        collective = self.module.collective(i)
        if collective is not None:
            exchange = self.exchange(i, collective)
            cost.exchanges.append((exchange, 1, False))
            moving[self._channel(collective)] = i.name
            kind = "network" if "network" in exchange.axes else "collective"
            background(i, exchange.seconds, self._links(exchange, collective), kind)
            return
        chip, spaces = self.topology.chip, {s.space for s in i.out}
        size = max((s.bytes for s in i.out), default=0.0)
        if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start", "async-start") and spaces:
            moved = min((s.bytes for s in i.out if s.dims), default=0.0) if i.opcode != "copy-start" else size
            host = 5 in spaces
            out = host and (i.opcode == "dynamic-update-slice-start" or (i.out[0].space == 5) == (i.opcode == "copy-start"))
            lane = ("to host" if out else "from host") if host else "dma"
            background(i, moved / (chip.host_speed if host else chip.hbm_speed), (lane,), "host" if host else "copy")
        else:  # send, recv, and whatever comes: they cost nothing until somebody shows what
            background(i, 0.0, ("dma",), "copy")

    def _start_of(self, done: Instruction, computation: Computation, begun: dict, moving: dict[str, str]) -> str | None:
        collective = self.module.collective(done)
        if collective is not None and done.opcode == "fusion":
            start = moving.pop(self._channel(collective), None)
            return start if start in begun else None
        todo = [o for o in done.operands if o in computation.by_name]
        while todo:
            name = todo.pop()
            if name in begun:
                return name
            source = computation.by_name[name]
            if source.opcode in ("get-tuple-element", "async-update", "bitcast", "tuple", "copy-start", "async-start"):
                todo += [o for o in source.operands if o in computation.by_name]
        return None

    # --- one instruction ----------------------------------------------------------------------------------------------------

    def compute(self, i: Instruction, computation: Computation) -> tuple[str, float]:
        """(class, seconds) of what runs on the core."""
        chip = self.topology.chip
        if i.opcode in _FREE:
            return "vector", 0.0
        if i.opcode == "custom-call":
            return self.kernel(i, computation)
        kind = "copy" if i.opcode in ("copy", "transpose", "reshape") else "vector"
        if i.opcode in ("convolution", "dot"):
            kind = "matmul"
        elif i.opcode == "fusion" and any(j.opcode in ("convolution", "dot") for j in self.module.inside(i.calls[0])):
            kind = "matmul"
        elif i.opcode == "fusion" and self.module[i.calls[0]].root.opcode in ("copy", "transpose"):
            kind = "copy"
        if i.cycles is not None:
            seconds = i.cycles / chip.clock
            if kind == "matmul":
                # the compiler adds up what the vector unit does for a matmul's operands and results and what the matrix unit does at
                # its peak; a core issues both in one bundle, so the longer hides the shorter
                matrix = self.flops(i) / (peak_flops(chip.kind) or math.inf)
                seconds = max(matrix / MATRIX_SHARE, seconds - matrix)
            return kind, seconds
        moved = i.bytes + sum(computation.by_name[o].bytes for o in i.operands if o in computation.by_name)
        small = i.opcode not in ("fusion", "copy", "sort", "scatter", "gather", "rng-bit-generator")
        return kind, 0.0 if small else moved / chip.hbm_speed

    def flops(self, i: Instruction) -> float:
        """FLOPs of the matmuls in a fusion."""
        total, inside = 0.0, [i.calls[0]] if i.opcode == "fusion" else []
        for name in inside:
            for j in self.module[name]:
                inside += j.calls if j.opcode == "fusion" else ()
                if j.opcode == "convolution":
                    total += _matmul(*(self.module[name].by_name[o].out[0].dims for o in j.operands), out=j.out[0].dims, rest=j.rest)
        return total

    def kernel(self, i: Instruction, computation: Computation) -> tuple[str, float]:
        """(class, seconds) of a Pallas kernel; other custom calls are marks for the compiler and cost nothing."""
        if i.attribute("custom_call_target") != "tpu_custom_call":
            return "kernel", 0.0
        chip = self.topology.chip
        arrays = [s for o in i.operands if o in computation.by_name for s in computation.by_name[o].out]
        bound = sum(s.bytes for s in (*arrays, *i.out) if s.space == 0) / chip.hbm_speed
        seconds = attention_seconds(i, arrays, chip.kind)
        if seconds is not None:
            return "attention", max(seconds, bound)
        said = i.backend.get("custom_call_config", {}).get("cost_estimate", {})
        flops = float(said.get("flops", 0))
        peak = peak_flops(chip.kind)
        return "kernel", max(bound, flops / (0.8 * peak) if peak else 0.0)

    # --- collectives --------------------------------------------------------------------------------------------------------

    def exchange(self, i: Instruction, collective: Instruction) -> Exchange:
        """The bytes of a collective and its time: over each dim of the torus, both ways round where it is a ring, else one way."""
        kind = hlo.kind_of(collective.opcode) or collective.opcode
        scatter = kind == "all-reduce" and i.opcode == "fusion" and self.module[i.calls[0]].root.opcode in ("dynamic-slice", "bitcast")
        parts = [s for s in collective.out if s.dims] or list(collective.out)
        if collective.opcode.endswith("-start") and len(parts) > 1:  # (operands, results): the results are the later half
            parts = parts[len(parts) // 2 :] if kind != "collective-permute" else parts[:1]
        size = sum(s.bytes for s in parts)
        dtype = parts[0].dtype if parts else ""
        members = hlo.groups(collective, len(self.coords))
        group = max(members, key=len)
        n = len(group)
        if n < 2:
            return Exchange(kind, 0.0, n, 0.0, (), dtype)
        if kind == "reduce-scatter":
            size *= n
        places = [self.coords[d] for d in group]
        slices = len({p[0] for p in places})
        axes, speed, hops = [], 0.0, 0
        spread = []
        for d, name in enumerate("xyz"[: len(self.topology.shape)]):
            at = sorted({p[1 + d] for p in places})
            if len(at) < 2:
                continue
            length = self.topology.shape[d]
            apart = min(b - a for a, b in zip(at, at[1:]))  # other groups lie between the members of this one and share its links
            ring = self.topology.wrap[d] and len(at) * apart == length
            rate = self.topology.chip.link * LINK_SHARE * (2 if ring else 1) / apart
            axes.append(name)
            spread.append((len(at), rate))
            speed += rate
            hops += (len(at) // 2 if ring else len(at) - 1) * apart
        near = max(1, n // slices)
        chip = self.topology.chip
        speed = speed or chip.link  # two cores of one chip
        if kind == "collective-permute":
            longest = max(self._distance(self.coords[a], self.coords[b]) for a, b in members)
            across = any(self.coords[a][0] != self.coords[b][0] for a, b in members)
            seconds = size / chip.network if across else size / (chip.link * LINK_SHARE) * max(1, longest) + HOP * longest
            return Exchange(kind, size, n, seconds, ("network",) if across else tuple(axes) or ("x",), dtype)
        if kind.endswith("all-to-all"):
            seconds = max([length * size / (4 * rate) for length, rate in spread], default=0.0) + HOP * hops
            moved = size * (n - 1) / n
            seconds += size * (slices - 1) / slices / chip.network
        else:
            rounds = 2 if kind == "all-reduce" and not scatter else 1
            moved = rounds * size * (n - 1) / n
            seconds = rounds * (size * (near - 1) / near / speed + HOP * hops)
            seconds += rounds * (size / near) * (slices - 1) / slices / chip.network
        if slices > 1:
            axes.append("network")
        return Exchange("reduce-scatter" if scatter else kind, moved, n, seconds, tuple(axes) or ("x",), dtype)

    def _links(self, exchange: Exchange, collective: Instruction) -> tuple[str, ...]:
        """The lanes that a collective takes: both directions of each dim that it spans, a permutation the one that it goes in."""
        if exchange.kind != "collective-permute":
            return tuple(f"{axis}{way}" for axis in exchange.axes for way in ("+-" if axis != "network" else ("",)))
        steps: Counter[str] = Counter()
        for a, b in hlo.groups(collective, len(self.coords)):
            for d, axis in enumerate("xyz"[: len(self.topology.shape)]):
                apart = self.coords[b][1 + d] - self.coords[a][1 + d]
                if apart:
                    length = self.topology.shape[d]
                    short = apart if not self.topology.wrap[d] or abs(apart) <= length // 2 else -apart
                    steps[f"{axis}{'+' if short > 0 else '-'}"] += 1
        return (steps.most_common(1)[0][0],) if steps and "network" not in exchange.axes else exchange.axes

    def _distance(self, a: tuple[int, ...], b: tuple[int, ...]) -> int:
        steps = 0
        for d, (length, ring) in enumerate(zip(self.topology.shape, self.topology.wrap)):
            apart = abs(a[1 + d] - b[1 + d])
            steps += min(apart, length - apart) if ring else apart
        return steps


def _matmul(lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], rest: str) -> float:
    """FLOPs of a matmul in the compiler's clothes: a convolution whose windows, padded or not, give each product once.

    Labels such as b0f_0io->b0f say what a dim is: b rows, f and o columns, i what is summed over, digits any of these or a batch; of a
    digit's sizes on the three sides the largest is the true one.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if found is None:
        return 2.0 * math.sqrt(math.prod(lhs) * math.prod(rhs) * math.prod(out))
    sides = [dict(zip(labels, dims)) for labels, dims in zip(found.groups(), (lhs, rhs, out))]
    sizes = [max(side[d] for side in sides) for d in sides[2] if d.isdigit()]
    return 2.0 * sides[2]["b"] * sides[2]["f"] * sides[1]["i"] * math.prod(sizes)


_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
    "optimization-barrier", "broadcast", "async-update", "infeed", "outfeed", "send", "recv", "domain",
}  # fmt: skip


def _short(i: Instruction) -> str:
    """A name for people: the last words of where an instruction comes from, else its own."""
    words = [w for w in i.op_name.split("/") if w and not w.startswith(("jit(", "while", "body", "closed_call", "jvp", "transpose("))]
    return "/".join(words[-2:]) if words else re.sub(r"[.\d]+$", "", i.name)


# --- attention kernels ------------------------------------------------------------------------------------------------------

# Measured forward rates of splash attention on long full rows, FLOP/s by device kind and head size: the caches of openxla/tokamax
# (tokamax/data/autotuning, 16,384 x 16,384, full mask). v5e has none there: it gets the share of the peak that v5p reaches, whose
# matrix unit is the same.
_SPLASH = {
    "TPU v5": {64: 210e12, 128: 410e12, 256: 409e12},
    "TPU v5 lite": {64: 90e12, 128: 176e12, 256: 176e12},
    "TPU v6 lite": {64: 174e12, 128: 330e12, 256: 586e12},
    "TPU7x": {64: 198e12, 128: 391e12, 256: 699e12},
}
# The same caches, backward / forward rate, tpu7x (453 / 391 and 829 / 699).
_BACKWARD = 1.15
# The same caches, causal rows of 4,096 and 16,384 on v5p and v6e: a tile on the diagonal takes a third more than a full one.
_DIAGONAL = 1 / 3


def attention_seconds(i: Instruction, arrays: Sequence[hlo.Shape], kind: str) -> float | None:
    """The time of an attention kernel from its name and the shapes that it is given, at measured rates; None if it is none.

    A causal mask is taken for granted: whole tiles above the diagonal are skipped, those on it are masked.
    """
    name = f"{i.op_name.removesuffix('/pallas_call').rsplit('/', 1)[-1]} {i.name}".lower()
    if not re.search(r"splash|flash|attention|mha", name):
        return None
    heads = [s.dims for s in arrays if len(s.dims) >= 3 and s.dtype in ("bf16", "f16") and 32 <= s.dims[-1] <= 512]
    if not heads:
        return None
    H = Counter(d[-1] for d in heads).most_common(1)[0][0]
    rows = max((d for d in heads if d[-1] == H), key=math.prod)
    N, T, S = math.prod(rows[:-2]), rows[-2], max(d[-2] for d in heads if d[-1] == H)
    known = min(_SPLASH[kind], key=lambda h: abs(h - H))
    rate = _SPLASH[kind][known] * min(1.0, H / known)
    # the table of blocks that splash is given says into how many tiles it cuts each side
    blocks = [s.dims[-2:] for s in arrays if s.dtype in ("s8", "s32") and len(s.dims) == 3 and max(s.dims[-2:]) <= S // 128]
    tiles = max((max(b) for b in blocks), default=math.ceil(S / 1024))
    seen = ((tiles + 1) / 2 + _DIAGONAL) / tiles
    flops = 4.0 * N * T * S * H * seen
    if re.search(r"dkv|dq|bwd|backward", name):
        # of the five products of a backward pass the queries' kernel makes three, the keys' four, and one that gives all gradients five
        flops *= 2.5 if len(i.out) >= 3 else 1.5 if "dq" in name else 2.0
        rate *= _BACKWARD
    return flops / rate
