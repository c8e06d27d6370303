"""Blocks of rows that never straddle two groups, one small matmul a block.

A group of n rows takes ceil(n / C) blocks of C, so M rows take M / C + E blocks at most, whatever the sizes: M + E C rows of work, where
masking would cost M E.
"""

import jax.numpy as jnp
from jax import lax


def _blocks(sizes, M):
    """(group of each block, rows of each block (blocks, C), place of each row among the blocks). M stands for "no row"."""
    E = len(sizes)
    C = max(8, min(128, 1 << max(0, M // E).bit_length()))
    blocks = -(-M // C) + E
    ends, counts = jnp.cumsum(sizes), -(-sizes // C)
    last = jnp.cumsum(counts)
    group = jnp.minimum(jnp.searchsorted(last, jnp.arange(blocks), side="right"), E - 1)
    start = (ends - sizes)[group] + (jnp.arange(blocks) - (last - counts)[group]) * C
    rows = start[:, None] + jnp.arange(C)
    rows = jnp.where(rows < ends[group][:, None], rows, M)
    own = jnp.minimum(jnp.searchsorted(ends, jnp.arange(M), side="right"), E - 1)
    place = (last - counts)[own] * C + jnp.arange(M) - (ends - sizes)[own]
    return group, rows, jnp.where(jnp.arange(M) < ends[-1], place, blocks * C)


def _take(x, rows):
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


def _multiply(x, w, sizes):
    group, rows, place = _blocks(sizes, len(x))
    kind = jnp.promote_types(x.dtype, jnp.float32)
    one = lambda block: jnp.matmul(_take(x, block[1]), w[block[0]].astype(x.dtype), preferred_element_type=kind).astype(x.dtype)
    return _take(lax.map(one, (group, rows)).reshape(-1, w.shape[2]), place)


def forward(x, w, sizes):
    return _multiply(x, w, sizes)


def backward(x, w, sizes, dy):
    """(dx, dw)."""
    group, rows, _ = _blocks(sizes, len(x))
    kind = jnp.promote_types(x.dtype, jnp.float32)

    def one(dw, block):
        e, own = block
        return dw.at[e].add(jnp.matmul(_take(x, own).T, _take(dy, own), preferred_element_type=kind)), None

    dw, _ = lax.scan(one, jnp.zeros(w.shape, kind), (group, rows))
    return _multiply(dy, w.swapaxes(1, 2), sizes), dw.astype(w.dtype)
