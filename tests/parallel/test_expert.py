"""Law 6 for experts that live on other devices: value, losses, statistics and gradients are those of one device, dropless and with
capacity; and what travels is what the file says."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from minllm import spec
from minllm.layer import Context, Execution
from minllm.layers.mlp import GLU
from minllm.layers.moe import MoE, Router
from minllm.sharding import ALL, make_mesh, sharding, shardings

B, T, D = 8, 16, 32
MESHES = {
    "expert": dict(expert=4, data=2), "expert_fsdp_tensor": dict(expert=2, fsdp=2, tensor=2),
    "expert_context": dict(expert=2, context=2, data=2), "expert_all": dict(expert=8),
}  # fmt: skip
LAYERS = {
    "dropless": MoE(Router(8, 3, "sigmoid", correction=True), GLU(16, bias=True), shared=GLU(16), balance=0.1, z_loss=0.01),
    "capacity": MoE(Router(8, 3), GLU(16, bias=True), capacity=0.6, balance=0.1),
}


def run_on(layer, mesh, skewed=False):
    run = Execution() if mesh is None else Execution(mesh=make_mesh(**mesh))
    specs = layer.params(D)
    p = spec.init(specs, jax.random.key(1))
    p = jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(7), a.shape, a.dtype), p)
    x = jax.random.normal(jax.random.key(2), (B, T, D))
    if skewed:  # nearly everything for the experts of one device
        p["router"]["weight"] = p["router"]["weight"].at[:, :3].add(3.0 * jnp.sign(x.mean((0, 1)))[:, None])
        x = x + 2 * jnp.sign(x.mean((0, 1)))
    direction = jax.random.normal(jax.random.key(3), x.shape)
    segments = jnp.ones((B, T), jnp.int32).at[3, 9:].set(0)
    if mesh is not None:
        p = jax.tree.map(jax.device_put, p, shardings(specs, run.mesh, run.rules))
        x = jax.device_put(x, sharding(run.mesh, run.rules, "batch seq _", x.shape))

    def loss(p, x):
        out = layer.apply(p, x, Context(run=run, segments=segments))
        return (out.x * direction).sum() + sum(s for s, _ in (out.losses or {}).values()), (out.x, out.losses, out.stats)

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p, x)
    return aux, grads


@pytest.mark.parametrize("mesh", ["expert", "expert_fsdp_tensor", "expert_context"])
@pytest.mark.parametrize("name", LAYERS)
def test_law_6_expert(name, mesh):
    """1e-5 of the largest entry: float32 sums in another order."""
    want, got = run_on(LAYERS[name], None), run_on(LAYERS[name], MESHES[mesh])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1.0)


def test_law_6_when_one_device_gets_nearly_everything():
    """Dropless means dropless: the worst case has room."""
    want, got = run_on(LAYERS["dropless"], None, skewed=True), run_on(LAYERS["dropless"], MESHES["expert_all"], skewed=True)
    load = want[0][2]["load"]
    assert float(load[:3].sum()) > 0.9 * float(load.sum())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1.0)


def exchanges(text):
    """Bytes of the result of every all-to-all of a compiled program."""
    kinds = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}
    found = re.findall(r"= \(?(bf16|f32|s32|u32)\[([\d,]*)\]\S* all-to-all(?:-start)?\(", text)
    return [kinds[k] * int(np.prod([int(n) for n in dims.split(",") if n] or [1])) for k, dims in found]


def test_law_10_tokens_travel_by_all_to_all_on_a_tpu():
    """With capacity, compiled for v5e: two exchanges forward and two backward, in bfloat16, of the rows that experts have room for."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    layer = replace(LAYERS["capacity"], shared=None)
    mesh = make_mesh(devices, expert=4)
    run, specs, D, T = Execution(mesh=mesh, kernels="reference"), layer.params(128), 128, 256
    there = lambda shape, axes, kind=jnp.bfloat16: jax.ShapeDtypeStruct(shape, kind, sharding=sharding(mesh, ALL, axes, shape))
    p, x = spec.tree_map(lambda s: there(s.shape, s.axes, s.dtype or jnp.bfloat16), specs), there((B, T, D), "batch seq _")
    loss = lambda p, x: layer.apply(p, x, Context(run=run)).x.astype(jnp.float32).sum()
    step = jax.jit(jax.grad(loss, (0, 1))).trace(p, x).lower(lowering_platforms=("tpu",)).compile()
    found = [size for size in exchanges(step.as_text()) if size > 2**14]
    k, E, n = 3, 8, 4
    rows = E * (B // n) * -(-T * k * 6 // (10 * E))
    assert len(found) == 4 and max(found) <= 2 * rows * D, (found, rows)
