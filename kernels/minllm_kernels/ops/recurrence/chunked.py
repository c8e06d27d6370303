"""Chunk after chunk in plain JAX: matrix products inside a chunk, a scan over chunks. What XLA runs where there is no kernel.

The backward pass walks the chunks in reverse with the gradient of the memory. Inside a chunk it is the gradient of `chunk`, computed
from the memory that the forward pass saved at the chunk's start, so nothing else of size T x C or T x H x h is ever kept.
"""

from functools import partial

import jax
import jax.numpy as jnp

from minllm_kernels.ops.recurrence.chunk import chunk, constants


def supports(*_, C, **__) -> str | None:
    if C < 16:
        return f"{C} tokens are too few to gain"
    return None


@partial(jax.jit, static_argnames=("C", "save"))
def forward(q, k, v, g, beta, state, *, C, save):
    """See `reference.forward`."""
    N, K, heads = v.shape[2], q.shape[2], _heads(C, state.dtype)

    def step(S, now):
        after, y = heads(S, *now)
        return after, (y.astype(v.dtype), S if save else None)

    state, (y, states) = jax.lax.scan(step, _by_group(state, K), _tiles(q, k, v, g, beta, C))
    return _tokens(y, N), _by_head(state, N), jnp.moveaxis(jax.vmap(lambda S: _by_head(S, N))(states), 0, 1) if save else None


@partial(jax.jit, static_argnames=("C",))
def backward(q, k, v, g, beta, states, dy, dstate, *, C):
    """See `reference.backward`."""
    N, K, heads = v.shape[2], q.shape[2], _heads(C, states.dtype)

    def step(dS, now):
        args, S, dy = now
        dS, *dargs = jax.vjp(heads, S, *args)[1]((dS, dy.astype(dS.dtype)))
        return dS, dargs

    saved = jax.vmap(lambda S: _by_group(S, K))(jnp.moveaxis(states, 1, 0))
    now = _tiles(q, k, v, g, beta, C), saved, _tile(dy, C, K, N // K)
    dstate, (dq, dk, dv, dg, dbeta) = jax.lax.scan(step, _by_group(dstate, K), now, reverse=True)
    if g is not None:
        dg = _tokens(dg, N) if g.ndim == 4 else _tokens(dg.swapaxes(-1, -2), N)[..., 0]
    dbeta = None if beta is None else _tokens(dbeta, N)[..., 0]
    return _tokens(dq, K), _tokens(dk, K), _tokens(dv, N), dg, dbeta, _by_head(dstate, N)


def _heads(C, dtype):
    """`chunk` over rows, groups of heads, and the value heads of a group, which share q and k."""
    fixed = jax.tree.map(lambda x: jnp.asarray(x, dtype), constants(C))
    return jax.vmap(jax.vmap(jax.vmap(lambda *args: chunk(*args, c=fixed), (0, None, None, 0, 0, 0))))


def _tile(x, C, *heads):
    """ "B T N ..." -> (T/C, B, *heads, C, ...)."""
    B, T, _, *rest = x.shape
    n = len(heads)
    x = x.reshape(B, T // C, C, *heads, *rest)
    return x.transpose(1, 0, *range(3, 3 + n), 2, *range(3 + n, x.ndim))


def _tiles(q, k, v, g, beta, C):
    K, r = q.shape[2], v.shape[2] // q.shape[2]
    row = None if g is None else _tile(g, C, K, r)
    row = row if g is None or g.ndim == 4 else row[..., None, :]
    beta = None if beta is None else _tile(beta, C, K, r)[..., None]
    return _tile(q, C, K), _tile(k, C, K), _tile(v, C, K, r), row, beta


def _tokens(x, N):
    """(T/C, B, *heads, C, h) -> "B T N h"."""
    x = x.reshape(*x.shape[:2], N, *x.shape[-2:]).transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _by_group(S, K):
    """ "B N h H" -> "B K N/K h H"."""
    return S.reshape(S.shape[0], K, -1, *S.shape[2:])


def _by_head(S, N):
    return S.reshape(S.shape[0], N, *S.shape[3:])
