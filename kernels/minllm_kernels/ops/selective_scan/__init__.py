"""Mamba's selective scan, and its gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.ops.recurrence import SHORTEST, documents
from minllm_kernels.ops.selective_scan import chunked, reference

FORWARD = {"xla": Branch(chunked.forward, chunked.supports)}
BACKWARD = {"xla": Branch(chunked.backward, chunked.supports)}

CHUNK = 32


def selective_scan(
    x: Float[Array, "B T F"],
    step: Float[Array, "B T F"],
    decay: Float[Array, "F S"],
    into: Float[Array, "B T S"],
    out: Float[Array, "B T S"],
    state: Float[Array, "B F S"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    impl: Impl = "auto",
    chip: str | None = None,
) -> tuple[Float[Array, "B T F"], Float[Array, "B F S"]]:
    """(y, the state after the last token) of

        h_t = e^{step_t decay} h_{t-1} + step_t x_t into_t^T        y_t = h_t out_t

    for each of F channels with S numbers of state: Gu & Dao 2023, arXiv 2312.00752, algorithm 2, where step is Delta, decay is A < 0, into
    is B and out is C. The input's share is discretised by Euler's rule, as in the paper's code.
    state: before the first token; default zero; float32, or float64 for float64 inputs. segments: as in `linear_attention`.
    Differentiable in everything but segments; the backward pass keeps one state a chunk of tokens.

    Raises ValueError where shapes do not fit, or when the chosen impl cannot serve the call.
    """
    (B, T, F), S = x.shape, into.shape[-1]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"selective_scan takes a floating-point x; got {x.dtype}")
    kind = jnp.promote_types(x.dtype, jnp.float32)
    goes_on = jnp.ones((B, T), kind)
    if segments is not None:
        first, real = documents(segments)
        goes_on = 1 - first.astype(kind)
        step = jnp.where(real[:, :, None], step, 0)
    C = T if T < SHORTEST else CHUNK
    if short := -T % C:
        pad = lambda x, value=0: jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
        x, step, into, out, goes_on = pad(x), pad(step), pad(into), pad(out), pad(goes_on, 1)
    state = jnp.zeros((B, F, S), kind) if state is None else state.astype(kind)
    args = (x, step.astype(kind), decay.astype(kind), into, out, goes_on, state)
    y, state = _selective_scan(Settings(C, impl, chip), *args)
    return y[:, :T], state


class Settings(NamedTuple):
    """What is known when the call is traced. C: tokens a chunk; the state before each is saved for the backward pass."""

    C: int
    impl: Impl
    chip: str | None

    def choose(self, name, reference, branches, *args, **static):
        return choose(name, self.impl, reference, branches, *args, chip=self.chip, C=self.C, **static)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selective_scan(settings, *args):
    y, state, _ = settings.choose("selective_scan", reference.forward, FORWARD, *args, save=False)
    return y, state


def _forward(settings, *args):
    y, state, states = settings.choose("selective_scan", reference.forward, FORWARD, *args, save=True)
    return (y, state), (args[:-1], states)


def _backward(settings, saved, grads):
    args, states = saved
    dx, dstep, ddecay, dinto, dout, dstate = settings.choose("selective_scan backward", reference.backward, BACKWARD, *args, states, *grads)
    return dx, dstep, ddecay, dinto, dout, None, dstate


_selective_scan.defvjp(_forward, _backward)
