"""Caches against plain Python: what a query may see is exactly what was written, wherever it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import spec
from minllm.layer import Context, Pool
from minllm.layers.attention import Attention
from minllm.layers.kv import attend_pages, extend, kv_cache, page_cache, write
from minllm.layers.position import Alibi, Rope
from minllm_kernels import attention
from minllm_kernels.mask import Causal


def empty(B, slots):
    return spec.init(kv_cache(B, slots, 1, 2, jnp.float32), jax.random.key(0))


def chunk(positions):
    """Keys that name their position and their row, values their negatives: "B T 1 2"."""
    positions = np.asarray(positions, np.int32)
    k = np.stack([positions, np.broadcast_to(np.arange(len(positions))[:, None], positions.shape)], -1)[:, :, None].astype(np.float32)
    return jnp.asarray(k), jnp.asarray(-k), jnp.asarray(positions)


def visible(k, v, kv_pos, row, q, window):
    """The positions that a query at q sees, checked for having the right keys and values; each at most once."""
    found = []
    for s, p in enumerate(np.asarray(kv_pos[row]).tolist()):
        if 0 <= p <= q and (window is None or p > q - window):
            assert k[row, s, 0].tolist() == [p, row] and v[row, s, 0].tolist() == [-p, -row]
            found.append(p)
    return sorted(found)


# window, slots, lengths of the chunks: single tokens, chunks up to the limit of writing first, longer than the window, than the cache
SCHEDULES = [
    (None, 24, [5, 1, 1, 9, 1, 3]), (4, 4, [1] * 12), (4, 4, [7, 1, 1, 2, 5, 1]), (4, 4, [3, 4, 5, 11]), (4, 7, [4, 4, 4, 1, 4]),
    (4, 7, [5, 8, 1, 4]), (1, 1, [3, 1, 1]), (6, 24, [10, 1, 5]), (30, 24, [10, 1, 5]),
]  # fmt: skip


@pytest.mark.parametrize("window, slots, lengths", SCHEDULES, ids=str)
def test_a_query_sees_all_of_its_past_once(window, slots, lengths):
    """Two ragged rows: the second is two tokens behind, its tail padded with positions of -1 in the first chunk."""
    cache, start = empty(2, slots), np.array([0, 0])
    for i, T in enumerate(lengths):
        positions = start[:, None] + np.arange(T)
        if i == 0 and T > 2:
            positions[1, -2:] = -1
        k, v, kv_pos, cache = extend(cache, *chunk(positions), window)
        for row in (0, 1):
            for q in positions[row][positions[row] >= 0].tolist():
                first = 0 if window is None else max(0, q - window + 1)
                assert visible(k, v, kv_pos, row, q, window) == list(range(first, q + 1)), (row, q)
        start = positions.max(1) + 1
    assert start[0] == sum(lengths)


def test_without_a_cache_a_row_sees_itself():
    k, v, pos = chunk([[0, 1, 2]])
    assert extend(None, k, v, pos, 2) == (k, v, pos, None)


def test_negative_positions_are_never_written():
    k, v, pos = chunk([[-1, 0, -1, 1], [-1, -1, -1, -1]])
    new = write(empty(2, 8), {"k": k, "v": v, "pos": pos})
    assert new["pos"].tolist() == [[0, 1] + [-1] * 6, [-1] * 8]
    assert new["k"][0, :2, 0].tolist() == [[0, 0], [1, 0]] and not new["k"][1].any() and not new["k"][0, 2:].any()


def test_of_a_chunk_longer_than_the_ring_the_last_tokens_stay():
    """Whatever their order: no slot is written twice, for which of two writes stays is nobody's promise."""
    k, v, pos = chunk([[*range(10)], [*range(7), -1, -1, -1], [*range(9, -1, -1)]])
    new = write(empty(3, 4), {"k": k, "v": v, "pos": pos})
    assert new["pos"].tolist() == [[8, 9, 6, 7], [4, 5, 6, 3], [8, 9, 6, 7]]
    assert new["k"][:, :, 0, 0].tolist() == new["pos"].tolist() and (new["k"] == -new["v"]).all()


def test_a_cache_keeps_its_dtype_and_gives_the_callers():
    cache = spec.init(kv_cache(1, 4, 1, 2, jnp.bfloat16), jax.random.key(0))
    k, v, kv_pos, cache = extend(cache, *chunk([[0, 1, 2, 3, 4]]), 2)
    assert cache["k"].dtype == jnp.bfloat16 and k.dtype == v.dtype == jnp.float32 and kv_pos.shape == (1, 9)


