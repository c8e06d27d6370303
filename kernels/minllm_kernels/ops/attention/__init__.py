"""Scaled dot-product attention with everything that language models ask of it, and its gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.mask import Causal, Mask
from minllm_kernels.ops.attention import chunked, cpu, native, reference

# "native" stands before "cpu": both are for the CPU, and the first that can serve a call does.
FORWARD = {
    "xla": Branch(chunked.forward, chunked.supports),
    "native": Branch(native.forward, native.supports),
    "cpu": Branch(cpu.forward, cpu.supports),
}
BACKWARD = {
    "xla": Branch(chunked.backward, chunked.supports),
    "native": Branch(native.backward, native.supports),
    "cpu": Branch(cpu.backward, cpu.supports),
}


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K h"],
    *,
    mask: Mask = Causal(),
    q_pos: Int[Array, "B T"],
    kv_pos: Int[Array, "B S"],
    q_seg: Int[Array, "B T"] | None = None,
    kv_seg: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    keep: Float[Array, "B N T S"] | None = None,
    impl: Impl = "auto",
    chip: str | None = None,
) -> Float[Array, "B T N h"]:
    """softmax(q k^T scale) v, per head; N / K query heads share a key/value head (Vaswani et al. 2017; GQA: arXiv 2305.13245).

    mask: a static predicate on positions. q_pos, kv_pos: positions; a key with a negative position is not there.
    q_seg, kv_seg: a query sees only keys of its own segment. scale: default H^-1/2.
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2). sinks: one extra logit a head, whose value is zero.
    bias: added to the scores. keep: multiplies the probabilities (dropout); neither is ever cheap.
    A row that sees nothing gives zeros. Softmax in float32. Differentiable in q, k, v, sinks and bias.
    impl: "auto" | "reference" | "xla" | "cpu" | "native" | "tpu" | "gpu"; chip: the device kind that tiles are chosen for.

    Raises ValueError where shapes do not fit, or when the chosen impl cannot serve the call.
    """
    B, _, N, H = q.shape
    K = k.shape[2]
    if N % K:
        raise ValueError(f"attention has {N} query heads for {K} key/value heads; the first must be a multiple of the second")
    if (q_seg is None) != (kv_seg is None):
        raise ValueError("attention needs segments for queries and keys, or for neither")
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"attention takes floating-point q, k and v; got {q.dtype}")
    settings = Settings(mask, H**-0.5 if scale is None else scale, softcap, impl, chip)
    return _attention(settings, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep)


class Settings(NamedTuple):
    """What is known when the call is traced."""

    mask: Mask
    scale: float
    softcap: float | None
    impl: Impl
    chip: str | None

    def choose(self, name, reference, branches, *args):
        static = dict(mask=self.mask, scale=self.scale, softcap=self.softcap)
        return choose(name, self.impl, reference, branches, *args, chip=self.chip, **static)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, *args):
    return _forward(settings, *args)[0]


def _forward(settings, *args):
    o, lse = settings.choose("attention", reference.forward, FORWARD, *args)
    return o, (args, o, lse)


def _backward(settings, saved, do):
    args, o, lse = saved
    dq, dk, dv, dsinks, dbias = settings.choose("attention backward", reference.backward, BACKWARD, *args, o, lse, do)
    return dq, dk, dv, None, None, None, None, dsinks, dbias, None


_attention.defvjp(_forward, _backward)
