"""Normalisation of the residual stream, statistics in float32.

    RMSNorm:    y = x / sqrt(mean(x^2) + eps) * g            Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4
    LayerNorm:  y = (x - mean) / sqrt(var + eps) * g + b     Ba et al. 2016, arXiv 1607.06450, eq. 3
    GroupNorm:  LayerNorm's y in each of G groups of dims    Wu & He 2018, arXiv 1803.08494, eq. 7, of each token by itself

With `unit_offset` the stored gain is g - 1 and starts at zero (Gemma), so that weight decay pulls it to one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out
from minllm.spec import Ones, Spec, Zeros


def rms_norm(x: Float[Array, "*dims D"], gain: Float[Array, "*_ D"] | None = None, eps: float = 1e-5) -> Float[Array, "*dims D"]:
    """x over its root mean square, times gain. The norm is rounded to x's dtype before the gain, in the order of the Llama release."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = (h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + eps)).astype(x.dtype)
    return y if gain is None else y * gain.astype(x.dtype)


@dataclass(frozen=True)
class RMSNorm(Layer):
    eps: float = 1e-5
    unit_offset: bool = False

    def params(self, D):
        return {"scale": Spec((D,), "_", Zeros() if self.unit_offset else Ones(), role="gain")}

    def apply(self, p, x: Float[Array, "*dims D"], ctx: Context, cache=None) -> Out:
        if not self.unit_offset:
            return Out(rms_norm(x, p["scale"], self.eps))
        # 1 + g is formed in float32, as Gemma does: in bfloat16 it would lose the small gains
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return Out((rms_norm(h, eps=self.eps) * (1 + p["scale"].astype(h.dtype))).astype(x.dtype))


@dataclass(frozen=True)
class LayerNorm(Layer):
    eps: float = 1e-5
    bias: bool = True
    unit_offset: bool = False

    def params(self, D):
        gain = {"scale": Spec((D,), "_", Zeros() if self.unit_offset else Ones(), role="gain")}
        return gain | ({"bias": Spec((D,), "_", role="bias")} if self.bias else {})

    def apply(self, p, x: Float[Array, "*dims D"], ctx: Context, cache=None) -> Out:
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + self.eps)
        y = h * (p["scale"].astype(h.dtype) + self.unit_offset)
        return Out((y + p["bias"] if self.bias else y).astype(x.dtype))


@dataclass(frozen=True)
class GroupNorm(Layer):
    """Mean and variance of each token and group of D / groups neighbouring dims: over a sequence they would look ahead."""

    groups: int
    eps: float = 1e-5

    def params(self, D):
        if D % self.groups:
            raise ValueError(f"a width of {D} does not divide into {self.groups} groups; choose a number that divides it")
        return LayerNorm(self.eps).params(D)

    def apply(self, p, x: Float[Array, "*dims D"], ctx: Context, cache=None) -> Out:
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], self.groups, -1)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + self.eps)
        return Out((h.reshape(x.shape) * p["scale"].astype(h.dtype) + p["bias"]).astype(x.dtype))


Norm = RMSNorm | LayerNorm | GroupNorm
