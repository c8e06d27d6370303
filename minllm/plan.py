"""Plan a run before paying for it: python -m minllm.plan --config FILE --topology v6e-256 [key.sub=value ...]

Compiles the very step that `minllm.train` runs with the real TPU compiler, on any CPU machine, and says whether it fits, how fast it
should go, where the time goes and what to change. Needs libtpu (pip install libtpu), and no TPU.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from minllm import chips, hlo
from minllm.chips import Topology
from minllm.config import ConfigError
from minllm.estimate import CLASSES, Cost, Estimator
from minllm.layers.stack import Stack
from minllm.metrics import MFU_CONVENTION, mfu
from minllm.models import build as build_model
from minllm.run import Run, for_topology
from minllm.step import Built, build

_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minllm.plan", description="Does it fit, how fast will it go, what to change.")
    parser.add_argument("--config", metavar="FILE", help="a YAML file; without one, the defaults")
    parser.add_argument("--topology", metavar="NAME", required=True, help="such as v5e-8, v5p-128 (cores), v6e-256x2 (two slices)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings in place of the file's")
    parser.add_argument("--search", action="store_true", help="compile other meshes and remat policies too, and rank them")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--timeline", metavar="PNG", help="draw one layer, forward and backward, into a picture")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiler's text of the step to a file")
    args = parser.parse_intermixed_args(argv)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask: this is no TPU VM
    try:
        topology = chips.topology(args.topology)
        settings = for_topology(args.config, args.topology, args.overrides).value
        plan = make(settings, topology)
    except DoesNotFit as error:
        print(f"does not fit: {error}", file=sys.stderr)
        found = [tried(change, settings, topology) for change in remedies(settings, topology)]
        for trial in found:
            print(f"  {trial.line()}", file=sys.stderr)
        best = cheapest(found)
        way = f"the cheapest change that fits: {' '.join(best.change)}" if best else "none of these fits: take a larger topology"
        print(way, file=sys.stderr)
        return 1
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.hlo:
        Path(args.hlo).write_text(plan.text)
    if args.timeline:
        draw(plan, args.timeline)
    found = [Trial((), plan)]
    if args.search:
        for change in neighbours(settings, topology):
            found.append(tried(change, settings, topology))
            print(f"  {found[-1].line()}", file=sys.stderr)
    if args.json:
        print(json.dumps(plan.json() | ({"search": [t.json() for t in ranked(found)]} if args.search else {}), indent=2))
    else:
        print(report(plan))
        if args.search:
            print("\nby predicted tokens/s/chip:", *(f"  {t.line()}" for t in ranked(found)), sep="\n")
    return 0


# --- one plan ---------------------------------------------------------------------------------------------------------------


class DoesNotFit(ValueError):
    """The compiler needs more memory than a device has: `needed` and `limit` in bytes, where it said so."""

    def __init__(self, message: str, needed: float | None = None, limit: float | None = None):
        super().__init__(message)
        self.needed, self.limit = needed, limit


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. activations: what the forward loop over layers keeps for the backward one, by what made it; gradients: of the
    stacked layers; temporaries: the rest of what a step needs for itself."""

    parameters: float
    optimizer: float
    average: float
    batch: float
    activations: dict[str, float]
    gradients: float
    temporaries: float
    code: float
    host: float
    limit: float

    @property
    def total(self) -> float:
        state = self.parameters + self.optimizer + self.average + self.batch
        return float(state + sum(self.activations.values()) + self.gradients + self.temporaries + self.code)


@dataclass(frozen=True)
class Plan:
    run: Run
    topology: Topology
    mesh: dict[str, int]
    tokens: int  # of a step, all chips together
    vocab: int
    memory: Memory
    cost: Cost = field(repr=False)
    mfu: float | None
    compile_seconds: float
    instructions: int
    layers: int  # repetitions of the longest loop over layers
    replicated: list[tuple[str, float]]
    text: str = field(repr=False)

    @property
    def seconds(self) -> float:
        return self.cost.seconds

    @property
    def speed(self) -> float:
        """Tokens per second and chip."""
        return self.tokens / self.seconds / self.topology.chips

    def json(self) -> dict[str, Any]:
        return {
            "topology": self.topology.name, "chips": self.topology.chips, "mesh": {a: n for a, n in self.mesh.items() if n > 1},
            "batch": self.run.ramp().size_of(0), "length": self.run.data.length, "remat": self.run.remat,
            "microbatches": self.run.microbatches, "vocab": self.vocab,
            "seconds": self.seconds, "tokens_per_second_per_chip": self.speed, "mfu": self.mfu, "mfu_convention": MFU_CONVENTION,
            "busy_seconds": dict(self.cost.busy), "hidden_seconds": dict(self.cost.hidden),
            "memory": asdict(self.memory) | {"total": self.memory.total}, "replicated": self.replicated,
            "collectives_per_layer": per_layer(self),
            "compile_seconds": self.compile_seconds, "instructions": self.instructions,
        }  # fmt: skip


