"""Token in, logits out: embedding, a trunk of layers, a final norm and a head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Execution, Layer, Out, add_losses, positions_of
from minllm.layers.attention import Attention
from minllm.layers.dropout import dropout
from minllm.layers.latent import LatentAttention
from minllm.layers.moe import MoE
from minllm.layers.norm import Norm, RMSNorm
from minllm.layers.position import Learned, Sinusoidal
from minllm.layers.stack import Stack
from minllm.parallel.vocab import embed
from minllm.sharding import constrain
from minllm.spec import FanIn, Normal, Spec, Tree, is_spec
from minllm.weights import Mixed, as_array, einsum


@dataclass(frozen=True)
class Decoder:
    """A language model.

    tied: the head is the embedding table. softcap: of the logits (Gemma 2). embed_scale: multiplies the embeddings (Gemma: sqrt(D)).
    position: what is added to the embeddings (GPT-2). embed_norm: of the embeddings (RWKV). dropout: of the embeddings.
    """

    vocab: int
    D: int
    trunk: tuple[Layer, ...]
    norm: Norm = field(default_factory=RMSNorm)
    tied: bool = False
    softcap: float | None = None
    embed_scale: float = 1.0
    position: Learned | Sinusoidal | None = None
    dropout: float = 0.0
    embed_norm: Norm | None = None

    def params(self) -> Tree:
        p = {
            "embed": Spec((self.vocab, self.D), "vocab embed", Normal(0.02), role="embedding"),
            "trunk": tuple(layer.params(self.D) for layer in self.trunk),
            "norm": self.norm.params(self.D),
        }
        p |= {"position": self.position.params(self.D)} if self.position else {}
        p |= {"embed_norm": self.embed_norm.params(self.D)} if self.embed_norm else {}
        return p if self.tied else p | {"head": Spec((self.D, self.vocab), "embed -> vocab", FanIn())}

    def cache(self, B: int, S: int, dtype: Any = jnp.float32) -> Tree:
        """The Specs of a decode cache for B rows of up to S tokens."""
        return tuple(layer.cache(self.D, B, S, dtype) for layer in self.trunk)

    def embedded(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context) -> Float[Array, "B T D"]:
        """What the trunk starts from."""
        x = embed(p["embed"], tokens, ctx.run) * self.embed_scale
        if self.position:
            x = self.position.apply(gathered(p["position"], ctx.run), x, ctx.positions)
        if self.embed_norm:
            x = self.embed_norm.apply(p["embed_norm"], x, ctx).x
        return constrain(dropout(x, self.dropout, ctx), "batch residual_seq act_embed", ctx.run)

    def hidden(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        """The normed residual stream "B T D": what the head multiplies. Its dtype is that of the parameters."""
        ctx = with_positions(ctx, tokens, cache)
        out = through(self.trunk, p["trunk"], self.embedded(p, tokens, ctx), ctx, cache)
        return out._replace(x=self.norm.apply(p["norm"], out.x, ctx).x)

    def head(self, p: Tree) -> Any:
        """The weight [D, V], with axes "embed vocab", that the hidden state is multiplied by."""
        if not self.tied:
            return p["head"]
        w = p["embed"]
        return Mixed(w.low.T, w.full.T) if isinstance(w, Mixed) else as_array(w).T

    def logits(self, p: Tree, h: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T V"]:
        y = einsum("btd,vd->btv", h, p["embed"]) if self.tied else einsum("btd,dv->btv", h, p["head"])
        y = constrain(y, "batch seq act_vocab", ctx.run)
        return y if self.softcap is None else self.softcap * jnp.tanh(y / self.softcap)

    def apply(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        out = self.hidden(p, tokens, ctx, cache)
        return out._replace(x=self.logits(p, out.x, ctx))

    def flops(self, T: int) -> float:
        """Matmul FLOPs of training on one token of a row of T: 2 a weight forward and 4 backward, and in attention 2 a score and 2 a
        value forward, twice that backward, over the keys that a causal query sees (half of T, or the window). Of experts, those chosen."""
        matrices = _matrices(self.params()) - sum(_asleep(m, self.D) for layer in self.trunk for m in _inside(layer, MoE))
        seen = sum(4 * a.heads * a.head_dim * _seen(T, a.window) for layer in self.trunk for a in _inside(layer, Attention))
        seen += sum(2 * a.heads * (a.head_dim + a.rope_dim + a.value_dim) * _seen(T, None)
                    for layer in self.trunk for a in _inside(layer, LatentAttention))  # fmt: skip
        return 3.0 * (2 * (matrices + self.vocab * self.D * self.tied) + seen)

    def update(self, p: Tree, stats: Any) -> Tree:
        """The parameters after the updates that are not by gradient."""
        return p | {"trunk": tuple(layer.update(q, s) for layer, q, s in zip(self.trunk, p["trunk"], stats))}


def fold(blocks: Sequence[tuple[Layer, ...]]) -> tuple[Stack, ...]:
    """Blocks of layers, one after the other, as stacks: at each place the period that covers the most (5 local blocks and a global one,
    a few dense blocks and then experts)."""
    trunk, at = [], 0
    while at < len(blocks):
        rest = blocks[at:]
        repeats = lambda p: next((i for i in range(len(rest)) if rest[i] != rest[i % p]), len(rest)) // p
        period = max(range(1, len(rest) + 1), key=lambda p: (p * repeats(p) if p == 1 or repeats(p) > 1 else 0, -p))
        trunk.append(Stack(tuple(layer for block in rest[:period] for layer in block), repeats(period)))
        at += period * repeats(period)
    return tuple(trunk)


def through(trunk: tuple[Layer, ...], p: tuple[Tree, ...], x: Float[Array, "B T D"], ctx: Context, cache: Tree) -> Out:
    """The layers of a trunk, one after the other."""
    depth, losses, caches, stats = 0, None, [], []
    for i, layer in enumerate(trunk):
        stacked = isinstance(layer, Stack)  # a stack folds the index of each of its layers into the key itself
        key = ctx.key if stacked or ctx.key is None else jax.random.fold_in(ctx.key, depth)
        out = layer.apply(p[i], x, ctx.replace(layer=depth, key=key), cache and cache[i])
        x, losses = out.x, add_losses(losses, out.losses)
        caches.append(out.cache)
        stats.append(out.stats)
        depth += len(layer.pattern) * layer.times if stacked else 1
    return Out(x, cache and tuple(caches), losses, tuple(stats))


def with_positions(ctx: Context, tokens: Int[Array, "B T"], cache: Tree) -> Context:
    """Positions where the caller gave none: counted from 0, or from the start of each segment."""
    if ctx.positions is not None:
        return ctx
    if cache is not None:
        raise ValueError("a call with a cache needs ctx.positions: which tokens came before is known to the caller only")
    if ctx.segments is not None:
        return ctx.replace(positions=positions_of(ctx.segments))
    return ctx.replace(positions=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))


def gathered(tables: Tree, run: Execution) -> Tree:
    """Tables on every device: a lookup in a sharded one is a surprise of communication."""

    def one(w: Any) -> Any:
        if isinstance(w, Mixed):
            return w.replace(low=constrain(w.low, "_ _", run))
        return constrain(w, "_ _", run) if isinstance(w, jax.Array) else w

    return jax.tree.map(one, tables, is_leaf=lambda w: not isinstance(w, dict))


def _inside[L: Layer](layer: Any, kind: type[L]) -> Iterator[L]:
    """Every layer of a kind inside a layer, as often as it runs."""
    if isinstance(layer, kind):
        yield layer
    elif is_dataclass(layer):
        for inner in [getattr(layer, f.name) for f in fields(layer)]:
            for part in inner if isinstance(inner, tuple) else (inner,):
                yield from list(_inside(part, kind)) * (layer.times if isinstance(layer, Stack) else 1)


def _matrices(specs: Tree) -> int:
    return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec) if "->" in s.axes)


def _asleep(moe: MoE, D: int) -> int:
    """Weights of experts that a token does not go through."""
    return _matrices(moe.expert.params(D)) * (moe.router.experts - moe.router.active)


def _seen(T: int, window: int | None) -> float:
    """Keys that a query sees on average, itself included."""
    w = min(T, window or T)
    return (w * (w + 1) / 2 + (T - w) * w) / T
