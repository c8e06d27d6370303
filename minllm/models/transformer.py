"""Token in, logits out: embedding, a trunk of layers, a final norm and a head."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Execution, Layer, Out, add_losses, positions_of
from minllm.layers.attention import Attention
from minllm.layers.dropout import dropout
from minllm.layers.norm import Norm, RMSNorm
from minllm.layers.stack import Stack
from minllm.sharding import constrain
from minllm.spec import FanIn, Normal, Spec, Tree, is_spec
from minllm.weights import Mixed, as_array, einsum, take


@dataclass(frozen=True)
class Decoder:
    """A language model.

    tied: the head is the embedding table. softcap: of the logits (Gemma 2). embed_scale: multiplies the embeddings (Gemma: sqrt(D)).
    dropout: of the embeddings.
    """

    vocab: int
    D: int
    trunk: tuple[Layer, ...]
    norm: Norm = field(default_factory=RMSNorm)
    tied: bool = False
    softcap: float | None = None
    embed_scale: float = 1.0
    dropout: float = 0.0

    def params(self) -> Tree:
        p = {
            "embed": Spec((self.vocab, self.D), "vocab embed", Normal(0.02), role="embedding"),
            "trunk": tuple(layer.params(self.D) for layer in self.trunk),
            "norm": self.norm.params(self.D),
        }
        return p if self.tied else p | {"head": Spec((self.D, self.vocab), "embed -> vocab", FanIn())}

    def cache(self, B: int, S: int, dtype: Any = jnp.float32) -> Tree:
        """The Specs of a decode cache for B rows of up to S tokens."""
        return tuple(layer.cache(self.D, B, S, dtype) for layer in self.trunk)

    def hidden(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        """The normed residual stream "B T D": what the head multiplies. Its dtype is that of the parameters."""
        ctx = with_positions(ctx, tokens, cache)
        x = take(_gathered(p["embed"], ctx.run), tokens) * self.embed_scale
        x = constrain(dropout(x, self.dropout, ctx), "batch residual_seq act_embed", ctx.run)
        depth, losses, caches, stats = 0, None, [], []
        for i, layer in enumerate(self.trunk):
            stacked = isinstance(layer, Stack)  # a stack folds the index of each of its layers into the key itself
            key = ctx.key if stacked or ctx.key is None else jax.random.fold_in(ctx.key, depth)
            out = layer.apply(p["trunk"][i], x, ctx.replace(layer=depth, key=key), cache and cache[i])
            x, losses = out.x, add_losses(losses, out.losses)
            caches.append(out.cache)
            stats.append(out.stats)
            depth += len(layer.pattern) * layer.times if stacked else 1
        return Out(self.norm.apply(p["norm"], x, ctx).x, cache and tuple(caches), losses, tuple(stats))

    def head(self, p: Tree, run: Execution) -> Float[Array, "D V"]:
        """What the hidden state is multiplied by, whole on every device."""
        w = as_array(_gathered(p["embed"] if self.tied else p["head"], run))
        return w.T if self.tied else w

    def logits(self, p: Tree, h: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T V"]:
        y = einsum("btd,vd->btv", h, p["embed"]) if self.tied else einsum("btd,dv->btv", h, p["head"])
        y = constrain(y, "batch seq act_vocab", ctx.run)
        return y if self.softcap is None else self.softcap * jnp.tanh(y / self.softcap)

    def apply(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        out = self.hidden(p, tokens, ctx, cache)
        return out._replace(x=self.logits(p, out.x, ctx))

    def flops(self, T: int) -> float:
        """Matmul FLOPs of training on one token of a row of T: 2 a weight forward and 4 backward, and in attention 2 a score and 2 a
        value forward, twice that backward, over the keys that a causal query sees (half of T, or the window)."""
        matrices = sum(s.size for s in jax.tree.leaves(self.params(), is_leaf=is_spec) if "->" in s.axes)
        seen = sum(4 * a.heads * a.head_dim * _seen(T, a.window) for layer in self.trunk for a in _attentions(layer))
        return 3.0 * (2 * (matrices + self.vocab * self.D * self.tied) + seen)

    def update(self, p: Tree, stats: Any) -> Tree:
        """The parameters after the updates that are not by gradient."""
        return p | {"trunk": tuple(layer.update(q, s) for layer, q, s in zip(self.trunk, p["trunk"], stats))}


def with_positions(ctx: Context, tokens: Int[Array, "B T"], cache: Tree) -> Context:
    """Positions where the caller gave none: counted from 0, or from the start of each segment."""
    if ctx.positions is not None:
        return ctx
    if cache is not None:
        raise ValueError("a call with a cache needs ctx.positions: which tokens came before is known to the caller only")
    if ctx.segments is not None:
        return ctx.replace(positions=positions_of(ctx.segments))
    return ctx.replace(positions=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))


def _gathered(w: Any, run: Execution) -> Any:
    """A table on every device: a lookup in a sharded one is a surprise of communication."""
    if isinstance(w, Mixed):
        return w.replace(low=constrain(w.low, "_ _", run))
    return constrain(w, "_ _", run) if isinstance(w, jax.Array) else w


def _attentions(layer: Any) -> Iterator[Attention]:
    """Every attention layer inside a layer, as often as it runs."""
    if isinstance(layer, Attention):
        yield layer
    elif is_dataclass(layer):
        for inner in [getattr(layer, f.name) for f in fields(layer)]:
            for part in inner if isinstance(inner, tuple) else (inner,):
                yield from list(_attentions(part)) * (layer.times if isinstance(layer, Stack) else 1)


def _seen(T: int, window: int | None) -> float:
    """Keys that a query sees on average, itself included."""
    w = min(T, window or T)
    return (w * (w + 1) / 2 + (T - w) * w) / T
