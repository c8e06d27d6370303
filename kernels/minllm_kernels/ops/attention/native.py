"""Attention for a CPU in C++ (../../native/attention.cc), through jax.ffi: one pass over the queries, blocks that nobody sees left out.

Which query sees which key is worked out here, by the mask's own words, as bytes "B T S" and as one byte a block of 64 x 64: the same for
every layer of a model, so that the compiler does it once.
"""

import jax
import jax.numpy as jnp
import numpy as np

from minllm_kernels import native

BLOCK = 64  # queries, and keys, of a block: the C of attention.cc
SHORTEST = 16  # a few queries gain nothing by the copies that the products want
LONGEST = 1024  # above it the bytes would be many; chunked.py takes over


def supports(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *_, softcap=None, **__) -> str | None:
    if reason := native.missing():
        return reason
    if bias is not None or keep is not None or softcap is not None:
        return "no bias, dropout mask or soft cap"
    if any(x.dtype != jnp.float32 for x in (q, k, v)) or q.shape[-1] % 16 or v.shape[-1] % 16:
        return f"q {q.dtype}{list(q.shape)}, v {v.dtype}{list(v.shape)}: made for float32 and head sizes of whole 16s"
    if q.shape[1] < SHORTEST or max(q.shape[1], k.shape[1]) > LONGEST:
        return f"T={q.shape[1]}, S={k.shape[1]}: made for {SHORTEST} to {LONGEST}"
    return None


def _see(mask, q_pos, kv_pos, q_seg, kv_seg):
    """(bytes "B T S", bytes "B T/64 S/64": 0 where nobody sees anything, 2 where everybody sees everything, else 1)."""
    see = mask.allows(q_pos[:, :, None], kv_pos[:, None, :]) & (kv_pos >= 0)[:, None, :]
    if q_seg is not None:
        see &= q_seg[:, :, None] == kv_seg[:, None, :]
    B, T, S = see.shape
    t, s = -T % BLOCK, -S % BLOCK

    def blocks(fill):  # a key behind the last is never seen, a query behind the last sees what the others see
        padded = jnp.pad(jnp.pad(see, ((0, 0), (0, 0), (0, s))), ((0, 0), (0, t), (0, 0)), constant_values=fill)
        return padded.reshape(B, (T + t) // BLOCK, BLOCK, (S + s) // BLOCK, BLOCK)

    some, every = blocks(False).any((2, 4)), blocks(True).all((2, 4))
    return see.astype(jnp.uint8), some.astype(jnp.uint8) + every.astype(jnp.uint8)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *, mask, scale, softcap):
    B, T, N, _ = q.shape
    K, h = k.shape[2], v.shape[-1]
    see, blocks = _see(mask, q_pos, kv_pos, q_seg, kv_seg)
    shapes = jax.ShapeDtypeStruct((B, T, N, h), q.dtype), jax.ShapeDtypeStruct((B, K, N // K, T), q.dtype)
    sinks = jnp.zeros((0,), q.dtype) if sinks is None else sinks.astype(q.dtype)
    call = jax.ffi.ffi_call("minllm_attention_forward", shapes, vmap_method="sequential")
    return call(q, k, v, sinks, see, blocks, scale=np.float32(scale))


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, lse, delta, do, *, mask, scale, softcap):
    see, blocks = _see(mask, q_pos, kv_pos, q_seg, kv_seg)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    call = jax.ffi.ffi_call("minllm_attention_backward", shapes, vmap_method="sequential")
    return *call(q, k, v, see, blocks, lse, delta, do, scale=np.float32(scale)), None
