"""Cross-entropy a chunk of tokens at a time: never more than chunk x V logits."""

import jax.numpy as jnp
from jax import lax

from minllm_kernels.ops.cross_entropy import reference

LOGITS = 2**25  # logits a chunk, at most: 128 MiB in float32


def supports(x, w, *_, **__) -> str | None:
    B, T, _ = x.shape
    if B * T * w.shape[1] <= LOGITS:
        return f"{B} x {T} tokens of {w.shape[1]} logits are few enough to hold"
    return None


def _chunks(V, *arrays):
    """Each array "B T ..." as (chunks, 1, C, ...), padded with zeros."""
    B, T = arrays[0].shape[:2]
    C = max(1, min(B * T, LOGITS // V))
    rows = [a.reshape(B * T, *a.shape[2:]) for a in arrays]
    rows = [jnp.pad(a, [(0, -len(a) % C)] + [(0, 0)] * (a.ndim - 1)) for a in rows]
    return tuple(a.reshape(-1, 1, C, *a.shape[1:]) for a in rows)


def forward(x, w, targets, *, softcap, smoothing, vocab):
    B, T, _ = x.shape
    one = lambda part: reference.forward(part[0], w, part[1], softcap=softcap, smoothing=smoothing, vocab=vocab)
    loss, lse = lax.map(one, _chunks(w.shape[1], x, targets))
    return tuple(a.reshape(-1)[: B * T].reshape(B, T) for a in (loss, lse))


def backward(x, w, targets, lse, dloss, dlse, *, softcap, smoothing, vocab):
    B, T, D = x.shape

    def one(dw, part):
        dx, more = reference.backward(part[0], w, *part[1:], softcap=softcap, smoothing=smoothing, vocab=vocab)
        return dw + more.astype(dw.dtype), dx

    start = jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))
    dw, dx = lax.scan(one, start, _chunks(w.shape[1], x, targets, lse, dloss, dlse))
    return dx.reshape(-1, D)[: B * T].reshape(B, T, D), dw.astype(w.dtype)
