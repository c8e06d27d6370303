"""minllm: a functional LLM stack in JAX that one person can read in a weekend and run on a pod."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from minllm import spec
from minllm.layer import Context, Execution, Out
from minllm.sample import sample

__all__ = ["Context", "Execution", "apply", "init", "sample"]


def init(model: Any, key: Key[Array, ""], dtype: Any = jnp.float32) -> spec.Tree:
    """Fresh parameters of a model."""
    return spec.init(model.params(), key, dtype)


def apply(model: Any, params: spec.Tree, tokens: Int[Array, "B T"], ctx: Context | None = None, cache: spec.Tree = None) -> Out:
    """Logits "B T V" in Out.x, and the new cache when one is given. Tokens without ctx.positions are counted from 0."""
    return model.apply(params, tokens, ctx or Context(), cache)
