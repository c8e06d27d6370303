"""Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Llama 3: arXiv 2407.21783, table 3).

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.
"""

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, silu
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Llama3Scaling, Rope, Scaling
from minllm.layers.residual import PreNorm
from minllm.layers.stack import Stack
from minllm.models.family import Arg, Family, Only, RopeFields
from minllm.models.transformer import Decoder
from minllm.spec import FanIn


def llama3(
    D: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = 8,
    hidden: int = 14_336,
    vocab: int = 128_256,
    theta: float = 500_000.0,
    scaling: Scaling | None = Llama3Scaling(),
    head_dim: int | None = None,
    window: int | None = None,
    tied: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-5,
) -> Decoder:
    """A Llama of any generation; the defaults are Llama 3.1 8B. kv_heads: None for as many as heads, head_dim: None for D / heads.
    `dropout` is of the embeddings and of each layer's output."""
    if head_dim is None and D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it, or give head_dim")
    norm, out_init = RMSNorm(eps), FanIn((2 * layers) ** -0.5)  # the residual stream's variance does not grow with depth
    H, rope = head_dim or D // heads, Rope(theta, scaling)
    attention = Attention(heads, kv_heads or heads, H, rope, window=window, dropout=dropout, out_init=out_init)
    block = (PreNorm(attention, norm), PreNorm(GLU(hidden, silu, dropout=dropout, out_init=out_init), norm))
    return Decoder(vocab, D, trunk=(Stack(block, layers),), norm=norm, tied=tied, dropout=dropout)


FIELDS = {
    "vocab_size": Arg("vocab", 32_000),
    "hidden_size": Arg("D"),
    "num_hidden_layers": Arg("layers"),
    "num_attention_heads": Arg("heads"),
    "num_key_value_heads": Arg("kv_heads", None),
    "head_dim": Arg("head_dim", None),
    "intermediate_size": Arg("hidden"),
    "rms_norm_eps": Arg("eps", 1e-6),
    "rope_theta": RopeFields(),
    "tie_word_embeddings": Arg("tied", False),
    "hidden_act": Only("silu", ("swish",)),
    "attention_bias": Only(False),
    "mlp_bias": Only(False),
    "attention_dropout": Only(0.0),
}
WEIGHTS = {
    "model.embed_tokens.weight": ("embed", "v d -> v d"),
    "model.layers.{i}.self_attn.q_proj.weight": ("layers/{i}/0/inner/q", "(n h) d -> d n h"),
    "model.layers.{i}.self_attn.k_proj.weight": ("layers/{i}/0/inner/k", "(k h) d -> d k h"),
    "model.layers.{i}.self_attn.v_proj.weight": ("layers/{i}/0/inner/v", "(k h) d -> d k h"),
    "model.layers.{i}.self_attn.o_proj.weight": ("layers/{i}/0/inner/o", "d (n h) -> n h d"),
    "model.layers.{i}.mlp.gate_proj.weight": ("layers/{i}/1/inner/gate", "f d -> d f"),
    "model.layers.{i}.mlp.up_proj.weight": ("layers/{i}/1/inner/up", "f d -> d f"),
    "model.layers.{i}.mlp.down_proj.weight": ("layers/{i}/1/inner/down", "d f -> f d"),
    "model.layers.{i}.input_layernorm.weight": ("layers/{i}/0/norm/scale", "d -> d"),
    "model.layers.{i}.post_attention_layernorm.weight": ("layers/{i}/1/norm/scale", "d -> d"),
    "model.norm.weight": ("norm/scale", "d -> d"),
    "lm_head.weight": ("head", "v d -> d v"),
}
_LLAMA2 = dict(layers=32, heads=32, kv_heads=None, hidden=11_008, vocab=32_000, theta=10_000.0, scaling=None)
_LLAMA1 = _LLAMA2 | dict(eps=1e-6)
PRESETS = {
    "8b": {},
    "70b": dict(D=8192, layers=80, heads=64, hidden=28_672),
    "405b": dict(D=16_384, layers=126, heads=128, hidden=53_248),
    "1b": dict(D=2048, layers=16, hidden=8192, scaling=Llama3Scaling(factor=32.0), tied=True),
    "3b": dict(D=3072, layers=28, heads=24, hidden=8192, scaling=Llama3Scaling(factor=32.0), tied=True),
    "3.0-8b": dict(scaling=None),
    "3.0-70b": dict(D=8192, layers=80, heads=64, hidden=28_672, scaling=None),
    "2-7b": _LLAMA2,
    "2-13b": _LLAMA2 | dict(D=5120, layers=40, heads=40, hidden=13_824),
    "2-70b": _LLAMA2 | dict(D=8192, layers=80, heads=64, kv_heads=8, hidden=28_672),
    "1-7b": _LLAMA1,
    "1-13b": _LLAMA1 | dict(D=5120, layers=40, heads=40, hidden=13_824),
    "1-33b": _LLAMA1 | dict(D=6656, layers=60, heads=52, hidden=17_920),
    "1-65b": _LLAMA1 | dict(D=8192, layers=80, heads=64, hidden=22_016),
    "mini": dict(D=256, layers=6, heads=8, kv_heads=4, hidden=704, vocab=512, theta=10_000.0, scaling=None, tied=True),
}
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
FAMILY = {"llama": Family("llama", "LlamaForCausalLM", llama3, PRESETS, FIELDS, WEIGHTS, ignored=IGNORED)}
