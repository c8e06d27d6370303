"""Latent attention against the formulas of the paper in float64, in both of its forms, and what its cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import models, spec
from minllm.layer import Context
from minllm.layers.latent import LatentAttention
from minllm.layers.position import Rope, YarnScaling
from minllm.layers.residual import PreNorm

D, B, T = 16, 2, 12
ROPE = Rope(scaling=YarnScaling(4.0, 8), pairs="neighbours")
FORMS = {"absorbed": LatentAttention(3, 8, 4, 6, rank=12, q_rank=10, position=ROPE, mscale=0.7),
         "written out": LatentAttention(3, 8, 4, 6, rank=200, q_rank=None, position=ROPE, mscale=0.7)}  # fmt: skip


def turned(x, rope):
    """x, (T, r), with the pair (x_2i, x_2i+1) as one complex number turned by position t."""
    r = x.shape[-1]
    base = rope.theta ** -(np.arange(0, r, 2) / r)
    angle = np.arange(len(x))[:, None] * rope.scaling.frequencies(base, rope.theta, 1)
    z = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angle) * rope.scaling.magnitude(1)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def oracle(layer, p, x):
    """One row, head by head, in float64."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    norm = lambda y, gain: y / np.sqrt((y * y).mean(-1, keepdims=True) + layer.eps) * gain
    c, shared = norm(x @ p["down"], p["scale"]), turned(x @ p["turn"], layer.position)
    source, W = (x, p["q"]) if layer.q_rank is None else (norm(x @ p["q_down"], p["q_scale"]), p["q_up"])
    H, out = layer.head_dim, np.zeros_like(x)
    sharper = (0.1 * layer.mscale * np.log(layer.position.scaling.factor) + 1) ** 2
    for n in range(layer.heads):
        q, k = source @ W[:, n], c @ p["k"][:, n]
        scores = (q[:, :H] @ k.T + turned(q[:, H:], layer.position) @ shared.T) * sharper / np.sqrt(H + layer.rope_dim)
        scores = np.where(np.tri(len(x)) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out += weights / weights.sum(-1, keepdims=True) @ (c @ p["v"][:, n]) @ p["o"][n]
    return out


@pytest.mark.parametrize("form", FORMS)
def test_formula(form):
    """1e-6 relative to the largest output: float32 through six products."""
    layer = FORMS[form]
    written_out = T * (2 * layer.rank - layer.head_dim - layer.value_dim) > layer.rank * (layer.head_dim + layer.value_dim)
    assert written_out == (form == "written out")
    p = spec.init(layer.params(D), jax.random.key(0))
    p = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), p)  # no gain at its neutral value
    x = np.random.default_rng(0).normal(size=(B, T, D))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ours = layer.apply(p, jnp.asarray(x, jnp.float32), Context(positions=positions)).x
    expected = np.stack([oracle(layer, p, row) for row in x])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_cache():
    """DeepSeek-V3 keeps 512 + 64 numbers a token and layer: 57 times fewer than 128 heads of 128 with keys and values."""
    block = models.build("deepseek_v3").trunk[0].pattern[0]
    assert isinstance(block, PreNorm)
    numbers = block.inner.cache(7168, 1, 1000, jnp.bfloat16)["latent"].size / 1000
    assert numbers == 576 and round(2 * 128 * 128 / numbers) == 57


def test_errors():
    with pytest.raises(ValueError, match=r"mscale 0\.7 sharpens the scores of positions scaled by YaRN"):
        LatentAttention(4, mscale=0.7)
    layer = FORMS["absorbed"]
    p, cache = spec.init(layer.params(D), jax.random.key(0)), spec.init(layer.cache(D, B, T, jnp.float32), jax.random.key(0))
    here = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    with pytest.raises(ValueError, match="a packed row cannot be decoded"):
        layer.apply(p, jnp.zeros((B, T, D)), Context(positions=here, segments=here + 1), cache)
