"""Multi-head latent attention: keys and values of all heads from one small vector a token, and only that vector in the cache.

    c = norm(x W_down)      k_n = [c W_k,n ; rope(x W_turn)]      v_n = c W_v,n      q_n = [q'_n ; rope(q''_n)],  q_n of norm(x W_down')
    y_n = softmax(q_n k_n^T / sqrt(H + r)) v_n

DeepSeek-V2, Liu et al. 2024, arXiv 2405.04434, section 2.1 and appendix C. Two forms give the same numbers, as
q'_n . c W_k,n = q'_n W_k,n^T . c: keys and values written out, 2 S R (H + h) FLOPs a head and scores over H + r dims; or queries carried
into the space of c ("absorbed"), which is then key and value of all heads, and scores over R + r dims. For few queries the second is
cheaper, for many the first.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out
from minllm.layers.kv import write
from minllm.layers.norm import rms_norm
from minllm.layers.position import Rope, YarnScaling
from minllm.parallel.ring import attend
from minllm.sharding import constrain
from minllm.spec import Constant, FanIn, Init, Ones, Spec
from minllm.weights import as_array, einsum


@dataclass(frozen=True)
class LatentAttention(Layer):
    """
    head_dim, rope_dim: H dims of a head's queries and keys that stand still, and r that turn; the latter keys are shared by all heads.
    value_dim: h, of a head. rank: R numbers of c. q_rank: those that queries come from; None for x itself.
    position: None where nothing turns (Kimi Linear). mscale: with YaRN, scores are sharpened by (1 + 0.1 mscale ln(factor))^2.
    """

    heads: int
    head_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    rank: int = 512
    q_rank: int | None = 1536
    position: Rope | None = Rope(pairs="neighbours")
    mscale: float = 0.0
    eps: float = 1e-6
    out_init: Init = FanIn()

    def __post_init__(self):
        if self.mscale and not (self.position and isinstance(self.position.scaling, YarnScaling)):
            raise ValueError(f"mscale {self.mscale} sharpens the scores of positions scaled by YaRN, and these are not; leave it 0")

    @property
    def scale(self) -> float:
        """Of the scores."""
        yarn = self.position.scaling if self.position else None
        sharper = 1 + 0.1 * self.mscale * math.log(max(yarn.factor, 1.0)) if isinstance(yarn, YarnScaling) else 1.0
        return sharper**2 * (self.head_dim + self.rope_dim) ** -0.5

    def params(self, D):
        N, H, r, h, R = self.heads, self.head_dim, self.rope_dim, self.value_dim, self.rank
        q = {"q": Spec((D, N, H + r), "embed -> heads head", FanIn())}
        if self.q_rank is not None:
            q = {"q_down": Spec((D, self.q_rank), "embed -> _", FanIn()), "q_scale": Spec((self.q_rank,), "_", Ones(), role="gain"),
                 "q_up": Spec((self.q_rank, N, H + r), "_ -> heads head", FanIn())}  # fmt: skip
        return q | {
            "down": Spec((D, R), "embed -> _", FanIn()), "scale": Spec((R,), "_", Ones(), role="gain"),
            "turn": Spec((D, r), "embed -> _", FanIn()), "k": Spec((R, N, H), "_ -> heads head", FanIn()),
            "v": Spec((R, N, h), "_ -> heads head", FanIn()), "o": Spec((N, h, D), "heads head -> embed", self.out_init)}  # fmt: skip

    def cache(self, D, B, S, dtype):
        return {"latent": Spec((B, S, 1, self.rank + self.rope_dim), "batch kv_seq _ _", dtype=dtype, role="buffer"),
                "pos": Spec((B, S), "batch kv_seq", Constant(-1), dtype=jnp.int32, role="buffer")}  # fmt: skip

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        if cache is not None and ctx.segments is not None:
            raise ValueError("a packed row cannot be decoded: give each document its own row, and positions of -1 to its padding")
        T, N, H, R, heads = x.shape[1], self.heads, self.head_dim, self.rank, "batch seq act_heads _"
        if self.q_rank is None:
            q = einsum("btd,dnh->btnh", x, p["q"])
        else:
            q = einsum("btr,rnh->btnh", rms_norm(einsum("btd,dr->btr", x, p["q_down"]), p["q_scale"], self.eps), p["q_up"])
        q = constrain(q, heads, ctx.run)
        still, turning = q[..., :H], q[..., H:]
        c = rms_norm(einsum("btd,dr->btr", x, p["down"]), p["scale"], self.eps)[:, :, None]
        turn = einsum("btd,dr->btr", x, p["turn"])[:, :, None]
        if self.position:
            turning, turn = self.position.apply(turning, ctx.positions), self.position.apply(turn, ctx.positions)
        new = {"latent": jnp.concatenate([c, turn], -1), "pos": ctx.positions}
        after = None if cache is None else write(cache, new)
        latent, kv_pos = (new["latent"], ctx.positions) if after is None else (after["latent"].astype(x.dtype), after["pos"])
        q_pos = ctx.positions if ctx.prefix is None else jnp.maximum(ctx.positions, ctx.prefix - 1)
        where = dict(q_pos=q_pos, kv_pos=kv_pos, q_seg=ctx.segments, kv_seg=ctx.segments, scale=self.scale, run=ctx.run)

        if T * (2 * R - H - self.value_dim) > R * (H + self.value_dim):
            axes = heads if cache is None else "batch kv_seq act_heads _"
            k, v = (constrain(einsum("bsr,rnh->bsnh", latent[..., 0, :R], p[w]), axes, ctx.run) for w in ("k", "v"))
            k = jnp.concatenate([k, jnp.broadcast_to(latent[..., R:], (*k.shape[:2], N, self.rope_dim))], -1)
            q, k, v = checkpoint_name((jnp.concatenate([still, turning], -1), k, v), "qkv")
            y = attend(q, k, v, **where)
        else:
            q = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", still, as_array(p["k"]).astype(x.dtype)), turning], -1)
            # what turns is answered too, and dropped: this costs less than a copy of the cache without it
            y = attend(q, latent, latent, **where)[..., :R]
            y = jnp.einsum("btnr,rnh->btnh", y, as_array(p["v"]).astype(x.dtype))
        return Out(einsum("btnh,nhd->btd", y, p["o"]), after)
