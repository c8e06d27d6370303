"""DeepSeek-V2 (Liu et al. 2024, arXiv 2405.04434, section 2 and 3.1.2) and V3 (arXiv 2412.19437, section 2 and 4.2).

Latent attention, and after the first layers a mixture of many small experts and shared ones. V2 scores experts by a softmax; V3 by
sigmoids, chooses with a bias that evens the load, and weighs by the scores of the chosen alone. Large models open only the experts of a
few groups to a token.
"""

from dataclasses import dataclass
from typing import Any

from minllm.layers.latent import LatentAttention
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling, YarnScaling
from minllm.layers.residual import PreNorm
from minllm.models import llama, qwen
from minllm.models.family import BENIGN, Arg, Family, Field, Only, RopeFields, first, sublayers
from minllm.models.transformer import Decoder, fold

_YARN = YarnScaling(40.0, 4096, temperature=1.0)


def deepseek_v2(
    D: int = 5120,
    layers: int = 60,
    heads: int = 128,
    hidden: int = 12_288,
    vocab: int = 102_400,
    head_dim: int = 128,
    rope_dim: int = 64,
    value_dim: int = 128,
    rank: int = 512,
    q_rank: int | None = 1536,
    dense: int = 1,
    experts: int = 160,
    active: int = 6,
    shared: int = 2,
    expert_hidden: int = 1536,
    groups: int = 8,
    active_groups: int = 3,
    gain: float = 16.0,
    theta: float = 10_000.0,
    scaling: Scaling | None = _YARN,
    mscale: float = 0.707,
    balance: float = 0.001,
    tied: bool = False,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are DeepSeek-V2. dense: layers without experts, whose GLU has `hidden`. shared: experts that all tokens go through.
    gain: of the chosen experts' scores. head_dim, rope_dim, value_dim, rank, q_rank, mscale: see `LatentAttention`."""
    router = Router(experts, active, renormalize=False, scale=gain, groups=groups, active_groups=active_groups)
    attention = LatentAttention(heads, head_dim, rope_dim, value_dim, rank, q_rank, Rope(theta, scaling, pairs="neighbours"), mscale)
    return _decoder(D, layers, vocab, attention, hidden, dense, router, expert_hidden, shared, balance, tied, eps)


def deepseek_v3(
    D: int = 7168,
    layers: int = 61,
    heads: int = 128,
    hidden: int = 18_432,
    vocab: int = 129_280,
    head_dim: int = 128,
    rope_dim: int = 64,
    value_dim: int = 128,
    rank: int = 512,
    q_rank: int | None = 1536,
    dense: int = 3,
    experts: int = 256,
    active: int = 8,
    shared: int = 1,
    expert_hidden: int = 2048,
    groups: int = 8,
    active_groups: int = 4,
    gain: float = 2.5,
    renormalize: bool = True,
    pairs: str = "neighbours",
    theta: float = 10_000.0,
    scaling: Scaling | None = _YARN,
    mscale: float = 1.0,
    balance: float = 0.0001,
    tied: bool = False,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are DeepSeek-V3 and R1, without the layer that guesses a second token. pairs: see `Rope`; the rest: see
    `deepseek_v2`."""
    router = Router(experts, active, "sigmoid", renormalize, gain, groups, active_groups, group_top=2, correction=True)
    attention = LatentAttention(heads, head_dim, rope_dim, value_dim, rank, q_rank, Rope(theta, scaling, pairs=pairs), mscale)
    return _decoder(D, layers, vocab, attention, hidden, dense, router, expert_hidden, shared, balance, tied, eps)


def _decoder(D, layers, vocab, attention, hidden, dense, router, expert_hidden, shared, balance, tied, eps):
    norm, moe = RMSNorm(eps), mixture(router, expert_hidden, shared, balance)
    blocks = [(PreNorm(attention, norm), PreNorm(GLU(hidden, silu) if i < dense else moe, norm)) for i in range(layers)]
    return Decoder(vocab, D, fold(blocks), norm, tied)


def mixture(router: Router, hidden: int, shared: int, balance: float) -> MoE:
    """Experts of `hidden`, and one that stands for the shared ones side by side. The loss counts each row by itself."""
    return MoE(router, GLU(hidden, silu), shared=GLU(shared * hidden, silu), balance=balance, balance_over="row")


@dataclass(frozen=True)
class LatentRope(RopeFields):
    """And mscale_all_dim of YaRN, which sharpens the scores, as the argument mscale."""

    def read(self, name, given):
        found = super().read(name, given)
        rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
        return found | {"mscale": float(rope.get("mscale_all_dim") or 0.0) if found["scaling"] else 0.0}

    def write(self, name, args):
        written, m = super().write(name, args), args["mscale"]
        if not m:
            return written
        rope = written["rope_scaling"] | {"mscale_all_dim": m}
        if rope.get("attention_factor") == 1.0:  # as the releases say it: mscale over mscale_all_dim
            rope = {key: value for key, value in rope.items() if key != "attention_factor"} | {"mscale": m}
        return written | {"rope_scaling": rope}


@dataclass(frozen=True)
class SameHeads(Field):
    """num_key_value_heads: latent attention has as many as query heads."""

    def read(self, name, given):
        heads = given["num_attention_heads"]
        if given.get(name) not in (None, heads):
            raise ValueError(f"{name} is {given[name]}; latent attention has a key for each of its {heads} heads")
        return {}

    def write(self, name, args):
        return {name: args["heads"]}


@dataclass(frozen=True)
class Sums(Field):
    """Dims that follow from others: head_dim is what turns, qk_head_dim the whole of a query."""

    def names(self, name):
        return name, "head_dim"

    def read(self, name, given):
        still, turning = given.get("qk_nope_head_dim", 128), given.get("qk_rope_head_dim", 64)
        for field, size in ((name, still + turning), ("head_dim", turning)):
            if given.get(field) not in (None, size):
                raise ValueError(
                    f"{field} is {given[field]}; with heads of {still} dims that stand still and {turning} that turn it is {size}"
                )
        return {}

    def write(self, name, args):
        return {}


@dataclass(frozen=True)
class TopKMethod(Field):
    """V2's topk_method: "greedy" among all experts, or "group_limited_greedy" with n_group and topk_group."""

    def names(self, name):
        return name, "n_group", "topk_group"

    def read(self, name, given):
        method = given.get(name, "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"{name} is {method!r}; known are greedy, group_limited_greedy")
        limited = method != "greedy"
        return {"groups": given["n_group"] if limited else 1, "active_groups": given["topk_group"] if limited else 1}

    def write(self, name, args):
        limited = args["groups"] > 1
        return {name: "group_limited_greedy" if limited else "greedy", "n_group": args["groups"], "topk_group": args["active_groups"]}


def read(model: Decoder) -> dict[str, Any]:
    """The builder's arguments, of a model of latent attention and experts."""
    inner = list(sublayers(model))
    attention, feeds = first(inner, LatentAttention), inner[1::2]
    moe = first(feeds, MoE)
    r, dense = moe.router, [layer for layer in feeds if isinstance(layer, GLU)]
    found = {name: getattr(attention, name) for name in ("heads", "head_dim", "rope_dim", "value_dim", "rank", "q_rank", "mscale")}
    if attention.position:
        found |= {"theta": attention.position.theta, "scaling": attention.position.scaling, "pairs": attention.position.pairs}
    return found | dict(
        D=model.D, layers=len(feeds), vocab=model.vocab, tied=model.tied, eps=model.norm.eps, hidden=(dense or [moe.expert])[0].hidden,
        dense=len(dense), experts=r.experts, active=r.active, groups=r.groups,
        active_groups=r.active_groups, gain=r.scale, renormalize=r.renormalize, expert_hidden=moe.expert.hidden,
        shared=moe.shared.hidden // moe.expert.hidden, balance=moe.balance)  # fmt: skip


LATENT_FIELDS = {
    "num_key_value_heads": SameHeads(),
    "kv_lora_rank": Arg("rank", 512),
    "q_lora_rank": Arg("q_rank", 1536),
    "qk_nope_head_dim": Arg("head_dim", 128),
    "qk_rope_head_dim": Arg("rope_dim", 64),
    "v_head_dim": Arg("value_dim", 128),
    "qk_head_dim": Sums(),
}
_SHARED = {name: known for name, known in llama.FIELDS.items() if name not in ("num_key_value_heads", "head_dim")} | LATENT_FIELDS | {
    "rope_theta": LatentRope(),
    "moe_intermediate_size": Arg("expert_hidden"),
    "n_routed_experts": Arg("experts", other="num_experts"),
    "n_shared_experts": Arg("shared"),
    "num_experts_per_tok": Arg("active"),
    "moe_layer_freq": Only(1),
    "aux_loss_alpha": Arg("balance", 0.0),
    "seq_aux": Only(True),
    "output_router_logits": Only(False),
}  # fmt: skip
V2_FIELDS = _SHARED | {
    "vocab_size": Arg("vocab", 102_400),
    "first_k_dense_replace": Arg("dense", 0),
    "topk_method": TopKMethod(),
    "routed_scaling_factor": Arg("gain", 1.0),
    "norm_topk_prob": Only(False),
    "scoring_func": Only("softmax"),
}
V3_FIELDS = _SHARED | {
    "vocab_size": Arg("vocab", 129_280),
    "n_routed_experts": Arg("experts", 256, other="num_local_experts"),
    "n_shared_experts": Arg("shared", 1),
    "num_experts_per_tok": Arg("active", 8),
    "moe_intermediate_size": Arg("expert_hidden", 2048),
    "first_k_dense_replace": Arg("dense", 3),
    "n_group": Arg("groups", 8),
    "topk_group": Arg("active_groups", 4),
    "topk_method": Only("noaux_tc"),
    "routed_scaling_factor": Arg("gain", 2.5),
    "norm_topk_prob": Arg("renormalize", True),
    "scoring_func": Only("sigmoid"),
    "rope_interleave": Arg("pairs", "neighbours", {True: "neighbours", False: "halves"}),
}
_IN = "layers/{i}/0/inner/"
LATENT = {
    "model.layers.{i}.self_attn.q_proj.weight": (f"{_IN}q", "(n h) d -> d n h"),
    "model.layers.{i}.self_attn.q_a_proj.weight": (f"{_IN}q_down", "r d -> d r"),
    "model.layers.{i}.self_attn.q_a_layernorm.weight": (f"{_IN}q_scale", "r -> r"),
    "model.layers.{i}.self_attn.q_b_proj.weight": (f"{_IN}q_up", "(n h) r -> r n h"),
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight": ((f"{_IN}down", f"{_IN}turn"), "(r + t) d -> d r, d t"),
    "model.layers.{i}.self_attn.kv_a_layernorm.weight": (f"{_IN}scale", "r -> r", f"{_IN}turn"),
    "model.layers.{i}.self_attn.kv_b_proj.weight": ((f"{_IN}k", f"{_IN}v"), "(n (h + e)) r -> r n h, r n e", f"{_IN}turn"),
    "model.layers.{i}.self_attn.o_proj.weight": (f"{_IN}o", "d (n e) -> n e d"),
}
_MLP = "layers/{i}/1/inner/"
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if ".self_attn." not in name} | LATENT | qwen.EXPERTS | {
    "model.layers.{i}.mlp.gate.e_score_correction_bias": (f"{_MLP}router/correction", "e -> e"),
    "model.layers.{i}.mlp.shared_experts.gate_proj.weight": (f"{_MLP}shared/gate", "f d -> d f"),
    "model.layers.{i}.mlp.shared_experts.up_proj.weight": (f"{_MLP}shared/up", "f d -> d f"),
    "model.layers.{i}.mlp.shared_experts.down_proj.weight": (f"{_MLP}shared/down", "d f -> f d"),
}  # fmt: skip
V2 = {
    "v2": {},
    "v2-lite": dict(D=2048, layers=27, heads=16, hidden=10_944, q_rank=None, experts=64, expert_hidden=1408, groups=1, active_groups=1,
                    gain=1.0),
}  # fmt: skip
V3 = {"v3": {}}
# How a release was spread over machines, and of V3 how many layers guess further tokens: they are not in `transformers`' models.
_BENIGN = BENIGN | {"ep_size", "num_nextn_predict_layers", "num_mtp_layers", "auto_map"}
FAMILY = {
    "deepseek_v2": Family("deepseek_v2", "DeepseekV2ForCausalLM", deepseek_v2, V2, V2_FIELDS, WEIGHTS, benign=_BENIGN, read=read),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3ForCausalLM", deepseek_v3, V3, V3_FIELDS, WEIGHTS, benign=_BENIGN, read=read),
}
