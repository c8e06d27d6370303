"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv 2407.10671, table 1; arXiv 2412.15115) and Qwen 3 (2025, arXiv 2505.09388, tables 1 and 2).

Llama's block; Qwen 2 adds biases to q, k and v, Qwen 3 has none and normalises each head's queries and keys. Both can be told to look at
a window only, from some layer on. The MoE models choose 8 of 128 small experts by a softmax over all, renormalised over the chosen.
"""

from dataclasses import replace

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling
from minllm.layers.residual import PreNorm
from minllm.models import llama
from minllm.models.family import BENIGN, Arg, BalanceLoss, Family, LateWindow, Only, SparseLayers
from minllm.models.transformer import Decoder, fold
from minllm.spec import FanIn


def qwen2(
    D: int = 3584,
    layers: int = 28,
    heads: int = 28,
    kv_heads: int | None = 4,
    hidden: int = 18_944,
    vocab: int = 152_064,
    theta: float = 1e6,
    scaling: Scaling | None = None,
    window: int | None = None,
    windowed: tuple[bool, ...] | None = None,
    tied: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Qwen2.5 7B. windowed: which layers look at `window` tokens only; None for all, if there is a window."""
    attention = Attention(heads, kv_heads or heads, D // heads, Rope(theta, scaling), bias=True)
    return _decoder(attention, D, layers, hidden, vocab, window, windowed, tied, dropout, eps)


def qwen3(
    D: int = 4096,
    layers: int = 36,
    heads: int = 32,
    kv_heads: int | None = 8,
    hidden: int = 12_288,
    vocab: int = 151_936,
    theta: float = 1e6,
    scaling: Scaling | None = None,
    head_dim: int = 128,
    window: int | None = None,
    windowed: tuple[bool, ...] | None = None,
    bias: bool = False,
    tied: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Qwen3 8B. bias: on every product of attention, which no release has."""
    attention = Attention(heads, kv_heads or heads, head_dim, Rope(theta, scaling), qk_norm=RMSNorm(eps), bias=bias, out_bias=bias)
    return _decoder(attention, D, layers, hidden, vocab, window, windowed, tied, dropout, eps)


def qwen3_moe(
    D: int = 2048,
    layers: int = 48,
    heads: int = 32,
    kv_heads: int | None = 4,
    hidden: int = 6144,
    vocab: int = 151_936,
    experts: int = 128,
    active: int = 8,
    expert_hidden: int = 768,
    renormalize: bool = True,
    sparse: tuple[bool, ...] | None = None,
    theta: float = 1e6,
    scaling: Scaling | None = None,
    head_dim: int | None = 128,
    bias: bool = False,
    balance: float = 0.008,
    tied: bool = False,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Qwen3 30B-A3B. sparse: which layers have experts, the others a GLU of `hidden`; None for all.
    balance: see `MoE`; 0.008 is 0.001 for each of the eight choices."""
    norm, out = RMSNorm(eps), FanIn((2 * layers) ** -0.5)
    attention = Attention(heads, kv_heads or heads, head_dim or D // heads, Rope(theta, scaling), qk_norm=norm, bias=bias, out_bias=bias,
                          out_init=out)  # fmt: skip
    dense = GLU(hidden, silu, out_init=out)
    moe = MoE(Router(experts, active, renormalize=renormalize), GLU(expert_hidden, silu, out_init=out), balance=balance)
    blocks = [(PreNorm(attention, norm), PreNorm(moe if one else dense, norm)) for one in sparse or (True,) * layers]
    return Decoder(vocab, D, fold(blocks), norm, tied)


def _decoder(attention, D, layers, hidden, vocab, window, windowed, tied, dropout, eps):
    norm, out_init = RMSNorm(eps), FanIn((2 * layers) ** -0.5)
    glu = PreNorm(GLU(hidden, silu, dropout=dropout, out_init=out_init), norm)
    blocks = []
    for narrow in windowed or (window is not None,) * layers:
        own = replace(attention, window=window if narrow else None, dropout=dropout, out_init=out_init)
        blocks.append((PreNorm(own, norm), glu))
    return Decoder(vocab, D, fold(blocks), norm, tied, dropout=dropout)


_SHARED = {name: known for name, known in llama.FIELDS.items() if name not in ("attention_bias", "mlp_bias", "head_dim")} | {
    "vocab_size": Arg("vocab", 151_936),
    "sliding_window": LateWindow(),
}
QWEN2_FIELDS = _SHARED | {"attention_bias": Only(True)}
QWEN3_FIELDS = _SHARED | {"head_dim": Arg("head_dim", 128), "attention_bias": Arg("bias", False)}
_MOE = {name: known for name, known in QWEN3_FIELDS.items() if name != "sliding_window"} | {
    "head_dim": Arg("head_dim", None),
    "use_sliding_window": Only(False),
    "num_experts": Arg("experts", 128, other="num_local_experts"),
    "num_experts_per_tok": Arg("active", 8),
    "moe_intermediate_size": Arg("expert_hidden", 768),
    "intermediate_size": Arg("hidden", 6144),
    "norm_topk_prob": Arg("renormalize", False),
    "mlp_only_layers": SparseLayers(),
    "router_aux_loss_coef": BalanceLoss(8),
}
BIASES = {
    "model.layers.{i}.self_attn.q_proj.bias": ("layers/{i}/0/inner/q_bias", "(n h) -> n h"),
    "model.layers.{i}.self_attn.k_proj.bias": ("layers/{i}/0/inner/k_bias", "(k h) -> k h"),
    "model.layers.{i}.self_attn.v_proj.bias": ("layers/{i}/0/inner/v_bias", "(k h) -> k h"),
    "model.layers.{i}.self_attn.o_proj.bias": ("layers/{i}/0/inner/o_bias", "d -> d"),
}
QK_NORMS = {
    "model.layers.{i}.self_attn.q_norm.weight": ("layers/{i}/0/inner/q_norm/scale", "h -> h"),
    "model.layers.{i}.self_attn.k_norm.weight": ("layers/{i}/0/inner/k_norm/scale", "h -> h"),
}
EXPERTS = {
    "model.layers.{i}.mlp.gate.weight": ("layers/{i}/1/inner/router/weight", "e d -> d e"),
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": ("layers/{i}/1/inner/experts/gate", "f d -> d f"),
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": ("layers/{i}/1/inner/experts/up", "f d -> d f"),
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": ("layers/{i}/1/inner/experts/down", "d f -> f d"),
}
QWEN2 = {
    "7b": {},
    "0.5b": dict(D=896, layers=24, heads=14, kv_heads=2, hidden=4864, vocab=151_936, tied=True),
    "1.5b": dict(D=1536, layers=28, heads=12, kv_heads=2, hidden=8960, vocab=151_936, tied=True),
    "3b": dict(D=2048, layers=36, heads=16, kv_heads=2, hidden=11_008, vocab=151_936, tied=True),
    "14b": dict(D=5120, layers=48, heads=40, kv_heads=8, hidden=13_824, eps=1e-5),
    "32b": dict(D=5120, layers=64, heads=40, kv_heads=8, hidden=27_648, eps=1e-5),
    "72b": dict(D=8192, layers=80, heads=64, kv_heads=8, hidden=29_568, eps=1e-5),
}
QWEN3 = {
    "8b": {},
    "0.6b": dict(D=1024, layers=28, heads=16, hidden=3072, tied=True),
    "1.7b": dict(D=2048, layers=28, heads=16, hidden=6144, tied=True),
    "4b": dict(D=2560, layers=36, heads=32, hidden=9728, tied=True),
    "14b": dict(D=5120, layers=40, heads=40, hidden=17_408),
    "32b": dict(D=5120, layers=64, heads=64, hidden=25_600),
}
QWEN3_MOE = {
    "30b-a3b": {},
    "235b-a22b": dict(D=4096, layers=94, heads=64, kv_heads=4, hidden=12_288, expert_hidden=1536),
}
_NO_WINDOW = BENIGN | {"sliding_window", "max_window_layers"}  # what use_sliding_window = false switches off
FAMILY = {
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", qwen2, QWEN2, QWEN2_FIELDS, llama.WEIGHTS | BIASES),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", qwen3, QWEN3, QWEN3_FIELDS, llama.WEIGHTS | BIASES | QK_NORMS),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe, QWEN3_MOE, _MOE, llama.WEIGHTS | BIASES | QK_NORMS | EXPERTS, benign=_NO_WINDOW
    ),
}
