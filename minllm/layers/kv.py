"""Key/value caches for decoding.

A cache has a fixed number of slots, and each slot stores the position of its token (-1: empty), so that attention masks by
positions and never by slot. Position p goes to slot p mod slots: with as many slots as positions this is the plain contiguous
cache, with as many as a sliding window it is a ring.

Or it is a pool of pages that all rows share (Kwon et al. 2023, arXiv 2309.06180): `ctx.pages` says which pages a row has, and token p
stands at place p mod S of its page p div S. Attention then is `minllm_kernels.paged_attention`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Pool
from minllm.sharding import local, shards_of
from minllm.spec import Constant, Spec, Tree
from minllm_kernels import paged_attention

Cache = dict[str, Array]


def kv_cache(B: int, S: int | Pool, K: int, H: int, dtype, value_dim: int | None = None, window: int | None = None) -> Tree:
    """The Specs of a cache of rows with a slot for each of S tokens, or for each of a window."""
    length = S.length if isinstance(S, Pool) else S
    slots = length if window is None else min(length, window)
    axes = "batch kv_seq act_kv_heads _"
    return {
        "k": Spec((B, slots, K, H), axes, dtype=dtype, role="buffer"),
        "v": Spec((B, slots, K, value_dim or H), axes, dtype=dtype, role="buffer"),
        "pos": Spec((B, slots), "batch kv_seq", Constant(-1), dtype=jnp.int32, role="buffer"),
    }


def write(cache: Cache, new: Cache) -> Cache:
    """Write the newest tokens, each at slot position mod slots. A token at a negative position is not written; of a chunk longer than
    the cache only the last `slots` tokens are."""
    slots = cache["pos"].shape[1]
    pos = new["pos"]
    kept = (pos >= 0) & (pos > pos.max(1, keepdims=True) - slots)
    at = jnp.where(kept, pos % slots, slots)  # out of bounds: dropped
    rows = jnp.arange(pos.shape[0])[:, None]
    return {name: full.at[rows, at].set(new[name].astype(full.dtype), mode="drop") for name, full in cache.items()}


def extend(
    cache: Cache | None, k: Float[Array, "B T K H"], v: Float[Array, "B T K h"], positions: Int[Array, "B T"], window: int | None
) -> tuple[Array, Array, Int[Array, "B S"], Cache | None]:
    """(keys, values, their positions) to attend over, and the new cache.

    Writing first is free of copies. It is right while no written token drives out one that an earlier query of this chunk still
    sees: always in a contiguous cache, and in a ring while the chunk is at most slots - window + 1. A longer chunk attends over the
    ring and itself.
    """
    new = {"k": k, "v": v, "pos": positions}
    if cache is None:
        return k, v, positions, None
    after = write(cache, new)
    if window is None or k.shape[1] <= cache["pos"].shape[1] - window + 1:
        seen = after
    else:
        seen = {name: jnp.concatenate([cache[name], new[name].astype(cache[name].dtype)], 1) for name in cache}
    return seen["k"].astype(k.dtype), seen["v"].astype(v.dtype), seen["pos"], after


def page_cache(pool: Pool, K: int, H: int, dtype, latent: bool = False) -> Tree:
    """The Specs of a pool; a page holds the heads of a token side by side. latent: the values are a part of the keys, which all query heads
    share, so no device holds less than all of them."""
    pages = Spec((pool.pages, pool.size, K * H), f"pages _ {'_' if latent else 'act_kv_heads'}", dtype=dtype, role="buffer")
    return {"k_pages": pages} if latent else {"k_pages": pages, "v_pages": pages}


def in_pages(cache: Cache | None) -> bool:
    return cache is not None and "k_pages" in cache


def attend_pages(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K h"] | None,
    cache: Cache,
    ctx: Context,
    *,
    v_size: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N h"], Cache]:
    """Write the tokens to their rows' pages, then attend causally over them; (y, the new cache). A token at a negative position is not
    written and gives zeros. Without v the values are the first v_size numbers of the one key head (MLA's latent). Every query is a row of
    its own to the op, so that its result does not depend on what is computed with it."""
    T, K, run = *k.shape[1:3], ctx.run
    shards = math.prod(run.mesh.shape[a] for a in shards_of("act_kv_heads", run))
    if v is not None and K % shards:
        raise ValueError(f"{K} key/value heads in pages do not divide over {shards} devices; choose a mesh whose axis divides them")

    def op(q, k, v, k_pages, v_pages, table, positions, sinks):
        P, S, _ = k_pages.shape
        page = jnp.take_along_axis(table, jnp.maximum(positions, 0) // S, 1)
        page = jnp.where(positions < 0, P, page)  # out of bounds: dropped
        write = lambda pool, x: pool.at[page, positions % S].set(x.reshape(*positions.shape, -1).astype(pool.dtype), mode="drop")
        k_pages, v_pages = write(k_pages, k), None if v is None else write(v_pages, v)
        y = paged_attention(q.reshape(-1, *q.shape[2:]), k_pages, v_pages, jnp.repeat(table, T, 0), jnp.arange(positions.size + 1),
                            (positions + 1).reshape(-1), max_q=1, v_size=v_size, window=window, scale=scale, softcap=softcap,
                            sinks=sinks, impl=run.kernels, chip=run.chip)  # fmt: skip
        return [x for x in (y.reshape(*q.shape[:3], -1), k_pages, v_pages) if x is not None]

    heads, few, pool = "batch seq act_heads _", "batch seq act_kv_heads _", "pages _ act_kv_heads"
    few, pool = (few, pool) if v is not None else ("batch seq _ _", "pages _ _")
    ins = (heads, few, few, pool, pool, "batch _", "batch seq", "act_heads")
    args = q, k, v, cache["k_pages"], cache.get("v_pages"), ctx.pages, ctx.positions, sinks
    y, *pools = local(op, ins, [heads] + [pool] * len(cache), run)(*args)
    return y, dict(zip(("k_pages", "v_pages"), pools))
