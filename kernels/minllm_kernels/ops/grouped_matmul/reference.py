"""One group after the other, each over all rows with the others masked:

    y = sum_e m_e x w_e      dx = sum_e m_e dy w_e^T      dw_e = (m_e x)^T dy
"""

import jax.numpy as jnp
from jax import lax


def _masks(sizes, M):
    """Whether each row is of each group: (E, M, 1)."""
    ends = jnp.cumsum(sizes)[:, None, None]
    row = jnp.arange(M)[None, :, None]
    return (row < ends) & (row >= ends - sizes[:, None, None])


def forward(x, w, sizes):
    kind = jnp.promote_types(x.dtype, jnp.float32)

    def one(y, group):
        mask, we = group
        return y + jnp.where(mask, jnp.matmul(x, we.astype(x.dtype), preferred_element_type=kind), 0), None

    y, _ = lax.scan(one, jnp.zeros((x.shape[0], w.shape[2]), kind), (_masks(sizes, len(x)), w))
    return y.astype(x.dtype)


def backward(x, w, sizes, dy):
    """(dx, dw)."""
    kind = jnp.promote_types(x.dtype, jnp.float32)
    dx = forward(dy, w.swapaxes(1, 2).astype(x.dtype), sizes)
    dw = lax.map(lambda mask: jnp.matmul(jnp.where(mask, x, 0).T, dy, preferred_element_type=kind), _masks(sizes, len(x)))
    return dx, dw.astype(w.dtype)
