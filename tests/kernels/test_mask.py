"""Masks against plain Python, and spans that are never too narrow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllm_kernels.mask import FAR, And, Causal, Chunk, Dilated, Full, Global, Mask, Or, Prefix, Strided, Window

small = st.integers(1, 8)
# Each mask beside what it says of one query and one key.
SIMPLE = st.one_of(
    st.just((Full(), lambda q, k: True)),
    st.just((Causal(), lambda q, k: k <= q)),
    st.tuples(st.none() | small, st.none() | small).map(
        lambda w: (Window(*w), lambda q, k: (w[0] is None or q - k < w[0]) and (w[1] is None or k - q < w[1]))
    ),
    small.map(lambda n: (Dilated(n), lambda q, k: (q - k) % n == 0)),
    st.tuples(small, st.integers(0, 8)).map(
        lambda s: (Strided(*s), lambda q, k: k % s[0] in range(max(s[0] - s[1], 0), s[0]) or q // s[0] == k // s[0])
    ),
    small.map(lambda n: (Chunk(n), lambda q, k: q // n == k // n)),
    st.integers(0, 8).map(lambda n: (Global(n), lambda q, k: q < n or k < n)),
    st.integers(0, 8).map(lambda n: (Prefix(n), lambda q, k: k < n)),
)


def combined(parts):
    def both(pair):
        (a, f), (b, g) = pair
        return a & b, lambda q, k: f(q, k) and g(q, k)

    def either(pair):
        (a, f), (b, g) = pair
        return a | b, lambda q, k: f(q, k) or g(q, k)

    return st.tuples(parts, parts).map(both) | st.tuples(parts, parts).map(either)


MASKS = st.recursive(SIMPLE, combined, max_leaves=5)
Q, K = np.arange(-2, 30), np.arange(0, 34)  # a query at a negative position is padding; a key there is never looked at


def table(rule, queries=Q, keys=K):
    return np.array([[bool(rule(int(q), int(k))) for k in keys] for q in queries])


@given(MASKS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_allows_what_its_definition_allows(pair):
    mask, rule = pair
    allowed = mask.allows(Q[:, None], K[None, :])
    assert allowed.shape == (len(Q), len(K)) and allowed.dtype == bool
    assert (np.asarray(allowed) == table(rule)).all()


@given(MASKS)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_traced_and_plain_agree(pair):
    mask, rule = pair
    q, k = jnp.asarray(Q, jnp.int32), jnp.asarray(K, jnp.int32)
    allowed, span = jax.jit(lambda q, k: (mask.allows(q[:, None], k), mask.span(q[3], q[9])))(q, k)
    assert (np.asarray(allowed) == table(rule)).all()
    assert [int(x) for x in span] == [int(x) for x in mask.span(int(Q[3]), int(Q[9]))]


@given(MASKS, st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_span_holds_every_key_that_is_seen(pair, data):
    mask, rule = pair
    lo = data.draw(st.integers(-2, 29))
    hi = data.draw(st.integers(lo, 29))
    first, last = (int(x) for x in mask.span(lo, hi))
    seen = K[table(rule, range(lo, hi + 1)).any(0)]
    assert all(first <= k <= last for k in seen), (mask, lo, hi, first, last)


@given(MASKS, st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_covered_needs_no_mask(pair, data):
    mask, rule = pair
    qlo, klo = data.draw(st.integers(-2, 29)), data.draw(st.integers(0, 33))
    qhi, khi = data.draw(st.integers(qlo, 29)), data.draw(st.integers(klo, 33))
    if mask.covers(qlo, qhi, klo, khi):
        assert table(rule, range(qlo, qhi + 1), range(klo, khi + 1)).all(), (mask, qlo, qhi, klo, khi)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(5, 3), Causal() & Window(9), Chunk(8), Prefix(7), Global(4)], ids=str)
@pytest.mark.parametrize("box", [(8, 11, 4, 7), (0, 3, 0, 3), (9, 10, 8, 9), (12, 15, 8, 12), (4, 6, 0, 2)])
def test_a_box_that_is_seen_whole_is_covered(mask, box):
    """Of the masks whose edges are lines: kernels lose nothing."""
    qlo, qhi, klo, khi = box
    whole = mask.allows(np.arange(qlo, qhi + 1)[:, None], np.arange(klo, khi + 1)).all()
    assert bool(mask.covers(*box)) == bool(whole)


def seen_by(mask, lo, hi):
    """(first, last) key that any query of lo to hi sees, by looking at each; None where there is none."""
    keys = np.arange(0, 100)
    some = np.asarray(mask.allows(np.arange(lo, hi + 1)[:, None], keys)).any(0)
    return (int(keys[some].min()), int(keys[some].max())) if some.any() else None


@pytest.mark.parametrize("mask", [
    Causal(), Window(5), Window(5, 3), Window(None, 4), Window(1, 1), Chunk(8), Chunk(5), Prefix(7), Causal() & Window(5),
    Window(3, 3) & Causal(), Causal() & Chunk(8),
    Causal() | Prefix(40), Window(4) | Prefix(3), Causal() & Prefix(6), (Causal() & Window(2)) | Prefix(3),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lo, hi", [(0, 0), (0, 7), (8, 15), (13, 20), (31, 31)])
def test_a_span_of_intervals_is_the_least(mask, lo, hi):
    first, last = (int(x) for x in mask.span(lo, hi))
    assert (max(first, 0), min(last, 99)) == seen_by(mask, lo, hi)


@pytest.mark.parametrize("lo, hi", [(0, 3), (2, 9), (10, 19)])
def test_a_global_span_is_the_least(lo, hi):
    """Global tokens see everybody; a block without one sees the global tokens."""
    assert tuple(int(x) for x in Global(4).span(lo, hi)) == ((0, FAR) if lo < 4 else (0, 3))


@pytest.mark.parametrize("mask", [Window(2) & Prefix(3), Chunk(4) & Prefix(2), (Window(2) & Prefix(3)) | (Chunk(4) & Prefix(2)),
                                  Causal() & (Window(2) & Prefix(3))], ids=str)  # fmt: skip
def test_where_nothing_is_seen_the_span_is_empty(mask):
    first, last = mask.span(12, 19)
    assert int(first) > int(last) and seen_by(mask, 12, 19) is None


def test_an_empty_side_does_not_widen_an_or():
    nothing = Window(2) & Prefix(3)
    for either in (nothing | Chunk(4), Chunk(4) | nothing):
        assert tuple(int(x) for x in either.span(12, 15)) == (12, 15)


def test_far_positions_do_not_overflow():
    far = jnp.int32(2**29)
    for mask in (Causal() & Window(100), Window(100, 100) | Global(4), Chunk(64)):
        first, last = mask.span(far, far + 10)
        assert int(last) >= 2**29 and bool(mask.allows(far, far))
        assert int(first) <= 2**29


def test_masks_are_values():
    make = lambda: (Causal() & Window(5)) | Prefix(3)
    assert make() == make() and hash(make()) == hash(make()) and make() == Or(And(Causal(), Window(5)), Prefix(3))
    assert Window(5) != Window(6) and Window(5) != Window(5, 2) and Causal() != Full() and Chunk(3) != Dilated(3)
    traces = []
    f = jax.jit(lambda mask, q: traces.append(1) or mask.allows(q, q), static_argnums=0)
    f(make(), jnp.arange(3))
    f(make(), jnp.arange(3))
    assert len(traces) == 1


@pytest.mark.parametrize("sides", [(0,), (-1, 1), (3, 0), (None, 0)])
def test_a_window_holds_its_own_token(sides):
    with pytest.raises(ValueError, match="at least 1; got"):
        Window(*sides)


def test_a_mask_must_say_what_it_allows():
    class Silent(Mask):
        pass

    with pytest.raises(NotImplementedError, match="Silent does not say what it allows"):
        Silent().allows(0, 0)
    assert Silent().span(0, 5) == (-FAR, FAR) and not Silent().covers(5, 5, 0, 0)  # a mask without them is only slow
