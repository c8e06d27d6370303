"""Meshes, rules and `local`: errors that name the numbers, and results that no mesh changes."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from minllm import spec
from minllm.layer import Context, Execution
from minllm.layers.attention import Attention
from minllm.layers.position import Rope
from minllm.sharding import (
    ALL,
    DDP,
    FSDP,
    FSDP_TP,
    MESH_AXES,
    TP,
    Rules,
    across_slices,
    constrain,
    local,
    make_mesh,
    replicated,
    sharding,
    shardings,
)  # fmt: skip


@pytest.mark.parametrize("sizes, shape", [
    (dict(), None), (dict(data=8), (8, 1, 1, 1, 1, 1)), (dict(fsdp=2, tensor=4), (1, 2, 1, 1, 1, 4)),
    (dict(fsdp=-1, tensor=2), (1, 4, 1, 1, 1, 2)), (dict(context=-1), (1, 1, 1, 1, 8, 1)),
], ids=str)  # fmt: skip
def test_a_mesh_has_every_axis(sizes, shape):
    mesh = make_mesh(**sizes, devices=jax.devices()[:1] if shape is None else None)
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (shape or (1,) * 6)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes, message", [
    (dict(model=8), "'model' is unknown; the axes are data, fsdp"), (dict(data=3), "multiply to 8"), (dict(data=4), "there are 8 devices"),
    (dict(data=-1, fsdp=-1), "one axis of -1 at most"), (dict(tensor=0), r"positive, or -1 for the rest; got \{'tensor': 0\}"),
    (dict(tensor=-2), "positive"), (dict(data=-1, tensor=3), "multiple of 3 devices"),
], ids=str)  # fmt: skip
def test_impossible_meshes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


MESH = AbstractMesh((2, 2, 1, 1, 2, 4), MESH_AXES)


@pytest.mark.parametrize("rules, axes, shape, expected", [
    (ALL, "embed -> heads head", (8, 4, 3), ("fsdp", "tensor", None)),
    (ALL, "embed -> kv_heads head", (8, 2, 3), ("fsdp", None, None)),          # fewer kv heads than shards: replicated
    (ALL, "embed -> kv_heads head", (8, 8, 3), ("fsdp", "tensor", None)),
    (ALL, "batch residual_seq act_embed", (4, 16, 8), (("data", "fsdp"), ("context", "tensor"), None)),
    (ALL, "_ vocab", (5, 12), (None, "tensor")),
    (DDP, "embed -> mlp", (7, 5), (None, None)),
    (ALL, "experts embed -> mlp", (5, 8, 8), (None, "fsdp", "tensor")),       # an axis of size 1 shards nothing
], ids=str)  # fmt: skip
def test_partition(rules, axes, shape, expected):
    assert rules.partition(MESH, axes, shape) == PartitionSpec(*expected)


@pytest.mark.parametrize("rules, axes, shape, message", [
    (ALL, "embed -> haeds head", (8, 4, 3), "'haeds' is not in Rules; did you mean 'heads'"),
    (ALL, "embed -> qwx", (8, 4), "'qwx' is not in Rules$"),
    (ALL, "embed -> mlp", (8, 6), "mlp of 6 does not divide over the mesh axes tensor=4; choose sizes whose product divides 6"),
    (ALL, "batch seq", (6, 16), "batch of 6 does not divide over the mesh axes data=2, fsdp=2"),
    (ALL, "heads mlp", (4, 4), "mesh axis 'tensor' would shard both 'heads' and 'mlp' of one array"),
    (Rules(batch="fsdp", act_embed="fsdp"), "batch seq act_embed", (4, 4, 4), "'fsdp' would shard both 'batch' and 'act_embed'"),
], ids=str)  # fmt: skip
def test_impossible_partitions(rules, axes, shape, message):
    with pytest.raises(ValueError, match=message):
        rules.partition(MESH, axes, shape)


def test_presets_say_what_their_names_say():
    sharded = lambda rules: {f.name for f in fields(rules) if getattr(rules, f.name)}
    assert sharded(Rules()) == set() and sharded(DDP) == {"batch"} and sharded(FSDP) == {"batch", "embed", "expert_embed"}
    assert {"heads", "mlp", "vocab", "act_heads"} <= sharded(TP) and "embed" not in sharded(TP)
    assert sharded(FSDP) | sharded(TP) == sharded(FSDP_TP) < sharded(ALL)
    assert hash(ALL) == hash(Rules(**vars(ALL)))


def test_shardings_follow_the_specs():
    mesh = make_mesh(fsdp=2, tensor=4)
    specs = {"q": spec.Spec((8, 4, 3), "embed -> heads head"), "b": spec.Spec((5,), "_")}
    where = shardings(specs, mesh, ALL)
    assert where["q"].spec == PartitionSpec("fsdp", "tensor", None) and where["b"].spec == PartitionSpec(None)
    x = jax.device_put(jnp.zeros((8, 4, 3)), where["q"])
    assert x.addressable_shards[0].data.shape == (4, 1, 3)


def test_without_a_mesh_nothing_happens():
    op, x = lambda x: x, jnp.ones((2, 3))
    for run in (Execution(), Execution(mesh=make_mesh(jax.devices()[:1]))):
        assert local(op, ("batch seq",), "batch seq", run) is op and constrain(x, "batch seq", run) is x


def test_constrain_places_an_activation():
    run = Execution(mesh=make_mesh(data=4, tensor=2))
    y = jax.jit(lambda x: constrain(x * 2, "batch seq act_mlp", run))(jnp.ones((8, 3, 4)))
    assert y.sharding.is_equivalent_to(sharding(run.mesh, ALL, "batch seq act_mlp", y.shape), 3)
    with pytest.raises(ValueError, match="batch of 6 does not divide"):
        constrain(jnp.ones((6, 3, 4)), "batch seq act_mlp", run)


def test_local_sees_parts_passes_none_and_returns_any_structure():
    run, seen = Execution(mesh=make_mesh(data=4, tensor=2)), []

    def op(x, nothing, w):
        seen.append((x.shape, nothing, w.shape))
        return {"y": x * w.sum(), "rows": x[:, 0, 0]}

    outs = {"y": "batch seq act_heads", "rows": "batch"}
    x = jnp.arange(8.0 * 3 * 4).reshape(8, 3, 4)
    out = jax.jit(local(op, ("batch seq act_heads", "batch", "_"), outs, run))(x, None, jnp.ones(5))
    assert seen[-1] == ((2, 3, 2), None, (5,)) and (out["y"] == 5 * x).all() and out["rows"].shape == (8,)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [2, 4])
def test_any_number_of_key_value_heads_over_any_tensor_axis(kv_heads, tensor):
    """Repeated to the least common multiple where they do not divide: 3 over 2 are 6, 3 over 4 are 12. Value and gradients as without a
    mesh, to 1e-5 of the largest entry: float32 sums in another order."""
    layer, mesh = Attention(12, kv_heads, 4, Rope()), make_mesh(data=8 // tensor, tensor=tensor)
    p, x = spec.init(layer.params(16), jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 6, 16))
    direction = jax.random.normal(jax.random.key(2), x.shape)
    positions = jnp.tile(jnp.arange(6), (4, 1))

    def value_and_grad(run):
        def loss(p, x):
            y = layer.apply(p, x, Context(positions=positions, run=run)).x
            return (y * direction).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(p, x)

    for a, b in zip(jax.tree.leaves(value_and_grad(Execution(mesh=mesh))), jax.tree.leaves(value_and_grad(Execution()))):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(np.asarray(b)).max()


def test_query_heads_that_do_not_divide_are_an_error():
    layer, run = Attention(6, 2, 4), Execution(mesh=make_mesh(data=2, tensor=4))
    p = spec.init(layer.params(16), jax.random.key(0))
    with pytest.raises(ValueError, match="act_heads of 6 does not divide over the mesh axes tensor=4"):
        layer.apply(p, jnp.ones((2, 3, 16)), Context(positions=jnp.zeros((2, 3), jnp.int32), run=run))


@pytest.mark.parametrize("sizes, slices, expected", [
    (dict(data=4, fsdp=64), 4, dict(data=4)), (dict(data=2, fsdp=128), 4, dict(data=2, fsdp=2)), (dict(fsdp=512), 2, dict(fsdp=2)),
    (dict(data=2, stage=4, fsdp=32), 8, dict(data=2, stage=4)),
], ids=str)  # fmt: skip
def test_which_axes_cross_slices(sizes, slices, expected):
    """K12: data first, then stages, then fsdp."""
    assert across_slices(dict.fromkeys(MESH_AXES, 1) | sizes, slices) == dict.fromkeys(MESH_AXES, 1) | expected


def test_a_slice_holds_what_talks_most():
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(chips, data=2, fsdp=2, tensor=2)
    for which in range(2):
        assert {c.slice_index for c in mesh.devices[which].ravel()} == {which}
    with pytest.raises(ValueError, match="mesh data=1, stage=1, fsdp=1 does not divide over 2 slices; make data a multiple of 2"):
        make_mesh(chips, context=4, tensor=2)


def test_the_audit_names_what_is_replicated():
    """V12: more than 1 % of the tree, the largest first, and over which axes; what is sharded, or small, is not named."""
    mesh = make_mesh(data=2, fsdp=4)
    leaf = lambda axes, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(mesh, ALL, axes, shape))
    tree = {"w": leaf("embed -> mlp", 1024, 64), "b": leaf("_", 128), "table": leaf("_ _", 512, 64), "x": leaf("batch _", 1024, 64)}
    assert replicated(tree) == [
        "table float32[512, 64]: 0.1 MiB on each device, the same over data=2, fsdp=4",
        "w float32[1024, 64]: 0.1 MiB on each device, the same over data=2",
    ]
    assert replicated(tree, memory=16 * 2**30) == []
    assert len(replicated(tree, share=0.0)) == 3