def make(run: Run, topology: Topology) -> Plan:
    """Compiles the step of a run for a topology and estimates it. Raises DoesNotFit, or ValueError for what the run gets wrong."""
    vocab = vocabulary(run)
    devices = topology.devices()
    built = build(run, vocab, devices)
    rows, T = run.ramp().size_of(0), run.data.length
    began = time.monotonic()
    try:
        compiled = built.compile(rows, T)
    except jax.errors.JaxRuntimeError as error:
        raise _fault(error, topology) from None
    seconds, text = time.monotonic() - began, compiled.as_text()
    module = hlo.parse(text)
    placed = [devices[0]] if built.execution.mesh is None else list(built.execution.mesh.devices.flat)
    coords = [(getattr(d, "slice_index", 0) or 0, *d.coords) for d in placed]
    cost = Estimator(module, topology, coords).step()
    mesh = dict(built.execution.mesh.shape) if built.execution.mesh is not None else {}
    used = mfu(built.model.flops(T), rows * T / cost.seconds, placed) if hasattr(built.model, "flops") else None
    count = sum(len(c.instructions) for c in module.computations.values())
    memory = measured(compiled.memory_analysis(), built, module, rows, T, topology)
    return Plan(run, topology, mesh, rows * T, vocab, memory, cost, used, seconds, count, depth(built), replicated(built), text)


def vocabulary(run: Run) -> int:
    """How many tokens there are, as far as is known without preparing the data: the model's, the tokenizer's or the family's own."""
    said = run.model.args.get("vocab") or getattr(run.data.tokenizer, "vocab_size", None)
    return int(said or build_model(run.model.family, run.model.preset, **run.model.args).vocab)  # type: ignore[arg-type]


def depth(built: Built) -> int:
    stacks = [layer.times for layer in getattr(built.model, "trunk", ()) if isinstance(layer, Stack)]
    return max(stacks, default=1)


def _fault(error: Exception, topology: Topology) -> Exception:
    """What the compiler says when memory is short, as DoesNotFit; any other error as it is."""
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said:
        return error
    found = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", said)
    found = found or re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", said)
    if found is None:
        return DoesNotFit(said.splitlines()[0])
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    needed, limit = (float(found.group(k)) * unit[found.group(k + 1)] for k in (1, 3))
    over = f"a step needs {needed / _GIB:.2f} GiB of the {limit / _GIB:.2f} GiB of a device"
    return DoesNotFit(f"{over} of {topology.name}: {(needed - limit) / _GIB:.2f} GiB too much", needed, limit)


