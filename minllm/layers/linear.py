"""Attention without softmax: a matrix memory a head that each token adds to, at a cost that is linear in the sequence.

    LinearAttention       y_t = phi(q_t)^T sum_s phi(k_s) v_s^T / phi(q_t)^T sum_s phi(k_s)    arXiv 2006.16236, eq. 4
    Retention             S_t = c_n S_{t-1} + k_t v_t^T, c_n = 1 - 2^{-5-n}                    RetNet, arXiv 2307.08621, eq. 8
    Lightning             the same with ALiBi's slopes, q, k and v through silu                MiniMax-01, arXiv 2501.08313, section 2.2
    GatedLinearAttention  S_t = diag(a_t) S_{t-1} + k_t v_t^T, a_t learned from x_t            arXiv 2312.06635, section 4

All of them read y_t = S_t^T q_t. The memory is `minllm_kernels.linear_attention`: in chunks for training and prefill, a recurrence for
decoding.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minllm.layer import Context, Out
from minllm.layers.carry import Recurrent, memory_cache, remember, resume
from minllm.layers.feature import Elu, Feature
from minllm.layers.norm import rms_norm
from minllm.layers.position import Rope
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Ones, Spec
from minllm.weights import einsum
from minllm_kernels import linear_attention

HEADS = "batch seq act_heads _"


@dataclass(frozen=True)
class LinearAttention(Recurrent):
    heads: int
    head_dim: int
    feature: Feature = Elu()
    eps: float = 1e-6
    out_init: Init = FanIn()

    def params(self, D):
        N, H = self.heads, self.head_dim
        into = Spec((D, N, H), "embed -> heads head", FanIn())
        return {"q": into, "k": into, "v": into, "feature": self.feature.params(N, H),
                "o": Spec((N, H, D), "heads head -> embed", self.out_init)}  # fmt: skip

    def cache(self, D, B, S, dtype):
        return {"state": memory_cache(B, self.heads, self.feature.size(self.head_dim), self.head_dim + 1)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        q, k, v = (constrain(einsum("btd,dnh->btnh", x, p[w]), HEADS, ctx.run) for w in ("q", "k", "v"))
        q, k = self.feature.apply(p["feature"], q, k)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)  # a value of one is answered with the sum of the weights
        before = resume(cache, ctx)
        y, state = remember(linear_attention, q, k, v, state=before and before["state"], ctx=ctx)
        y = y[..., :-1] / (y[..., -1:] + self.eps)
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache and {"state": state})


@dataclass(frozen=True)
class Retention(Recurrent):
    """position: the rotation of RetNet's eq. 5. value_dim: of a head, twice head_dim in the paper."""

    heads: int
    head_dim: int
    value_dim: int
    position: Rope | None = Rope(pairs="neighbours")
    eps: float = 1e-6
    out_init: Init = FanIn()

    def params(self, D):
        N, H, h = self.heads, self.head_dim, self.value_dim
        into, wide = Spec((D, N, H), "embed -> heads head", FanIn()), Spec((D, N, h), "embed -> heads head", FanIn())
        return {"q": into, "k": into, "v": wide, "gate": wide, "o": Spec((N, h, D), "heads head -> embed", self.out_init)}

    def cache(self, D, B, S, dtype):
        return {"state": memory_cache(B, self.heads, self.head_dim, self.value_dim)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        q, k, v, gate = (constrain(einsum("btd,dnh->btnh", x, p[w]), HEADS, ctx.run) for w in ("q", "k", "v", "gate"))
        if self.position:
            q, k = self.position.apply(q, ctx.positions), self.position.apply(k, ctx.positions)
        log_decay = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(self.heads)))), jnp.float32)
        log_decay = jnp.broadcast_to(log_decay, (*x.shape[:2], self.heads))
        before = resume(cache, ctx)
        y, state = remember(linear_attention, q * self.head_dim**-0.5, k, v, log_decay, state=before and before["state"], ctx=ctx)
        y = rms_norm(y, eps=self.eps) * jax.nn.silu(gate)
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache and {"state": state})


