"""Cross-entropy over whole logits, and its gradient:

dlogits = (dloss + dlse) p - dloss ((1 - smoothing) onehot + smoothing / V)
"""

import jax
import jax.numpy as jnp


def logits(x, w, softcap):
    """(logits in float32, the slope of the soft cap or None)."""
    kind = jnp.promote_types(x.dtype, jnp.float32)
    s = jnp.einsum("btd,dv->btv", x, w.astype(x.dtype), preferred_element_type=kind)
    if softcap is None:
        return s, None
    t = jnp.tanh(s / softcap)
    return softcap * t, 1 - t * t


def forward(x, w, targets, *, softcap, smoothing, vocab):
    s, _ = logits(x, w, softcap)
    lse = jax.nn.logsumexp(s, -1)
    here = (targets >= 0) & (targets < w.shape[1])
    right = jnp.where(here, jnp.take_along_axis(s, jnp.where(here, targets, 0)[..., None], -1)[..., 0], 0)
    loss = lse - right
    if smoothing:
        loss = lse - (1 - smoothing) * right - smoothing * s.sum(-1) / vocab
    return loss, lse


def backward(x, w, targets, lse, dloss, dlse, *, softcap, smoothing, vocab):
    """(dx, dw)."""
    s, slope = logits(x, w, softcap)
    ds = (dloss + dlse)[..., None] * jnp.exp(s - lse[..., None])
    right = jnp.arange(w.shape[1]) == targets[..., None]
    ds = ds - dloss[..., None] * ((1 - smoothing) * right + smoothing / vocab)
    ds = (ds if slope is None else ds * slope).astype(x.dtype)
    kind = s.dtype
    dx = jnp.einsum("btv,dv->btd", ds, w.astype(x.dtype), preferred_element_type=kind).astype(x.dtype)
    dw = jnp.einsum("btd,btv->dv", x, ds, preferred_element_type=kind).astype(w.dtype)
    return dx, dw
