"""Attention whose scores depend on the distance i - j of query and key by more than a bias.

    Shaw            s_ij = q_i . (k_j + a_c) / sqrt(H)    y_i = sum_j p_ij (v_j + b_c)    c = clip(j - i, -reach, reach)
                    Shaw et al. 2018, arXiv 1803.02155, equations 3 to 5
    Transformer-XL  s_ij = ((q_i + u) . k_j + (q_i + v) . W_r r(i - j)) / sqrt(H)         r(d)_w = (sin(d w), cos(d w))
                    Dai et al. 2019, arXiv 1901.02860, section 3.3

The second needs no table of distances: sin((i-j)w) = sin(iw) cos(jw) - cos(iw) sin(jw) makes its second term a product of something of
the query alone with something of the key's position alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out
from minllm.layers.kv import extend, kv_cache
from minllm.parallel.ring import attend
from minllm.sharding import constrain
from minllm.spec import FanIn, Normal, Spec
from minllm.weights import einsum
from minllm_kernels.mask import Causal, Mask


@dataclass(frozen=True)
class _Relative(Layer):
    heads: int
    head_dim: int
    mask: Mask = Causal()

    def params(self, D):
        into = Spec((D, self.heads, self.head_dim), "embed -> heads head", FanIn())
        return {"q": into, "k": into, "v": into, "o": Spec((self.heads, self.head_dim, D), "heads head -> embed", FanIn())}

    def cache(self, D, B, S, dtype):
        return kv_cache(B, S, self.heads, self.head_dim, dtype)

    def _heads(self, p, x, ctx, cache):
        """(q, k, v, the keys' positions, the new cache)."""
        if cache is not None and ctx.segments is not None:
            raise ValueError("a packed row cannot be decoded: give each document its own row, and positions of -1 to its padding")
        q, k, v = (constrain(einsum("btd,dnh->btnh", x, p[w]), "batch seq act_heads _", ctx.run) for w in ("q", "k", "v"))
        return q, *extend(cache, k, v, ctx.positions, None)


@dataclass(frozen=True)
class ShawAttention(_Relative):
    """reach: distances beyond it count as it. Holds a [T, S] array: the values depend on the distance."""

    reach: int = 16

    def params(self, D):
        table = Spec((2 * self.reach + 1, self.head_dim), "_ head", Normal(self.head_dim**-0.5), role="embedding")
        return super().params(D) | {"key_distance": table, "value_distance": table}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        q, k, v, kv_pos, cache = self._heads(p, x, ctx, cache)
        i, j = ctx.positions[:, :, None], kv_pos[:, None, :]
        c = jnp.clip(j - i, -self.reach, self.reach) + self.reach
        near = c[:, :, :, None] == jnp.arange(2 * self.reach + 1)  # "B T S C": sums by distance are products with it
        far = jnp.einsum("btnh,ch->btnc", q, p["key_distance"].astype(q.dtype))
        s = jnp.einsum("btnh,bsnh->bnts", q, k) + jnp.einsum("btnc,btsc->bnts", far, near.astype(q.dtype))
        see = self.mask.allows(i, j) & (j >= 0)
        if ctx.segments is not None:
            see &= ctx.segments[:, :, None] == ctx.segments[:, None, :]
        s = jnp.where(see[:, None], s.astype(jnp.promote_types(s.dtype, jnp.float32)) * self.head_dim**-0.5, -jnp.inf)
        # a query that sees nothing (padding) gives zeros
        weight = jnp.where(see.any(-1)[:, None, :, None], jax.nn.softmax(jnp.where(see.any(-1)[:, None, :, None], s, 0), -1), 0)
        weight = weight.astype(v.dtype)
        by_distance = jnp.einsum("bnts,btsc->btnc", weight, near.astype(v.dtype))
        y = jnp.einsum("bnts,bsnh->btnh", weight, v) + jnp.einsum("btnc,ch->btnh", by_distance, p["value_distance"].astype(v.dtype))
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache)


@dataclass(frozen=True)
class XLAttention(_Relative):
    """base: of the wavelengths, as of sinusoidal positions."""

    base: float = 10_000.0

    def params(self, D):
        if D % 2:
            raise ValueError(f"the distances of XLAttention have a sine and a cosine of each wavelength: the width must be even, not {D}")
        bias = Spec((self.heads, self.head_dim), "heads head", role="bias")
        return super().params(D) | {"r": Spec((D, self.heads, self.head_dim), "embed -> heads head", FanIn()), "u": bias, "v_bias": bias}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        q, k, v, kv_pos, cache = self._heads(p, x, ctx, cache)
        D, kind = x.shape[-1], jnp.promote_types(x.dtype, jnp.float32)
        w = jnp.asarray(self.base ** -(np.arange(0, D, 2) / D), kind)
        i, j = (jnp.maximum(pos, 0)[..., None].astype(kind) * w for pos in (ctx.positions, kv_pos))
        both = einsum("btnh,dnh->btnd", (q + p["v_bias"].astype(q.dtype)).astype(kind), p["r"])
        sin, cos = both[..., : D // 2], both[..., D // 2 :]  # what multiplies sin((i - j) w) and cos((i - j) w)
        sin_i, cos_i = jnp.sin(i)[:, :, None], jnp.cos(i)[:, :, None]
        turned = jnp.concatenate([sin * sin_i + cos * cos_i, cos * sin_i - sin * cos_i], -1)
        bias = jnp.einsum("btnf,bsf->bnts", turned, jnp.concatenate([jnp.cos(j), jnp.sin(j)], -1)) * self.head_dim**-0.5
        y = attend(q + p["u"].astype(q.dtype), k, v, mask=self.mask, q_pos=ctx.positions, kv_pos=kv_pos, q_seg=ctx.segments,
                   kv_seg=ctx.segments, bias=bias, run=ctx.run)  # fmt: skip
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache)
