"""Weights as array-likes: each leaf type multiplies like the plain array that it stands for, alone, stacked and in runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import spec
from minllm.layer import Context, Execution
from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU
from minllm.layers.position import Rope
from minllm.layers.residual import PreNorm
from minllm.layers.stack import Stack
from minllm.weights import LowRank, Matrix, OutFirst, Stacked, einsum, grouped, regroup, take, unstack

random = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
# eq, x, w, how many of the weight's dims are inputs
PRODUCTS = {
    "btd,df->btf": ((2, 3, 8), (8, 10), 1),
    "btd,dnh->btnh": ((2, 3, 8), (8, 2, 5), 1),
    "btnh,nhd->btd": ((2, 3, 2, 5), (2, 5, 8), 2),
    "md,df->mf": ((7, 8), (8, 10), 1),
}


def close(a, b, tolerance=1e-5):
    """Of the largest entry: float32 sums in another order."""
    assert a.shape == b.shape and jnp.abs(a - b).max() <= tolerance * jnp.abs(b).max()


def low_rank(w, inputs, shape=None):
    shape = shape or w.shape
    return LowRank(w, normal(*shape[:inputs], 3), normal(3, *shape[inputs:]), 0.5)


def dense(w, inputs):
    """The plain array that a leaf stands for."""
    if isinstance(w, LowRank):
        return dense(w.base, inputs) + w.scale * jnp.tensordot(w.a, w.b, 1)
    if isinstance(w, OutFirst):
        return jnp.moveaxis(w.w, range(-inputs, 0), range(inputs))
    return w.array() if isinstance(w, Matrix) else w


KINDS = {
    "plain": lambda w, inputs: w,
    "low_rank": low_rank,
    "out_first": lambda w, inputs: OutFirst(jnp.moveaxis(w, range(inputs), range(-inputs, 0)), inputs),
    "matrix": lambda w, inputs: Matrix(w.reshape(np.prod(w.shape[:inputs]), -1), (w.shape[:inputs], w.shape[inputs:])),
    "low_rank_over_out_first": lambda w, inputs: low_rank(KINDS["out_first"](w, inputs), inputs, w.shape),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eq", PRODUCTS)
def test_einsum_is_that_of_the_plain_array(eq, kind):
    """In value and in the gradient of x."""
    x_shape, w_shape, inputs = PRODUCTS[eq]
    x, w = normal(*x_shape), KINDS[kind](normal(*w_shape), inputs)
    y, vjp = jax.vjp(lambda x: einsum(eq, x, w), x)
    expected, theirs = jax.vjp(lambda x: jnp.einsum(eq, x, dense(w, inputs)), x)
    close(y, expected)
    close(vjp(y)[0], theirs(y)[0])
    assert einsum(eq, x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_low_rank_of_a_tied_head():
    """The weight's inputs come last there: what counts is which letters x has."""
    x, w = normal(2, 3, 8), normal(11, 8)
    lora = LowRank(w, normal(8, 3), normal(3, 11), 2.0)
    close(einsum("btd,vd->btv", x, lora), jnp.einsum("btd,vd->btv", x, w + 2.0 * (lora.a @ lora.b).T))


def test_low_rank_gradients_reach_both_factors_and_the_base():
    x, lora = normal(2, 3, 8), low_rank(normal(8, 10), 1)
    grads = jax.grad(lambda w: (einsum("btd,df->btf", x, w) ** 2).sum())(lora)
    full = jax.grad(lambda w: (jnp.einsum("btd,df->btf", x, w) ** 2).sum())(dense(lora, 1))
    close(grads.base, full)
    close(grads.a, 0.5 * full @ lora.b.T)
    close(grads.b, 0.5 * lora.a.T @ full)


def test_take_and_grouped():
    table, ids = normal(9, 4), jnp.array([[1, 8, 0], [3, 3, 2]])
    assert (take(table, ids) == table[ids]).all()
    x, w, sizes = normal(10, 4), normal(3, 4, 5), jnp.array([4, 0, 6])
    close(grouped(x, w, sizes), jnp.concatenate([x[:4] @ w[0], x[4:] @ w[2]]))
    assert grouped(x.astype(jnp.bfloat16), w, sizes).dtype == jnp.bfloat16


D, L = 16, 5
STACK = Stack((PreNorm(Attention(4, 2, 4, Rope(), dropout=0.2)), PreNorm(GLU(24, dropout=0.2))), L)


