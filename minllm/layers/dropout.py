"""Dropout (Srivastava et al. 2014): y = x * keep / (1 - rate), keep drawn for each element.

Each row draws from its own key, by its number in the global batch: meshes, microbatches and pipelines drop the same elements.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out


def keep_mask(shape: tuple[int, ...], rate: float, ctx: Context, stream: int = 0) -> Float[Array, "B ..."]:
    """0 or 1 / (1 - rate), one draw an element; `stream` tells apart the masks of one layer."""
    key = jax.random.fold_in(ctx.key, stream)
    rows = jnp.arange(shape[0]) if ctx.rows is None else ctx.rows
    keep = jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), 1 - rate, shape[1:]))(rows)
    return keep / (1 - rate)


def dropout(x: Float[Array, "B ..."], rate: float, ctx: Context, stream: int = 0) -> Float[Array, "B ..."]:
    """The identity when the rate is 0 or the context has no key."""
    if rate == 0 or ctx.key is None:
        return x
    return x * keep_mask(x.shape, rate, ctx, stream).astype(x.dtype)


@dataclass(frozen=True)
class Dropout(Layer):
    """Dropout as a layer of its own: after an embedding, or around another layer's output."""

    rate: float

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        return Out(dropout(x, self.rate, ctx))
