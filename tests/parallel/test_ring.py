"""Attention over a spread sequence: its parts, its balance, its limits. That it changes no value is law 6."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm.layer import Execution
from minllm.parallel.ring import attend, head_tail
from minllm.sharding import make_mesh
from minllm_kernels import attention
from minllm_kernels.mask import Causal, Window
from minllm_kernels.ops.attention import Settings, attention_part, merge_parts


def inputs(B=2, T=32, N=4, K=2, H=8, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))
    return q, k, v, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)), jnp.asarray(rng.normal(size=N), jnp.float32)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(5)], ids=["causal", "window"])
def test_parts_of_the_keys_add_up(mask, sinks):
    """A query that sees nothing in one part, or in either, included. 1e-6: one rounding more."""
    q, k, v, pos, s = inputs()
    s = s if sinks else None
    settings, at = Settings(mask, 0.3, None, "auto", None), lambda i, j: (k[:, i:j], v[:, i:j], pos, pos[:, i:j])
    parts = [attention_part(settings, q, *at(i, j), None, None, s if i == 0 else None, None, None) for i, j in ((0, 8), (8, 32))]
    o, lse = merge_parts(*parts)
    want, want_lse = attention_part(settings, q, *at(0, 32), None, None, s, None, None)
    np.testing.assert_allclose(o, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    nothing = jnp.zeros_like(o), jnp.full_like(lse, jnp.inf)
    for a, b in ((nothing, (o, lse)), ((o, lse), nothing)):
        np.testing.assert_allclose(merge_parts(a, b)[0], o, atol=1e-6)
    assert np.isposinf(merge_parts(nothing, nothing)[1]).all() and (merge_parts(nothing, nothing)[0] == 0).all()


@pytest.mark.parametrize("context", ["gather", "ring", "ulysses"])
def test_documents_sinks_and_the_balanced_order(context):
    """K09: tokens in head-and-tail order, packed documents, a sink a head: value and every gradient as on one device. 1e-5 of the largest
    entry: float32 sums in another order."""
    q, k, v, pos, sinks = inputs(T=64)
    seg = jnp.broadcast_to(1 + (jnp.arange(64) >= 23), (2, 64)).astype(jnp.int32)
    pos = pos - 23 * (seg - 1)
    order, direction = head_tail(64, 4), jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(args, run, order):
        q, k, v, sinks = args
        q, k, v, p, s, d = (a[:, order] for a in (q, k, v, pos, seg, direction))
        return (attend(q, k, v, q_pos=p, kv_pos=p, q_seg=s, kv_seg=s, sinks=sinks, run=run) * d).sum()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    ours = grad((q, k, v, sinks), Execution(mesh=make_mesh(data=2, context=4), context=context), order)
    base = grad((q, k, v, sinks), Execution(), np.arange(64))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(base), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1.0)


def test_a_balanced_order_shares_out_a_causal_mask_evenly():
    """K09, K10: scores under the mask that each device computes are equal; in the order of the text the last has 2 C - 1 times the first's.
    Documents unbalance it: the order knows nothing of them."""
    T, C = 64, 4
    see = np.tril(np.ones((T, T)))
    work = lambda order: see[order].sum(1).reshape(C, -1).sum(1)
    balanced, plain = work(head_tail(T, C)), work(np.arange(T))
    assert len(set(balanced)) == 1 and plain[-1] > 6 * plain[0]
    assert sorted(head_tail(T, C)) == list(range(T))
    documents = see * (np.arange(T)[:, None] // 24 == np.arange(T)[None] // 24)
    assert len(set(documents[head_tail(T, C)].sum(1).reshape(C, -1).sum(1))) > 1


def test_a_ring_in_bfloat16_is_as_near_as_one_device():
    """At most twice the error of the same precision on one device, in root mean square, both against float64."""
    q, k, v, pos, _ = inputs(T=64)
    with jax.enable_x64(True):
        want = attention(*(a.astype(jnp.float64) for a in (q, k, v)), q_pos=pos, kv_pos=pos)
    low = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    one = attention(*low, q_pos=pos, kv_pos=pos)
    ring = jax.jit(lambda *a: attend(*a, q_pos=pos, kv_pos=pos, run=Execution(mesh=make_mesh(context=8), context="ring")))(*low)
    error = lambda y: float(np.sqrt(np.mean((np.asarray(y, np.float64) - np.asarray(want)) ** 2)))
    assert ring.dtype == jnp.bfloat16 and error(ring) <= 2 * error(one)


def test_limits():
    run = Execution(mesh=make_mesh(context=8), context="ulysses")
    q, k, v, pos, _ = inputs()
    with pytest.raises(ValueError, match=r"each of 8 devices a share of the 4 query heads.*context: ring"):
        attend(q, k, v, q_pos=pos, kv_pos=pos, run=run)
    with pytest.raises(ValueError, match=r"seq of 12 does not divide over the mesh axes context=8"):
        attend(*(a[:, :12] for a in (q, k, v)), q_pos=pos[:, :12], kv_pos=pos[:, :12], run=run)
    with pytest.raises(ValueError, match="context: ring cannot share out a bias"):
        attend(q, k, v, q_pos=pos, kv_pos=pos, bias=jnp.zeros((1, 4, 32, 32)), run=replace(run, context="ring"))
    with pytest.raises(
        ValueError, match=r"24 tokens do not divide into the 16 pieces of a balanced order over context=8; use a multiple of 16"
    ):
        head_tail(24, 8)