@pytest.fixture(scope="module")
def params():
    return spec.init(STACK.params(D), jax.random.key(0))


def apply(p, cache=None, run=Execution(), key=None):
    x = jax.random.normal(jax.random.key(1), (2, 7, D))
    ctx = Context(positions=jnp.tile(jnp.arange(7), (2, 1)), run=run, key=key)
    return jax.jit(lambda p, cache: STACK.apply(p, x, ctx, cache))(p, cache)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_unstack_and_regroup_are_inverse(params):
    runs = unstack(params)
    assert len(runs) == L and all(isinstance(run, Stacked) and jax.tree.leaves(run)[0].shape[0] == 1 for run in runs)
    assert same(regroup(runs), params) and same(unstack(runs), runs)
    assert same(unstack({"trunk": (params, params), "embed": normal(3, 4)})["trunk"][1], runs)  # wherever it stands


def mixed(params):
    """The third layer with a low-rank gate, the fifth with a bfloat16 query: runs of 2, 1, 1 and 1. And the same in plain arrays."""
    runs, plain = unstack(params), unstack(params)
    w = runs[2].pattern[1]["inner"]["gate"]
    lora = LowRank(w, 0.1 * normal(1, D, 3), 0.1 * normal(1, 3, 24), 2.0)
    q = runs[4].pattern[0]["inner"]["q"].astype(jnp.bfloat16)
    runs[2] = put(runs[2], 1, "gate", lora)
    plain[2] = put(plain[2], 1, "gate", w + 2.0 * jnp.einsum("ldr,lrf->ldf", lora.a, lora.b))
    runs[4], plain[4] = put(runs[4], 0, "q", q), put(plain[4], 0, "q", q.astype(jnp.float32))
    return regroup(runs), regroup(plain)


def put(run, j, name, w):
    pattern = list(run.pattern)
    pattern[j] = pattern[j] | {"inner": pattern[j]["inner"] | {name: w}}
    return Stacked(tuple(pattern))


def test_regroup_makes_the_longest_runs_of_one_kind_and_converts_nothing(params):
    runs, plain = mixed(params)
    assert isinstance(plain, Stacked) and [jax.tree.leaves(run)[0].shape[0] for run in runs] == [2, 1, 1, 1]
    assert isinstance(runs[1].pattern[1]["inner"]["gate"], LowRank) and runs[3].pattern[0]["inner"]["q"].dtype == jnp.bfloat16
    assert same(regroup(unstack(runs)), runs) and len(unstack(runs)) == L


@pytest.mark.parametrize("run", [Execution(), Execution(scan=False), Execution(remat="full")], ids=["scan", "unrolled", "remat"])
def test_a_stack_over_runs_is_the_stack(run, params):
    """Dropout included: a layer's key comes from its global index, whatever run it is in."""
    runs, plain = mixed(params)
    for key in (None, jax.random.key(3)):
        close(apply(runs, run=run, key=key).x, apply(plain, key=key).x)
        close(apply(unstack(params), run=run, key=key).x, apply(params, key=key).x)


def test_gradients_over_runs_are_those_of_the_stack(params):
    plain, runs = (jax.grad(lambda p: (apply(p).x ** 2).sum())(p) for p in (params, unstack(params)))
    for a, b in zip(jax.tree.leaves(regroup(runs)), jax.tree.leaves(plain)):
        close(a, b)


def test_decoding_over_runs_and_over_single_layers(params):
    runs, plain = mixed(params)
    cache = spec.init(STACK.cache(D, 2, 7, jnp.float32), jax.random.key(0))
    outs = [apply(p, cache) for p in (plain, runs, unstack(runs))]
    assert len(outs[0].cache) == 2 * L
    for out in outs[1:]:
        close(out.x, outs[0].x)
        jax.tree.map(close, out.cache, outs[0].cache)
    close(outs[0].x, apply(plain).x)


def test_a_low_rank_leaf_is_scanned_like_an_array(params):
    """Its metadata holds no layer dim: all layers low-rank are one stack."""
    w = params.pattern[1]["inner"]["gate"]
    lora = LowRank(w, 0.1 * normal(L, D, 3), 0.1 * normal(L, 3, 24), 2.0)
    p = put(params, 1, "gate", lora)
    close(apply(p).x, apply(put(params, 1, "gate", w + 2.0 * jnp.einsum("ldr,lrf->ldf", lora.a, lora.b))).x)
    assert same(regroup(unstack(p)), p)
