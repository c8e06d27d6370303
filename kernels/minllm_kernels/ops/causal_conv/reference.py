"""The convolution one token after another, with the last W - 1 inputs as its state."""

import jax
import jax.numpy as jnp


def forward(x, w, state, first, real):
    """first, real "B T": whether a token begins a document, and whether it is a token at all; None: one document, no padding."""
    kind = jnp.promote_types(x.dtype, jnp.float32)
    ones = jnp.ones(x.shape[:2], bool)
    first, real = (~ones, ones) if first is None else (first, real)

    def token(last, now):
        x, first, real = now
        last = jnp.where(first[:, None, None], 0, last)
        seen = jnp.concatenate([last, x[:, None]], 1)
        y = jnp.einsum("bwf,wf->bf", seen.astype(kind), w.astype(kind), precision="highest")
        return jnp.where(real[:, None, None], seen[:, 1:], last), y.astype(x.dtype)

    state, y = jax.lax.scan(token, state, tuple(jnp.moveaxis(a, 1, 0) for a in (x, first, real)))
    return jnp.moveaxis(y, 0, 1), state


def backward(x, w, state, first, real, dy, dstate):
    """The gradients of (x, w, state)."""
    return jax.vjp(lambda x, w, state: forward(x, w, state, first, real), x, w, state)[1]((dy, dstate))
