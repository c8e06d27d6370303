"""The delta rule: a memory that is corrected, not only added to.

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T        y_t = S_t^T q_t / sqrt(H)

    DeltaNet             a = 1                           Yang et al. 2024, arXiv 2406.06484, section 3
    GatedDeltaNet        one a_t a head                  Yang et al. 2024, arXiv 2412.06464, eq. 10; Qwen3-Next
    KimiDeltaAttention   one a_t a channel of k          Kimi Linear, arXiv 2510.26692, section 3

q, k and v pass a short convolution and silu, q and k are made to length 1; b_t = sigmoid(w x_t). The memory is `minllm_kernels.delta_rule`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Out
from minllm.layers.carry import Recurrent, conv_cache, convolve, memory_cache, remember, resume
from minllm.layers.norm import rms_norm
from minllm.layers.ssm import LogUniform, StepBias
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Normal, Ones, Spec
from minllm.weights import einsum
from minllm_kernels import delta_rule


def unit(x: Float[Array, "*dims H"], eps: float = 1e-6) -> Float[Array, "*dims H"]:
    """x / |x|, in float32; the epsilon stands inside the root, so that the gradient at zero is finite."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) + eps)).astype(x.dtype)


@dataclass(frozen=True)
class DeltaNet(Recurrent):
    """kv_heads: of queries and keys; heads / kv_heads value heads share one (Qwen3-Next: 2). value_dim: of a head; None: head_dim.

    negative: b_t = 2 sigmoid(.), so that the memory's eigenvalues reach down to -1 (Grazzi et al. 2024, arXiv 2411.12537).
    conv: the width of the short convolution.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    negative: bool = False
    conv: int = 4
    eps: float = 1e-6
    out_init: Init = FanIn()

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{type(self).__name__} has {self.heads} value heads for {self.kv_heads} kv_heads; "
                             "the first must be a multiple of the second")  # fmt: skip

    def params(self, D):
        N, K, H, W = self.heads, self.kv_heads, self.head_dim, self.conv
        h, taps = self.value_dim or H, Normal(W**-0.5)
        few = Spec((D, K, H), "embed -> kv_heads head", FanIn())
        return {"q": few, "k": few, "v": Spec((D, N, h), "embed -> heads head", FanIn()), "beta": Spec((D, N), "embed -> heads", FanIn()),
                "q_conv": Spec((W, K, H), "_ kv_heads head", taps), "k_conv": Spec((W, K, H), "_ kv_heads head", taps),
                "v_conv": Spec((W, N, h), "_ heads head", taps), "scale": Spec((h,), "_", Ones(), role="gain"),
                "o": Spec((N, h, D), "heads head -> embed", self.out_init)}  # fmt: skip

    def cache(self, D, B, S, dtype):
        N, K, H, h = self.heads, self.kv_heads, self.head_dim, self.value_dim or self.head_dim
        few = conv_cache(B, self.conv, (K, H), "act_kv_heads _", dtype)
        return {"q": few, "k": few, "v": conv_cache(B, self.conv, (N, h), "act_heads _", dtype), "state": memory_cache(B, N, H, h)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        before, after, qkv = resume(cache, ctx), {}, []
        for w, axes in (("q", "act_kv_heads _"), ("k", "act_kv_heads _"), ("v", "act_heads _")):
            y = constrain(einsum("btd,dnh->btnh", x, p[w]), f"batch seq {axes}", ctx.run)
            y, after[w] = convolve(y, p[f"{w}_conv"], before and before[w], axes, ctx)
            qkv.append(jax.nn.silu(y))
        q, k, v = qkv
        beta = jax.nn.sigmoid(einsum("btd,dn->btn", x, p["beta"]).astype(jnp.promote_types(x.dtype, jnp.float32)))
        gates = (2 * beta if self.negative else beta, *self.decay(p, x))
        q, k = unit(q) * self.head_dim**-0.5, unit(k)
        y, after["state"] = remember(delta_rule, q, k, v, *gates, state=before and before["state"], ctx=ctx)
        return Out(einsum("btnh,nhd->btd", self.output(p, x, y), p["o"]), cache and after)

    def decay(self, p, x) -> tuple[Array, ...]:
        """The log decays; none here."""
        return ()

    def output(self, p, x, y):
        return rms_norm(y, p["scale"], self.eps)


@dataclass(frozen=True)
class GatedDeltaNet(DeltaNet):
    """log a_t = -e^rate softplus(w x_t + bias); the output is gated by silu."""

    def params(self, D):
        N, h = self.heads, self.value_dim or self.head_dim
        return super().params(D) | {
            "decay": {"weight": Spec((D, N), "embed -> heads", FanIn()), "bias": Spec((N,), "heads", StepBias(), role="bias"),
                      "rate": Spec((N,), "heads", LogUniform(1.0, 16.0), role="bias")},
            "gate": Spec((D, N, h), "embed -> heads head", FanIn())}  # fmt: skip

    def decay(self, p, x):
        d, kind = p["decay"], jnp.promote_types(x.dtype, jnp.float32)
        step = jax.nn.softplus(einsum("btd,dn->btn", x, d["weight"]).astype(kind) + d["bias"])
        return (-jnp.exp(d["rate"].astype(kind)) * step,)

    def output(self, p, x, y):
        return super().output(p, x, y) * jax.nn.silu(einsum("btd,dnh->btnh", x, p["gate"]))


@dataclass(frozen=True)
class KimiDeltaAttention(DeltaNet):
    """log a_t = -e^rate softplus(.) or, with a floor below zero, floor * sigmoid(e^rate (.)), where (.) = W_up W_down x_t + bias.

    The bounded form never forgets a channel at once; the paper's code uses -5. The output is gated by a sigmoid of low rank.
    """

    floor: float | None = None
    rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.floor is not None and not self.floor < 0:
            raise ValueError(f"the floor of the log decay is {self.floor}; it must lie below zero, or be None for no floor")

    def params(self, D):
        N, H, h = self.heads, self.head_dim, self.value_dim or self.head_dim
        R = self.rank or H
        down = Spec((D, R), "embed -> _", FanIn())
        return super().params(D) | {
            "decay": {"down": down, "up": Spec((R, N, H), "_ -> heads head", FanIn()),
                      "bias": Spec((N, H), "heads head", StepBias(), role="bias"),
                      "rate": Spec((N,), "heads", LogUniform(1.0, 16.0), role="bias")},
            "gate": {"down": down, "up": Spec((R, N, h), "_ -> heads head", FanIn())}}  # fmt: skip

    def decay(self, p, x):
        d, kind = p["decay"], jnp.promote_types(x.dtype, jnp.float32)
        a = einsum("btr,rnh->btnh", einsum("btd,dr->btr", x, d["down"]), d["up"]).astype(kind) + d["bias"]
        rate = jnp.exp(d["rate"].astype(kind))[:, None]
        return (-rate * jax.nn.softplus(a) if self.floor is None else self.floor * jax.nn.sigmoid(rate * a),)

    def output(self, p, x, y):
        gate = einsum("btr,rnh->btnh", einsum("btd,dr->btr", x, p["gate"]["down"]), p["gate"]["up"])
        return super().output(p, x, y) * jax.nn.sigmoid(gate)