def _bytes(tree: Any) -> float:
    """Bytes that each device holds of a tree of abstract arrays."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 4 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return total


def measured(stats: Any, built: Built, module: hlo.Module, rows: int, T: int, topology: Topology) -> Memory:
    state = built.state
    saved, gradients, host = kept(module, depth(built))
    rest = stats.temp_size_in_bytes - sum(saved.values()) - gradients
    outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    return Memory(
        parameters=_bytes((state.params, state.frozen)),
        optimizer=_bytes(state.opt_state),
        average=_bytes(state.average),
        batch=_bytes(built.batch(rows, T)),
        activations=saved,
        gradients=gradients,
        temporaries=max(0.0, rest) + outputs,
        code=float(stats.generated_code_size_in_bytes),
        host=host + stats.host_temp_size_in_bytes,
        limit=topology.chip.hbm,
    )


def kept(module: hlo.Module, layers: int) -> tuple[dict[str, float], float, float]:
    """(activations by what made them, gradients, bytes on the host): what the loops over layers write, one slice a trip.

    Such a loop carries an array whose first dim is its trip count, and updates one slice of it. What the compiler keeps in the core's own
    memory, as it does for small models, takes none of the device's.
    """
    saved: dict[str, float] = defaultdict(float)
    gradients = host = 0.0
    for computation in module.computations.values():
        for loop in computation:
            trips = module.trips(loop, computation) if loop.opcode == "while" else None
            if trips is None or not 2 <= trips <= layers <= trips + 1:  # the compiler may peel one trip off
                continue
            body = module[loop.attribute("body") or ""]
            if body.root.opcode != "tuple":
                continue
            for name in body.root.operands:
                value = body.by_name[name]
                inner = module[value.calls[0]] if value.opcode == "fusion" else body
                update = next((i for i in inner if i.opcode == "dynamic-update-slice"), None) if inner is not body else value
                if update is None or update.opcode != "dynamic-update-slice" or len(value.out) != 1 or value.out[0].dims[:1] != (layers,):
                    continue
                shape = value.out[0]
                if shape.space == 5:
                    host += shape.bytes
                elif shape.space == 0 and "transpose(" in loop.op_name:
                    gradients += shape.bytes
                elif shape.space == 0:
                    saved[f"{shape.dtype}[{','.join(map(str, shape.dims))}] {_maker(value, body)}"] += shape.bytes
    return dict(saved), gradients, host


def _maker(update: hlo.Instruction, body: hlo.Computation) -> str:
    """Where the slice that an update writes comes from, in the words of the model."""
    for name in reversed(update.operands):
        value = body.by_name.get(name)
        if value is not None and len(value.out) == 1 and len(value.out[0].dims) > 1 and value.out[0].dims != update.out[0].dims:
            while value.opcode in ("copy", "bitcast", "copy-done", "copy-start") and value.operands[0] in body.by_name:
                value = body.by_name[value.operands[0]]
            words = [w for w in value.op_name.split("/") if not w.startswith(("jit(", "jvp", "while", "body", "eval_jaxpr", "checkpoint"))]
            return "/".join(words[-2:]) if words else "the layer's input"
    return "the layer's input"


def replicated(built: Built, share: float = 0.01) -> list[tuple[str, float]]:
    """Arrays of the state that lie whole on every device and take more than `share` of a device's memory: (name, bytes)."""
    found = []
    mesh = built.execution.mesh
    if mesh is None:
        return found
    limit = chips.chip_of(mesh.devices.flat[0].device_kind).hbm * share
    for path, leaf in jax.tree_util.tree_leaves_with_path(built.state):
        size = _bytes(leaf)
        if size > limit and leaf.sharding.shard_shape(leaf.shape) == leaf.shape:
            found.append((jax.tree_util.keystr(path), size))
    return found


# --- where the time goes ----------------------------------------------------------------------------------------------------


def layer_loops(plan: Plan) -> dict[str, Cost]:
    """The loop over layers forward, and the one backward: one trip of each."""
    found: dict[str, Cost] = {}
    for name, trips, body in plan.cost.loops:
        if trips <= plan.layers <= trips + 1 and trips > 1:
            way = "backward" if "transpose(" in name else "forward"
            if way not in found or body.seconds > found[way].seconds:
                found[way] = body
    return found


def per_layer(plan: Plan) -> list[dict[str, Any]]:
    """The collectives of one layer, equal ones together."""
    rows = []
    for way, body in layer_loops(plan).items():
        counted: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for e, times, waited in body.exchanges:
            if e.size > 1:
                sums = counted[e.kind, e.dtype, e.size, "".join(e.axes) if "network" not in e.axes else "network", waited]
                sums[0] += times
                sums[1] += e.bytes * times
                sums[2] += e.seconds * times
        for (kind, dtype, size, over, waited), (count, total, seconds) in counted.items():
            rows.append({"pass": way, "kind": kind, "dtype": dtype, "devices": size, "over": over, "count": round(count),
                         "bytes": total, "seconds": seconds, "overlapped": not waited})  # fmt: skip
    return rows


