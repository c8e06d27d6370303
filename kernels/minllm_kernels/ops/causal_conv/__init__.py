"""A short causal convolution along the sequence, each channel by itself, and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.ops.causal_conv import reference, shifted
from minllm_kernels.ops.recurrence import documents

FORWARD = {"xla": Branch(shifted.forward)}
BACKWARD = {"xla": Branch(shifted.backward)}


def causal_conv(
    x: Float[Array, "B T F"],
    w: Float[Array, "W F"],
    state: Float[Array, "B Z F"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    impl: Impl = "auto",
    chip: str | None = None,
) -> tuple[Float[Array, "B T F"], Float[Array, "B Z F"]]:
    """(y, the last Z = W - 1 inputs) of

        y_t = sum_i w_i x_{t - W + 1 + i}

    so w[W-1] multiplies the token itself. state: the W - 1 inputs before the first token; default zero, and of x's dtype.
    segments: the document of each token; a token sees only its own, and `state` belongs to the first of the row. Segment 0 is padding,
    which may stand at either end of a row but not between its tokens: it is not there, and its outputs mean nothing.
    Differentiable in x, w and state through both results. Products are added up in float32.

    Raises ValueError where shapes do not fit, or when the chosen impl cannot serve the call.
    """
    (B, _, F), W = x.shape, w.shape[0]
    if state is not None and state.shape[1] != W - 1:
        raise ValueError(f"causal_conv got a state of {state.shape[1]} tokens for a width of {W}; it holds the last {W - 1}")
    state = jnp.zeros((B, W - 1, F), x.dtype) if state is None else state.astype(x.dtype)
    first, real = (None, None) if segments is None else documents(segments)
    return _causal_conv((impl, chip), x, w, state, first, real)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv(settings, *args):
    return choose("causal_conv", settings[0], reference.forward, FORWARD, *args, chip=settings[1])


def _forward(settings, *args):
    return _causal_conv(settings, *args), args


def _backward(settings, args, grads):
    dx, dw, dstate = choose("causal_conv backward", settings[0], reference.backward, BACKWARD, *args, *grads, chip=settings[1])
    return dx, dw, dstate, None, None


_causal_conv.defvjp(_forward, _backward)
