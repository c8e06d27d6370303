"""Jamba (Lieber et al. 2024, arXiv 2403.19887, section 3 and figure 1): of eight layers seven are Mamba and one is attention without
positions; every second feed-forward layer is a mixture of experts, two for each token, weighed by a softmax over all.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.residual import PreNorm
from minllm.layers.ssm import Mamba
from minllm.models import llama
from minllm.models.family import BENIGN, Arg, BalanceLoss, Divides, Family, Only, arguments, first, sublayers
from minllm.models.mamba import Expand, StepRank, mixer_rows
from minllm.models.transformer import Decoder, fold
from minllm.spec import FanIn


def jamba(
    D: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = 8,
    hidden: int = 14_336,
    vocab: int = 65_536,
    experts: int = 16,
    active: int = 2,
    period: int = 8,
    offset: int = 4,
    expert_period: int = 2,
    expert_offset: int = 1,
    inner: int | None = None,
    state: int = 16,
    rank: int | None = None,
    conv: int = 4,
    balance: float = 0.002,
    tied: bool = False,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Jamba v0.1. Of each `period` layers that with number `offset` is attention; experts alike. inner, rank: see
    `mamba`."""
    if D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it")
    norm, out = RMSNorm(eps), FanIn((2 * layers) ** -0.5)
    attention = Attention(heads, kv_heads or heads, D // heads, out_init=out)
    mamba = Mamba(inner or 2 * D, state, rank or ceil(D / 16), conv, norm, out)
    dense = GLU(hidden, silu, out_init=out)
    moe = MoE(Router(experts, active, renormalize=False), dense, balance=balance) if experts > 1 else dense
    mixers = (attention if i % period == offset else mamba for i in range(layers))
    feeds = (moe if i % expert_period == expert_offset else dense for i in range(layers))
    blocks = [(PreNorm(mixer, norm), PreNorm(feed, norm)) for mixer, feed in zip(mixers, feeds)]
    return Decoder(vocab, D, fold(blocks), norm, tied)


def _every(which: Sequence[bool]) -> tuple[int, int]:
    """(period, offset) of what recurs; a period longer than the model for what does not."""
    at = [i for i, one in enumerate(which) if one] + 2 * [len(which)]
    return (at[1] - at[0] if at[1] < len(which) else len(which) + 1), at[0]


def _read(model: Decoder) -> dict[str, Any]:
    inner = list(sublayers(model))
    mixers, feeds = inner[::2], inner[1::2]
    mamba = first(mixers, Mamba)
    period, offset = _every([isinstance(layer, Attention) for layer in mixers])
    expert_period, expert_offset = _every([isinstance(layer, MoE) for layer in feeds])
    return arguments(model) | dict(
        layers=len(mixers), period=period, offset=offset, expert_period=expert_period, expert_offset=expert_offset, inner=mamba.inner,
        state=mamba.state, rank=mamba.rank, conv=mamba.conv, tied=model.tied)  # fmt: skip


FIELDS = {name: known for name, known in llama.FIELDS.items() if name not in ("rope_theta", "attention_bias", "mlp_bias")} | {
    "vocab_size": Arg("vocab", 65_536),
    "num_key_value_heads": Arg("kv_heads", 8),
    "head_dim": Divides(),
    "num_experts": Arg("experts", 16, other="num_local_experts"),
    "num_experts_per_tok": Arg("active", 2),
    "attn_layer_period": Arg("period", 8),
    "attn_layer_offset": Arg("offset", 4),
    "expert_layer_period": Arg("expert_period", 2),
    "expert_layer_offset": Arg("expert_offset", 1),
    "mamba_d_state": Arg("state", 16),
    "mamba_d_conv": Arg("conv", 4),
    "mamba_expand": Expand(),
    "mamba_dt_rank": StepRank(),
    "mamba_conv_bias": Only(True),
    "mamba_proj_bias": Only(False),
    "mamba_inner_layernorms": Only(True),
    "sliding_window": Only(None),
    "router_aux_loss_coef": BalanceLoss(2),
}
_FEED = "model.layers.{i}.feed_forward."
_EXPERTS = "layers/{i}/1/inner/experts/"
WEIGHTS = (
    {name.replace("post_attention", "pre_ff").replace(".mlp.", ".feed_forward.").replace("model.norm", "model.final_layernorm"): row
     for name, row in llama.WEIGHTS.items()}
    | mixer_rows("model.layers.{i}.mamba", "layers/{i}/0/inner/")
    | {
        "model.layers.{i}.mamba.dt_layernorm.weight": ("layers/{i}/0/inner/norm/step/scale", "r -> r"),
        "model.layers.{i}.mamba.b_layernorm.weight": ("layers/{i}/0/inner/norm/into/scale", "s -> s"),
        "model.layers.{i}.mamba.c_layernorm.weight": ("layers/{i}/0/inner/norm/out/scale", "s -> s"),
        f"{_FEED}router.weight": ("layers/{i}/1/inner/router/weight", "e d -> d e"),
        **{f"{_FEED}experts.{{e}}.{w}_proj.weight": (f"{_EXPERTS}{w}", "f d -> d f") for w in ("gate", "up")},
        f"{_FEED}experts.{{e}}.down_proj.weight": (f"{_EXPERTS}down", "d f -> f d"),
    }
)  # fmt: skip
PRESETS = {
    "v0.1": {},
    "1.5-large": dict(D=8192, layers=72, heads=64, hidden=24_576),
}
_BENIGN = BENIGN | {"use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "calc_logits_for_entire_prompt"}
FAMILY = {"jamba": Family("jamba", "JambaForCausalLM", jamba, PRESETS, FIELDS, WEIGHTS, benign=_BENIGN, read=_read)}
