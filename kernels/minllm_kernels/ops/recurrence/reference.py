"""The recurrence one token after another, as the formula says it, in float32 (float64 for float64)."""

import jax
import jax.numpy as jnp


def forward(q, k, v, g, beta, state, *, C, save):
    """q, k "B T K H"; v "B T N h"; g "B T N", "B T N H" or None; beta "B T N" or None; state "B N h H", the memory transposed.

    Returns y "B T N h", the state after the last token, and with `save` the states before each chunk of C tokens, "B T/C N h H".
    """
    K, N = q.shape[2], v.shape[2]
    if g is not None and g.ndim == 3:
        g = g[..., None]

    def token(S, now):
        q, k, v, g, beta = now
        q, k = (jnp.repeat(x.astype(S.dtype), N // K, axis=1) for x in (q, k))
        S = S if g is None else S * jnp.exp(g)[:, :, None, :]
        if beta is None:
            write = v.astype(S.dtype)
        else:  # what is written is how far the memory's answer to k is from v
            write = beta[..., None] * (v - jnp.einsum("bnvh,bnh->bnv", S, k, precision="highest"))
        S = S + write[..., :, None] * k[..., None, :]
        return S, jnp.einsum("bnvh,bnh->bnv", S, q, precision="highest")

    def chunk(S, now):
        after, y = jax.lax.scan(token, S, now)
        return after, (y, S if save else None)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).reshape(-1, C, x.shape[0], *x.shape[2:]), (q, k, v, g, beta))
    state, (y, states) = jax.lax.scan(chunk, state, tokens)
    y = jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, 1).astype(v.dtype)
    return y, state, jnp.moveaxis(states, 0, 1) if save else None


def backward(q, k, v, g, beta, states, dy, dstate, *, C):
    """The gradients of (q, k, v, g, beta, state)."""
    f = lambda *args: forward(*args, C=C, save=False)[:2]
    return jax.vjp(f, q, k, v, g, beta, states[:, 0])[1]((dy, dstate))
