"""Paged attention as the formula says it: every query gets its row's keys, in order, in float32.

    s = cap tanh(q k^T scale / cap)      p = exp(s - m) / (sum exp(s - m) + exp(sink - m))      o = p v
"""

import jax.numpy as jnp


def forward(q, k_pages, v_pages, table, q_starts, kv_lens, sinks, k_scale, v_scale, *, max_q, v_size, window, scale, softcap):
    """o "T N h". A page outside the pool gives NaN."""
    T, N, H = q.shape
    S, K = k_pages.shape[1], k_pages.shape[2] // H
    B, M = table.shape

    def rows(pages, size, head_scale):
        x = pages.astype(jnp.float32).at[jnp.where(table < 0, len(pages), table)].get(mode="fill", fill_value=jnp.nan)
        x = x.reshape(B, M * S, K, size)
        return x if head_scale is None else x * head_scale[:, None]

    k = rows(k_pages, H, k_scale)
    # values within the keys have the keys' scale, and their own if one is given
    v = rows(v_pages, v_size, v_scale) if v_pages is not None else k[..., :v_size] * (1 if v_scale is None else v_scale[:, None])
    token = jnp.arange(T)
    row = jnp.clip(jnp.searchsorted(q_starts, token, side="right") - 1, 0, B - 1)
    position = kv_lens[row] - (q_starts[row + 1] - token)
    key = jnp.arange(M * S)
    see = (key <= position[:, None]) & (token < q_starts[B])[:, None]
    if window is not None:
        see &= key > position[:, None] - window
    v = jnp.where((key < kv_lens[:, None])[:, :, None, None], v, 0)          # pages hold anything behind the last token
    s = jnp.einsum("tkgh,tskh->tkgs", q.astype(jnp.float32).reshape(T, K, N // K, H), k[row], precision="highest") * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    s = jnp.where(see[:, None, None], s, -jnp.inf)
    m = s.max(-1)
    if sinks is not None:
        m = jnp.maximum(m, sinks.astype(jnp.float32).reshape(K, N // K))
    m = jnp.where(jnp.isneginf(m), 0, m)
    p = jnp.exp(s - m[..., None])
    total = p.sum(-1)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32).reshape(K, N // K) - m)
    p = p / jnp.where(total > 0, total, 1)[..., None]
    return jnp.einsum("tkgs,tskh->tkgh", p, v[row], precision="highest").reshape(T, N, v_size).astype(q.dtype)
