"""Mixture of experts: each token goes through a few of many feed-forward layers.

    s = softmax(x W)  or  sigmoid(x W)             chosen = the k largest of s + b
    g_e = scale s_e [/ sum of s over the chosen]   y = sum over the chosen of g_e f_e(x)  [+ f_shared(x)]

Shazeer et al. 2017, arXiv 1701.06538; Switch: Fedus et al. 2021, arXiv 2101.03961; Mixtral: arXiv 2401.04088, section 2.1; shared experts:
DeepSeekMoE, arXiv 2401.06066, section 3.2; groups: DeepSeek-V2, arXiv 2405.04434, section 2.1.2; sigmoid scores and the bias b:
DeepSeek-V3, arXiv 2412.19437, section 2.1.2. The exchange of tokens is `parallel/expert.py`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minllm.layer import Context, Layer, Losses, Out
from minllm.layers.dropout import dropout
from minllm.parallel.expert import mix
from minllm.spec import FanIn, Spec, Tree, tree_map
from minllm.weights import einsum


@dataclass(frozen=True)
class Router:
    """Who goes where: `active` of `experts` for each token. Scores are float32 at least.

    renormalize: the gates of the chosen add up to `scale`. A softmax renormalised is a softmax over the chosen alone (Mixtral, gpt-oss).
    groups: experts are in so many groups of equal size, and only the best `active_groups` of a token are open to it; a group is worth the
        sum of its `group_top` best scores (DeepSeek-V2: 1, V3: 2).
    bias: added to the logits (gpt-oss). correction: a bias that chooses but does not weigh; it is not learned but moved, by `rate` a step,
        towards equal loads (DeepSeek-V3: 0.001).
    """

    experts: int
    active: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    group_top: int = 1
    bias: bool = False
    correction: bool = False
    rate: float = 0.001

    def __post_init__(self):
        size, odd = divmod(self.experts, self.groups)
        if odd or not self.group_top <= size or not self.active_groups <= self.groups or not self.active <= size * self.active_groups:
            raise ValueError(
                f"Router cannot choose {self.active} of {self.experts} experts in {self.active_groups} of {self.groups} groups by their "
                f"{self.group_top} best: groups must divide the experts, and the open ones must hold at least {self.active}"
            )

    def params(self, D: int) -> Tree:
        p = {"weight": Spec((D, self.experts), "embed -> _", FanIn())}
        if self.bias:
            p |= {"bias": Spec((self.experts,), "_", role="bias")}
        if self.correction:  # float32 whatever the rest is: bfloat16 would swallow steps of 0.001
            p |= {"correction": Spec((self.experts,), "_", role="bias", dtype=jnp.float32)}
        return p

    def choose(self, p: Tree, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array, Array]:
        """(logits "B T E", scores "B T E", ids "B T k", gates "B T k")."""
        logits = einsum("btd,de->bte", x.astype(jnp.promote_types(x.dtype, jnp.float32)), p["weight"])
        if self.bias:
            logits += p["bias"].astype(logits.dtype)
        scores = jax.nn.softmax(logits) if self.score == "softmax" else jax.nn.sigmoid(logits)
        wanted = scores + jax.lax.stop_gradient(p["correction"]).astype(scores.dtype) if self.correction else scores
        if self.groups > 1:
            members = wanted.reshape(*wanted.shape[:-1], self.groups, -1)
            worth = jax.lax.top_k(members, self.group_top)[0].sum(-1)
            best = jax.lax.top_k(worth, self.active_groups)[1]
            open_ = (best[..., None] == jnp.arange(self.groups)).any(-2)
            wanted = jnp.where(open_[..., None], members, -jnp.inf).reshape(wanted.shape)
        ids = jax.lax.top_k(wanted, self.active)[1]
        gates = jnp.take_along_axis(scores, ids, -1)
        if self.renormalize:
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
        return logits, scores, ids, gates * self.scale

    def update(self, p: Tree, load: Float[Array, " E"]) -> Tree:
        """The correction after a step in which the experts got `load` tokens."""
        return p | {"correction": p["correction"] + self.rate * jnp.sign(load.mean() - load)} if self.correction else p


@dataclass(frozen=True)
class MoE(Layer):
    """
    expert: the feed-forward layer that each expert is (its dropout does not act here). shared: one that every token goes through;
    shared_gate: times sigmoid(x w) (Qwen2-MoE).
    capacity: room of an expert for `group` rows of the batch, as a multiple of the even share group T k / E; tokens queue by time and then
        by row, and what finds no room is dropped: a token then depends on the earlier ones of its group. None: dropless.
    balance: times E sum_e f_e P_e, f_e the share of the choices that fell on e and P_e its mean score (of sigmoid scores, normalised over
        the experts): 1 when even (Switch, equation 4; the Hugging Face loss of Mixtral counts every choice, and is k times this). The
        means are over the tokens of a microbatch on all devices ("batch"), before they are multiplied, or over each row ("row",
        DeepSeek-V3, equation 17: no microbatches change it).
    z_loss: times the mean square of the log-sum-exp of the logits (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, equation 5: 0.001).
    Both losses are means over the layers that have them; padding counts for nothing.

    stats: "load", the tokens each expert was chosen by, and "dropped", the share of choices without room.
    """

    router: Router
    expert: Layer
    shared: Layer | None = None
    shared_gate: bool = False
    capacity: float | None = None
    group: int = 1
    balance: float = 0.0
    balance_over: Literal["batch", "row"] = "batch"
    z_loss: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"an expert's capacity is a positive multiple of its even share; got {self.capacity}")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate weighs a shared expert, and there is none: give `shared` a layer")

    @property
    def any_order(self) -> bool:
        """Whether tokens may stand in any order: with capacity the first to come are the first to find room."""
        return self.capacity is None

    def params(self, D):
        p = {"router": self.router.params(D), "experts": self._experts(D)}
        if self.shared is not None:
            p |= {"shared": self.shared.params(D)}
        if self.shared_gate:
            p |= {"shared_gate": Spec((D, 1), "embed -> _", FanIn())}
        return p

    def _experts(self, D: int) -> Tree:
        def each(s: Spec) -> Spec:
            axes = " ".join("expert_embed" if w == "embed" else w for w in s.axes.split())
            return replace(s, shape=(self.router.experts, *s.shape), axes=f"experts {axes}")

        return tree_map(each, self.expert.params(D))

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        logits, scores, ids, gates = self.router.choose(p["router"], x)
        there = jnp.ones(x.shape[:2], bool) if ctx.positions is None else ctx.positions >= 0
        if ctx.segments is not None:
            there &= ctx.segments != 0
        ids = jnp.where(there[..., None], ids, self.router.experts)  # padding goes to nobody
        gates = jnp.where(there[..., None], gates, 0)
        specs, run = self._experts(x.shape[-1]), ctx.run
        y, kept = mix(self.expert, specs, p["experts"], x, ids, gates, capacity=self.capacity, group=self.group, run=run)
        if self.shared is not None:
            z = self.shared.apply(p["shared"], x, ctx).x
            y += z * jax.nn.sigmoid(einsum("btd,do->bto", x, p["shared_gate"])) if self.shared_gate else z
        hits = (ids[..., None] == jnp.arange(self.router.experts)).sum(-2)
        total = jnp.maximum(hits.sum(), 1).astype(jnp.float32)
        stats = {"load": hits.sum((0, 1)).astype(jnp.float32), "dropped": 0.0 if kept is None else 1 - kept.sum() / total}
        return Out(dropout(y, self.dropout, ctx), None, self._losses(logits, scores, hits, there), jax.tree.map(jnp.asarray, stats))

    def _losses(self, logits: Array, scores: Array, hits: Int[Array, "B T E"], there: Bool[Array, "B T"]) -> Losses | None:
        E, k, losses = self.router.experts, self.router.active, {}
        if self.balance:
            over = (0, 1) if self.balance_over == "batch" else (1,)
            tokens = jnp.maximum(there.sum(over), 1)[..., None]
            f = hits.sum(over) / (k * tokens)
            P = jnp.where(there[..., None], scores / scores.sum(-1, keepdims=True), 0).sum(over) / tokens
            value = E * (f * P).sum(-1)
            losses["balance_loss"] = (self.balance * value.sum(), jnp.float32(value.size))
        if self.z_loss:
            z = jnp.where(there, jax.nn.logsumexp(logits, -1) ** 2, 0).sum()
            losses["router_z_loss"] = (self.z_loss * z, jnp.float32(there.size))
        return losses or None

    def update(self, p, stats: Any):
        return p | {"router": self.router.update(p["router"], stats["load"])}


def utilisation(load: Float[Array, "... E"]) -> dict[str, Array]:
    """How evenly experts are used: "entropy" of the shares in nats (log E when even), "violation", the largest load over the mean minus 1
    (MaxVio of Wang et al. 2024, arXiv 2408.15664, equation 4), "idle", the share of experts that nobody chose."""
    share = load / jnp.maximum(load.sum(-1, keepdims=True), 1)
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1))).sum(-1)
    violation = load.max(-1) / jnp.maximum(load.mean(-1), 1e-9) - 1
    return {"entropy": entropy, "violation": violation, "idle": (load == 0).mean(-1)}
