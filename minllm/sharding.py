"""Where arrays live.

A mesh has the same named axes for every run, most of size 1. `Rules` map the closed vocabulary of logical axes to mesh axes,
so a parallelism that the compiler can do is a `Rules` value or a mesh shape, never code in a layer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from minllm.spec import Tree, path_name, tree_map

if TYPE_CHECKING:
    from minllm.layer import Execution

MeshAxes = str | tuple[str, ...] | None

# Outermost first: neighbours on the last axis are the closest chips (the order TP, CP, PP, DP of the Llama 3 paper, section 3.3).
MESH_AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")

# Fewer key/value heads than tensor shards is normal: their weights are then replicated, and `local` repeats the heads.
# Every other dim that does not divide is an error.
MAY_REPLICATE = ("kv_heads", "act_kv_heads")


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (default: all of them). Axes not named have size 1; one size may be -1: the rest of the devices.

    Raises ValueError for an unknown axis or when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"mesh axis {min(unknown)!r} is unknown; the axes are {', '.join(MESH_AXES)}")
    if bad := {a: n for a, n in sizes.items() if n < 1 and n != -1}:
        raise ValueError(f"mesh axis sizes must be positive, or -1 for the rest; got {bad}")
    known = math.prod(n for n in sizes.values() if n != -1)
    free = [a for a, n in sizes.items() if n == -1]
    if len(free) > 1 or len(devices) % known or (not free and known != len(devices)):
        raise ValueError(
            f"mesh {sizes} needs a multiple of {known} devices and one axis of -1 at most, but there are {len(devices)} devices; "
            f"make the sizes multiply to {len(devices)}"
        )
    shape = tuple(len(devices) // known if sizes.get(a) == -1 else sizes.get(a, 1) for a in MESH_AXES)
    kinds = (AxisType.Auto,) * len(shape)
    if devices[0].platform == "cpu":  # simulated devices have no topology to optimise for
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=kinds)
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    # a mesh axis may be part of a physical one: 64 x 4 on a torus of 16 x 16
    if slices == 1:
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES, axis_types=kinds)
    between = across_slices(dict(zip(MESH_AXES, shape)), slices)
    within = tuple(n // between[a] for a, n in zip(MESH_AXES, shape))
    chips = create_hybrid_device_mesh(within, tuple(between.values()), devices, allow_split_physical_axes=True)
    return Mesh(chips, MESH_AXES, axis_types=kinds)


def across_slices(sizes: dict[str, int], slices: int) -> dict[str, int]:
    """How many slices each mesh axis spans. Slices are joined by the data-centre network, which is tens of times slower than the links
    inside one: it carries the gradients of data first, then the activations between stages, then the weights of fsdp, and nothing else.

    Raises ValueError where these axes do not divide over the slices.
    """
    between, rest = dict.fromkeys(sizes, 1), slices
    for axis in ("data", "stage", "fsdp"):
        between[axis] = math.gcd(sizes[axis], rest)
        rest //= between[axis]
    if rest > 1:
        raise ValueError(
            f"mesh data={sizes['data']}, stage={sizes['stage']}, fsdp={sizes['fsdp']} does not divide over {slices} slices; make data a "
            f"multiple of {slices} (expert, context and tensor stay inside a slice)"
        )
    return between


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis. Weights and activations have separate words, so that no mesh axis occurs twice in one array."""

    # weights
    embed: MeshAxes = None
    heads: MeshAxes = None
    kv_heads: MeshAxes = None
    head: MeshAxes = None
    mlp: MeshAxes = None
    vocab: MeshAxes = None
    experts: MeshAxes = None
    expert_embed: MeshAxes = None  # the width of an expert's matrices: "experts" holds one mesh axis that "embed" may use
    layers: MeshAxes = None
    # activations and caches
    batch: MeshAxes = None
    seq: MeshAxes = None
    residual_seq: MeshAxes = None
    act_embed: MeshAxes = None
    act_heads: MeshAxes = None
    act_kv_heads: MeshAxes = None
    act_mlp: MeshAxes = None
    act_vocab: MeshAxes = None
    kv_seq: MeshAxes = None
    pages: MeshAxes = None

    def mesh_axes(self, word: str) -> tuple[str, ...]:
        """The mesh axes of one logical axis; raises ValueError for a word that is not in the vocabulary."""
        if word == "_":
            return ()
        words = [f.name for f in fields(self)]
        if word not in words:
            near = difflib.get_close_matches(word, words, 1)
            raise ValueError(f"logical axis {word!r} is not in Rules{f'; did you mean {near[0]!r}?' if near else ''}")
        axes = getattr(self, word)
        return (axes,) if isinstance(axes, str) else tuple(axes or ())

    def partition(self, mesh: Mesh | AbstractMesh, axes: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes; raises ValueError where a dim does not divide over its mesh axes."""
        words = [w for w in axes.split() if w != "->"]
        assert len(words) == len(shape), (axes, shape)
        entries, used = [], {}
        for word, dim in zip(words, shape):
            names = tuple(a for a in self.mesh_axes(word) if mesh.shape[a] > 1)
            shards = math.prod(mesh.shape[a] for a in names)
            if dim % shards and word in MAY_REPLICATE:
                names = ()
            elif dim % shards:
                sizes = ", ".join(f"{a}={mesh.shape[a]}" for a in names)
                raise ValueError(f"{word} of {dim} does not divide over the mesh axes {sizes}; choose sizes whose product divides {dim}")
            for a in names:
                if a in used:
                    raise ValueError(f"mesh axis {a!r} would shard both {used[a]!r} and {word!r} of one array ({axes!r}); change one rule")
                used[a] = word
            entries.append(names if len(names) > 1 else names[0] if names else None)
        return PartitionSpec(*entries)


_TENSOR = dict(heads="tensor", kv_heads="tensor", mlp="tensor", vocab="tensor",
               act_heads="tensor", act_kv_heads="tensor", act_mlp="tensor", act_vocab="tensor")  # fmt: skip
DDP = Rules(batch=("data", "fsdp", "expert"))
FSDP = replace(DDP, embed=("fsdp", "expert", "stage"), expert_embed=("fsdp", "stage"))  # a pipeline deals the layers out in each step
TP = replace(DDP, **_TENSOR)
FSDP_TP = replace(FSDP, **_TENSOR)
# Everything at once: with the axes that a mesh leaves at 1 it is each of the others. Norms and residuals are sharded along the
# sequence inside a tensor group; context shards the queries' sequence and gathers keys and values (Llama 3 paper, section 3.3.2).
ALL = replace(FSDP_TP, seq="context", residual_seq=("context", "tensor"), experts="expert")


def sharding(mesh: Mesh | AbstractMesh, rules: Rules, axes: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, rules.partition(mesh, axes, shape))


def shardings(specs: Tree, mesh: Mesh | AbstractMesh, rules: Rules) -> Tree:
    """The sharding of each Spec of a tree."""
    return tree_map(lambda s: sharding(mesh, rules, s.axes, s.shape), specs)


def replicated(tree: Tree, share: float = 0.01, memory: float | int | None = None) -> list[str]:
    """A line for each array of a tree (arrays, or shapes with shardings) of which devices hold copies and that takes more than `share` of
    `memory` bytes (default: what the whole tree takes on a device), the largest first."""
    found, total = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf.sharding, NamedSharding):
            continue
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        mesh, used = leaf.sharding.mesh, {a for entry in leaf.sharding.spec for a in ((entry,) if isinstance(entry, str) else entry or ())}
        if over := [f"{a}={n}" for a, n in mesh.shape.items() if n > 1 and a not in used]:
            found.append((size, path_name(path), leaf, over))
    limit = share * (memory or total)
    return [
        f"{name} {leaf.dtype.name}{list(leaf.shape)}: {size / 2**20:,.1f} MiB on each device, the same over {', '.join(over)}"
        for size, name, leaf, over in sorted(found, key=lambda f: (-f[0], f[1])) if size > limit
    ]  # fmt: skip


def constrain(x: Array, axes: str, run: Execution) -> Array:
    """Say where an activation lives; the identity without a mesh."""
    if run.mesh is None or run.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(run.mesh, run.rules, axes, x.shape))


def shards_of(word: str, run: Execution) -> tuple[str, ...]:
    """The mesh axes that really split a logical axis: those of more than one device."""
    return () if run.mesh is None else tuple(a for a in run.rules.mesh_axes(word) if run.mesh.shape[a] > 1)


def local(op: Callable, ins: tuple[str, ...], outs: Any, run: Execution) -> Callable:
    """`op` on each device's part of its arguments: a `shard_map` whose specs come from the Rules, the identity without a mesh.

    ins: the logical axes of each positional argument (an argument may be None); outs: those of each result, in op's structure.
    The op must be independent along every sharded dim, or send for what it needs: it may name the mesh axes. Key/value heads that do not
    divide over their mesh axis are repeated to the least common multiple, which divides the query heads whenever the mesh axis does.
    """
    mesh, rules = run.mesh, run.rules
    if mesh is None or mesh.size == 1:
        return op

    def repeated(x, axes):
        for dim, word in enumerate(axes.split()):
            if word == "act_kv_heads":
                shards = math.prod(mesh.shape[a] for a in rules.mesh_axes(word))
                x = jnp.repeat(x, math.lcm(x.shape[dim], shards) // x.shape[dim], axis=dim)
        return x

    def call(*args):
        here = [i for i, x in enumerate(args) if x is not None]
        given = [repeated(args[i], ins[i]) for i in here]

        def body(*parts):
            full: list[Any] = [None] * len(args)
            for i, part in zip(here, parts):
                full[i] = part
            return op(*full)

        # before the op is traced: what does not divide is said in the words of the rules
        in_specs = tuple(rules.partition(mesh, ins[i], x.shape) for i, x in zip(here, given))
        split = {word: entry for i, spec in zip(here, in_specs) for word, entry in zip(ins[i].split(), spec)}
        spec_of = lambda axes: PartitionSpec(*(split.get(word, shards_of(word, run)) for word in axes.split()))
        return shard_map(body, mesh, in_specs, jax.tree.map(spec_of, outs))(*given)

    return call


def shard_map(body: Callable, mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over every axis that is not already manual: inside a pipeline `stage` is."""
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
    # check_vma=False: kernels would have to declare the varying axes of their outputs
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)
