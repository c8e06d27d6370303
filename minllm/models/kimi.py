"""Kimi Linear (Moonshot AI 2025, arXiv 2510.26692, sections 3 and 4): of four layers three are Kimi delta attention and one is latent
attention without positions; after the first layer, DeepSeek-V3's mixture of experts, 8 of 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minllm.layers.delta import KimiDeltaAttention
from minllm.layers.latent import LatentAttention
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.residual import PreNorm
from minllm.models import deepseek, llama, mixtral
from minllm.models.family import BENIGN, Arg, Family, Field, Only, first, sublayers
from minllm.models.transformer import Decoder, fold


def kimi_linear(
    D: int = 2304,
    layers: int = 27,
    heads: int = 32,
    hidden: int = 9216,
    vocab: int = 163_840,
    delta_heads: int = 32,
    delta_dim: int = 128,
    conv: int = 4,
    linear: tuple[bool, ...] | None = None,
    head_dim: int = 128,
    rope_dim: int = 64,
    value_dim: int = 128,
    rank: int = 512,
    q_rank: int | None = None,
    sparse: tuple[bool, ...] | None = None,
    experts: int = 256,
    active: int = 8,
    shared: int = 1,
    expert_hidden: int = 1024,
    groups: int = 1,
    active_groups: int = 1,
    gain: float = 2.446,
    renormalize: bool = True,
    balance: float = 0.0001,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are Kimi-Linear-48B-A3B. linear: which layers are delta attention; None for all but every fourth and the last.
    sparse: which have experts; None for all but the first. rope_dim: key dims that all heads share; here they do not turn.
    Other arguments: see `deepseek_v3`."""
    norm = RMSNorm(eps)
    latent = LatentAttention(heads, head_dim, rope_dim, value_dim, rank, q_rank, position=None)
    delta = KimiDeltaAttention(delta_heads, delta_heads, delta_dim, conv=conv, eps=eps)
    router = Router(experts, active, "sigmoid", renormalize, gain, groups, active_groups, group_top=2, correction=True)
    moe, dense = deepseek.mixture(router, expert_hidden, shared, balance), GLU(hidden, silu)
    linear = linear or tuple((i + 1) % 4 > 0 and i + 1 < layers for i in range(layers))
    sparse = sparse or tuple(i > 0 for i in range(layers))
    blocks = [(PreNorm(delta if one else latent, norm), PreNorm(moe if many else dense, norm))
              for one, many in zip(linear, sparse, strict=True)]  # fmt: skip
    return Decoder(vocab, D, fold(blocks), norm)


@dataclass(frozen=True)
class Kinds(Field):
    """A list of two kinds of layers, as a tuple of whether it is the first of them."""

    arg: str
    kinds: tuple[str, str]

    def read(self, name, given):
        return {} if given.get(name) is None else {self.arg: self.which(name, given[name], given["num_hidden_layers"])}

    def which(self, name: str, types: Sequence[str], layers: int) -> tuple[bool, ...]:
        if strange := set(types) - set(self.kinds):
            raise ValueError(f"{name} has {min(strange)!r}; supported are {' and '.join(self.kinds)}")
        if len(types) != layers:
            raise ValueError(f"{name} has {len(types)} entries for {layers} layers")
        return tuple(one == self.kinds[0] for one in types)

    def write(self, name, args):
        return {name: [self.kinds[0] if one else self.kinds[1] for one in args[self.arg]]}


@dataclass(frozen=True)
class Experts(Kinds):
    """mlp_layer_types; without it, first_k_dense_replace layers have none."""

    def names(self, name):
        return name, "first_k_dense_replace"

    def read(self, name, given):
        first = given.get("first_k_dense_replace", 1)
        return super().read(name, given) or {self.arg: tuple(i >= first for i in range(given["num_hidden_layers"]))}


@dataclass(frozen=True)
class Deltas(Kinds):
    """layer_types and the shape of delta attention; the release says both in linear_attn_config, where layers count from 1."""

    def names(self, name):
        return name, "linear_attn_config", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"

    def read(self, name, given):
        sub, layers = dict(given.get("linear_attn_config") or {}), given["num_hidden_layers"]
        found = dict(delta_dim=sub.pop("head_dim", given.get("linear_head_dim", 128)),
                     delta_heads=sub.pop("num_heads", given.get("linear_num_heads", 32)),
                     conv=sub.pop("short_conv_kernel_size", given.get("linear_conv_kernel_dim", 4)))  # fmt: skip
        full, delta = sub.pop("full_attn_layers", None), sub.pop("kda_layers", None)
        if sub:
            raise ValueError(f"linear_attn_config has unknown keys: {', '.join(sub)}")
        said = None
        if full is not None and delta is not None:
            if sorted([*full, *delta]) != list(range(1, layers + 1)):
                raise ValueError(f"full_attn_layers and kda_layers of linear_attn_config must name each of {layers} layers once, from 1 on")
            said = tuple(i + 1 in delta for i in range(layers))
        listed = super().read(name, given).get(self.arg, said)
        if said is not None and listed != said:
            raise ValueError(f"{name} and linear_attn_config differ in which layers are delta attention; leave one out")
        return found | {self.arg: tuple(i == 0 or i % 4 > 0 for i in range(layers)) if listed is None else listed}

    def write(self, name, args):
        at = {kind: [i + 1 for i, one in enumerate(args[self.arg]) if one == kind] for kind in (True, False)}
        sub = {"head_dim": args["delta_dim"], "num_heads": args["delta_heads"], "short_conv_kernel_size": args["conv"],
               "kda_layers": at[True], "full_attn_layers": at[False]}  # fmt: skip
        shape = {"linear_head_dim": args["delta_dim"], "linear_num_heads": args["delta_heads"], "linear_conv_kernel_dim": args["conv"]}
        return super().write(name, args) | shape | {"linear_attn_config": sub}


