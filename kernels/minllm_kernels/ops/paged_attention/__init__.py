"""Attention over a paged cache: decoding and chunked prefill of many requests in one call.

The cache is a pool of pages and every row (request) has a table of the pages that hold its tokens (Kwon et al. 2023, arXiv 2309.06180).
A page holds all key/value heads of its tokens side by side, so a page is one contiguous copy, and heads of 64 need no padding.
"""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.ops.paged_attention import chunked, reference, tpu

BRANCHES = {"xla": Branch(chunked.forward), "tpu": Branch(tpu.forward, tpu.supports)}
CACHE = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Array,
    v_pages: Array | None,
    table: Int[Array, "B M"],
    q_starts: Int[Array, " B+1"],
    kv_lens: Int[Array, " B"],
    *,
    max_q: int | None = None,
    v_size: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "#K"] | None = None,
    v_scale: Float[Array, "#K"] | None = None,
    impl: Impl = "auto",
    chip: str | None = None,
) -> Float[Array, "T N h"]:
    """softmax(q k^T scale) v for the queries of B rows, packed one after the other; keys and values stand in pages, the queries' own too.

    q: row b's queries are q[q_starts[b]:q_starts[b+1]], its last tokens: query i of n stands at position kv_lens[b] - n + i and sees what
    stands at or before it. Queries beyond q_starts[B] give zeros, and so does one that sees nothing. A row may have none.
    k_pages: "P S KH", a pool of P pages of S tokens, each token's K heads side by side; bfloat16, float32, int8 or fp8.
    v_pages: "P S Kh", h may differ from H. None: the values are the first v_size numbers of the one key head (MLA's latent, arXiv
    2405.04434, with W_uk absorbed into q). table: the pages of each row in order; entries after its last are not looked at.
    max_q: the longest row of queries (default T); 1 says that all rows decode, which saves a pass.
    window: a query sees only the last `window` positions, itself counted. scale: default H^-1/2.
    softcap, sinks: as in `attention`. k_scale, v_scale: what a stored number is to be multiplied with, one for each kv head or for all.
    Softmax and sums in float32. For serving: it has no gradient.

    Raises ValueError where shapes do not fit, when a table that is not traced points outside the pool, and when the chosen impl cannot
    serve the call. Compiled kernels clamp the table's entries and read nothing outside the pool.
    """
    T, N, H = q.shape
    if k_pages.ndim != 3 or k_pages.shape[2] % H:
        raise ValueError(f"k_pages is [pages, tokens, kv heads x {H}] for queries of size {H}; got {k_pages.shape}")
    K = k_pages.shape[2] // H
    if N % K:
        raise ValueError(f"paged_attention has {N} query heads for {K} key/value heads; the first must be a multiple of the second")
    if (v_pages is None) == (v_size is None):
        raise ValueError("paged_attention needs v_pages, or v_size where the values are the first numbers of the keys; not both")
    if v_size is not None and (K != 1 or not 0 < v_size <= H):
        raise ValueError(f"values within the keys need one kv head and v_size <= {H}; got {K} heads and v_size {v_size}")
    if v_pages is not None and (v_pages.shape[:2] != k_pages.shape[:2] or v_pages.ndim != 3 or v_pages.shape[2] % K):
        raise ValueError(f"v_pages is [pages, tokens, {K} x value size] beside k_pages {k_pages.shape}; got {v_pages.shape}")
    if k_pages.dtype not in CACHE or (v_pages is not None and v_pages.dtype != k_pages.dtype):
        raise ValueError(f"a cache is of {', '.join(jnp.dtype(d).name for d in CACHE)}, keys and values alike; got {k_pages.dtype}"
                         + (f" and {v_pages.dtype}" if v_pages is not None else ""))
    if table.ndim != 2 or q_starts.shape != (table.shape[0] + 1,) or kv_lens.shape != (table.shape[0],):
        raise ValueError(f"for B rows table is [B, M], q_starts [B+1], kv_lens [B]; got {table.shape}, {q_starts.shape}, {kv_lens.shape}")
    if window is not None and window < 1:
        raise ValueError(f"a window counts its own token, so it is at least 1; got {window}")
    if max_q is not None and max_q < 1:
        raise ValueError(f"max_q is the longest row of queries, at least 1; got {max_q}")
    if max_q is not None and not isinstance(q_starts, Tracer) and (longest := int(np.diff(np.asarray(q_starts)).max())) > max_q:
        raise ValueError(f"max_q is {max_q}, a row has {longest} queries")
    if not any(isinstance(x, Tracer) for x in (table, kv_lens)):
        _check_table(np.asarray(table), np.asarray(kv_lens), *k_pages.shape[:2])
    whole = lambda x: None if x is None else jnp.broadcast_to(x, (K,)).astype(jnp.float32)
    static = dict(
        max_q=min(T, max_q or T),
        v_size=v_size if v_pages is None else v_pages.shape[2] // K,
        window=window,
        scale=H**-0.5 if scale is None else scale,
        softcap=softcap,
    )
    args = (q, k_pages, v_pages, table, q_starts, kv_lens, sinks, whole(k_scale), whole(v_scale))
    return choose("paged_attention", impl, reference.forward, BRANCHES, *args, chip=chip, **static)


def _check_table(table: np.ndarray, kv_lens: np.ndarray, P: int, S: int) -> None:
    M = table.shape[1]
    if (kv_lens > M * S).any():
        row = int(kv_lens.argmax())
        raise ValueError(f"row {row} has {kv_lens[row]} tokens, its table of {M} pages of {S} holds {M * S}")
    used = np.arange(M) < -(-kv_lens[:, None] // S)
    if (wrong := used & ((table < 0) | (table >= P))).any():
        row, place = (int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(f"table[{row}, {place}] is page {table[row, place]} of a pool of {P}")
