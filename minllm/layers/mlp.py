"""The feed-forward layer, and the activations.

    MLP:  y = act(x W_up + b) W_down + b                     Vaswani et al. 2017, eq. 2
    GLU:  y = (act(x W_gate) * x W_up) W_down                Shazeer 2020, arXiv 2002.05202; SwiGLU is GLU(F, silu)
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out
from minllm.layers.dropout import dropout
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Spec
from minllm.weights import einsum

Activation = Callable[[Array], Array]

# Named functions, because lambdas and closures compare unequal and a layer must be hashable.
relu, silu, sigmoid, tanh, softplus, mish = jax.nn.relu, jax.nn.silu, jax.nn.sigmoid, jnp.tanh, jax.nn.softplus, jax.nn.mish


def identity(x: Array) -> Array:
    """Makes a bilinear layer of a GLU."""
    return x


def gelu(x: Array) -> Array:
    """x Phi(x), by the error function (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """The tanh form of GPT-2 and Gemma."""
    return jax.nn.gelu(x, approximate=True)


def gelu_quick(x: Array) -> Array:
    """x sigmoid(1.702 x), of CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def relu2(x: Array) -> Array:
    """max(0, x)^2 (Primer, So et al. 2021, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


@dataclass(frozen=True)
class Swish:
    """x sigmoid(beta x) (Ramachandran et al. 2017, arXiv 1710.05941); silu is beta = 1."""

    beta: float = 1.0

    def __call__(self, x: Array) -> Array:
        return x * jax.nn.sigmoid(self.beta * x)


@dataclass(frozen=True)
class XIELU:
    """a_p x^2 + x/2 where x > 0, a_n (e^x - 1 - x) + x/2 elsewhere (Huang & Schlag 2024, arXiv 2411.13010), with fixed coefficients."""

    positive: float = 0.8
    negative: float = 0.8

    def __call__(self, x: Array) -> Array:
        low = jnp.minimum(x, -1e-6)
        return jnp.where(x > 0, self.positive * x * x, self.negative * (jnp.expm1(low) - x)) + 0.5 * x


@dataclass(frozen=True)
class MLP(Layer):
    hidden: int
    act: Activation = gelu
    bias: bool = False
    dropout: float = 0.0
    out_init: Init = FanIn()

    def params(self, D):
        F = self.hidden
        p = {"up": Spec((D, F), "embed -> mlp", FanIn()), "down": Spec((F, D), "mlp -> embed", self.out_init)}
        if self.bias:
            p |= {"up_bias": Spec((F,), "mlp", role="bias"), "down_bias": Spec((D,), "_", role="bias")}
        return p

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        h = checkpoint_name(einsum("btd,df->btf", x, p["up"]), "mlp")
        h = self.act(h + p["up_bias"].astype(x.dtype) if self.bias else h)
        y = einsum("btf,fd->btd", constrain(h, "batch seq act_mlp", ctx.run), p["down"])
        return Out(dropout(y + p["down_bias"].astype(x.dtype) if self.bias else y, self.dropout, ctx))


@dataclass(frozen=True)
class GLU(Layer):
    """limit: clamps the gate from above and the other branch on both sides; shift: added to the other branch (gpt-oss: 7 and 1).
    bias: on all three matrices."""

    hidden: int
    act: Activation = silu
    bias: bool = False
    limit: float | None = None
    shift: float = 0.0
    dropout: float = 0.0
    out_init: Init = FanIn()

    def params(self, D):
        into = Spec((D, self.hidden), "embed -> mlp", FanIn())
        p = {"gate": into, "up": into, "down": Spec((self.hidden, D), "mlp -> embed", self.out_init)}
        if self.bias:
            b = Spec((self.hidden,), "mlp", role="bias")
            p |= {"gate_bias": b, "up_bias": b, "down_bias": Spec((D,), "_", role="bias")}
        return p

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        gate, up = checkpoint_name((einsum("btd,df->btf", x, p["gate"]), einsum("btd,df->btf", x, p["up"])), "mlp")
        if self.bias:
            gate, up = gate + p["gate_bias"].astype(x.dtype), up + p["up_bias"].astype(x.dtype)
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        h = constrain(self.act(gate) * (up + self.shift if self.shift else up), "batch seq act_mlp", ctx.run)
        y = einsum("btf,fd->btd", h, p["down"])
        return Out(dropout(y + p["down_bias"].astype(x.dtype) if self.bias else y, self.dropout, ctx))
