"""The selective scan one token after another, in float32 (float64 for float64)."""

import jax
import jax.numpy as jnp


def forward(x, step, decay, into, out, goes_on, state, *, C, save):
    """goes_on "B T": 0 where a document begins, else 1. Returns y, the last state, and with `save` the states before each chunk of C
    tokens, "B T/C F S"."""

    def token(h, now):
        x, step, into, out, goes_on = (a.astype(h.dtype) for a in now)
        h = goes_on[:, None, None] * jnp.exp(step[:, :, None] * decay) * h + (step * x)[:, :, None] * into[:, None, :]
        return h, jnp.einsum("bfs,bs->bf", h, out, precision="highest")

    def chunk(h, now):
        after, y = jax.lax.scan(token, h, now)
        return after, (y, h if save else None)

    tokens = (jnp.moveaxis(a, 1, 0).reshape(-1, C, a.shape[0], *a.shape[2:]) for a in (x, step, into, out, goes_on))
    state, (y, states) = jax.lax.scan(chunk, state, tuple(tokens))
    y = jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, 1).astype(x.dtype)
    return y, state, jnp.moveaxis(states, 0, 1) if save else None


def backward(x, step, decay, into, out, goes_on, states, dy, dstate, *, C):
    """The gradients of (x, step, decay, into, out, state)."""
    f = lambda x, step, decay, into, out, state: forward(x, step, decay, into, out, goes_on, state, C=C, save=False)[:2]
    return jax.vjp(f, x, step, decay, into, out, states[:, 0])[1]((dy, dstate))
