"""Attention for a CPU: one row of the batch after another, its queries in short static blocks.

The scores of a block stay in the second-level cache, where whole [B, N, T, S] passes over them would go to memory. Where the keys of a
row come in the order of its queries, as they do in training, the keys behind a block are not even multiplied: half of the work under
a causal mask. That order is checked when it runs, and the whole rows are taken when it does not hold.
"""

import jax.numpy as jnp
from jax import lax

from minllm_kernels.mask import Mask

LONGEST = 1024  # above it the program would unroll into too many blocks; chunked.py takes over
BLOCK = 64  # queries a block: 8 heads of 64 x 256 scores are 0.5 MiB


def supports(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *_, **__) -> str | None:
    if bias is not None or keep is not None:
        return "a bias or a dropout mask is a [T, S] array already"
    if not 2 * BLOCK <= q.shape[1] <= LONGEST or k.shape[1] > LONGEST:
        return f"T={q.shape[1]}, S={k.shape[1]}: made for {2 * BLOCK} to {LONGEST}"
    return None


def _ordered(mask: Mask, q_pos, kv_pos, q_seg, kv_seg):
    """Whether no query sees a key that stands behind it in the row: queries and keys are the same tokens, and within a row segments
    rise, and positions rise within a segment. None when the shapes or the mask rule it out."""
    if q_pos.shape != kv_pos.shape or not isinstance(last := mask.span(0, 0)[1], int) or last > 0:
        return None
    same = (q_pos == kv_pos).all()
    there = kv_pos >= 0  # padding is seen by nobody, wherever it stands
    rises = (kv_pos[:, 1:] > kv_pos[:, :-1]) & there[:, :-1]
    if q_seg is not None:
        same &= (q_seg == kv_seg).all()
        rises = (rises & (kv_seg[:, 1:] == kv_seg[:, :-1])) | ((kv_seg[:, 1:] > kv_seg[:, :-1]) & there[:, :-1])
    return same & (rises | ~there[:, 1:]).all()


def _either(mask, where, rows):
    """rows(skip) over the whole batch, skipping what `_ordered` allows."""
    ordered = _ordered(mask, *where)
    return rows(False) if ordered is None else lax.cond(ordered, lambda: rows(True), lambda: rows(False))


def _blocks(T, S, skip):
    """(queries, keys) of each block as slices."""
    edges = [*range(0, T, BLOCK), T]
    return [(slice(lo, hi), slice(0, hi if skip else S)) for lo, hi in zip(edges, edges[1:]) if hi > lo]


def _scores(q, k, hide, scale, softcap):
    """q "K Gt H", k "K S H" -> scores "K Gt S" with `hide` added, and the slope of the soft cap."""
    s = jnp.einsum("kth,ksh->kts", q, k, preferred_element_type=hide.dtype) * scale
    slope = None
    if softcap is not None:
        tanh = jnp.tanh(s / softcap)
        s, slope = softcap * tanh, 1 - tanh * tanh
    return s + hide, slope


def _hide(mask, q_pos, kv_pos, q_seg, kv_seg, G, kind):
    """0 where a query may look and -inf elsewhere, for the G heads of a group: adding it fuses where selecting by it would not."""
    see = mask.allows(q_pos[:, None], kv_pos[None, :]) & (kv_pos >= 0)[None, :]
    if q_seg is not None:
        see &= q_seg[:, None] == kv_seg[None, :]
    return lax.optimization_barrier(jnp.tile(jnp.where(see, 0, -jnp.inf).astype(kind), (G, 1)))


def _part(x, i):
    return None if x is None else x[i]