def report(plan: Plan) -> str:
    """The plan in words, for a terminal."""
    m, run, top = plan.memory, plan.run, plan.topology
    size = lambda n: f"{n / _GIB:8.2f} GiB"
    ring = "".join("o" if w else "-" for w in top.wrap)
    many = f" x {top.slices} slices" if top.slices > 1 else ""
    axes = " x ".join(f"{a} {n}" for a, n in plan.mesh.items() if n > 1) or "one device"
    lines = [
        f"{top.name}: {top.chips} chips {'x'.join(map(str, top.shape))} ({ring}){many}, mesh {axes}",
        f"batch {run.ramp().size_of(0)} x {run.data.length} tokens, remat {run.remat}, {run.microbatches} microbatch(es), "
        f"vocabulary {plan.vocab}; compiled in {plan.compile_seconds:.0f} s, {plan.instructions} instructions",
        "",
        "memory of a device",
        f"  parameters       {size(m.parameters)}",
        f"  optimizer        {size(m.optimizer)}",
    ]
    if m.average:
        lines.append(f"  moving average   {size(m.average)}")
    lines.append(f"  gradients        {size(m.gradients)}   stacked layers; the others are among the temporaries")
    for name, n in sorted(m.activations.items(), key=lambda a: -a[1]):
        lines.append(f"  activations      {size(n)}   {name}")
    lines += [
        f"  temporaries      {size(m.temporaries)}",
        f"  code, batch      {size(m.code + m.batch)}",
        f"  together         {size(m.total)}   of {m.limit / _GIB:.2f} GiB: {m.total / m.limit:.0%}",
    ]
    if m.host:
        lines.append(f"  on the host      {size(m.host)}")
    lines += [f"  replicated       {size(n)}   {name} lies whole on every device" for name, n in plan.replicated]
    said = "" if plan.mfu is None else f", MFU {plan.mfu:.1%} ({MFU_CONVENTION})"
    lines += ["", f"a step: {plan.seconds:.3f} s, {plan.speed:,.0f} tokens/s/chip{said}"]
    lines.append("  on the critical path            hidden behind it")
    for kind in CLASSES:
        busy, hidden = plan.cost.busy.get(kind, 0.0), plan.cost.hidden.get(kind, 0.0)
        if busy > 1e-6 or hidden > 1e-6:
            aside = f"{hidden:8.4f} s" if hidden > 1e-6 else ""
            lines.append(f"  {kind:12} {busy:8.4f} s {busy / plan.seconds:6.1%}   {aside}".rstrip())
    lines += ["  the longest:", *(f"    {t:8.4f} s  {name}" for name, t in plan.cost.ops.most_common(6))]
    rows = per_layer(plan)
    if rows:
        lines += ["", "collectives of one layer"]
        for r in rows:
            how = "overlapped" if r["overlapped"] else "waited for"
            what = f"{r['pass']:9} {r['count']:3} {r['kind']:18} {r['dtype']:5} {r['bytes'] / 2**20:9.1f} MiB"
            lines.append(f"  {what} over {r['devices']:4} devices ({r['over']}) {r['seconds'] * 1e3:8.3f} ms {how}")
    return "\n".join(lines)


def draw(plan: Plan, png: str | Path) -> None:
    """One layer as a timeline: what the core does, and what links and memory channels do beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = dict(zip(CLASSES, ("#2166ac", "#1b7837", "#7fbf7b", "#92c5de", "#bdbdbd", "#d6604d", "#7b3294", "#e08214", "#f4a582")))
    loops = layer_loops(plan) or {"step": plan.cost}
    figure = Figure(figsize=(12, 2.4 + 1.7 * len(loops)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    shown = set()
    for panel, (way, body) in zip(figure.subplots(len(loops), 1, squeeze=False)[:, 0], loops.items()):
        lanes = ["core", *sorted({s.lane for s in body.spans} - {"core"})]
        for s in body.spans:
            if s.end - s.begin > body.seconds / 4000:
                shown.add(s.kind)
                at, width = lanes.index(s.lane), s.end - s.begin
                panel.barh(at, width * 1e3, left=s.begin * 1e3, height=0.7, color=colours[s.kind], edgecolor="white", linewidth=0.2)
                room = int(150 * width / body.seconds)  # letters
                name = s.name if len(s.name) <= room else s.name.split("/")[0]
                if 2 < len(name) <= room:
                    panel.text((s.begin + s.end) * 500, at, name, ha="center", va="center", fontsize=6)
        panel.set_yticks(range(len(lanes)), [{"core": "core", "dma": "memory", "host": "host"}.get(n, f"links {n}") for n in lanes])
        panel.invert_yaxis()
        panel.set_title(f"{way}: {body.seconds * 1e3:.2f} ms a layer", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    panel.set_xlabel("ms")
    key = [Patch(color=colours[k], label=k) for k in CLASSES if k in shown]
    figure.legend(handles=key, loc="outside lower center", ncols=9, frameon=False)
    run, where = plan.run, plan.topology.name
    name = f"{run.model.family} {run.model.preset or ''}".strip()
    figure.suptitle(f"{name} on {where}, batch {run.ramp().size_of(0)} x {run.data.length}, remat {run.remat}", fontsize=11)
    figure.savefig(png)


# --- what to change ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A change of settings, and the plan that it leads to or why there is none."""

    change: tuple[str, ...]
    plan: Plan | None
    why: str = ""

    def line(self) -> str:
        name = " ".join(self.change) or "as asked"
        if self.plan is None:
            return f"{name:40} {self.why}"
        p, m = self.plan, self.plan.memory
        return f"{name:40} {p.seconds:8.3f} s/step {p.speed:9,.0f} tokens/s/chip {m.total / _GIB:7.2f} GiB of {m.limit / _GIB:.2f}"

    def json(self) -> dict[str, Any]:
        return {"change": list(self.change)} | ({"why": self.why} if self.plan is None else self.plan.json())


