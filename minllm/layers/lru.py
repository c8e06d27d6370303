"""Linear recurrent units: one number of state a channel, which forgets by a gate that sees the input alone.

    RGLRU    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t      a_t = e^{-8 softplus(rate) r_t}, r and i sigmoids of u_t
             y_t = (h_t * gelu(x_t W_gate)) W_o               u is x through a matrix and a short convolution
    MinGRU   h_t = (1 - z_t) h_{t-1} + z_t x_t W_x            z_t = sigmoid(x_t W_z + b_z)
    MinLSTM  h_t = (f h_{t-1} + i x_t W_x) / (f + i)          f, i sigmoids of x_t;  both: y_t = h_t W_o

De et al. 2024 (Griffin), arXiv 2402.19427, section 2.4 and figure 2; Feng et al. 2024, arXiv 2410.01201, sections 3.1 and 3.2. The
recurrence is `minllm_kernels.selective_scan` with a state of one number: a step of -log a_t, and inputs divided by it. RGLRU does not scale
the first token of a document by the root: there is nothing before it to make room for.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Out
from minllm.layers.carry import Recurrent, conv_cache, convolve, resume, scan
from minllm.layers.mlp import gelu_tanh
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Normal, Spec
from minllm.weights import einsum

AXES = "batch seq act_mlp"
SMALLEST = 1e-30  # of a step, so that one can divide by it


@dataclass(frozen=True)
class Memory:
    """softplus^-1 of -log(a) / 8 with a^2 uniform between low and high: what a channel keeps at an open gate (Griffin, section 2.4)."""

    low: float = 0.81
    high: float = 0.998

    def __call__(self, key, spec, dtype):
        rate = -jnp.log(jax.random.uniform(key, spec.shape, jnp.float32, self.low, self.high)) / 16
        return jnp.log(jnp.expm1(rate)).astype(dtype)


@dataclass(frozen=True)
class RGLRU(Recurrent):
    """inner: channels F; heads: blocks of neighbouring channels that the gates see; conv: the width of the convolution."""

    inner: int
    heads: int
    conv: int = 4
    out_init: Init = FanIn()

    def __post_init__(self):
        if self.inner % self.heads:
            raise ValueError(f"RGLRU has {self.inner} channels for {self.heads} heads; the first must be a multiple of the second")

    def params(self, D):
        F, N, W = self.inner, self.heads, self.conv
        H = F // N
        into, bias = Spec((D, F), "embed -> mlp", FanIn()), Spec((F,), "mlp", role="bias")
        gate = {"weight": Spec((N, H, H), "heads _ _", Normal(H**-0.5)), "bias": Spec((N, H), "heads _", role="bias")}
        return {"x": into, "x_bias": bias, "gate": into, "gate_bias": bias, "conv": Spec((W, F), "_ mlp", Normal(W**-0.5)),
                "conv_bias": bias, "input": gate, "forget": gate, "rate": Spec((F,), "mlp", Memory(), role="bias"),
                "down": Spec((F, D), "mlp -> embed", self.out_init), "down_bias": Spec((D,), "_", role="bias")}  # fmt: skip

    def cache(self, D, B, S, dtype):
        state = Spec((B, self.inner, 1), "batch act_mlp _", dtype=jnp.float32, role="buffer")
        return {"conv": conv_cache(B, self.conv, (self.inner,), "act_mlp", dtype), "state": state}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        (B, T, _), kind, F = x.shape, jnp.promote_types(x.dtype, jnp.float32), self.inner
        before = resume(cache, ctx)
        u, z = (constrain(einsum("btd,df->btf", x, p[w]) + p[f"{w}_bias"].astype(x.dtype), AXES, ctx.run) for w in ("x", "gate"))
        u, conv = convolve(u, p["conv"], before and before["conv"], "act_mlp", ctx)
        u = u + p["conv_bias"].astype(x.dtype)
        blocks, gates = u.reshape(B, T, self.heads, -1), {}
        for w in ("input", "forget"):
            y = einsum("btnh,nhg->btng", blocks, p[w]["weight"]).astype(kind) + p[w]["bias"]
            gates[w] = constrain(jax.nn.sigmoid(y).reshape(B, T, F), AXES, ctx.run)
        step = jnp.maximum(8 * jax.nn.softplus(p["rate"].astype(kind)) * gates["forget"], SMALLEST)
        room = jnp.where((ctx.positions == 0)[..., None], 1, jnp.sqrt(-jnp.expm1(-2 * step)))
        u = (u * gates["input"] * room / step).astype(x.dtype)
        y, state = _recur(u, step, before, ctx)
        y = einsum("btf,fd->btd", y * gelu_tanh(z), p["down"]) + p["down_bias"].astype(x.dtype)
        return Out(y, cache and {"conv": conv, "state": state})


def _recur(x, step, before, ctx):
    """(h, its last value) of h_t = e^{-step_t} h_{t-1} + step_t x_t."""
    one = jnp.ones((*x.shape[:2], 1), x.dtype)
    return scan(x, step, -jnp.ones((x.shape[-1], 1), step.dtype), one, one, before and before["state"], ctx)


@dataclass(frozen=True)
class MinGRU(Recurrent):
    """inner: channels F."""

    inner: int
    out_init: Init = FanIn()

    def params(self, D):
        F = self.inner
        into, bias = Spec((D, F), "embed -> mlp", FanIn()), Spec((F,), "mlp", role="bias")
        return {"x": into, "forget": into, "forget_bias": bias, "down": Spec((F, D), "mlp -> embed", self.out_init)}

    def cache(self, D, B, S, dtype):
        return {"state": Spec((B, self.inner, 1), "batch act_mlp _", dtype=jnp.float32, role="buffer")}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        u = constrain(einsum("btd,df->btf", x, p["x"]), AXES, ctx.run)
        step = jnp.maximum(self.step(p, x), SMALLEST)
        y, state = _recur((u * -jnp.expm1(-step) / step).astype(x.dtype), step, resume(cache, ctx), ctx)
        return Out(einsum("btf,fd->btd", y, p["down"]), cache and {"state": state})

    def step(self, p, x) -> Float[Array, "B T F"]:
        """-log(1 - z)."""
        return jax.nn.softplus(self.gate(p, x, "forget"))

    def gate(self, p, x, name):
        return einsum("btd,df->btf", x, p[name]).astype(jnp.promote_types(x.dtype, jnp.float32)) + p[f"{name}_bias"]


@dataclass(frozen=True)
class MinLSTM(MinGRU):
    def params(self, D):
        p = super().params(D)
        return p | {"input": p["forget"], "input_bias": p["forget_bias"]}

    def step(self, p, x):
        """-log(f / (f + i))."""
        log = jax.nn.log_sigmoid
        return jax.nn.softplus(log(self.gate(p, x, "input")) - log(self.gate(p, x, "forget")))
