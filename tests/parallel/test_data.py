"""V02: data parallelism by jit, shard_map and pmap gives the numbers of one device, equal replicas, and one all-reduce of the gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm.parallel.data import by_jit, by_pmap, by_shard_map


def loss(params, batch):
    h = jnp.tanh(batch["x"] @ params["in"])
    return jnp.mean((h @ params["out"] - batch["y"]) ** 2)


@pytest.mark.parametrize("make", [by_jit, by_shard_map, by_pmap])
def test_three_notations_of_one_step(make):
    """1e-6: float32 means in another order."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"in": normal(5, 7), "out": normal(7, 3)}
    one, many = params, params
    step, devices = make(loss, 0.1, jax.devices()), jax.devices()
    for _ in range(5):
        batch = {"x": normal(16, 5), "y": normal(16, 3)}
        value, grads = jax.value_and_grad(loss)(one, batch)
        one = jax.tree.map(lambda w, g: w - 0.1 * g, one, grads)
        many, found = step(many, batch)
        np.testing.assert_allclose(found, value, rtol=1e-6)
    for ours, want in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert ours.shape == want.shape and len(ours.addressable_shards) == len(devices)
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
        for shard in ours.addressable_shards:  # replicas are equal bitwise
            np.testing.assert_array_equal(shard.data, ours.addressable_shards[0].data)


@pytest.mark.parametrize("make", [by_jit, by_shard_map])
def test_the_gradient_is_all_that_is_sent(make):
    abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = {"in": abstract(5, 7), "out": abstract(7, 3)}, {"x": abstract(16, 5), "y": abstract(16, 3)}
    text = make(loss, 0.1, jax.devices()).lower(*args).compile().as_text()
    sent = re.findall(r"(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    sums = [line.split("all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    sizes = {int(np.prod([int(n) for n in shape.split(",") if n])) for line in sums for shape in re.findall(r"f32\[([\d,]*)\]", line)}
    assert set(sent) == {"all-reduce"} and sizes == {5 * 7, 7 * 3, 1}
