"""The engine under linear attention and the delta rule: one pass over the sequence with a matrix memory a head.

    S_t = (I - b_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        y_t = S_t^T q_t

Without b_t the bracket is the identity and k_t v_t^T is added as it is. Documents need no code below this file: at the first token of
one the log decay is so low that its exponential is zero, and every decay is a sum of log decays, never a difference, so that a sum
which does not cross the boundary does not know of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.ops.recurrence import chunked, reference, tpu

FORWARD = {"xla": Branch(chunked.forward, chunked.supports), "tpu": Branch(tpu.forward, tpu.supports)}
BACKWARD = {"xla": Branch(chunked.backward, chunked.supports), "tpu": Branch(tpu.backward, tpu.supports)}

FORGET = -1e4  # a log decay whose exponential is zero in float64 too
SHORTEST = 16  # tokens; fewer are walked one by one
CHUNK = 64


def run(name, q, k, v, log_decay, beta, state, segments, impl: Impl, chip):
    """(y "B T N h" in v's dtype, state "B N H h"). See the ops for what the arguments are."""
    (B, T, K, H), (N, h) = q.shape, v.shape[2:]
    if N % K:
        raise ValueError(f"{name} has {N} value heads for {K} query and key heads; the first must be a multiple of the second")
    if k.shape != q.shape or v.shape[:2] != (B, T):
        raise ValueError(f"{name} got q {q.shape}, k {k.shape} and v {v.shape}; q and k must agree, and v in its first two dims")
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"{name} takes floating-point q, k and v; got {q.dtype}")
    kind = jnp.promote_types(q.dtype, jnp.float32)
    g = None if log_decay is None else log_decay.astype(kind)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if segments is not None:
        first, real = documents(segments)
        g = jnp.zeros((B, T, N), kind) if g is None else g
        per_head = (slice(None), slice(None)) + (None,) * (g.ndim - 2)
        g = jnp.where(first[per_head], FORGET, jnp.where(real[per_head], g, 0))
        if beta is None:
            k = jnp.where(real[:, :, None, None], k, 0)
        else:
            beta = jnp.where(real[:, :, None], beta, 0)
    if T < SHORTEST and impl == "auto":
        impl = "reference"
    C = T if T < SHORTEST else min(CHUNK, 1 << (T - 1).bit_length())
    if short := -T % C:  # tokens that leave the memory alone
        pad = lambda x: jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        q, k, v, g, beta = jax.tree.map(pad, (q, k, v, g, beta))
    state = jnp.zeros((B, N, h, H), kind) if state is None else state.astype(kind).swapaxes(2, 3)
    beta = None if beta is None else beta.astype(kind)
    y, state = _recurrence(Settings(name, C, impl, chip), q, k, v, g, beta, state)
    return y[:, :T], state.swapaxes(2, 3)


def documents(segments):
    """(whether a token is the first of its document, whether it is a token at all), both "B T". Id 0 is padding. The first document of
    a row may have begun before it, so its first token does not count."""
    real = segments > 0
    index = jnp.where(real, jnp.arange(segments.shape[1]), -1)
    last = jax.lax.cummax(index, axis=1)
    last = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], 1)  # of the last token before this one
    before = jnp.take_along_axis(segments, jnp.maximum(last, 0), 1)
    return real & (last >= 0) & (before != segments), real


class Settings(NamedTuple):
    """What is known when the call is traced. C: tokens a chunk; memories are saved at the start of each for the backward pass."""

    name: str
    C: int
    impl: Impl
    chip: str | None

    def choose(self, what, reference, branches, *args, **static):
        return choose(f"{self.name}{what}", self.impl, reference, branches, *args, chip=self.chip, C=self.C, **static)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings, *args):
    y, state, _ = settings.choose("", reference.forward, FORWARD, *args, save=False)
    return y, state


def _forward(settings, *args):
    y, state, states = settings.choose("", reference.forward, FORWARD, *args, save=True)
    return (y, state), (args[:-1], states)


def _backward(settings, saved, grads):
    args, states = saved
    return settings.choose(" backward", reference.backward, BACKWARD, *args, states, *grads)


_recurrence.defvjp(_forward, _backward)
