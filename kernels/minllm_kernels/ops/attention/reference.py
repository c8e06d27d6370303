"""Attention as the formula says it, with the whole [T, S] matrix in float32.

    s = cap tanh(q k^T scale / cap) + bias        p = exp(s - lse)        o = p v

and its gradient from what the forward saves (q, k, v, o, lse), after Dao et al. 2022, arXiv 2205.14135, appendix B, with
delta = sum(do o) (less the gradient of lse, where lse is asked for):

    dv = p^T do     dp = do v^T     ds = p (dp - delta)     dq = ds k scale     dk = ds^T q scale
"""

import jax
import jax.numpy as jnp


def logits(q, k, q_pos, kv_pos, q_seg, kv_seg, bias, *, mask, scale, softcap):
    """(s, slope): scores "B K G T S" in float32, -inf where a query may not look, and the derivative of the soft cap (None without)."""
    B, T, N, H = q.shape
    K = k.shape[2]
    kind = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k, preferred_element_type=kind) * scale
    slope = None
    if softcap is not None:
        t = jnp.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    if bias is not None:
        b, n = bias.shape[:2]
        s = s + (bias.reshape(b, 1, 1, *bias.shape[2:]) if n == 1 else bias.reshape(b, K, N // K, *bias.shape[2:]))
    see = mask.allows(q_pos[:, :, None], kv_pos[:, None, :]) & (kv_pos >= 0)[:, None, :]
    if q_seg is not None:
        see &= q_seg[:, :, None] == kv_seg[:, None, :]
    return jnp.where(see[:, None, None], s, -jnp.inf), slope


def varies(x) -> frozenset:
    """The mesh axes that an array varies over inside a shard_map."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # jax 0.12, 0.11


def per_group(sinks, K):
    """sinks "N" as "K G 1": broadcasts over rows "B K G T"."""
    return sinks.reshape(K, -1, 1)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *, mask, scale, softcap):
    """(o "B T N h", lse "B K G T"). A row that sees nothing gives o = 0 and lse = +inf."""
    B, T, N, _ = q.shape
    K = k.shape[2]
    s, _ = logits(q, k, q_pos, kv_pos, q_seg, kv_seg, bias, mask=mask, scale=scale, softcap=softcap)
    m = s.max(-1)
    if sinks is not None:
        m = jnp.maximum(m, per_group(sinks, K))
    m = jnp.where(jnp.isneginf(m), 0, m)
    p = jnp.exp(s - m[..., None])
    total = p.sum(-1)
    if sinks is not None:
        total = total + jnp.exp(per_group(sinks, K) - m)
    lse = jnp.where(total > 0, m + jnp.log(total), jnp.inf)
    p = p / jnp.where(total > 0, total, 1)[..., None]
    if keep is not None:
        p = p * keep.reshape(p.shape)
    o = jnp.einsum("bkgts,bskh->btkgh", p.astype(v.dtype), v, preferred_element_type=p.dtype)
    return o.reshape(B, T, N, v.shape[-1]).astype(q.dtype), lse


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, lse, delta, do, *, mask, scale, softcap):
    """(dq, dk, dv, dbias), the last None where there is no bias. lse, delta "B K G T"."""
    B, T, N, H = q.shape
    K = k.shape[2]
    split = (B, T, K, N // K, -1)
    s, slope = logits(q, k, q_pos, kv_pos, q_seg, kv_seg, bias, mask=mask, scale=scale, softcap=softcap)
    p = jnp.exp(s - lse[..., None])
    do_, kind = do.reshape(split), p.dtype
    dp = jnp.einsum("btkgh,bskh->bkgts", do_, v, preferred_element_type=kind)
    dropped = p
    if keep is not None:
        dp, dropped = dp * keep.reshape(p.shape), p * keep.reshape(p.shape)
    dv = jnp.einsum("bkgts,btkgh->bskh", dropped.astype(do.dtype), do_, preferred_element_type=kind)
    ds = p * (dp - delta[..., None])
    dbias = None
    if bias is not None:
        full = ds.reshape(B, N, *ds.shape[3:])
        axes = tuple(i for i in (0, 1) if bias.shape[i] == 1)
        dbias = full.sum(axes, keepdims=True).astype(bias.dtype)
    if slope is not None:
        ds = ds * slope
    ds = (ds * scale).astype(q.dtype)
    dq = jnp.einsum("bkgts,bskh->btkgh", ds, k, preferred_element_type=kind).reshape(B, T, N, H)
    dk = jnp.einsum("bkgts,btkgh->bskh", ds, q.reshape(split), preferred_element_type=kind)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias
