"""The selective scan chunk after chunk: inside a chunk the tokens are combined in a tree, (a, b) then (c, d) being (a c, b c + d).

The backward pass walks the chunks in reverse, each from the state that the forward pass saved at its start: the B T F S numbers of all
states are never held at once.
"""

import jax
import jax.numpy as jnp


def supports(*_, C, **__) -> str | None:
    if C < 16:
        return f"{C} tokens are too few to gain"
    return None


def _chunk(h, decay, x, step, into, out, goes_on):
    """(the state after the chunk, y); arrays of tokens are "B C ..."."""
    x, into, out = (a.astype(h.dtype) for a in (x, into, out))
    keep = goes_on[:, :, None, None] * jnp.exp(step[..., None] * decay)
    new = (step * x)[..., None] * into[:, :, None, :]
    keep, new = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (keep, new), axis=1)
    states = keep * h[:, None] + new
    return states[:, -1], jnp.einsum("bcfs,bcs->bcf", states, out, precision="highest")


def _split(x, C):
    """ "B T ..." -> (T/C, B, C, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 1, 0)


def _join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def forward(x, step, decay, into, out, goes_on, state, *, C, save):
    """See `reference.forward`."""

    def walk(h, now):
        after, y = _chunk(h, decay, *now)
        return after, (y.astype(x.dtype), h if save else None)

    state, (y, states) = jax.lax.scan(walk, state, tuple(_split(a, C) for a in (x, step, into, out, goes_on)))
    return _join(y), state, jnp.moveaxis(states, 0, 1) if save else None


def backward(x, step, decay, into, out, goes_on, states, dy, dstate, *, C):
    """See `reference.backward`."""

    def walk(carry, now):
        dh, ddecay = carry
        *tokens, goes_on, h, dy = now
        grad = jax.vjp(lambda h, decay, *tokens: _chunk(h, decay, *tokens, goes_on=goes_on), h, decay, *tokens)[1]
        dh, more, *dtokens = grad((dh, dy.astype(dh.dtype)))
        return (dh, ddecay + more), tuple(dtokens)

    now = (*(_split(a, C) for a in (x, step, into, out, goes_on)), jnp.moveaxis(states, 1, 0), _split(dy, C))
    (dstate, ddecay), dtokens = jax.lax.scan(walk, (dstate, jnp.zeros_like(decay)), now, reverse=True)
    dx, dstep, dinto, dout = (_join(a) for a in dtokens)
    return dx, dstep, ddecay, dinto, dout, dstate
