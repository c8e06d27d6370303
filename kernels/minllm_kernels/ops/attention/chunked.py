"""Attention block by block in plain JAX: the online softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867), as memory-efficient
attention (Rabe & Staats 2021, arXiv 2112.05682). Never holds a [T, S] array; skips the blocks that the mask's span, the positions or
the segments rule out. What XLA runs for long sequences where there is no kernel.
"""

import jax.numpy as jnp
from jax import lax

from minllm_kernels.mask import FAR
from minllm_kernels.ops.attention.reference import logits, per_group

BLOCK = 512  # queries and keys a block: scores of one head are 1 MiB, which stays in a core's cache


def supports(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *_, **__) -> str | None:
    if bias is not None or keep is not None:
        return "a bias or a dropout mask is a [T, S] array already"
    if q.shape[1] * k.shape[1] <= 4 * BLOCK * BLOCK or q.shape[1] < 8:
        return f"T={q.shape[1]}, S={k.shape[1]}: too short to gain"
    return None


def _pad(x, size, value=0):
    """Pad dim 1 to a multiple of size."""
    if x is None:
        return None
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _block(x, i, size):
    return None if x is None else lax.dynamic_slice_in_dim(x, i * size, size, 1)


def _meets(mask, q_pos, kv_pos, q_seg, kv_seg):
    """Whether any query of a block may see any key of a block: a bound from their extremes."""
    lo, hi = mask.span(q_pos.min(), q_pos.max())
    there = kv_pos >= 0
    meets = (kv_pos.max() >= jnp.maximum(lo, 0)) & (jnp.where(there, kv_pos, FAR).min() <= hi)
    if q_seg is not None:
        meets &= (q_seg.max() >= kv_seg.min()) & (q_seg.min() <= kv_seg.max())
    return meets


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *, mask, scale, softcap):
    B, T, N, _ = q.shape
    S, K, h = k.shape[1], k.shape[2], v.shape[-1]
    G, kind = N // K, jnp.promote_types(q.dtype, jnp.float32)
    tq, ts = min(BLOCK, T), min(BLOCK, S)
    q, q_pos, q_seg = _pad(q, tq), _pad(q_pos, tq, -1), _pad(q_seg, tq)
    k, v, kv_pos, kv_seg = _pad(k, ts), _pad(v, ts), _pad(kv_pos, ts, -1), _pad(kv_seg, ts)

    def queries(i):
        qi, qp, qs = (_block(x, i, tq) for x in (q, q_pos, q_seg))

        def keys(carry, j):
            kj, vj, kp, ks = (_block(x, j, ts) for x in (k, v, kv_pos, kv_seg))

            def look(carry):
                m, total, acc = carry
                s, _ = logits(qi, kj, qp, kp, qs, ks, None, mask=mask, scale=scale, softcap=softcap)
                new = jnp.maximum(m, s.max(-1))
                safe = jnp.where(jnp.isneginf(new), 0, new)
                shrink, p = jnp.exp(m - safe), jnp.exp(s - safe[..., None])
                pv = jnp.einsum("bkgts,bskh->bkgth", p.astype(v.dtype), vj, preferred_element_type=kind)
                return new, total * shrink + p.sum(-1), acc * shrink[..., None] + pv

            return lax.cond(_meets(mask, qp, kp, qs, ks), look, lambda c: c, carry), None

        if sinks is None:
            m, total = jnp.full((B, K, G, tq), -jnp.inf, kind), jnp.zeros((B, K, G, tq), kind)
        else:  # a sink is a key with value zero
            m = jnp.broadcast_to(per_group(sinks, K), (B, K, G, tq)).astype(kind)
            total = jnp.ones_like(m)
        start = (m, total, jnp.zeros((B, K, G, tq, h), kind))
        (m, total, acc), _ = lax.scan(keys, start, jnp.arange(k.shape[1] // ts))
        lse = jnp.where(total > 0, jnp.where(jnp.isneginf(m), 0, m) + jnp.log(total), jnp.inf)
        return (acc / jnp.where(total > 0, total, 1)[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype), lse

    o, lse = lax.map(queries, jnp.arange(q.shape[1] // tq))  # (blocks, B, tq, K, G, h), (blocks, B, K, G, tq)
    o = o.swapaxes(0, 1).reshape(B, -1, N, h)[:, :T]
    return o, jnp.moveaxis(lse, 0, 3).reshape(B, K, G, -1)[..., :T]


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, lse, delta, do, *, mask, scale, softcap):
    B, T, N, H = q.shape
    S, K, h = k.shape[1], k.shape[2], v.shape[-1]
    G, kind = N // K, jnp.promote_types(q.dtype, jnp.float32)
    tq, ts = min(BLOCK, T), min(BLOCK, S)
    q, q_pos, q_seg, do, delta = _pad(q, tq), _pad(q_pos, tq, -1), _pad(q_seg, tq), _pad(do, tq), _pad(delta.transpose(0, 3, 1, 2), tq)
    lse = _pad(lse.transpose(0, 3, 1, 2), tq)
    k, v, kv_pos, kv_seg = _pad(k, ts), _pad(v, ts), _pad(kv_pos, ts, -1), _pad(kv_seg, ts)

    def queries(carry, i):
        qi, qp, qs, doi, di, li = (_block(x, i, tq) for x in (q, q_pos, q_seg, do, delta, lse))
        qi_, doi_ = qi.reshape(B, tq, K, G, H), doi.reshape(B, tq, K, G, h)
        di, li = di.transpose(0, 2, 3, 1)[..., None], li.transpose(0, 2, 3, 1)[..., None]

        def keys(carry, j):
            kj, vj, kp, ks = (_block(x, j, ts) for x in (k, v, kv_pos, kv_seg))

            def look(carry):
                dq, dk, dv = carry
                s, slope = logits(qi, kj, qp, kp, qs, ks, None, mask=mask, scale=scale, softcap=softcap)
                p = jnp.exp(s - li)
                dvj = jnp.einsum("bkgts,btkgh->bskh", p.astype(do.dtype), doi_, preferred_element_type=kind)
                ds = p * (jnp.einsum("btkgh,bskh->bkgts", doi_, vj, preferred_element_type=kind) - di)
                ds = (ds * scale if slope is None else ds * slope * scale).astype(q.dtype)
                dkj = jnp.einsum("bkgts,btkgh->bskh", ds, qi_, preferred_element_type=kind)
                dq = dq + jnp.einsum("bkgts,bskh->btkgh", ds, kj, preferred_element_type=kind)
                at = lambda full, part: lax.dynamic_update_slice_in_dim(full, _block(full, j, ts) + part, j * ts, 1)
                return dq, at(dk, dkj), at(dv, dvj)

            return lax.cond(_meets(mask, qp, kp, qs, ks), look, lambda c: c, carry), None

        dk, dv = carry
        start = (jnp.zeros((B, tq, K, G, H), kind), dk, dv)
        (dq, dk, dv), _ = lax.scan(keys, start, jnp.arange(k.shape[1] // ts))
        return (dk, dv), dq.reshape(B, tq, N, H).astype(q.dtype)

    zeros = jnp.zeros(k.shape, kind), jnp.zeros(v.shape, kind)
    (dk, dv), dq = lax.scan(queries, zeros, jnp.arange(q.shape[1] // tq))
    dq = dq.swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]
    return dq, dk[:, :S].astype(k.dtype), dv[:, :S].astype(v.dtype), None