def _read(model: Decoder) -> dict[str, Any]:
    inner = list(sublayers(model))
    delta = first(inner, KimiDeltaAttention)
    linear = tuple(isinstance(layer, KimiDeltaAttention) for layer in inner[::2])
    sparse = tuple(isinstance(layer, MoE) for layer in inner[1::2])
    return deepseek.read(model) | dict(linear=linear, sparse=sparse, delta_heads=delta.heads, delta_dim=delta.head_dim, conv=delta.conv)


_LLAMA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "attention_bias", "attention_dropout")
FIELDS = {name: llama.FIELDS[name] for name in _LLAMA} | {
    **{name: known for name, known in deepseek.LATENT_FIELDS.items() if name != "qk_head_dim"},
    "vocab_size": Arg("vocab", 163_840),
    "intermediate_size": Arg("hidden", 9216),
    "rms_norm_eps": Arg("eps", 1e-5),
    "q_lora_rank": Arg("q_rank", None),
    "mla_use_nope": Only(True),
    "rope_scaling": Only(None),
    "layer_types": Deltas("linear", ("linear_attention", "full_attention")),
    "mlp_layer_types": Experts("sparse", ("sparse", "dense")),
    "moe_intermediate_size": Arg("expert_hidden", 1024),
    "moe_layer_freq": Only(1),
    "moe_router_activation_func": Only("sigmoid"),
    "moe_renormalize": Arg("renormalize", True, other="norm_topk_prob"),
    "num_experts": Arg("experts", 256, other="num_local_experts"),
    "num_experts_per_token": Arg("active", 8, other="num_experts_per_tok"),
    "num_shared_experts": Arg("shared", 1, other="n_shared_experts"),
    "num_expert_group": Arg("groups", 1, other="n_group"),
    "topk_group": Arg("active_groups", 1),
    "use_grouped_topk": Only(True),
    "routed_scaling_factor": Arg("gain", 2.446),
    "output_router_logits": Only(False),
    "tie_word_embeddings": Only(False),
}  # fmt: skip
_IN, _MLP = "layers/{i}/0/inner/", "layers/{i}/1/inner/"
_DELTA = f"{_IN}q_conv"
_SELF, _MOE = "model.layers.{i}.self_attn.", "model.layers.{i}.block_sparse_moe."
WEIGHTS = (
    {name: row for name, row in mixtral.WEIGHTS.items() if ".self_attn." not in name}
    | {name: row for name, row in llama.WEIGHTS.items() if ".mlp." in name}
    | deepseek.LATENT
    | {
        f"{_SELF}k_proj.weight": (f"{_IN}k", "(n h) d -> d n h", _DELTA),
        f"{_SELF}v_proj.weight": (f"{_IN}v", "(n h) d -> d n h", _DELTA),
        **{f"{_SELF}{w}_conv1d.weight": (f"{_IN}{w}_conv", "(n h) 1 w -> w n h") for w in "qkv"},
        f"{_SELF}f_a_proj.weight": (f"{_IN}decay/down", "r d -> d r"),
        f"{_SELF}f_b_proj.weight": (f"{_IN}decay/up", "(n h) r -> r n h"),
        f"{_SELF}dt_bias": (f"{_IN}decay/bias", "(n h) -> n h"),
        f"{_SELF}A_log": (f"{_IN}decay/rate", "1 1 n 1 -> n"),
        f"{_SELF}b_proj.weight": (f"{_IN}beta", "n d -> d n"),
        f"{_SELF}g_a_proj.weight": (f"{_IN}gate/down", "r d -> d r"),
        f"{_SELF}g_b_proj.weight": (f"{_IN}gate/up", "(n h) r -> r n h"),
        f"{_SELF}o_norm.weight": (f"{_IN}scale", "h -> h", _DELTA),
        f"{_MOE}gate.e_score_correction_bias": (f"{_MLP}router/correction", "e -> e"),
        **{f"{_MOE}shared_experts.{w}_proj.weight": (f"{_MLP}shared/{w}", "f d -> d f") for w in ("gate", "up")},
        f"{_MOE}shared_experts.down_proj.weight": (f"{_MLP}shared/down", "d f -> f d"),
    }
)
PRESETS = {"48b-a3b": {}}
# head_dim and rope_theta belong to positions that nothing has; qk_head_dim is a sum of two others
_BENIGN = BENIGN | {"model_max_length", "num_nextn_predict_layers", "rope_theta", "head_dim", "qk_head_dim", "auto_map"}
# `transformers` gives dense layers the name of mixtures when it writes
_RENAMED = tuple((f"{_MOE}{w}_proj.weight", f"model.layers.{{i}}.mlp.{w}_proj.weight") for w in ("gate", "up", "down"))
FAMILY = {
    "kimi_linear": Family(
        "kimi_linear", "KimiLinearForCausalLM", kimi_linear, PRESETS, FIELDS, WEIGHTS, renamed=_RENAMED, benign=_BENIGN, read=_read
    )
}