def _heads_first(x, K):
    """ "T N H" -> "K G T H"."""
    T, N, H = x.shape
    return x.transpose(1, 0, 2).reshape(K, N // K, T, H)


def _rows(x, t):
    """The queries t of every head of a group: "K G T ..." -> "K Gt ..."."""
    x = x[:, :, t]
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *, mask, scale, softcap):
    T, N, _ = q.shape[1:]
    S, K, h = *k.shape[1:3], v.shape[-1]

    G, kind = N // K, jnp.promote_types(q.dtype, jnp.float32)

    def row(skip, q, k, v, q_pos, kv_pos, q_seg, kv_seg):
        q, k, v = _heads_first(q, K), k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        outs, lses = [], []
        for t, s in _blocks(T, S, skip):
            hide = _hide(mask, q_pos[t], kv_pos[s], _part(q_seg, t), _part(kv_seg, s), G, kind)
            x, _ = _scores(_rows(q, t), k[:, s], hide, scale, softcap)
            m = x.max(-1, keepdims=True)
            sink = None if sinks is None else jnp.repeat(sinks.reshape(K, G), t.stop - t.start, 1)[..., None]
            if sink is not None:
                m = jnp.maximum(m, sink)
            m = jnp.where(jnp.isneginf(m), 0, m)
            p = jnp.exp(x - m)
            total = p.sum(-1, keepdims=True)
            if sink is not None:
                total = total + jnp.exp(sink - m)
            o = jnp.einsum("kts,ksh->kth", p.astype(v.dtype), v[:, s], preferred_element_type=kind)
            outs.append((o / jnp.where(total > 0, total, 1)).reshape(K, G, -1, h))
            lses.append(jnp.where(total > 0, m + jnp.log(total), jnp.inf).reshape(K, G, -1))
        o = jnp.concatenate(outs, 2).reshape(N, T, h).transpose(1, 0, 2).astype(q.dtype)
        return o, jnp.concatenate(lses, 2)

    args = (q, k, v, q_pos, kv_pos, q_seg, kv_seg)
    return _either(mask, args[3:], lambda skip: lax.map(lambda a: row(skip, *a), args))


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, lse, delta, do, *, mask, scale, softcap):
    T, N, H = q.shape[1:]
    S, K = k.shape[1:3]
    G, kind = N // K, jnp.promote_types(q.dtype, jnp.float32)

    def row(skip, q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, delta, do):
        q, k, v = _heads_first(q, K), k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        do = _heads_first(do, K)
        dqs, dk, dv = [], jnp.zeros(k.shape, kind), jnp.zeros(v.shape, kind)
        for t, s in _blocks(T, S, skip):
            hide = _hide(mask, q_pos[t], kv_pos[s], _part(q_seg, t), _part(kv_seg, s), G, kind)
            qt, dot = _rows(q, t), _rows(do, t)
            x, slope = _scores(qt, k[:, s], hide, scale, softcap)
            p = jnp.exp(x - _rows(lse, t)[..., None])
            dp = jnp.einsum("kth,ksh->kts", dot, v[:, s], preferred_element_type=kind)
            ds = p * (dp - _rows(delta, t)[..., None]) * scale
            ds = (ds if slope is None else ds * slope).astype(q.dtype)
            dqs.append(jnp.einsum("kts,ksh->kth", ds, k[:, s], preferred_element_type=kind).reshape(K, G, -1, H))
            behind = ((0, 0), (0, S - s.stop), (0, 0))
            dk = dk + jnp.pad(jnp.einsum("kts,kth->ksh", ds, qt, preferred_element_type=kind), behind)
            dv = dv + jnp.pad(jnp.einsum("kts,kth->ksh", p.astype(do.dtype), dot, preferred_element_type=kind), behind)
        dq = jnp.concatenate(dqs, 2).reshape(N, T, H).transpose(1, 0, 2).astype(q.dtype)
        return dq, dk.transpose(1, 0, 2).astype(k.dtype), dv.transpose(1, 0, 2).astype(v.dtype)

    args = (q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, delta, do)
    dq, dk, dv = _either(mask, args[3:7], lambda skip: lax.map(lambda a: row(skip, *a), args))
    return dq, dk, dv, None
