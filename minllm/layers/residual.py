"""Where the norm goes around the residual stream. Each is a layer that holds a layer.

    PreNorm       y = x + f(N(x))            Xiong et al. 2020, arXiv 2002.04745; Llama
    PostNorm      y = N(x + f(x))            Vaswani et al. 2017; BERT
    SandwichNorm  y = x + M(f(N(x)))         Ding et al. 2021, arXiv 2105.13290; Gemma 2
    ReorderedNorm y = x + N(f(x))            OLMo 2, arXiv 2501.00656, section 3.1
    DeepNorm      y = N(alpha x + f(x))      Wang et al. 2022, arXiv 2203.00555, table 1: alpha = (2L)^(1/4) in a decoder of L layers,
                                             whose v, o and feed-forward matrices start (8L)^(-1/4) times as large
    Parallel      y = x + f(N(x)) + g(N(x))  GPT-J, PaLM (arXiv 2204.02311, section 2); GPT-NeoX gives each its own norm
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from minllm.layer import Context, Layer, Out, add_losses
from minllm.layers.norm import Norm, RMSNorm
from minllm.sharding import constrain


@dataclass(frozen=True)
class _Around(Layer):
    inner: Layer
    norm: Norm = RMSNorm()

    def params(self, D):
        return {"norm": self.norm.params(D), "inner": self.inner.params(D)}

    def cache(self, D, B, S, dtype):
        return self.inner.cache(D, B, S, dtype)

    def update(self, p, stats):
        return p | {"inner": self.inner.update(p["inner"], stats)}


class PreNorm(_Around):
    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        out = self.inner.apply(p["inner"], self.norm.apply(p["norm"], x, ctx).x, ctx, cache)
        return out._replace(x=constrain(x + out.x, "batch residual_seq act_embed", ctx.run))


class PostNorm(_Around):
    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        out = self.inner.apply(p["inner"], x, ctx, cache)
        return out._replace(x=constrain(self.norm.apply(p["norm"], x + out.x, ctx).x, "batch residual_seq act_embed", ctx.run))


@dataclass(frozen=True)
class DeepNorm(_Around):
    alpha: float = 1.0

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        out = self.inner.apply(p["inner"], x, ctx, cache)
        y = self.norm.apply(p["norm"], self.alpha * x + out.x, ctx).x
        return out._replace(x=constrain(y, "batch residual_seq act_embed", ctx.run))


class ReorderedNorm(_Around):
    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        out = self.inner.apply(p["inner"], x, ctx, cache)
        return out._replace(x=constrain(x + self.norm.apply(p["norm"], out.x, ctx).x, "batch residual_seq act_embed", ctx.run))


class SandwichNorm(_Around):
    def params(self, D):
        return super().params(D) | {"outer_norm": self.norm.params(D)}

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        out = self.inner.apply(p["inner"], self.norm.apply(p["norm"], x, ctx).x, ctx, cache)
        y = self.norm.apply(p["outer_norm"], out.x, ctx).x
        return out._replace(x=constrain(x + y, "batch residual_seq act_embed", ctx.run))


@dataclass(frozen=True)
class Parallel(Layer):
    """All layers read the same stream; `shared` gives them one norm (GPT-J) or each its own (GPT-NeoX)."""

    layers: tuple[Layer, ...]
    norm: Norm = RMSNorm()
    shared: bool = True

    def params(self, D):
        norms = self.norm.params(D) if self.shared else tuple(self.norm.params(D) for _ in self.layers)
        return {"norm": norms, "inner": tuple(f.params(D) for f in self.layers)}

    def cache(self, D, B, S, dtype):
        return tuple(f.cache(D, B, S, dtype) for f in self.layers)

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        norms = [p["norm"]] * len(self.layers) if self.shared else p["norm"]
        h = [self.norm.apply(norms[0], x, ctx).x] * len(self.layers) if self.shared else [self.norm.apply(n, x, ctx).x for n in norms]
        y, caches, losses, stats = x, [], None, []
        for i, layer in enumerate(self.layers):
            # each branch draws its own randomness: layer indices count whole blocks, so the branch goes into the key
            own = ctx if ctx.key is None else ctx.replace(key=jax.random.fold_in(ctx.key, i))
            out = layer.apply(p["inner"][i], h[i], own, cache and cache[i])
            y, losses = y + out.x, add_losses(losses, out.losses)
            caches.append(out.cache)
            stats.append(out.stats)
        y = constrain(y, "batch residual_seq act_embed", ctx.run)
        return Out(y, cache and tuple(caches), losses, tuple(stats) if any(s is not None for s in stats) else None)

    def update(self, p, stats):
        if stats is None:
            return p
        return p | {"inner": tuple(f.update(q, s) for f, q, s in zip(self.layers, p["inner"], stats))}
