"""Law 10: what a step sends between devices, exactly: kind, mesh axes, dtype, how often a layer and how many bytes, read off the
partitioned program. A stray reshard, a weight gathered in float32, a table gathered whole would be a line more.

A line is: where (forward and backward: in each layer; once: outside), number, kind, mesh axes, dtype, KiB that one such operation gives
each device. The step is a llama's: D 64, 8 heads, 4 key/value heads of 8, hidden 128, V 128, 32 rows of 96 tokens, bfloat16 matmuls and
float32 parameters, on 8 devices. Not listed are scalars and sums of gains' gradients (at most 4 D numbers). What XLA:CPU leaves as an
all-reduce of a weight's gradient, the TPU's compiler makes a reduce-scatter of where only a piece is kept, which a test below reads.
"""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from minllm.data import Data
from minllm.layer import Precision
from minllm.run import Mesh, Model, Run
from minllm.step import build

D, T, ROWS, V = 64, 96, 32, 128
ARGS = dict(D=D, layers=3, heads=8, kv_heads=4, head_dim=8, hidden=128, scaling=None)
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}

RUNS = {
    "data": dict(mesh=Mesh(data=8)),
    "fsdp": dict(mesh=Mesh(data=1, fsdp=8)),
    "hsdp": dict(mesh=Mesh(data=2, fsdp=4)),
    "zero2": dict(mesh=Mesh(data=1, fsdp=8), zero=2),
    "fsdp x tensor": dict(mesh=Mesh(data=1, fsdp=4, tensor=2)),
    "fsdp x context, ring": dict(mesh=Mesh(data=1, fsdp=2, context=4), context="ring"),
    "fsdp x context, ulysses": dict(mesh=Mesh(data=1, fsdp=4, context=2), context="ulysses"),
}


QUICK = ("fsdp", "fsdp x tensor")  # of the default suite; the others are nightly


