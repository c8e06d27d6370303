"""State space layers whose step, input and output depend on the token.

    h_t = e^{d_t A} h_{t-1} + d_t x_t B_t^T        y_t = h_t C_t + D x_t

    Mamba    A (F, S): S decays a channel              Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and figure 3
    Mamba2   one decay a head: linear attention        Dao & Gu 2024, arXiv 2405.21060, section 7

x, B and C come from a short convolution and silu; d_t = softplus(.); the output is gated by silu(z).
"""

from dataclasses import dataclass
from math import log

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Out
from minllm.layers.carry import Recurrent, conv_cache, convolve, memory_cache, remember, resume, scan
from minllm.layers.norm import Norm, rms_norm
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Normal, Ones, Spec
from minllm.weights import einsum
from minllm_kernels import linear_attention


@dataclass(frozen=True)
class LogUniform:
    """The logarithm of a uniform number between low and high: decay rates of every size."""

    low: float
    high: float

    def __call__(self, key, spec, dtype):
        return jnp.log(jax.random.uniform(key, spec.shape, jnp.float32, self.low, self.high)).astype(dtype)


@dataclass(frozen=True)
class StepBias:
    """What softplus maps to steps between low and high, uniform in their logarithm (Gu & Dao 2023, section 3.6)."""

    low: float = 1e-3
    high: float = 0.1

    def __call__(self, key, spec, dtype):
        step = jnp.exp(jax.random.uniform(key, spec.shape, jnp.float32, log(self.low), log(self.high)))
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)


@dataclass(frozen=True)
class LogCount:
    """log(1), log(2) up to log(S) in every row: S4D's real decays (Gu et al. 2022, arXiv 2206.11893)."""

    def __call__(self, key, spec, dtype):
        return jnp.broadcast_to(jnp.log(jnp.arange(1, spec.shape[-1] + 1, dtype=jnp.float32)), spec.shape).astype(dtype)


@dataclass(frozen=True)
class Mamba(Recurrent):
    """inner: channels F; state: numbers of state S a channel; rank: of the step's map; conv: the width of the convolution.
    norm: of the step before its map grows wide, of input and output (Jamba, Lieber et al. 2024, arXiv 2403.19887, section 6.4)."""

    inner: int
    state: int = 16
    rank: int = 16
    conv: int = 4
    norm: Norm | None = None
    out_init: Init = FanIn()

    def params(self, D):
        F, S, R, W = self.inner, self.state, self.rank, self.conv
        into = Spec((D, F), "embed -> mlp", FanIn())
        thin = Spec((F, S), "mlp -> _", FanIn())
        norms = {"step": self.norm.params(R), "into": self.norm.params(S), "out": self.norm.params(S)} if self.norm else {}
        return {
            "x": into, "gate": into, "conv": Spec((W, F), "_ mlp", Normal(W**-0.5)), "conv_bias": Spec((F,), "mlp", role="bias"),
            "step": {"down": Spec((F, R), "mlp -> _", FanIn()), "up": Spec((R, F), "_ -> mlp", FanIn()),
                     "bias": Spec((F,), "mlp", StepBias(), role="bias")},
            "into": thin, "out": thin, "rate": Spec((F, S), "mlp _", LogCount(), role="bias"),
            "skip": Spec((F,), "mlp", Ones(), role="gain"), "down": Spec((F, D), "mlp -> embed", self.out_init),
            "norm": norms}  # fmt: skip

    def cache(self, D, B, S, dtype):
        state = Spec((B, self.inner, self.state), "batch act_mlp _", dtype=jnp.float32, role="buffer")
        return {"conv": conv_cache(B, self.conv, (self.inner,), "act_mlp", dtype), "state": state}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        before, kind = resume(cache, ctx), jnp.promote_types(x.dtype, jnp.float32)
        u, z = (constrain(einsum("btd,df->btf", x, p[w]), "batch seq act_mlp", ctx.run) for w in ("x", "gate"))
        u, conv = convolve(u, p["conv"], before and before["conv"], "act_mlp", ctx)
        u = jax.nn.silu(u + p["conv_bias"].astype(x.dtype))
        few = {"step": p["step"]["down"], "into": p["into"], "out": p["out"]}
        few = {name: einsum("btf,fs->bts", u, w) for name, w in few.items()}
        if self.norm:
            few = {name: self.norm.apply(p["norm"][name], y, ctx).x for name, y in few.items()}
        step = einsum("btr,rf->btf", few["step"], p["step"]["up"])
        step = jax.nn.softplus(step.astype(kind) + p["step"]["bias"])
        decay = -jnp.exp(p["rate"].astype(kind))
        y, state = scan(u, step, decay, few["into"], few["out"], before and before["state"], ctx)
        y = (y + u * p["skip"].astype(x.dtype)) * jax.nn.silu(z)
        return Out(einsum("btf,fd->btd", y, p["down"]), cache and {"conv": conv, "state": state})


