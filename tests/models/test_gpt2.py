"""GPT-3's alternation of layers that see everything and layers that see a band (Brown et al. 2020, arXiv 2005.14165, section 2.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import models, spec
from minllm.layer import Context

SHAPE = dict(D=32, layers=4, heads=4, vocab=31, length=32)


def test_alternation():
    """A band as wide as the row is no band; a narrower one hides the first token from the second layer, but not from the model."""
    dense, banded = models.build("gpt2", **SHAPE), models.build("gpt2", **SHAPE, window=4)
    p = spec.init(dense.params(), jax.random.key(0))
    alike = models.build("gpt2", **SHAPE, window=16)
    unfold = lambda model: spec.init(model.params(), jax.random.key(0))
    pairs = jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *(half(unfold(alike), k) for k in (0, 1)))
    p = p | {"trunk": (type(p["trunk"][0])(tuple(pairs)),)}
    x = jax.random.randint(jax.random.key(1), (2, 16), 0, 31)
    logits = lambda model, p: jax.jit(lambda p: model.apply(p, x, Context()).x)(p)
    wide, narrow, whole = logits(alike, unfold(alike)), logits(banded, unfold(alike)), logits(dense, p)
    np.testing.assert_allclose(wide, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(narrow[:, :4], whole[:, :4], rtol=0, atol=1e-5)
    assert float(jnp.abs(narrow[:, 4:] - whole[:, 4:]).max()) > 1e-3


def half(p, k):
    """Of a stack of (attention, mlp, banded attention, mlp): the k-th pair."""
    return p["trunk"][0].pattern[2 * k : 2 * k + 2]


def test_no_config_can_say_it():
    with pytest.raises(ValueError, match="the model is no gpt2"):
        models.family("gpt2").config(models.build("gpt2", **SHAPE, window=4))
