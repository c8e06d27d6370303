"""Paged attention in plain JAX, by the online softmax over fixed splits of the keys: what runs where there is no kernel.

Every query goes through its row's pages in splits of the same keys and in the same order, however many queries and rows are with it and
however long they are: a split that it sees nothing of multiplies by one and adds zero. So its result has the same bits in any company, as
long as T is the same.
"""

import jax
import jax.numpy as jnp

SPLIT = 128  # keys


def forward(q, k_pages, v_pages, table, q_starts, kv_lens, sinks, k_scale, v_scale, *, max_q, v_size, window, scale, softcap):
    """o "T N h"."""
    T, N, H = q.shape
    P, S, _ = k_pages.shape
    K, (B, M) = k_pages.shape[2] // H, table.shape
    G, pages = N // K, max(1, SPLIT // S)
    token = jnp.arange(T)
    row = jnp.clip((q_starts <= token[:, None]).sum(1) - 1, 0, B - 1)
    there = token < q_starts[B]
    position = jnp.where(there, kv_lens[row] - (q_starts[row + 1] - token), -1)
    table = jnp.pad(jnp.clip(table, 0, P - 1), ((0, 0), (0, -M % pages)))[row]
    first = jnp.zeros((), jnp.int32) if window is None else jnp.where(position < 0, M * S, jnp.maximum(position - window + 1, 0)).min()
    x = q.astype(jnp.float32).reshape(T, K, G, H)

    def split(j, carry):
        m, total, acc = carry
        key = j * pages * S + jnp.arange(pages * S)
        see = key <= position[:, None]
        if window is not None:
            see &= key > position[:, None] - window
        own = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, 1)
        read = lambda pool, size: pool[own].reshape(T, pages * S, K, size).astype(jnp.float32)
        k = read(k_pages, H)
        k = k if k_scale is None else k * k_scale[:, None]
        v = k[..., :v_size] if v_pages is None else read(v_pages, v_size)
        v = v if v_scale is None else v * v_scale[:, None]
        v = jnp.where(see[:, :, None, None], v, 0)          # pages hold anything behind the last token
        s = jnp.einsum("tkgh,tskh->tkgs", x, k, precision="highest") * scale
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        s = jnp.where(see[:, None, None], s, -jnp.inf)
        most = jnp.maximum(m, s.max(-1))
        finite = jnp.where(jnp.isneginf(most), 0, most)
        fade, p = jnp.exp(m - finite), jnp.exp(s - finite[..., None])
        return most, total * fade + p.sum(-1), acc * fade[..., None] + jnp.einsum("tkgs,tskh->tkgh", p, v, precision="highest")

    if sinks is None:
        m, total = jnp.full((T, K, G), -jnp.inf), jnp.zeros((T, K, G))
    else:  # a sink is a key with value zero
        m, total = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(K, G), (T, K, G)), jnp.ones((T, K, G))
    start = (m, total, jnp.zeros((T, K, G, v_size)))
    _, total, acc = jax.lax.fori_loop(first // (pages * S), -(-(position.max() + 1) // (pages * S)), split, start)
    return (acc / jnp.where(total > 0, total, 1)[..., None]).reshape(T, N, v_size).astype(q.dtype)