def tried(change: tuple[str, ...], run: Run, topology: Topology) -> Trial:
    """A change, compiled."""
    try:
        return Trial(change, make(changed(run, change), topology))
    except ValueError as error:
        return Trial(change, None, str(error))


def changed(run: Run, change: tuple[str, ...]) -> Run:
    """A run with `key.sub=value` settings in place of its own."""
    for text in change:
        key, value = text.split("=")
        section, _, name = key.rpartition(".")
        value = json.loads(value) if re.fullmatch(r"-?\d+", value) else value
        part = replace(getattr(run, section), **{name: value}) if section else None
        run = replace(run, **({section: part} if section else {key: value}))
    return run


def cheapest(found: list[Trial]) -> Trial | None:
    return next(iter(ranked(found)), None)


def ranked(found: list[Trial]) -> list[Trial]:
    return sorted((t for t in found if t.plan), key=lambda t: -t.plan.speed)  # type: ignore[union-attr]


_LIGHTER_TO_HEAVIER = ("none", "dots", "layer", "full")


def remedies(run: Run, topology: Topology) -> Iterator[tuple[str, ...]]:
    """Changes that take less memory: recompute more, split the batch, shard more, take fewer rows."""
    at = _LIGHTER_TO_HEAVIER.index(run.remat)
    remat = [(f"remat={policy}",) for policy in _LIGHTER_TO_HEAVIER[at + 1 :]]
    yield from remat
    rows, M = run.ramp().size_of(0), run.microbatches
    shards = topology.size // max(1, run.mesh.tensor * run.mesh.context * run.mesh.expert * run.mesh.stage)
    deepest = remat[-1] if remat else ()
    if rows % (shards * M * 2) == 0:
        yield (*deepest, f"microbatches={M * 2}")
    if run.mesh.data not in (1,) and run.mesh.fsdp == 1:
        yield (*deepest, "mesh.data=1", "mesh.fsdp=-1")
    if rows // 2 >= shards * M:
        yield (*deepest, f"batch={rows // 2}")
    for tensor in (2, 4):
        if topology.size % (tensor * run.mesh.tensor) == 0 and run.mesh.tensor * tensor <= 8:
            yield (*deepest, f"mesh.tensor={run.mesh.tensor * tensor}")


def neighbours(run: Run, topology: Topology) -> Iterator[tuple[str, ...]]:
    """Other meshes and remat policies, for a search."""
    rows = run.ramp().size_of(0)
    for policy in _LIGHTER_TO_HEAVIER:
        if policy != run.remat:
            yield (f"remat={policy}",)
    for tensor in (1, 2, 4, 8):
        shards = topology.size // tensor
        if topology.size % tensor or rows % shards or tensor == run.mesh.tensor:
            continue
        for policy in dict.fromkeys((run.remat, "full")):
            yield (f"mesh.tensor={tensor}", *((f"remat={policy}",) if policy != run.remat else ()))
    if topology.slices > 1:
        yield (f"mesh.data={topology.slices}", "mesh.fsdp=-1")


if __name__ == "__main__":
    sys.exit(main())
