"""Distances in scores: ALiBi, T5's buckets, Shaw's and Transformer-XL's attention against loops in float64 and against Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from minllm import spec
from minllm.layer import Context
from minllm.layers.attention import Attention
from minllm.layers.position import Alibi, Buckets
from minllm.layers.relative import ShawAttention, XLAttention
from minllm_kernels.mask import Full

random = np.random.default_rng(0)
B, T, D, N, H = 2, 9, 12, 3, 4
X = random.standard_normal((B, T, D))


def weights(layer):
    return jax.tree.map(lambda s: random.standard_normal(s.shape) * 0.5, layer.params(D), is_leaf=spec.is_spec)


def ours(layer, p, x, positions=None):
    with jax.enable_x64(True):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]) if positions is None else positions, x.shape[:2])
        p = jax.tree.map(jnp.asarray, p)
        return np.asarray(layer.apply(p, jnp.asarray(x), Context(positions=positions)).x)


def by_hand(p, scores, value=None, causal=True):
    """scores(q, k, i, j, head) and value(v, i, j, head) for one pair of tokens: attention as a loop."""
    q, k, v = (np.einsum("btd,dnh->btnh", X, p[w]) for w in "qkv")
    y = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for i in range(T):
                seen = range(i + 1) if causal else range(T)
                s = np.array([scores(q[b, i, n], k[b, j, n], i, j, n) for j in seen]) * H**-0.5
                w = np.exp(s - s.max())
                w /= w.sum()
                y[b, i, n] = sum(a * (v[b, j, n] if value is None else value(v[b, j, n], i, j, n)) for a, j in zip(w, seen))
    return np.einsum("btnh,nhd->btd", y, p["o"])


@pytest.mark.parametrize("heads", [1, 4, 8, 6, 12, 20])
def test_slopes(heads):
    """Bloom's: its biases are slope * position of the key. Bit for bit for powers of two; for others it raises a root of two that is
    rounded in float32 to a power, ours are rounded once."""
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].numpy()
    np.testing.assert_allclose(Alibi().slopes(heads).astype(np.float32), theirs, rtol=0 if heads.bit_count() == 1 else 1e-6)


def test_alibi():
    layer = Attention(N, N, H, relative=Alibi())
    p = weights(layer)
    slopes = Alibi().slopes(N)
    expected = by_hand(p, lambda q, k, i, j, n: q @ k - slopes[n] * (i - j) * H**0.5)
    assert np.abs(ours(layer, p, X) - expected).max() <= 1e-6  # the bias is float32


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("buckets, longest", [(32, 128), (8, 20), (64, 300)])
def test_buckets(buckets, longest, both):
    """Exactly T5's, for every distance."""
    distance = np.arange(-2 * longest, 2 * longest + 1)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional=both, num_buckets=buckets, max_distance=longest)
    assert (np.asarray(Buckets(buckets, longest, both).ids(jnp.asarray(distance))) == theirs.numpy()).all()


def test_bucketed_bias():
    layer = Attention(N, N, H, relative=Buckets(8, 16, both=True), mask=Full())
    p = weights(layer)
    ids = np.asarray(layer.relative.ids(jnp.arange(-T, T)))
    expected = by_hand(p, lambda q, k, i, j, n: q @ k + p["relative"]["table"][ids[j - i + T], n] * H**0.5, causal=False)
    assert np.abs(ours(layer, p, X) - expected).max() <= 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_shaw(causal):
    layer = ShawAttention(N, H, reach=3) if causal else ShawAttention(N, H, Full(), reach=3)
    p = weights(layer)
    at = lambda i, j: max(-3, min(3, j - i)) + 3
    expected = by_hand(p, lambda q, k, i, j, n: q @ (k + p["key_distance"][at(i, j)]),
                       lambda v, i, j, n: v + p["value_distance"][at(i, j)], causal)  # fmt: skip
    assert np.abs(ours(layer, p, X) - expected).max() <= 1e-10


def test_transformer_xl():
    layer = XLAttention(N, H)
    p = weights(layer)
    w = 10_000.0 ** -(np.arange(0, D, 2) / D)

    def score(q, k, i, j, n):
        r = np.concatenate([np.sin((i - j) * w), np.cos((i - j) * w)]) @ p["r"][:, n]
        return (q + p["u"][n]) @ k + (q + p["v_bias"][n]) @ r

    expected = by_hand(p, score)
    assert np.abs(ours(layer, p, X) - expected).max() <= 1e-10
    assert np.abs(ours(layer, p, X, np.arange(T) + 1000) - expected).max() <= 1e-9  # distances alone matter


def test_errors():
    with pytest.raises(ValueError, match="the width must be even, not 7"):
        XLAttention(N, H).params(7)
