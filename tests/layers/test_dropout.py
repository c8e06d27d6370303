"""Dropout: the right rate, and masks that depend on the key, the layer, the stream and the row, and on nothing else."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minllm
from minllm import spec
from minllm.layer import Context, Execution, Layer, Out
from minllm.layers.attention import Attention
from minllm.layers.dropout import Dropout, dropout, keep_mask
from minllm.layers.norm import RMSNorm
from minllm.layers.stack import Stack
from minllm.models.llama import llama3
from minllm.models.transformer import Decoder
from minllm.spec import Ones, Spec

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Half(Layer):
    """Drops half; its parameter, which a stack needs to have, is one."""

    def params(self, D):
        return {"one": Spec((), "", Ones())}

    def apply(self, p, x, ctx, cache=None):
        return Out(dropout(x * p["one"], 0.5, ctx))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scale(rate):
    """Of 200,000 elements the kept ones are within three sigma of their expected number, and so are those of each row."""
    keep = np.asarray(keep_mask((10, 200, 100), rate, Context(key=KEY)))
    assert set(np.unique(keep)) == {np.float32(0), np.float32(1 / (1 - rate))}
    for part in (keep, *keep):
        assert abs((part > 0).mean() - (1 - rate)) <= 3 * np.sqrt(rate * (1 - rate) / part.size)


def test_without_key_or_rate_it_is_the_identity():
    x = jax.random.normal(KEY, (2, 3, 4))
    assert dropout(x, 0.5, Context()) is x and dropout(x, 0.0, Context(key=KEY)) is x
    assert Dropout(0.5).apply({}, x, Context()).x is x


def test_dropped_values_are_zero_and_others_scaled_also_in_the_gradient():
    x = jnp.ones((4, 50, 8), jnp.bfloat16)
    y, vjp = jax.vjp(lambda x: dropout(x, 0.25, Context(key=KEY)), x)
    keep = keep_mask(x.shape, 0.25, Context(key=KEY)).astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and (y == keep).all() and (vjp(x)[0] == keep).all()


@pytest.mark.parametrize("pieces", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[6], [1, 3], [7, 0, 2, 4, 5]], [[7, 6, 5, 4, 3, 2, 1, 0]]], ids=str)
def test_any_split_of_the_batch_drops_the_same(pieces):
    """A microbatch, a pipeline stage or another order of rows, told by ctx.rows."""
    whole = keep_mask((8, 5, 6), 0.5, Context(key=KEY))
    for rows in pieces:
        rows = jnp.array(rows, jnp.int32)
        assert (keep_mask((len(rows), 5, 6), 0.5, Context(key=KEY, rows=rows)) == whole[rows]).all()


def test_masks_differ_by_key_stream_and_row():
    mask = lambda stream=0, **ctx: np.asarray(keep_mask((3, 64, 8), 0.5, Context(**{"key": KEY, **ctx}), stream)) > 0
    masks = [mask(), mask(stream=1), mask(key=jax.random.key(1)), mask(rows=jnp.array([3, 4, 5]))]
    rows = [row for m in masks for row in m]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert abs((a == b).mean() - 0.5) <= 4 * 0.5 / np.sqrt(a.size)  # 66 pairs of independent rows


@pytest.mark.parametrize("run", [Execution(), Execution(scan=False), Execution(remat="full")], ids=["scan", "unrolled", "remat"])
def test_every_layer_of_a_stack_drops_apart(run):
    """Six layers of rate 1/2 on ones: what is left has passed six masks, (1/2)^6 of 64,000 within three sigma; the same however it runs."""
    stack, x = Stack((Half(), Half()), 3), jnp.ones((8, 1000, 8))
    positions = jnp.zeros((8, 1000), jnp.int32)
    y = np.asarray(stack.apply(spec.init(stack.params(8), KEY), x, Context(positions=positions, key=KEY, run=run)).x)
    assert set(np.unique(y)) == {0.0, 64.0}
    assert abs((y > 0).mean() - 1 / 64) <= 3 * np.sqrt(1 / 64 * 63 / 64 / y.size)
    expected = np.prod([np.asarray(keep_mask(x.shape, 0.5, Context(key=jax.random.fold_in(KEY, i)))) for i in range(6)], 0)
    assert (y == expected).all()


def test_embedding_and_layers_outside_a_stack_drop_apart():
    """A model of rate 1/2 everywhere: the embedding, two layers of the trunk and one in a stack pass four masks."""
    model = Decoder(5, 8, (Dropout(0.5), Half(), Stack((Half(),), 1)), RMSNorm(1e-12), dropout=0.5)
    p = minllm.init(model, KEY)
    p["embed"] = jnp.ones_like(p["embed"])
    h = np.asarray(model.hidden(p, jnp.zeros((4, 2000), jnp.int32), Context(key=KEY)).x)
    assert abs((h > 0).mean() - 1 / 16) <= 3 * np.sqrt(1 / 16 * 15 / 16 / h.size)


def test_attention_drops_probabilities_and_outputs_apart():
    x, positions = jax.random.normal(KEY, (2, 16, 16)), jnp.tile(jnp.arange(16), (2, 1))
    attention = lambda **rates: Attention(2, 2, 16, **rates)
    p = spec.init(attention().params(16), KEY)
    ctx = Context(positions=positions, key=KEY)
    plain, out, weights, both = (attention(**r).apply(p, x, ctx).x for r in (
        {}, {"dropout": 0.5}, {"weight_dropout": 0.5}, {"dropout": 0.5, "weight_dropout": 0.5}))  # fmt: skip
    keep = keep_mask(plain.shape, 0.5, ctx)
    assert jnp.abs(out - plain * keep).max() <= 1e-6 and jnp.abs(both - weights * keep).max() <= 1e-6
    assert jnp.abs(weights - plain).max() > 0.1


def test_a_model_in_microbatches_is_the_model_on_the_whole_batch():
    model = llama3(D=16, layers=2, heads=2, kv_heads=1, hidden=24, vocab=11, scaling=None, dropout=0.3)
    p, tokens = minllm.init(model, KEY), jax.random.randint(KEY, (4, 9), 0, 11)
    apply = jax.jit(lambda tokens, rows: model.apply(p, tokens, Context(key=KEY, rows=rows)).x)
    whole = minllm.apply(model, p, tokens, Context(key=KEY)).x
    for rows in (jnp.array([0, 1]), jnp.array([2, 3])):
        assert jnp.abs(apply(tokens[rows], rows) - whole[rows]).max() <= 1e-5  # float32, logits of size one
    assert jnp.abs(apply(tokens[:2], jnp.array([2, 3])) - whole[:2]).max() > 0.1
