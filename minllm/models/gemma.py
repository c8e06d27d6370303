"""Gemma (2024, arXiv 2403.08295, table 1), Gemma 2 (2024, arXiv 2408.00118, table 1) and the text models of Gemma 3 (2025, arXiv
2503.19786, section 2).

All: gains stored less one, embeddings times sqrt(D), GEGLU, tied head, wide heads. Gemma 2 adds a norm after each layer, soft caps on
scores and logits, and a window in every second layer. Gemma 3 has query and key norms in place of the caps, five layers with a window to
one without, and another theta in each kind.
"""

from dataclasses import replace

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, gelu_tanh
from minllm.layers.norm import RMSNorm
from minllm.layers.position import LinearScaling, Rope, Scaling
from minllm.layers.residual import PreNorm, SandwichNorm
from minllm.models import llama, qwen
from minllm.models.family import Arg, Family, LayerTypes, Only, QueryScale, TwoRopes
from minllm.models.transformer import Decoder, fold


def gemma(
    D: int = 3072,
    layers: int = 28,
    heads: int = 16,
    kv_heads: int | None = 16,
    hidden: int = 24_576,
    vocab: int = 256_000,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    head_dim: int = 256,
    tied: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Gemma 7B."""
    attention = Attention(heads, kv_heads or heads, head_dim, Rope(theta, scaling), dropout=dropout)
    block = tuple(PreNorm(layer, RMSNorm(eps, unit_offset=True)) for layer in (attention, GLU(hidden, gelu_tanh, dropout=dropout)))
    return Decoder(vocab, D, fold([block] * layers), block[0].norm, tied, embed_scale=D**0.5, dropout=dropout)


def gemma2(
    D: int = 2304,
    layers: int = 26,
    heads: int = 8,
    kv_heads: int | None = 4,
    hidden: int = 9216,
    vocab: int = 256_000,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    head_dim: int = 256,
    scale: float = 256**-0.5,
    window: int | None = 4096,
    windowed: tuple[bool, ...] | None = None,
    score_softcap: float | None = 50.0,
    softcap: float | None = 30.0,
    tied: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Gemma 2 2B. windowed: which layers look at `window` tokens only; None for every second, from the first."""
    whole = Attention(heads, kv_heads or heads, head_dim, Rope(theta, scaling), scale=scale, softcap=score_softcap, dropout=dropout)
    local = replace(whole, window=window)
    blocks = _sandwiches(whole, local, windowed or _periodic(layers, 2), GLU(hidden, gelu_tanh, dropout=dropout), eps)
    return Decoder(vocab, D, fold(blocks), blocks[0][0].norm, tied, softcap, D**0.5, dropout=dropout)


def gemma3(
    D: int = 1152,
    layers: int = 26,
    heads: int = 4,
    kv_heads: int | None = 1,
    hidden: int = 6912,
    vocab: int = 262_144,
    theta: float = 1e6,
    local_theta: float = 10_000.0,
    scaling: Scaling | None = None,
    head_dim: int = 256,
    scale: float = 256**-0.5,
    window: int | None = 512,
    windowed: tuple[bool, ...] | None = None,
    score_softcap: float | None = None,
    softcap: float | None = None,
    tied: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are Gemma 3 1B. windowed: which layers look at `window` tokens only, with `local_theta`; None for all but every
    sixth. scaling: of the others."""
    norm = RMSNorm(eps, unit_offset=True)
    whole = Attention(heads, kv_heads or heads, head_dim, Rope(theta, scaling), qk_norm=norm, scale=scale, softcap=score_softcap,
                      dropout=dropout)  # fmt: skip
    local = replace(whole, window=window, position=Rope(local_theta))
    blocks = _sandwiches(whole, local, windowed or _periodic(layers, 6), GLU(hidden, gelu_tanh, dropout=dropout), eps)
    return Decoder(vocab, D, fold(blocks), norm, tied, softcap, D**0.5, dropout=dropout)


def _periodic(layers, period):
    return tuple((i + 1) % period > 0 for i in range(layers))


def _sandwiches(whole, local, windowed, glu, eps):
    around = lambda layer: SandwichNorm(layer, RMSNorm(eps, unit_offset=True))
    return [(around(local if narrow else whole), around(glu)) for narrow in windowed]


_SHARED = {name: known for name, known in llama.FIELDS.items() if name not in ("hidden_act", "mlp_bias")} | {
    "tie_word_embeddings": Arg("tied", True),
    "use_bidirectional_attention": Only(False, (None,)),
}
FIELDS = _SHARED | {
    "vocab_size": Arg("vocab", 256_000),
    "num_key_value_heads": Arg("kv_heads", 16),
    "head_dim": Arg("head_dim", 256),
    "hidden_act": Only("gelu_pytorch_tanh", ("gelu",)),  # the first configs said gelu and meant the tanh form
    "hidden_activation": Only("gelu_pytorch_tanh", (None,)),
}
FIELDS2 = _SHARED | {
    "vocab_size": Arg("vocab", 256_000),
    "num_key_value_heads": Arg("kv_heads", 4),
    "head_dim": Arg("head_dim", 256),
    "hidden_activation": Only("gelu_pytorch_tanh"),
    "hidden_act": Only("gelu_pytorch_tanh"),
    "query_pre_attn_scalar": QueryScale(256.0),
    "sliding_window": Arg("window", 4096),
    "layer_types": LayerTypes(2),
    "final_logit_softcapping": Arg("softcap", 30.0),
    "attn_logit_softcapping": Arg("score_softcap", 50.0),
}
FIELDS3 = FIELDS2 | {
    "vocab_size": Arg("vocab", 262_208),
    "rope_theta": TwoRopes(1e6, 10_000.0),
    "layer_types": LayerTypes(6),
    "final_logit_softcapping": Arg("softcap", None),
    "attn_logit_softcapping": Arg("score_softcap", None),
}
SANDWICH = {
    "model.layers.{i}.post_attention_layernorm.weight": ("layers/{i}/0/outer_norm/scale", "d -> d"),
    "model.layers.{i}.pre_feedforward_layernorm.weight": ("layers/{i}/1/norm/scale", "d -> d"),
    "model.layers.{i}.post_feedforward_layernorm.weight": ("layers/{i}/1/outer_norm/scale", "d -> d"),
}
GEMMA = {"7b": {}, "2b": dict(D=2048, layers=18, heads=8, kv_heads=1, hidden=16_384)}
GEMMA2 = {
    "2b": {},
    "9b": dict(D=3584, layers=42, heads=16, kv_heads=8, hidden=14_336),
    "27b": dict(D=4608, layers=46, heads=32, kv_heads=16, hidden=36_864, head_dim=128, scale=144**-0.5),
}
_LONG = dict(window=1024, vocab=262_208, scaling=LinearScaling(8.0))
GEMMA3 = {
    "1b": {},
    "270m": dict(D=640, layers=18, hidden=2048),
    "4b": _LONG | dict(D=2560, layers=34, heads=8, kv_heads=4, hidden=10_240),
    "12b": _LONG | dict(D=3840, layers=48, heads=16, kv_heads=8, hidden=15_360),
    "27b": _LONG | dict(D=5376, layers=62, heads=32, kv_heads=16, hidden=21_504, head_dim=128, scale=168**-0.5),
}
FAMILY = {
    "gemma": Family("gemma", "GemmaForCausalLM", gemma, GEMMA, FIELDS, llama.WEIGHTS),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", gemma2, GEMMA2, FIELDS2, llama.WEIGHTS | SANDWICH),
    "gemma3_text": Family("gemma3_text", "Gemma3ForCausalLM", gemma3, GEMMA3, FIELDS3, llama.WEIGHTS | SANDWICH | qwen.QK_NORMS),
}
