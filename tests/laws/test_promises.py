"""The promises in bold of the design that belong to no single layer: decode is unrolled, keys, precision, lowering for TPUs."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXAMPLES
from jax.experimental import topologies

from minllm import spec
from minllm.layer import Context, Execution
from minllm.models import build
from minllm.sharding import ALL, MESH_AXES, make_mesh, sharding, shardings
from minllm.weights import unstack


def placed(specs, mesh, dtype):
    return spec.tree_map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype, sharding=sharding(mesh, ALL, s.axes, s.shape)), specs)


@pytest.fixture(scope="module")
def v5e():
    """Compile-only devices: the real XLA:TPU compiler, without a TPU."""
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return lambda **sizes: make_mesh(devices[: int(np.prod(list(sizes.values())))], **sizes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_compiles_for_v5e_2x2(name, v5e):
    ex, mesh = EXAMPLES[name], v5e(fsdp=2, tensor=2)
    run, B, T = Execution(mesh=mesh), 4, 16
    shape = jax.eval_shape(lambda: ex.inputs(B, T))
    axes = "batch seq" if shape.ndim == 2 else "batch seq _"
    x = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding(mesh, ALL, axes, shape.shape))

    def loss(p, x):
        return (ex.apply(p, x, run=run).x.astype(jnp.float32) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss)).trace(placed(ex.specs, mesh, jnp.bfloat16), x)
    assert step.lower(lowering_platforms=("tpu",)).compile().memory_analysis().temp_size_in_bytes >= 0
    assert run.chip == "TPU v5 lite"  # what kernels choose their tiles by is known without a TPU


def decode(model, mesh, B, S, params):
    specs = model.params()
    cache = placed(model.cache(B, S, jnp.bfloat16), mesh, jnp.bfloat16)
    weights = jax.eval_shape(unstack, spec.abstract(specs, jnp.bfloat16)) if params == "unstacked" else spec.abstract(specs, jnp.bfloat16)
    whole = sharding(mesh, ALL, "", ())
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), weights)
    token = jax.ShapeDtypeStruct((B, 1), jnp.int32, sharding=whole)

    def step(p, token, positions, cache):
        return model.apply(p, token, Context(positions=positions, run=Execution(mesh=mesh)), cache)

    traced = jax.jit(step, donate_argnums=3).trace(weights, token, token, cache)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def test_decode_is_unrolled(v5e):
    """One token against a 1 GiB cache takes a small fraction of it in temporaries: no layer's cache is copied into a stack of all."""
    model = build("llama", layers=8, D=512, heads=8, kv_heads=8, head_dim=64, hidden=512, vocab=512)
    B, S = 8, 8192
    cache = spec.abstract(model.cache(B, S, jnp.bfloat16))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
    assert size >= 2**30 and len(cache[0]) == 16  # one entry a layer
    memory = decode(model, v5e(data=1), B, S, "unstacked").memory_analysis()
    assert memory.alias_size_in_bytes >= size  # updated in place
    assert memory.temp_size_in_bytes <= size / 4, memory.temp_size_in_bytes / 2**20


def test_keys_are_those_of_the_global_layer_index():
    """Dropout is the same scanned, unrolled and in a stack split into two: layer i draws from fold_in(key, i)."""
    ex = EXAMPLES["llama_tied_dropout"]
    p, x, key = ex.params(), ex.inputs(2, 16), jax.random.key(9)
    scanned = ex.apply(p, x, key=key).x
    unrolled = ex.apply(p, x, key=key, run=Execution(scan=False)).x
    split = ex.apply(unstack(p), x, key=key).x
    off = ex.apply(p, x).x
    np.testing.assert_allclose(scanned, unrolled, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scanned, split, rtol=0, atol=1e-5)
    assert float(jnp.abs(scanned - off).max()) > 0.01
    half = replace(ex.layer, trunk=(ex.layer.trunk[0].at(1), ex.layer.trunk[0].at(1)))
    first, second = (jax.tree.map(lambda a, i=i: a[i : i + 1], p["trunk"][0]) for i in (0, 1))
    np.testing.assert_allclose(half.apply(p | {"trunk": (first, second)}, x, Context(key=key)).x, scanned, rtol=0, atol=1e-5)


def test_initial_values_depend_on_path_and_layer_alone():
    deep, shallow = (build("llama", D=32, layers=n, heads=4, kv_heads=2, hidden=48, vocab=64) for n in (4, 2))
    a, b = (spec.init(m.params(), jax.random.key(0)) for m in (deep, shallow))
    np.testing.assert_array_equal(a["trunk"][0].pattern[0]["inner"]["q"][:2], b["trunk"][0].pattern[0]["inner"]["q"])
    np.testing.assert_array_equal(a["embed"], b["embed"])
    mesh = make_mesh(fsdp=4, tensor=2)
    sharded = jax.jit(lambda k: spec.init(deep.params(), k), out_shardings=shardings(deep.params(), mesh, ALL))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, sharded, a)


def test_the_mesh_has_every_axis():
    assert make_mesh(fsdp=8).axis_names == MESH_AXES
