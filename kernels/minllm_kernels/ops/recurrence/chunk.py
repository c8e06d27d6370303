"""One chunk of one head, as matrix products.

With the decays summed in log space, G_i over the tokens of the chunk up to i, and A_ij = q_i^T diag(e^{G_i - G_j}) k_j for j <= i:

    y = (q e^G) S + A w        S' = diag(e^{G_C}) S + (k e^{G_C - G})^T w

w is v in linear attention (GLA: Yang et al. 2023, arXiv 2312.06635, section 4; Mamba-2: Dao & Gu 2024, arXiv 2405.21060, section 6). In
the delta rule (Yang et al. 2024, arXiv 2406.06484, section 3.2; gated: arXiv 2412.06464; per channel: Kimi Linear, arXiv 2510.26692) it
solves a unit triangular system, with L_ij = b_i k_i^T diag(e^{G_i - G_j}) k_j for j < i:

    (I + L) w = b (v - (k e^G) S)

Nothing here subtracts two sums of log decays: every exponent is a sum of its own terms, made by a product with zeros and ones. So none
is positive, none overflows, and none loses digits to a saturated gate elsewhere in the chunk.

    C tokens        S memory, transposed: (h, H)        q, k (C, H)        v (C, h)        b (C, 1)
    g log decays: a row (1, C), one a channel (C, H), or None
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Constants(NamedTuple):
    """Zeros and ones that depend on C alone; a kernel keeps them in memory, because masks made anew would crowd its registers.

    terms (levels + 2, C, C): which tokens each sum of `channel_decays` takes. levels (levels, C, C): the pairs (row, column) of each
    level. below, eye (C, C): the pairs of a row with what comes before it, and with itself.
    """

    terms: Any
    levels: Any
    below: Any
    eye: Any

    def load(self):
        """From references to arrays, each level by itself."""
        each = lambda ref: [ref[n] for n in range(ref.shape[0])]
        return Constants(each(self.terms), each(self.levels), self.below[...], self.eye[...])


def constants(C: int) -> Constants:
    """As numpy arrays. At level n the chunk falls into blocks of 2b tokens, b = 2^n. A pair (i, j) in the second and the first half of one
    block is as far apart as i is from the boundary and the boundary from j, and each token has just one of these two distances. Every
    pair i > j has one level: the highest bit in which i and j differ."""
    i, t = np.arange(C)[:, None], np.arange(C)[None, :]
    sums, levels = [t <= i, t > i], []
    for b in [1 << n for n in range((C - 1).bit_length())]:
        edge = i // (2 * b) * 2 * b + b  # the first token of the second half
        sums.append(((t >= edge) & (t <= i)) | ((t > i) & (t < edge)))
        levels.append(((i ^ t) // b == 1) & (t < i))
    f = lambda *masks: np.stack(masks).astype(np.float32)
    return Constants(f(*sums), f(*levels), *f(t < i, t == i))


def chunk(S, q, k, v, g, b, c: Constants):
    """(the memory after the chunk, y), both in S's dtype. The products are of the dtype of q, k and v, added up in S's dtype. g and b may
    be None: no decay, no delta rule."""
    near = q.dtype
    if g is None or g.shape[0] == 1:
        pairs, enter, leave, whole = (c.below + c.eye, 1, 1, 1) if g is None else one_decay(g, near, c)
        A = _dot(q, k, "ih,jh->ij", near) * pairs
        L = None if b is None else _dot(k, k, "ih,jh->ij", near) * pairs
    else:
        levels, enter, leave, whole = channel_decays(g, near, c)
        rows = q if b is None else jnp.concatenate([q, k])
        A = _pairs(rows.astype(g.dtype), k.astype(g.dtype), levels, near, c)
        own, L = A[: len(q)], None if b is None else A[len(q) :]
        A = own + jnp.sum(q.astype(g.dtype) * k, 1, keepdims=True) * c.eye
    near_S = S.astype(near)
    if b is None:
        w = v
    else:
        w = _solve(near, L * c.below * b, b * (v - _dot(k * enter, near_S, "ih,vh->iv", near)), c)
    y = _dot(q * enter, near_S, "ih,vh->iv", near) + _dot(A, w, "ij,jv->iv", near)
    return S * whole + _dot(w, k * leave, "iv,ih->vh", near), y


def one_decay(g, near, c):
    """For one log decay a token, a row (1, C): e^{G_i - G_j} (C, C), zero above the diagonal; e^{G_i} and e^{G_C - G_j} as columns;
    e^{G_C} (1, 1)."""
    upto = g * (c.below + c.eye)  # the terms of G_i
    enter, whole = upto.sum(1, keepdims=True), g.sum(1, keepdims=True)
    leave = (g * (1 - c.below - c.eye)).sum(1, keepdims=True)
    after = _sums(near, False, c.below, upto)  # (i, j): the terms of G_i that come after j
    return jnp.exp(after) * (c.below + c.eye), jnp.exp(enter), jnp.exp(leave), jnp.exp(whole)


def channel_decays(g, near, c):
    """For one log decay a channel (C, H): the decays of each level, and e^{G_i}, e^{G_C - G_j} (C, H), e^{G_C} (1, H)."""
    enter, leave, *levels = (jnp.exp(_sums(near, True, c.terms[n], g)) for n in range(len(c.terms)))
    return levels, enter, leave, enter[len(g) - 1 :]


def _pairs(rows, k, decays, near, c):
    """rows_i^T diag(e^{G_i - G_j}) k_j for i > j, zero elsewhere; rows are one or two times (C, H)."""
    many = len(rows) // len(k)
    wide = lambda x: x if many == 1 else jnp.concatenate([x] * many)
    return reduce(jnp.add, (_dot(rows * wide(e), k * e, "ih,jh->ij", near) * wide(c.levels[n]) for n, e in enumerate(decays)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(near, L, r, c):
    """(I + L)^-1 r for a strictly lower triangular L."""
    return _solved(near, L, r, c)[0]


def _solved(near, L, r, c):
    """The inverse of a block of twice the size from that of its halves: X - X L X with the part of L that joins them. Powers of L, which
    overflow where it is large, are never formed."""
    X = c.eye - L * c.levels[0]
    for n in range(1, len(c.levels)):
        X = X - _dot(X, _dot(L * c.levels[n], X, "ij,jk->ik", near), "ij,jk->ik", near)
    w = _dot(X, r, "ij,jv->iv", near)
    return w, (X, w)


def _solve_backward(near, saved, dw):
    X, w = saved
    dr = _dot(X, dw, "ji,jv->iv", near)
    return -_dot(dr, w, "iv,jv->ij", near), dr, None


_solve.defvjp(_solved, _solve_backward)


def _dot(a, b, eq, near):
    """A product of operands rounded to `near`, added up in float32; float32 operands are not rounded."""
    full = jnp.promote_types(near, jnp.float32)
    precision = "highest" if near == full else "default"
    return jnp.einsum(eq, a.astype(near), b.astype(near), preferred_element_type=full, precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(near, left, ones, x):
    """ones x, or x ones unless `left`, where `ones` holds zeros and ones: sums of the entries of x.

    For a rounded dtype x goes in two parts of 8 bits: an exponent is then wrong by 2^-17 of itself, and its exponential by at most 2^-18.
    """
    parts = _parts(near, x)
    ones = ones.astype(parts[0].dtype)
    precision = "highest" if len(parts) == 1 else "default"
    dot = partial(jnp.dot, precision=precision, preferred_element_type=x.dtype)
    return sum(dot(ones, part) if left else dot(part, ones) for part in parts)


def _parts(near, x):
    if jnp.promote_types(near, jnp.float32) == near:
        return (x,)
    high = x.astype(jnp.bfloat16)  # near may be float16, whose range log decays leave
    return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def _sums_backward(near, left, ones, dy):
    parts = _parts(near, dy)
    ones = ones.astype(parts[0].dtype)
    precision = "highest" if len(parts) == 1 else "default"
    dims = (((0,), (0,)), ((), ())) if left else (((1,), (1,)), ((), ()))
    dot = partial(lax.dot_general, dimension_numbers=dims, precision=precision, preferred_element_type=dy.dtype)
    return None, sum(dot(ones, part) if left else dot(part, ones) for part in parts)


_sums.defvjp(lambda near, left, ones, x: (_sums(near, left, ones, x), ones), _sums_backward)
