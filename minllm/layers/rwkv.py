"""RWKV-4: attention whose weights are a key and a distance, as a recurrence; and a feed-forward layer that sees the token before.

    x'_w = m_w x_t + (1 - m_w) x_{t-1}                                         token shift, for each w of k, v, r
    S_t = e^{-w} S_{t-1} + e^{k_t} (v_t, 1)      (a, b) = S_{t-1} + e^{u + k_t} (v_t, 1)      y_t = (sigmoid(r_t) * a / b) W_o
    feed-forward: y_t = sigmoid(x'_r W_r) * relu(x'_k W_k)^2 W_v

Peng et al. 2023, arXiv 2305.13048, section 3.1 and appendix D. The sums are kept as (m, S e^{-m}) with m the largest exponent, so that no
e^k overflows; that pair composes, so a whole row is one associative scan (the tokens of a row are brought together for it).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Out
from minllm.layers.carry import Recurrent, conv_cache, convolve, resume
from minllm.sharding import constrain
from minllm.spec import Constant, FanIn, Init, Spec, TruncatedNormal
from minllm.weights import einsum

NOTHING = -1e30  # an exponent that no other is below; finite, so that two of them have a difference
WHOLE = "batch _ act_mlp"


def shifted(x: Float[Array, "B T D"], before, ctx: Context) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """(each token's predecessor in its document, zero for the first; the last token)."""
    taps = jnp.stack([jnp.ones(x.shape[-1], x.dtype), jnp.zeros(x.shape[-1], x.dtype)])
    return convolve(x, taps, before and before["last"], "act_embed", ctx)


def mixed(x, past, share):
    share = share.astype(x.dtype)
    return x * share + past * (1 - share)


@dataclass(frozen=True)
class TimeMix(Recurrent):
    """inner: channels F."""

    inner: int
    out_init: Init = FanIn()

    def params(self, D):
        F = self.inner
        into, share = Spec((D, F), "embed -> mlp", FanIn()), Spec((D,), "_", Constant(0.5), role="bias")
        return {"k": into, "v": into, "r": into, "mix": {"k": share, "v": share, "r": share},
                "decay": Spec((F,), "mlp", TruncatedNormal(1.0), role="bias"), "first": Spec((F,), "mlp", role="bias"),
                "o": Spec((F, D), "mlp -> embed", self.out_init)}  # fmt: skip

    def cache(self, D, B, S, dtype):
        one = Spec((B, self.inner), "batch act_mlp", dtype=jnp.float32, role="buffer")
        return {"last": conv_cache(B, 2, (D,), "act_embed", dtype), "top": one, "sum": one, "weight": one}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        kind, before = jnp.promote_types(x.dtype, jnp.float32), resume(cache, ctx)
        past, last = shifted(x, before, ctx)
        k, v, r = (einsum("btd,df->btf", mixed(x, past, p["mix"][w]), p[w]) for w in "kvr")
        k, v = (constrain(y.astype(kind), WHOLE, ctx.run) for y in (k, v))
        there, first = ((flag[..., None]) for flag in (ctx.positions >= 0, ctx.positions == 0))
        fade = jnp.where(first, NOTHING, jnp.where(there, -jnp.exp(p["decay"].astype(kind)), 0))
        tokens = fade, jnp.where(there, k, NOTHING), jnp.where(there, v, 0), jnp.broadcast_to(there, k.shape).astype(kind)
        if before is None:
            start = [jnp.full_like(k[:, :1], NOTHING), *[jnp.zeros_like(k[:, :1])] * 2]
        else:
            start = [before[name][:, None].astype(kind) for name in ("top", "sum", "weight")]
        row = [jnp.concatenate([a, b], 1) for a, b in zip([jnp.zeros_like(k[:, :1]), *start], tokens)]
        _, *sums = jax.lax.associative_scan(_then, tuple(row), axis=1)
        top, a, b = (s[:, :-1] for s in sums)

        top, own = jnp.where(first, NOTHING, top), k + p["first"].astype(kind)
        most = jnp.maximum(top, own)
        old, new = jnp.exp(top - most), jnp.exp(own - most)
        y = ((old * a + new * v) / (old * b + new)).astype(x.dtype) * jax.nn.sigmoid(r)
        y = einsum("btf,fd->btd", constrain(y, "batch seq act_mlp", ctx.run), p["o"])
        return Out(y, cache and {"last": last} | dict(zip(("top", "sum", "weight"), (s[:, -1].astype(jnp.float32) for s in sums))))


def _then(first, second):
    """The sums of two stretches of tokens, the second after the first."""
    (d, m, a, b), (e, n, c, w) = first, second
    m = m + e
    most = jnp.maximum(m, n)
    old, new = jnp.exp(m - most), jnp.exp(n - most)
    return d + e, most, old * a + new * c, old * b + new * w


@dataclass(frozen=True)
class ChannelMix(Recurrent):
    hidden: int
    out_init: Init = FanIn()

    def params(self, D):
        share = Spec((D,), "_", Constant(0.5), role="bias")
        return {"k": Spec((D, self.hidden), "embed -> mlp", FanIn()), "r": Spec((D, D), "embed -> _", FanIn()),
                "v": Spec((self.hidden, D), "mlp -> embed", self.out_init), "mix": {"k": share, "r": share}}  # fmt: skip

    def cache(self, D, B, S, dtype):
        return {"last": conv_cache(B, 2, (D,), "act_embed", dtype)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        past, last = shifted(x, resume(cache, ctx), ctx)
        h = jnp.square(jax.nn.relu(einsum("btd,df->btf", mixed(x, past, p["mix"]["k"]), p["k"])))
        r = jax.nn.sigmoid(einsum("btd,de->bte", mixed(x, past, p["mix"]["r"]), p["r"]))
        y = r * einsum("btf,fd->btd", constrain(h, "batch seq act_mlp", ctx.run), p["v"])
        return Out(y, cache and {"last": last})