@pytest.fixture
def no_cache():
    """A program from the cache is not compiled, and so not dumped."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def built(devices, **settings):
    run = Run(model=Model(args=ARGS), data=Data(length=T), batch=ROWS, scan=True, precision=Precision(compute="bfloat16"), **settings)
    return build(run, V, devices)


def axes_of(line, mesh):
    """The mesh axes over which the devices of a group differ."""
    if found := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\[([^]]*)\])? \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'([\w.]+)'=(\d+)", found[1])}
        assert not found[2], line
        over = [i for i, name in enumerate(sizes) if f"'{name}'" in found[3]]
        devices = np.arange(mesh.size).reshape(tuple(sizes.values()))
        groups = np.moveaxis(devices, over, range(-len(over), 0)).reshape(-1, int(np.prod([devices.shape[i] for i in over]))).tolist()
    elif found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        groups = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
    else:
        found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
        shape, dims, order = (None if s is None else [int(n) for n in s.split(",")] for s in found.groups())
        groups = np.arange(np.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(shape).tolist()
    places = np.stack(np.unravel_index(np.array([p for g in groups for p in ((g[0], other) for other in g)]), mesh.devices.shape), -1)
    differ = (places[:, 0] != places[:, 1]).any(0)
    return tuple(axis for axis, d in zip(mesh.axis_names, differ) if d)


def computations(text):
    """{name: lines} of an HLO module."""
    blocks = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ [^\n]*\{\n)", text)
    return {found[1]: block.splitlines() for block in blocks if (found := re.match(r"(?:ENTRY )?%([\w.\-]+)", block))}


def places(parts, entry):
    """{computation: "once", or the loops that it is in: "forward", "backward hop"}: a step scans over layers, a ring over devices."""
    found, todo = {entry: "once"}, [entry]
    while todo:
        name = todo.pop()
        for line in parts[name]:
            inner = re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)", line)
            inner += re.findall(r"%([\w.\-]+)", "".join(re.findall(r"branch_computations=\{([^}]*)\}", line)))
            for other in inner:
                if " while(" not in line:
                    found[other] = found[name]
                elif found[name] == "once":
                    found[other] = "backward" if "transpose" in line else "forward"
                else:
                    found[other] = f"{found[name].split()[0]} hop"
                todo.append(other)
    return found


def read_budget(text, mesh):
    lines, parts = Counter(), computations(text)
    for name, place in places(parts, re.search(r"^ENTRY %([\w.\-]+)", text, re.M)[1]).items():
        for line in parts[name]:
            if not (found := re.search(rf"= (\w+)\[([\d,]*)\]\S* ({KINDS})\(", line)):
                continue
            dtype, size, kind = found[1], int(np.prod([int(n) for n in found[2].split(",") if n])), found[3]
            axes = axes_of(line, mesh)
            if axes and not (kind == "all-reduce" and size <= 4 * D):
                lines[place, kind, ",".join(axes), dtype, f"{size * BYTES[dtype] / 1024:g}"] += 1
    return "\n".join(sorted(f"{place}: {n} {' '.join(rest)}" for (place, *rest), n in lines.items()))


def budget(settings, folder):
    """The lines of a run."""
    b = built(jax.devices(), **settings)
    folder.mkdir(exist_ok=True)
    b.lower(ROWS, T).compile({"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partition.*"})
    (file,) = folder.glob("*jit_step*after_spmd-partitioning*.txt")
    return read_budget(file.read_text(), b.execution.mesh)


BUDGET = {
    "data": """
        backward: 2 all-reduce data f32 16
        backward: 2 all-reduce data f32 8
        backward: 3 all-reduce data f32 32
        once: 2 all-reduce data f32 32
    """,
    "fsdp": """
        backward: 2 all-gather fsdp bf16 4
        backward: 2 all-gather fsdp bf16 8
        backward: 2 all-reduce fsdp f32 16
        backward: 2 all-reduce fsdp f32 8
        backward: 3 all-gather fsdp bf16 16
        backward: 3 all-reduce fsdp f32 32
        forward: 2 all-gather fsdp bf16 4
        forward: 2 all-gather fsdp bf16 8
        forward: 3 all-gather fsdp bf16 16
        once: 1 all-gather fsdp bf16 16
        once: 1 all-gather fsdp s32 12
        once: 1 reduce-scatter fsdp f32 4
        once: 2 all-to-all fsdp bf16 48
    """,
    "hsdp": """
        backward: 2 all-gather fsdp bf16 4
        backward: 2 all-gather fsdp bf16 8
        backward: 2 all-reduce data f32 2
        backward: 2 all-reduce data f32 4
        backward: 2 all-reduce fsdp f32 16
        backward: 2 all-reduce fsdp f32 8
        backward: 3 all-gather fsdp bf16 16
        backward: 3 all-reduce data f32 8
        backward: 3 all-reduce fsdp f32 32
        forward: 2 all-gather fsdp bf16 4
        forward: 2 all-gather fsdp bf16 8
        forward: 3 all-gather fsdp bf16 16
        once: 1 all-gather fsdp bf16 16
        once: 1 all-gather fsdp s32 6
        once: 1 reduce-scatter fsdp f32 8
        once: 2 all-reduce data f32 8
        once: 2 all-to-all fsdp bf16 48
    """,
    "zero2": """
        backward: 2 all-reduce fsdp f32 16
        backward: 2 all-reduce fsdp f32 8
        backward: 3 all-reduce fsdp f32 32
        once: 2 all-gather fsdp bf16 12
        once: 2 all-gather fsdp bf16 16
        once: 2 all-gather fsdp bf16 24
        once: 2 all-reduce fsdp f32 32
        once: 3 all-gather fsdp bf16 48
    """,
    "fsdp x tensor": """
        backward: 2 all-gather fsdp bf16 2
        backward: 2 all-gather fsdp bf16 4
        backward: 2 all-reduce fsdp f32 4
        backward: 2 all-reduce fsdp f32 8
        backward: 3 all-gather fsdp bf16 8
        backward: 3 all-reduce fsdp f32 16
        backward: 4 all-gather tensor bf16 96
        backward: 5 all-reduce tensor bf16 96
        forward: 2 all-gather fsdp bf16 2
        forward: 2 all-gather fsdp bf16 4
        forward: 2 all-gather tensor bf16 96
        forward: 2 all-reduce tensor bf16 96
        forward: 3 all-gather fsdp bf16 8
        once: 1 all-gather fsdp bf16 8
        once: 1 all-gather fsdp s32 12
        once: 1 reduce-scatter fsdp f32 4
        once: 2 all-gather tensor bf16 96
        once: 2 all-to-all fsdp bf16 48
        once: 2 reduce-scatter tensor bf16 48
        once: 5 all-reduce tensor f32 3
    """,
    "fsdp x context, ring": """
        backward hop: 2 collective-permute context bf16 24
        backward hop: 2 collective-permute context f32 48
        backward hop: 2 collective-permute context s32 1.5
        backward: 2 all-gather fsdp bf16 4
        backward: 2 all-gather fsdp bf16 8
        backward: 2 all-reduce context f32 4
        backward: 2 all-reduce context f32 8
        backward: 2 all-reduce fsdp f32 16
        backward: 2 all-reduce fsdp f32 8
        backward: 2 collective-permute context bf16 24
        backward: 2 collective-permute context s32 1.5
        backward: 3 all-gather fsdp bf16 16
        backward: 3 all-reduce context f32 16
        backward: 3 all-reduce fsdp f32 32
        backward: 4 collective-permute context f32 48
        forward hop: 2 collective-permute context bf16 24
        forward: 2 all-gather fsdp bf16 4
        forward: 2 all-gather fsdp bf16 8
        forward: 2 collective-permute context s32 1.5
        forward: 3 all-gather fsdp bf16 16
        once: 1 all-gather fsdp bf16 16
        once: 1 all-gather fsdp s32 3
        once: 1 reduce-scatter fsdp f32 16
        once: 2 all-reduce context f32 16
        once: 2 all-to-all fsdp bf16 48
    """,
    "fsdp x context, ulysses": """
        backward: 2 all-gather fsdp bf16 4
        backward: 2 all-gather fsdp bf16 8
        backward: 2 all-reduce context f32 2
        backward: 2 all-reduce context f32 4
        backward: 2 all-reduce fsdp f32 16
        backward: 2 all-reduce fsdp f32 8
        backward: 2 all-to-all context bf16 24
        backward: 2 all-to-all context bf16 48
        backward: 3 all-gather fsdp bf16 16
        backward: 3 all-reduce context f32 8
        backward: 3 all-reduce fsdp f32 32
        forward: 2 all-gather fsdp bf16 4
        forward: 2 all-gather fsdp bf16 8
        forward: 2 all-to-all context bf16 24
        forward: 2 all-to-all context bf16 48
        forward: 3 all-gather fsdp bf16 16
        once: 1 all-gather fsdp bf16 16
        once: 1 all-gather fsdp s32 6
        once: 1 reduce-scatter fsdp f32 8
        once: 2 all-reduce context f32 8
        once: 2 all-to-all fsdp bf16 48
        once: 4 all-gather context s32 3
    """,
}  # fmt: skip


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in RUNS])
def test_communication_budget(name, tmp_path, no_cache):
    assert budget(RUNS[name], tmp_path) == re.sub(r"\n +", "\n", BUDGET[name]).strip()


@pytest.fixture(scope="module")
def v5e():
    """Eight compile-only chips: the real XLA:TPU compiler, without a TPU."""
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["fsdp", "hsdp", "fsdp x tensor"])
def test_tpu_reduces_what_it_keeps(name, v5e):
    """No gradient of a weight is all-reduced over fsdp: an all-reduce of more than gains is inside a reduce-scatter, or over data."""
    b = built(v5e, **RUNS[name])
    whole = []
    for name, lines in computations(b.compile(ROWS, T).as_text()).items():
        for line in lines:
            if (found := re.search(r"= (.*?) all-reduce(?:-start)?\(", line)) and "all-reduce-scatter" not in name:
                size = max(int(np.prod([int(n) for n in s.split(",") if n])) for s in re.findall(r"\[([\d,]*)\]", found[1]))
                if size > 4 * D and "fsdp" in axes_of(line, b.execution.mesh):
                    whole.append(line.strip()[:200])
    assert not whole, "\n".join(whole)


@pytest.mark.nightly
def test_offloaded_activations_leave_the_device(v5e):
    """The residual stream of each layer goes to the host's memory: 3 layers of 4 rows of 96 x 64 numbers in bfloat16 at least."""
    settings = dict(mesh=Mesh(data=1, fsdp=8), remat="full")
    plain, offloaded = (built(v5e, **settings, **more).compile(ROWS, T).memory_analysis() for more in ({}, dict(offload=("input",))))
    assert plain.host_temp_size_in_bytes == 0 and offloaded.host_temp_size_in_bytes >= 3 * 4 * T * D * 2
