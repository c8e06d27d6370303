"""Laws 1 to 5 and 7: what every layer and model promises, whatever it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXAMPLES

from minllm import spec
from minllm.layer import Context, layers_in
from minllm.models.transformer import Decoder

B, T = 2, 16
every = pytest.mark.parametrize("name", EXAMPLES)


def close(a, b, tolerance=1e-5):
    """Largest difference relative to the largest value: float32 sums in another order."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3), np.abs(a - b).max() / np.abs(b).max()


def holds(claim, check):
    """A law holds; where the example gives a reason why not, its opposite does."""
    if claim is True:
        return check()
    assert isinstance(claim, str)
    with pytest.raises(AssertionError):
        check()


@every
def test_law_1_declared_is_real(name):
    ex = EXAMPLES[name]
    p, x = ex.params(), ex.inputs(B, T)
    declared = spec.abstract(ex.specs)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), p) == jax.tree.map(lambda a: (a.shape, a.dtype), declared)
    assert hash(ex.layer) == hash(ex.layer) and ex.layer == ex.layer
    direction = jax.random.normal(jax.random.key(3), jax.eval_shape(lambda: ex.apply(p, x).x).shape)
    grads = jax.jit(jax.grad(lambda p: (ex.apply(p, x).x * direction).sum()))(p)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        path = spec.path_name(path)
        assert bool(jnp.isfinite(g).all()), path
        assert bool((g != 0).any()) != any(path.endswith(end) for end, _ in ex.no_gradient), path


@every
def test_law_2_causal(name):
    """Changing token t changes nothing before t."""
    ex = EXAMPLES[name]
    p, x = ex.params(), ex.inputs(B, T)
    apply = jax.jit(lambda x: ex.apply(p, x).x)
    other = ex.inputs(B, T, seed=7)

    def check():
        for t in (1, T // 2, T - 1):
            assert bool((apply(x)[:, :t] == apply(x.at[:, t:].set(other[:, t:]))[:, :t]).all())

    holds(ex.causal, check)


@every
def test_law_3_split(name):
    """A row in pieces with a cache = the row at once: training, prefill, chunked prefill and decode are one function."""
    ex = EXAMPLES[name]
    p, x = ex.params(), ex.inputs(B, T)
    apply = jax.jit(lambda x, cache, positions: ex.apply(p, x, cache, positions=positions))
    whole = apply(x, None, jnp.broadcast_to(jnp.arange(T), (B, T))).x

    def check():
        # one token after another; chunks longer than a window of 4 or 5; a long prefill
        for cuts in ((9, *range(10, T)), (7, 13), (1, 15)):
            cache, parts, start = ex.cache(B, T), [], 0
            for end in (*cuts, T):
                positions = jnp.broadcast_to(jnp.arange(start, end), (B, end - start))
                out = apply(x[:, start:end], cache, positions)
                cache, start = out.cache, end
                parts.append(out.x)
            close(jnp.concatenate(parts, 1), whole)

    holds(ex.splits, check)


@pytest.mark.parametrize("name", [name for name, ex in EXAMPLES.items() if ex.splits is True])
def test_law_3_padding(name):
    """Tokens at negative positions are not there: a prompt padded on the right decodes like the bare prompt."""
    ex = EXAMPLES[name]
    p, x, n = ex.params(), ex.inputs(B, T), 9
    positions = jnp.where(jnp.arange(12) < n, jnp.arange(12), -1)
    padded = ex.apply(p, x[:, :12], ex.cache(B, T), positions=jnp.broadcast_to(positions, (B, 12)))
    bare = ex.apply(p, x[:, :n], ex.cache(B, T))
    close(padded.x[:, :n], bare.x)
    at = jnp.full((B, 1), n)
    close(ex.apply(p, x[:, 12:13], padded.cache, positions=at).x, ex.apply(p, x[:, 12:13], bare.cache, positions=at).x)


@pytest.mark.nightly
@every
def test_tokens_may_stand_in_any_order(name):
    """What balances the work of a sequence over devices: a layer that knows tokens by their positions gives the same for each; one that
    reads neighbours says so."""
    ex = EXAMPLES[name]
    p, x, order = ex.params(), ex.inputs(B, T), np.random.default_rng(0).permutation(T)
    apply = jax.jit(lambda x, positions: ex.apply(p, x, positions=jnp.broadcast_to(positions, (B, T))).x)
    same = lambda: close(apply(x[:, order], jnp.asarray(order, jnp.int32)), apply(x, jnp.arange(T, dtype=jnp.int32))[:, order])
    holds(True if all(layer.any_order for layer in layers_in(ex.layer)) else "reads neighbours", same)


@every
def test_law_4_packing(name):
    """Two documents in one row = the two apart; positions restart at each document."""
    ex = EXAMPLES[name]
    p, x, cut = ex.params(), ex.inputs(B, T), 6
    segments = jnp.broadcast_to((jnp.arange(T) >= cut) + 1, (B, T))
    positions = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, jnp.arange(T), jnp.arange(T) - cut), (B, T))

    def check():
        packed = ex.apply(p, x, segments=segments, positions=positions).x
        close(packed[:, :cut], ex.apply(p, x[:, :cut]).x)
        close(packed[:, cut:], ex.apply(p, x[:, cut:]).x)
        if isinstance(ex.layer, Decoder):  # and a model finds the positions itself
            close(ex.layer.apply(p, x, Context(segments=segments)).x, packed)

    holds(ex.packs, check)


@every
def test_law_5_batch(name):
    """Row i does not depend on row j."""
    ex = EXAMPLES[name]
    p, x = ex.params(), ex.inputs(B, T)
    # the second row is longer, so that whatever looks over the whole batch is seen
    positions = jnp.stack([jnp.where(jnp.arange(T) < 8, jnp.arange(T), -1), jnp.arange(T)])

    def check():
        apply = jax.jit(lambda x, pos: ex.apply(p, x, positions=pos).x)
        alone = apply(x, jnp.stack([positions[0], positions[0]]))[0, :8]
        assert bool((apply(x, positions)[0, :8] == alone).all())
        other = ex.inputs(B, T, seed=7)
        assert bool((apply(x.at[1].set(other[1]), positions)[0, :8] == alone).all())
        assert bool((apply(x.at[0].set(other[0]), positions)[1] == apply(x, positions)[1]).all())

    holds(ex.rows_independent, check)


@every
def test_law_7_precision(name):
    """bfloat16 stays within 1e-2 of float32 in relative L2 (3e-2 for gradients): 8 bits of mantissa are 4e-3 an operation. Outputs keep
    the dtype of the parameters and inputs."""
    ex = EXAMPLES[name]
    p, x = ex.params(), ex.inputs(B, T)

    def loss(p, x):
        y = ex.apply(p, x).x.astype(jnp.float32)
        return (y * jax.random.normal(jax.random.key(3), y.shape)).sum(), y

    low = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
    # the values compared are those that bfloat16 can hold: rounding the inputs is no error of the layer
    full = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, low((p, x)))
    grad = jax.jit(jax.grad(loss, has_aux=True))
    (g16, y16), (g32, y32) = grad(*low((p, x))), grad(*full)
    assert ex.apply(*low((p, x))).x.dtype == jnp.bfloat16
    distance = lambda a, b: float(jnp.linalg.norm((a - b).astype(jnp.float32).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30))
    assert distance(y16, y32) <= 1e-2
    for a, b in zip(jax.tree.leaves(g16), jax.tree.leaves(g32)):
        assert distance(a, b) <= 3e-2
