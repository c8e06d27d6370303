"""Multi-head attention with any number of key/value heads.

    q, k, v = x W_q, x W_k, x W_v      y = softmax(q k^T / sqrt(H) + mask) v W_o

Vaswani et al. 2017, arXiv 1706.03762, section 3.2; one key/value head: Shazeer 2019, arXiv 1911.02150; groups: Ainslie et al. 2023,
arXiv 2305.13245. Sinks: Agarwal et al. 2025 (gpt-oss), arXiv 2508.10925, section 2; output gates: Qiu et al. 2025, arXiv 2505.06708.
The softmax is `minllm_kernels.attention`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out, Pool
from minllm.layers.dropout import dropout, keep_mask
from minllm.layers.kv import attend_pages, extend, in_pages, kv_cache, page_cache
from minllm.layers.norm import Norm
from minllm.layers.position import Alibi, AxialRope, Buckets, Rope
from minllm.parallel.ring import attend
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Spec
from minllm.weights import einsum
from minllm_kernels.mask import Causal, Mask, Window


@dataclass(frozen=True)
class Attention(Layer):
    """
    position: how queries and keys learn where they are; None for no encoding at all (NoPE). relative: what scores learn of distances.
    mask: who sees whom. window: at most this many tokens back, the token itself included (Mistral); decoding then keeps a ring.
    qk_norm: a norm of each head's queries and keys before the rotation (Qwen 3), or with qk_norm_flat of all heads at once (OLMo 2).
    softcap, scale: of the scores (Gemma 2). bias: on q, k and v; out_bias: on the output.
    sinks: one learned logit a head that takes part in the softmax and has no value. gate: y * sigmoid(x W_gate) before W_o.
    dropout: of the output; weight_dropout: of the probabilities, which holds a [T, S] array.
    """

    heads: int
    kv_heads: int
    head_dim: int
    position: Rope | AxialRope | None = None
    relative: Alibi | Buckets | None = None
    mask: Mask = Causal()
    window: int | None = None
    qk_norm: Norm | None = None
    qk_norm_flat: bool = False
    softcap: float | None = None
    scale: float | None = None
    bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    gate: bool = False
    dropout: float = 0.0
    weight_dropout: float = 0.0
    out_init: Init = FanIn()

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"Attention has {self.heads} heads for {self.kv_heads} kv_heads; the first must be a multiple of the second")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window counts its own token, so it is at least 1; got {self.window}")

    def params(self, D):
        N, K, H = self.heads, self.kv_heads, self.head_dim
        kv = Spec((D, K, H), "embed -> kv_heads head", FanIn())
        p = {"q": Spec((D, N, H), "embed -> heads head", FanIn()), "k": kv, "v": kv,
             "o": Spec((N, H, D), "heads head -> embed", self.out_init)}  # fmt: skip
        if self.bias:
            b = Spec((K, H), "kv_heads head", role="bias")
            p |= {"q_bias": Spec((N, H), "heads head", role="bias"), "k_bias": b, "v_bias": b}
        if self.relative:
            p |= {"relative": self.relative.params(N)}
        if self.sinks:
            p |= {"sinks": Spec((N,), "heads", role="bias")}
        if self.gate:
            p |= {"gate": Spec((D, N, H), "embed -> heads head", FanIn())}
        if self.out_bias:
            p |= {"o_bias": Spec((D,), "_", role="bias")}
        if self.qk_norm:
            p |= {"q_norm": self.qk_norm.params(N * H if self.qk_norm_flat else H)}
            p |= {"k_norm": self.qk_norm.params(K * H if self.qk_norm_flat else H)}
        return p

    def cache(self, D, B, S, dtype):
        if isinstance(S, Pool) and self.mask == Causal() and self.relative is None:
            return page_cache(S, self.kv_heads, self.head_dim, dtype)
        return kv_cache(B, S, self.kv_heads, self.head_dim, dtype, window=self.window)

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        if cache is not None and ctx.segments is not None:
            raise ValueError("a packed row cannot be decoded: give each document its own row, and positions of -1 to its padding")
        if self.window is not None and ctx.prefix is not None:
            raise ValueError(f"a prefix and a window of {self.window} together are not defined: one would move the other")
        # heads are shared out here: the compiler would else give a device all heads of some tokens, and exchange them after the rotation
        axes = {"q": "batch seq act_heads _", "k": "batch seq act_kv_heads _", "v": "batch seq act_kv_heads _"}
        q, k, v = (constrain(einsum("btd,dnh->btnh", x, p[w]), axes[w], ctx.run) for w in axes)
        if self.bias:
            q, k, v = (y + p[f"{w}_bias"].astype(x.dtype) for w, y in (("q", q), ("k", k), ("v", v)))
        if self.qk_norm:
            q, k = self._norm(p["q_norm"], q, ctx), self._norm(p["k_norm"], k, ctx)
        if self.position:
            q, k = self.position.apply(q, ctx.positions), self.position.apply(k, ctx.positions)
        q, k, v = checkpoint_name((q, k, v), "qkv")
        sinks = p["sinks"] if self.sinks else None
        if in_pages(cache):
            y, cache = attend_pages(q, k, v, cache, ctx, window=self.window, scale=self.scale, softcap=self.softcap, sinks=sinks)
        else:
            y, cache = self._attend(p, q, k, v, cache, ctx, sinks)
        if self.gate:
            y = y * jax.nn.sigmoid(einsum("btd,dnh->btnh", x, p["gate"]))
        y = einsum("btnh,nhd->btd", y, p["o"])
        return Out(dropout(y + p["o_bias"].astype(x.dtype) if self.out_bias else y, self.dropout, ctx), cache)

    def _attend(self, p, q, k, v, cache, ctx, sinks):
        k, v, kv_pos, cache = extend(cache, k, v, ctx.positions, self.window)
        # the queries of a prefix look as far as its last token
        q_pos = ctx.positions if ctx.prefix is None else jnp.maximum(ctx.positions, ctx.prefix - 1)
        mask = self.mask if self.window is None else self.mask & Window(self.window)
        bias = self.relative.bias(p["relative"] or ctx.shared, ctx.positions, kv_pos, self.heads) if self.relative else None
        keep = None
        if self.weight_dropout and ctx.key is not None:
            keep = keep_mask((q.shape[0], self.heads, q.shape[1], k.shape[1]), self.weight_dropout, ctx, stream=1)

        y = attend(q, k, v, mask=mask, q_pos=q_pos, kv_pos=kv_pos, q_seg=ctx.segments, kv_seg=ctx.segments, keep=keep, bias=bias,
                   scale=self.scale, softcap=self.softcap, sinks=sinks, run=ctx.run)  # fmt: skip
        return y, cache

    def _norm(self, p, x, ctx):
        if not self.qk_norm_flat:
            return self.qk_norm.apply(p, x, ctx).x
        return self.qk_norm.apply(p, x.reshape(*x.shape[:2], -1), ctx).x.reshape(x.shape)
