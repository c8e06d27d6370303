"""Qwen3-Next (Qwen team 2025, the model card of Qwen3-Next-80B-A3B): of four layers three are gated delta nets and one is attention, whose
output is gated and whose heads turn by a quarter; each is followed by 10 of 512 small experts and a shared one with a gate of its own.
"""

from dataclasses import dataclass
from typing import Any

from minllm.layers.attention import Attention
from minllm.layers.delta import GatedDeltaNet
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling
from minllm.layers.residual import PreNorm
from minllm.models import llama, qwen
from minllm.models.family import Arg, BalanceLoss, Family, Field, Only, RopeFields, SparseLayers, arguments, first, sublayers
from minllm.models.transformer import Decoder, fold
from minllm.spec import FanIn


def qwen3_next(
    D: int = 2048,
    layers: int = 48,
    heads: int = 16,
    kv_heads: int | None = 2,
    head_dim: int = 256,
    hidden: int = 5120,
    vocab: int = 151_936,
    delta_heads: int = 32,
    delta_kv_heads: int = 16,
    delta_dim: int = 128,
    value_dim: int = 128,
    conv: int = 4,
    linear: tuple[bool, ...] | None = None,
    experts: int = 512,
    active: int = 10,
    expert_hidden: int = 512,
    shared_hidden: int = 512,
    renormalize: bool = True,
    sparse: tuple[bool, ...] | None = None,
    theta: float = 1e7,
    scaling: Scaling | None = None,
    fraction: float = 0.25,
    balance: float = 0.01,
    tied: bool = False,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Qwen3-Next 80B-A3B. linear: which layers are delta nets, of delta_heads value heads; None for all but every
    fourth. sparse: which have experts, the others a GLU of `hidden`; None for all. fraction: of a head's dims, those that turn."""
    norm, out = RMSNorm(eps, unit_offset=True), FanIn((2 * layers) ** -0.5)
    attention = Attention(heads, kv_heads or heads, head_dim, Rope(theta, scaling, fraction), qk_norm=norm, gate=True, out_init=out)
    delta = GatedDeltaNet(delta_heads, delta_kv_heads, delta_dim, value_dim, conv=conv, eps=eps, out_init=out)
    moe = MoE(Router(experts, active, renormalize=renormalize), GLU(expert_hidden, silu, out_init=out),
              shared=GLU(shared_hidden, silu, out_init=out), shared_gate=True, balance=balance)  # fmt: skip
    dense = GLU(hidden, silu, out_init=out)
    linear = linear or tuple((i + 1) % 4 > 0 for i in range(layers))
    blocks = [(PreNorm(delta if one else attention, norm), PreNorm(moe if many else dense, norm))
              for one, many in zip(linear, sparse or (True,) * layers, strict=True)]  # fmt: skip
    return Decoder(vocab, D, fold(blocks), norm, tied)


@dataclass(frozen=True)
class LinearLayers(Field):
    """layer_types: which layers are delta nets; without it, all but each full_attention_interval-th."""

    def names(self, name):
        return name, "full_attention_interval"

    def read(self, name, given):
        types, layers, period = given.get(name), given["num_hidden_layers"], given.get("full_attention_interval", 4)
        if types is None:
            return {"linear": tuple((i + 1) % period > 0 for i in range(layers))}
        if strange := set(types) - {"linear_attention", "full_attention"}:
            raise ValueError(f"{name} has {min(strange)!r}; supported are linear_attention and full_attention")
        if len(types) != layers:
            raise ValueError(f"{name} has {len(types)} entries for {layers} layers")
        return {"linear": tuple(one == "linear_attention" for one in types)}

    def write(self, name, args):
        return {name: ["linear_attention" if one else "full_attention" for one in args["linear"]]}


def _read(model: Decoder) -> dict[str, Any]:
    inner = list(sublayers(model))
    mixers, feeds = inner[::2], inner[1::2]
    delta = first(mixers, GatedDeltaNet)
    shared = first(feeds, MoE).shared
    linear, sparse = (tuple(isinstance(layer, kind) for layer in part) for part, kind in ((mixers, GatedDeltaNet), (feeds, MoE)))
    return arguments(model) | dict(
        layers=len(mixers), linear=linear, sparse=sparse, delta_heads=delta.heads, delta_kv_heads=delta.kv_heads,
        delta_dim=delta.head_dim, value_dim=delta.value_dim, conv=delta.conv, shared_hidden=shared.hidden)  # fmt: skip


FIELDS = {name: known for name, known in llama.FIELDS.items() if name != "mlp_bias"} | {
    "vocab_size": Arg("vocab", 151_936),
    "num_key_value_heads": Arg("kv_heads", 2),
    "head_dim": Arg("head_dim", 256),
    "intermediate_size": Arg("hidden", 5632),
    "rope_theta": RopeFields(fraction=0.25),
    "layer_types": LinearLayers(),
    "linear_conv_kernel_dim": Arg("conv", 4),
    "linear_key_head_dim": Arg("delta_dim", 128),
    "linear_value_head_dim": Arg("value_dim", 128),
    "linear_num_key_heads": Arg("delta_kv_heads", 16),
    "linear_num_value_heads": Arg("delta_heads", 32),
    "num_experts": Arg("experts", 512, other="num_local_experts"),
    "num_experts_per_tok": Arg("active", 10),
    "moe_intermediate_size": Arg("expert_hidden", 512),
    "shared_expert_intermediate_size": Arg("shared_hidden", 512),
    "norm_topk_prob": Arg("renormalize", True),
    "mlp_only_layers": SparseLayers(),
    "router_aux_loss_coef": BalanceLoss(10),
    "attention_bias": Only(False),
}
_IN, _DELTA = "layers/{i}/0/inner/", "layers/{i}/0/inner/decay/rate"
_OF = ".self_attn."
WEIGHTS = (
    {name: row if _OF not in name else (*row, f"{_IN}q_norm/scale") for name, row in llama.WEIGHTS.items()}
    | qwen.QK_NORMS
    | qwen.EXPERTS
    | {
        # each head's gate follows its queries
        "model.layers.{i}.self_attn.q_proj.weight": (
            (f"{_IN}q", f"{_IN}gate"), "(n (h + h)) d -> d n h, d n h", f"{_IN}q_norm/scale"),
        # q, k, v and the gate of one key head after the other
        "model.layers.{i}.linear_attn.in_proj_qkvz.weight": (
            (f"{_IN}q", f"{_IN}k", f"{_IN}v", f"{_IN}gate"),
            "(k (h + h + g e + g e)) d -> d k h, d k h, d (k g) e, d (k g) e", _DELTA),
        "model.layers.{i}.linear_attn.conv1d.weight": (
            (f"{_IN}q_conv", f"{_IN}k_conv", f"{_IN}v_conv"), "(k h + k h + n e) 1 w -> w k h, w k h, w n e"),
        "model.layers.{i}.linear_attn.dt_bias": (f"{_IN}decay/bias", "n -> n"),
        "model.layers.{i}.linear_attn.A_log": (_DELTA, "n -> n"),
        "model.layers.{i}.linear_attn.norm.weight": (f"{_IN}scale", "e -> e"),
        "model.layers.{i}.linear_attn.out_proj.weight": (f"{_IN}o", "d (n e) -> n e d", _DELTA),
        "model.layers.{i}.mlp.shared_expert.gate_proj.weight": ("layers/{i}/1/inner/shared/gate", "f d -> d f"),
        "model.layers.{i}.mlp.shared_expert.up_proj.weight": ("layers/{i}/1/inner/shared/up", "f d -> d f"),
        "model.layers.{i}.mlp.shared_expert.down_proj.weight": ("layers/{i}/1/inner/shared/down", "d f -> f d"),
        "model.layers.{i}.mlp.shared_expert_gate.weight": ("layers/{i}/1/inner/shared_gate", "o d -> d o"),
    }
)  # fmt: skip


def _rows(model: Decoder) -> dict:
    """A key head's gates of its value heads stand together, and their number is not in the shape of the gates."""
    delta = first(sublayers(model), GatedDeltaNet)
    group = delta.heads // delta.kv_heads
    ours = "k" if group == 1 else f"(k {group})"
    both = (f"{_IN}beta", f"{_IN}decay/weight"), f"(k ({group} + {group})) d -> d {ours}, d {ours}"
    return WEIGHTS | {"model.layers.{i}.linear_attn.in_proj_ba.weight": both}


PRESETS = {"80b-a3b": {}}
# The release holds a layer that guesses a second token; like `transformers`, we leave it out.
_GUESS = ("mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight",
          "mtp.layers.{i}.linear_attn.in_proj_ba.weight",
          *(name.replace("model", "mtp").replace("{e}", "{i}") for name in WEIGHTS if "layers" in name))  # fmt: skip
FAMILY = {"qwen3_next": Family("qwen3_next", "Qwen3NextForCausalLM", qwen3_next, PRESETS, FIELDS, _rows, ignored=_GUESS, read=_read)}
