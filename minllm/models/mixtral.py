"""Mixtral (Jiang et al. 2024, arXiv 2401.04088, table 1): a Mistral whose feed-forward layers are mixtures of eight SwiGLU experts, two
for each token, weighed by a softmax over the two logits.
"""

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling
from minllm.layers.residual import PreNorm
from minllm.layers.stack import Stack
from minllm.models import llama, mistral
from minllm.models.family import Arg, BalanceLoss, Family, Only
from minllm.models.transformer import Decoder
from minllm.spec import FanIn


def mixtral(
    D: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = 8,
    hidden: int = 14_336,
    vocab: int = 32_000,
    experts: int = 8,
    active: int = 2,
    theta: float = 1_000_000.0,
    scaling: Scaling | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    balance: float = 0.02,
    z_loss: float = 0.0,
    capacity: float | None = None,
    group: int = 1,
    tied: bool = False,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are 8x7B. `balance` times `MoE`'s balance loss (0.02, of two choices a token, is 0.01 in Switch's count of one)."""
    if head_dim is None and D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it, or give head_dim")
    norm, out_init = RMSNorm(eps), FanIn((2 * layers) ** -0.5)
    attention = Attention(heads, kv_heads or heads, head_dim or D // heads, Rope(theta, scaling), window=window, out_init=out_init)
    moe = MoE(Router(experts, active), GLU(hidden, silu, out_init=out_init), capacity=capacity, group=group, balance=balance, z_loss=z_loss)
    return Decoder(vocab, D, trunk=(Stack((PreNorm(attention, norm), PreNorm(moe, norm)), layers),), norm=norm, tied=tied)


FIELDS = mistral.FIELDS | {
    "rms_norm_eps": Arg("eps", 1e-5),
    "sliding_window": Arg("window", None),
    "num_local_experts": Arg("experts", 8, other="num_experts"),
    "num_experts_per_tok": Arg("active", 2),
    "router_aux_loss_coef": BalanceLoss(2),
    "router_jitter_noise": Only(0.0),
}
ATTENTION = {name: row for name, row in llama.WEIGHTS.items() if ".mlp." not in name}
WEIGHTS = ATTENTION | {
    "model.layers.{i}.block_sparse_moe.gate.weight": ("layers/{i}/1/inner/router/weight", "e d -> d e"),
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": ("layers/{i}/1/inner/experts/gate", "f d -> d f"),
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight": ("layers/{i}/1/inner/experts/up", "f d -> d f"),
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight": ("layers/{i}/1/inner/experts/down", "d f -> f d"),
}
PRESETS = {
    "8x7b": {},
    "8x22b": dict(D=6144, layers=56, heads=48, hidden=16_384, vocab=32_768),
}
FAMILY = {"mixtral": Family("mixtral", "MixtralForCausalLM", mixtral, PRESETS, FIELDS, WEIGHTS, ignored=llama.IGNORED)}