@dataclass(frozen=True)
class Lightning(Recurrent):
    """fade: multiplies the slopes; MiniMax-01 lets it fall from 1 in the first layer to 0 in the last."""

    heads: int
    head_dim: int
    fade: float = 1.0
    eps: float = 1e-6
    out_init: Init = FanIn()

    def params(self, D):
        N, H = self.heads, self.head_dim
        into = Spec((D, N, H), "embed -> heads head", FanIn())
        return {"q": into, "k": into, "v": into, "gate": into, "scale": Spec((N, H), "heads head", Ones(), role="gain"),
                "o": Spec((N, H, D), "heads head -> embed", self.out_init)}  # fmt: skip

    def cache(self, D, B, S, dtype):
        return {"state": memory_cache(B, self.heads, self.head_dim, self.head_dim)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        q, k, v = (jax.nn.silu(constrain(einsum("btd,dnh->btnh", x, p[w]), HEADS, ctx.run)) for w in ("q", "k", "v"))
        log_decay = jnp.asarray(-self.fade * 2.0 ** (-8 * np.arange(1, self.heads + 1) / self.heads), jnp.float32)
        log_decay = jnp.broadcast_to(log_decay, (*x.shape[:2], self.heads))
        before = resume(cache, ctx)
        y, state = remember(linear_attention, q, k, v, log_decay, state=before and before["state"], ctx=ctx)
        y = rms_norm(y.reshape(*x.shape[:2], -1), p["scale"].reshape(-1), self.eps).reshape(y.shape)  # of all heads together
        y = y * jax.nn.sigmoid(einsum("btd,dnh->btnh", x, p["gate"]))
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache and {"state": state})


@dataclass(frozen=True)
class GatedLinearAttention(Recurrent):
    """per_channel: one decay a channel of k, through a low rank; or one a head ("simple GLA").

    slowness: a = sigmoid(.)^(1/slowness), so larger forgets more slowly (paper: 16).
    """

    heads: int
    head_dim: int
    value_dim: int
    per_channel: bool = True
    decay_rank: int = 16
    slowness: float = 16.0
    eps: float = 1e-5
    out_init: Init = FanIn()

    def params(self, D):
        N, H, h, R = self.heads, self.head_dim, self.value_dim, self.decay_rank
        into, wide = Spec((D, N, H), "embed -> heads head", FanIn()), Spec((D, N, h), "embed -> heads head", FanIn())
        p = {"q": into, "k": into, "v": wide, "gate": wide, "scale": Spec((h,), "_", Ones(), role="gain"),
             "o": Spec((N, h, D), "heads head -> embed", self.out_init)}  # fmt: skip
        if self.per_channel:
            return p | {"decay": {"down": Spec((D, R), "embed -> _", FanIn()), "up": Spec((R, N, H), "_ -> heads head", FanIn()),
                                  "bias": Spec((N, H), "heads head", role="bias")}}  # fmt: skip
        return p | {"decay": {"weight": Spec((D, N), "embed -> heads", FanIn()), "bias": Spec((N,), "heads", role="bias")}}

    def cache(self, D, B, S, dtype):
        return {"state": memory_cache(B, self.heads, self.head_dim, self.value_dim)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        q, k, v, gate = (constrain(einsum("btd,dnh->btnh", x, p[w]), HEADS, ctx.run) for w in ("q", "k", "v", "gate"))
        if self.per_channel:
            a = einsum("btr,rnh->btnh", einsum("btd,dr->btr", x, p["decay"]["down"]), p["decay"]["up"])
        else:
            a = einsum("btd,dn->btn", x, p["decay"]["weight"])
        a = a.astype(jnp.promote_types(x.dtype, jnp.float32)) + p["decay"]["bias"]
        log_decay = jax.nn.log_sigmoid(a) / self.slowness  # in log space: products underflow
        before = resume(cache, ctx)
        y, state = remember(linear_attention, q * self.head_dim**-0.5, k, v, log_decay, state=before and before["state"], ctx=ctx)
        y = rms_norm(y, p["scale"], self.eps) * jax.nn.silu(gate)
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache and {"state": state})
