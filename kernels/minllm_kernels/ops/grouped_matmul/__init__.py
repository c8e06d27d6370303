"""Rows times the matrix of their group: what a mixture of experts computes, and its gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.ops.grouped_matmul import chunked, ragged, reference, tpu

FORWARD = {"xla": Branch(ragged.forward), "cpu": Branch(chunked.forward), "tpu": Branch(tpu.forward, tpu.supports)}
BACKWARD = {"xla": Branch(ragged.backward), "cpu": Branch(chunked.backward), "tpu": Branch(tpu.backward, tpu.supports)}


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    sizes: Int[Array, " E"],
    *,
    impl: Impl = "auto",
    chip: str | None = None,
) -> Float[Array, "M N"]:
    """y_m = x_m w_e, where the rows of x are sorted by group: the first sizes[0] belong to e = 0, the next sizes[1] to e = 1, and so on.

    Rows past sum(sizes) belong to nobody and give zeros, forward and backward; the sum must not exceed M. Groups may be empty.
    Sums in float32 at least; the result has the dtype of x. Differentiable in x and w; dw comes in the dtype of w.
    impl: "auto" | "reference" | "xla" | "cpu" | "tpu"; chip: the device kind that tiles are chosen for.
    Raises ValueError when the chosen impl cannot serve the call.
    """
    return _grouped_matmul(Settings(impl, chip), x, w, sizes.astype(jnp.int32))


class Settings(NamedTuple):
    """What is known when the call is traced."""

    impl: Impl
    chip: str | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(settings, x, w, sizes):
    return _forward(settings, x, w, sizes)[0]


@partial(jax.jit, static_argnums=0, inline=True)  # or an eager call would compile its branches anew each time
def _forward(settings, x, w, sizes):
    y = choose("grouped_matmul", settings.impl, reference.forward, FORWARD, x, w, sizes, chip=settings.chip)
    return y, (x, w, sizes)


@partial(jax.jit, static_argnums=0, inline=True)
def _backward(settings, saved, dy):
    dx, dw = choose("grouped_matmul backward", settings.impl, reference.backward, BACKWARD, *saved, dy, chip=settings.chip)
    return dx, dw, None


_grouped_matmul.defvjp(_forward, _backward)
