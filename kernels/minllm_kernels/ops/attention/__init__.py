"""Scaled dot-product attention with everything that language models ask of it, and its gradient."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.mask import Causal, Mask
from minllm_kernels.ops.attention import chunked, cpu, native, reference, tpu
from minllm_kernels.score import Score

# "native" stands before "cpu": both are for the CPU, and the first that can serve a call does.
FORWARD = {
    "xla": Branch(chunked.forward, chunked.supports),
    "native": Branch(native.forward, native.supports),
    "cpu": Branch(cpu.forward, cpu.supports),
    "tpu": Branch(tpu.forward, tpu.supports),
}
BACKWARD = {
    "xla": Branch(chunked.backward, chunked.supports),
    "native": Branch(native.backward, native.supports),
    "cpu": Branch(cpu.backward, cpu.supports),
    "tpu": Branch(tpu.backward, tpu.supports),
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
    score: Score | None = None,
    table: Float[Array, "#B N #T R"] | None = None,
    impl: Impl = "auto",
    chip: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """softmax(q k^T scale) v, per head; N / K query heads share a key/value head (Vaswani et al. 2017; GQA: arXiv 2305.13245).

    mask: a static predicate on positions. q_pos, kv_pos: positions; a key with a negative position is not there.
    q_seg, kv_seg: a query sees only keys of its own segment. scale: default H^-1/2.
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2). sinks: one extra logit a head, whose value is zero.
    bias: added to the scores. keep: multiplies the probabilities (dropout); neither is ever cheap.
    score, table: a bias that is a function of head and positions (score.py: ALiBi, T5, Shaw), written out as a bias.
    A row that sees nothing gives zeros. Softmax in float32. Differentiable in q, k, v, sinks, bias and table.
    return_lse: also log(sum(exp(scores))), sinks included, in float32; -inf for a row that sees nothing. Differentiable too.
    impl: "auto" | "reference" | "xla" | "cpu" | "native" | "tpu" | "gpu"; chip: the device kind that tiles are chosen for.

    Raises ValueError where shapes do not fit, or when the chosen impl cannot serve the call.
    """
    (B, T, N, H), (S, K, h) = q.shape, (k.shape[1], k.shape[2], v.shape[-1])
    if N % K:
        raise ValueError(f"attention has {N} query heads for {K} key/value heads; the first must be a multiple of the second")
    if (q_seg is None) != (kv_seg is None):
        raise ValueError("attention needs segments for queries and keys, or for neither")
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"attention takes floating-point q, k and v; got {q.dtype}")
    wanted = dict(k=(B, S, K, H), v=(B, S, K, h), q_pos=(B, T), kv_pos=(B, S), q_seg=(B, T), kv_seg=(B, S), sinks=(N,))
    given = dict(k=k, v=v, q_pos=q_pos, kv_pos=kv_pos, q_seg=q_seg, kv_seg=kv_seg, sinks=sinks)
    for name, array in given.items():
        if array is not None and array.shape != wanted[name]:
            raise ValueError(f"attention needs {name} of shape {wanted[name]} for q {q.shape}, k {k.shape}, v {v.shape}; got {array.shape}")
    if (score is None) != (table is None):
        raise ValueError("attention needs a score and its table, or neither")
    if score is not None:
        written = score.bias(table, q_pos, kv_pos)
        bias = written if bias is None else written + bias
    settings = Settings(mask, H**-0.5 if scale is None else scale, softcap, impl, chip)
    o, lse = _attention(settings, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep)
    if not return_lse:
        return o
    return o, jnp.where(jnp.isposinf(lse), -jnp.inf, lse).reshape(B, N, -1).swapaxes(1, 2)


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
    # named, so that a remat policy can save both: a backward pass that lacks either runs the forward again
    o, lse = checkpoint_name(attention_part(settings, *args), "attention")
    return (o, lse), (args, o, lse)


def _backward(settings, saved, cotangents):
    (args, o, lse), (do, dlse) = saved, cotangents
    dq, dk, dv, dsinks, dbias = attention_part_gradient(settings, *args, o, lse, do, dlse=dlse)
    grads = (dq, dk, dv, None, None, None, None, dsinks, dbias, None)
    return tuple(g if g is None else _like(g, x) for g, x in zip(grads, args))


def _like(grad, x):
    """Inside a shard_map, the gradient of what is the same on several devices is the sum of theirs."""
    extra = tuple(reference.varies(grad) - reference.varies(x))
    return jax.lax.psum(grad, extra) if extra else grad


_attention.defvjp(_forward, _backward)


# What attention over a part of the keys gives, for callers that hold keys in parts (a ring of devices). Neither is differentiable.


def attention_part(settings: Settings, *args: Any) -> tuple[Array, Array]:
    """(o "B T N h", log-sum-exp of the scores "B K G T"; +inf where a query sees none of these keys)."""
    return settings.choose("attention", reference.forward, FORWARD, *args)


def attention_part_gradient(settings: Settings, *args: Any, dlse: Array | float = 0.0) -> tuple[Any, ...]:
    """(dq, dk, dv, dsinks, dbias) that these keys have a share in; after the inputs, `args` are o, log-sum-exp and do of all keys."""
    *inputs, o, lse, do = args
    q, k, sinks = inputs[0], inputs[1], inputs[7]
    # lse adds p dlse to the gradient of the scores, which p (dp - delta) holds already
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1).swapaxes(1, 2).reshape(lse.shape) - dlse
    dq, dk, dv, dbias = settings.choose("attention backward", reference.backward, BACKWARD, *inputs, lse, delta, do)
    dsinks = None
    if sinks is not None:
        sunk = jnp.exp(reference.per_group(sinks, k.shape[2]) - lse)
        dsinks = -(sunk * delta).sum((0, 3)).reshape(q.shape[2]).astype(sinks.dtype)
    return dq, dk, dv, dsinks, dbias


def merge_parts(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The (o, log-sum-exp) of two disjoint parts of the keys together; o in float32."""
    lses = [jnp.where(jnp.isposinf(lse), -jnp.inf, lse) for _, lse in (a, b)]
    top = jnp.maximum(*lses)
    top = jnp.where(jnp.isneginf(top), 0, top)
    shares = [jnp.exp(lse - top) for lse in lses]
    total = shares[0] + shares[1]
    B, K, G, T = total.shape
    weigh = lambda o, share: o * (share / jnp.where(total > 0, total, 1)).transpose(0, 3, 1, 2).reshape(B, T, K * G, 1)
    return weigh(a[0], shares[0]) + weigh(b[0], shares[1]), jnp.where(total > 0, top + jnp.log(total), jnp.inf)
