"""Embedding and cross-entropy over a spread vocabulary: value and gradients as on one device, and float32 sums of bfloat16 weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm.layer import Execution
from minllm.parallel.vocab import cross_entropy, embed
from minllm.sharding import ALL, DDP, TP, make_mesh
from minllm.weights import Mixed

B, T, D, V = 8, 16, 16, 64
MESHES = {
    "fsdp": dict(fsdp=8), "tensor": dict(data=4, tensor=2), "fsdp_tensor": dict(fsdp=4, tensor=2),
    "all": dict(fsdp=2, context=2, tensor=2), "hsdp": dict(data=2, fsdp=4),
}  # fmt: skip


def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    ids = jnp.asarray(rng.integers(0, V, (2, B, T)), jnp.int32)
    return normal(V, D), normal(D, V), *ids, normal(B, T, D), normal(B, T)


def value_and_grad(run, tied=False, dtype=None):
    table, head, ids, targets, mix, weights = arrays()

    def loss(table, head):
        low = lambda w: w if dtype is None else Mixed(jax.lax.stop_gradient(w).astype(dtype), w)
        x = embed(low(table), ids, run) * mix.astype(dtype or mix.dtype)
        w = low(table.T if tied else head)
        loss, lse = cross_entropy(x, w, targets, softcap=20.0, smoothing=0.1, run=run)
        return ((loss + 0.1 * lse**2) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(table, head)


def agree(ours, base, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(base), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_spread_vocabulary(mesh):
    """1e-5 of the largest entry: float32 sums in another order."""
    agree(value_and_grad(Execution(mesh=make_mesh(**MESHES[mesh]))), value_and_grad(Execution()), 1e-5)


@pytest.mark.parametrize("rules", [DDP, TP, ALL], ids=["ddp", "tp", "all"])
def test_under_other_rules_and_tied(rules):
    run = Execution(mesh=make_mesh(fsdp=4, tensor=2), rules=rules)
    agree(value_and_grad(run, tied=True), value_and_grad(Execution(), tied=True), 1e-5)


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    """At most twice the error of one device in the same precision, in root mean square, both against float32 throughout."""
    exact = value_and_grad(Execution())[1]
    one, eight = (value_and_grad(run, dtype=jnp.bfloat16)[1] for run in (Execution(), Execution(mesh=make_mesh(fsdp=4, tensor=2))))
    error = lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2)))
    for a, b, c in zip(eight, one, exact):
        assert a.dtype == jnp.float32 and error(a, c) <= 2 * error(b, c)


def test_few_rows_are_looked_up_too():
    """A batch that no mesh axis shares out, as decoding has it: columns are gathered instead of exchanged."""
    table, _, ids, *_ = arrays()
    rules = replace(ALL, batch=None, seq=None, residual_seq=None)
    run = Execution(mesh=make_mesh(fsdp=4, tensor=2), rules=rules)
    np.testing.assert_allclose(jax.jit(lambda: embed(table, ids[:1, :1], run))(), table[ids[:1, :1]], rtol=0, atol=0)
