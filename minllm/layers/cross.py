"""Attention of one sequence over another, the memory (Vaswani et al. 2017, section 3.2.3, first use).

    q = x W_q     k, v = memory W_k, memory W_v     y = softmax(q k^T / sqrt(H)) v W_o

Every token sees the whole memory. While decoding, keys and values of the memory are made once and kept.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out
from minllm.layers.dropout import dropout
from minllm.layers.kv import kv_cache, write
from minllm.parallel.ring import attend
from minllm.sharding import constrain
from minllm.spec import FanIn, Init, Spec
from minllm.weights import einsum
from minllm_kernels.mask import Full


@dataclass(frozen=True)
class CrossAttention(Layer):
    """scale: of the scores; None for H^-1/2. The context gives `memory` and, where it has padding, `memory_positions` of -1 there; a later
    call with the cache alone sees the memory of the call that filled it."""

    heads: int
    head_dim: int
    scale: float | None = None
    dropout: float = 0.0
    out_init: Init = FanIn()

    def params(self, D):
        N, H = self.heads, self.head_dim
        into = Spec((D, N, H), "embed -> heads head", FanIn())
        return {"q": into, "k": into, "v": into, "o": Spec((N, H, D), "heads head -> embed", self.out_init)}

    def cache(self, D, B, S, dtype):
        return kv_cache(B, S, self.heads, self.head_dim, dtype)

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        if ctx.segments is not None:
            raise ValueError("a packed row has no one memory: give each pair of source and target its own row")
        q = constrain(einsum("btd,dnh->btnh", x, p["q"]), "batch seq act_heads _", ctx.run)
        if ctx.memory is not None:
            k, v = (constrain(einsum("bsd,dnh->bsnh", ctx.memory, p[w]), "batch seq act_heads _", ctx.run) for w in ("k", "v"))
            B, S = ctx.memory.shape[:2]
            there = ctx.memory_positions
            kv_pos = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)) if there is None else there
            if cache is not None:
                if S > cache["pos"].shape[1]:
                    raise ValueError(
                        f"the memory has {S} tokens, the cache room for {cache['pos'].shape[1]}; make it for the longer of both"
                    )
                cache = write(cache, {"k": k, "v": v, "pos": kv_pos})
        elif cache is not None:
            k, v, kv_pos = cache["k"].astype(x.dtype), cache["v"].astype(x.dtype), cache["pos"]
        else:
            raise ValueError("attention over a memory needs ctx.memory, or a cache that a call with one has filled")
        y = attend(q, k, v, mask=Full(), q_pos=ctx.positions, kv_pos=kv_pos, scale=self.scale, run=ctx.run)
        return Out(dropout(einsum("btnh,nhd->btd", y, p["o"]), self.dropout, ctx), cache)
