"""The convolution as a sum of W shifted copies: what XLA fuses into one pass over memory. The only thing kept for the gradient is x."""

from functools import reduce

import jax
import jax.numpy as jnp


def forward(x, w, state, first, real):
    """See `reference.forward`. Padding stands at the ends of a row only."""
    T, W = x.shape[1], w.shape[0]
    kind = jnp.promote_types(x.dtype, jnp.float32)
    w = w.astype(kind)
    if first is None:
        row = jnp.concatenate([state, x], 1)
        y = reduce(jnp.add, (row[:, i : i + T].astype(kind) * w[i] for i in range(W)))
        return y.astype(x.dtype), row[:, T:]
    count = real.sum(1)
    lead = jnp.where(count > 0, jnp.argmax(real, 1), 0)  # tokens of padding on the left: the state belongs behind them
    row = jnp.concatenate([jnp.zeros_like(state), x], 1)
    row = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(row, state, lead, 0)
    rank = jnp.arange(T) - lead[:, None]
    # how many inputs of the same document came before; the first document may have begun before the row
    age = rank - jax.lax.cummax(jnp.where(first, rank, -W), axis=1)
    y = reduce(jnp.add, (jnp.where((age >= W - 1 - i)[..., None], row[:, i : i + T].astype(kind) * w[i], 0) for i in range(W)))
    last = jnp.take_along_axis(age, jnp.maximum(lead + count - 1, 0)[:, None], 1)
    kept = (jnp.arange(W - 1, 0, -1) <= last + 1) | (count == 0)[:, None]
    state = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, W - 1))(row, lead + count)
    return y.astype(x.dtype), jnp.where(kept[..., None], state, 0)


def backward(x, w, state, first, real, dy, dstate):
    """The gradients of (x, w, state): the function is linear in each, so this computes no forward pass."""
    return jax.vjp(lambda x, w, state: forward(x, w, state, first, real), x, w, state)[1]((dy, dstate))