def test_values_may_have_another_width_than_keys():
    shapes = {n: s.shape for n, s in kv_cache(2, 5, 3, 8, jnp.float32, value_dim=4).items()}
    assert shapes == {"k": (2, 5, 3, 8), "v": (2, 5, 3, 4), "pos": (2, 5)}
    assert all(s.role == "buffer" for s in kv_cache(2, 5, 3, 8, jnp.float32).values())


@pytest.mark.parametrize("window", [3, 5])
def test_ring_and_contiguous_cache_decode_alike(window):
    """An attention layer over a ring of its window = over a cache that forgets nothing. 1e-6: sums in another order."""
    layer, D, B, T = Attention(4, 2, 8, Rope(), window=window), 16, 2, 20
    p, x = spec.init(layer.params(D), jax.random.key(0)), jax.random.normal(jax.random.key(1), (B, T, D))
    ring = spec.init(layer.cache(D, B, T, jnp.float32), jax.random.key(0))
    full = spec.init(kv_cache(B, T, 2, 8, jnp.float32), jax.random.key(0))
    assert ring["k"].shape[1] == window and full["k"].shape[1] == T
    start, apply = 0, jax.jit(layer.apply)
    for n in (7, 1, 1, 1, 3, 7):
        ctx = Context(positions=jnp.tile(jnp.arange(start, start + n), (B, 1)))
        a, b = (apply(p, x[:, start : start + n], ctx, cache) for cache in (ring, full))
        ring, full, start = a.cache, b.cache, start + n
        assert jnp.abs(a.x - b.x).max() <= 1e-6
    assert ring["k"].shape[1] == window


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunks", [(11,), (4, 1, 6), (1,) * 11], ids=str)
def test_pages_anywhere_in_a_pool_are_a_cache(window, chunks):
    """Two rows, one shorter, whose pages lie in disorder. 2e-6: sums in another order."""
    D, S = 32, 11
    layer = Attention(4, 2, 8, position=Rope(), window=window, sinks=True)
    p, apply = spec.init(layer.params(D), jax.random.key(1)), jax.jit(layer.apply)
    x = jax.random.normal(jax.random.key(2), (2, S, D))
    positions = jnp.where(jnp.arange(S) < jnp.array([[S], [7]]), jnp.arange(S), -1)
    whole = apply(p, x, Context(positions=positions)).x
    pool = jax.tree.map(lambda a: a + jnp.nan, spec.init(layer.cache(D, 2, Pool(9, 3, S), jnp.float32), jax.random.key(0)))
    table, start, parts = jnp.array([[7, 2, 5, 0], [3, 8, 1, 100]]), 0, []
    for n in chunks:
        own = Context(positions=positions[:, start : start + n], pages=table)
        out = apply(p, x[:, start : start + n], own, pool)
        pool, start = out.cache, start + n
        parts.append(out.x)
    there = np.asarray(positions >= 0)
    np.testing.assert_allclose(np.concatenate(parts, 1)[there], np.asarray(whole)[there], atol=2e-6)
    assert np.isnan(pool["k_pages"][jnp.array([4, 6])]).all()       # pages of nobody are untouched


def test_what_pages_cannot_serve_has_rows():
    pool = Pool(9, 3, 20)
    paged = Attention(4, 2, 8).cache(32, 2, pool, jnp.float32)
    assert {name: s.shape for name, s in paged.items()} == {"k_pages": (9, 3, 16), "v_pages": (9, 3, 16)}
    assert Attention(4, 2, 8, relative=Alibi()).cache(32, 2, pool, jnp.float32)["k"].shape == (2, 20, 2, 8)
    assert Attention(4, 2, 8, relative=Alibi(), window=6).cache(32, 2, pool, jnp.float32)["k"].shape == (2, 6, 2, 8)


def test_a_latent_in_pages_is_key_and_value():
    """Four query heads over one key of 12 numbers, of which the first 8 are the value: as attention over the rows themselves."""
    key = jax.random.split(jax.random.key(0), 2)
    q, latent = jax.random.normal(key[0], (2, 6, 4, 12)), jax.random.normal(key[1], (2, 6, 1, 12))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    pool = spec.init(page_cache(Pool(5, 3, 6), 1, 12, jnp.float32, latent=True), jax.random.key(0))
    ctx = Context(positions=positions, pages=jnp.array([[4, 0], [2, 3]]))
    y, pool = attend_pages(q, latent, None, pool, ctx, v_size=8)
    whole = attention(q, latent, latent[..., :8], mask=Causal(), q_pos=positions, kv_pos=positions, scale=12**-0.5)
    np.testing.assert_allclose(y, whole, atol=1e-6)
    assert list(pool) == ["k_pages"] and (pool["k_pages"][0] == latent[0, 3:, 0]).all()