@dataclass(frozen=True)
class Mamba2(Recurrent):
    """heads of head_dim channels with a state of head_dim x state each; heads / groups of them share B and C."""

    heads: int
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    conv: int = 4
    eps: float = 1e-5
    out_init: Init = FanIn()

    def __post_init__(self):
        if self.heads % self.groups:
            raise ValueError(f"Mamba2 has {self.heads} heads for {self.groups} groups; the first must be a multiple of the second")

    def params(self, D):
        N, h, G, S, W = self.heads, self.head_dim, self.groups, self.state, self.conv
        wide, few = Spec((D, N, h), "embed -> heads head", FanIn()), Spec((D, G, S), "embed -> kv_heads head", FanIn())
        taps = Normal(W**-0.5)
        return {
            "x": wide, "gate": wide, "into": few, "out": few, "conv": {
                "x": Spec((W, N, h), "_ heads head", taps), "x_bias": Spec((N, h), "heads head", role="bias"),
                **{w: Spec((W, G, S), "_ kv_heads head", taps) for w in ("into", "out")},
                **{f"{w}_bias": Spec((G, S), "kv_heads head", role="bias") for w in ("into", "out")}},
            "step": {"weight": Spec((D, N), "embed -> heads", FanIn()), "bias": Spec((N,), "heads", StepBias(), role="bias")},
            "rate": Spec((N,), "heads", LogUniform(1.0, 16.0), role="bias"), "skip": Spec((N,), "heads", Ones(), role="gain"),
            "scale": Spec((N, h), "heads head", Ones(), role="gain"),
            "o": Spec((N, h, D), "heads head -> embed", self.out_init)}  # fmt: skip

    def cache(self, D, B, S, dtype):
        few = conv_cache(B, self.conv, (self.groups, self.state), "act_kv_heads _", dtype)
        return {"x": conv_cache(B, self.conv, (self.heads, self.head_dim), "act_heads _", dtype), "into": few, "out": few,
                "state": memory_cache(B, self.heads, self.state, self.head_dim)}  # fmt: skip

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        (B, T, _), kind = x.shape, jnp.promote_types(x.dtype, jnp.float32)
        before, after, parts = resume(cache, ctx), {}, []
        for w, axes in (("x", "act_heads _"), ("into", "act_kv_heads _"), ("out", "act_kv_heads _")):
            y = constrain(einsum("btd,dnh->btnh", x, p[w]), f"batch seq {axes}", ctx.run)
            y, after[w] = convolve(y, p["conv"][w], before and before[w], axes, ctx)
            parts.append(jax.nn.silu(y + p["conv"][f"{w}_bias"].astype(x.dtype)))
        u, into, out = parts
        step = jax.nn.softplus(einsum("btd,dn->btn", x, p["step"]["weight"]).astype(kind) + p["step"]["bias"])
        log_decay = -jnp.exp(p["rate"].astype(kind)) * step
        v = (u * step[..., None]).astype(x.dtype)
        y, after["state"] = remember(linear_attention, out, into, v, log_decay, state=before and before["state"], ctx=ctx)
        y = y + u * p["skip"].astype(x.dtype)[:, None]
        y = y * jax.nn.silu(einsum("btd,dnh->btnh", x, p["gate"]))
        groups = y.reshape(B, T, self.groups, -1)  # one norm a group of heads
        y = rms_norm(groups, p["scale"].reshape(self.groups, -1), self.eps).reshape(y.shape)
        return Out(einsum("btnh,nhd->btd", y, p["o"]), cache and after)
