"""OLMo 2 (2025, arXiv 2501.00656, section 3.1 and table 1): norms after each layer, inside the residual branch, and one norm over all
heads' queries, one over all keys."""

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, silu
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling
from minllm.layers.residual import ReorderedNorm
from minllm.models import llama, qwen
from minllm.models.family import Arg, Family, Only
from minllm.models.transformer import Decoder, fold


def olmo2(
    D: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    hidden: int = 11_008,
    vocab: int = 100_352,
    theta: float = 500_000.0,
    scaling: Scaling | None = None,
    tied: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are OLMo 2 7B."""
    norm = RMSNorm(eps)
    attention = Attention(heads, kv_heads or heads, D // heads, Rope(theta, scaling), qk_norm=norm, qk_norm_flat=True, dropout=dropout)
    block = (ReorderedNorm(attention, norm), ReorderedNorm(GLU(hidden, silu, dropout=dropout), norm))
    return Decoder(vocab, D, fold([block] * layers), norm, tied, dropout=dropout)


FIELDS = {name: known for name, known in llama.FIELDS.items() if name not in ("head_dim", "mlp_bias")} | {
    "vocab_size": Arg("vocab", 50_304),
    "rms_norm_eps": Arg("eps", 1e-5),
    "attention_bias": Only(False),
}
WEIGHTS = (
    {name: row for name, row in llama.WEIGHTS.items() if "input_layernorm" not in name}
    | qwen.QK_NORMS
    | {
        "model.layers.{i}.post_attention_layernorm.weight": ("layers/{i}/0/norm/scale", "d -> d"),
        "model.layers.{i}.post_feedforward_layernorm.weight": ("layers/{i}/1/norm/scale", "d -> d"),
    }
)
PRESETS = {
    "7b": {},
    "1b": dict(D=2048, layers=16, heads=16, hidden=8192),
    "13b": dict(D=5120, layers=40, heads=40, hidden=13_824),
    "32b": dict(D=5120, layers=64, heads=40, kv_heads=8, hidden=27_648),
}
FAMILY = {"olmo2": Family("olmo2", "Olmo2ForCausalLM", olmo2, PRESETS, FIELDS, WEIGHTS)}
