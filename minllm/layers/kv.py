"""Key/value caches for decoding.

A cache has a fixed number of slots, and each slot stores the position of its token (-1: empty), so that attention masks by
positions and never by slot. Position p goes to slot p mod slots: with as many slots as positions this is the plain contiguous
cache, with as many as a sliding window it is a ring.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.spec import Constant, Spec, Tree

Cache = dict[str, Array]


def kv_cache(B: int, slots: int, K: int, H: int, dtype, value_dim: int | None = None) -> Tree:
    """The Specs of a cache of `slots` slots."""
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
