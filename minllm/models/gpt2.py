"""GPT-2 (Radford et al. 2019, table 2): learned positions, pre-norm LayerNorm, biases everywhere, GELU in the tanh form, tied head.

Its files store matrices as (in, out), and queries, keys and values as one.
"""

from dataclasses import replace

from minllm.layers.attention import Attention
from minllm.layers.mlp import MLP, gelu, gelu_tanh, relu, silu
from minllm.layers.norm import LayerNorm
from minllm.layers.position import Learned
from minllm.layers.residual import PreNorm
from minllm.models.family import BENIGN, Arg, Family, Only
from minllm.models.transformer import Decoder, fold
from minllm.spec import FanIn


def gpt2(
    D: int = 768,
    layers: int = 12,
    heads: int = 12,
    vocab: int = 50_257,
    length: int = 1024,
    hidden: int | None = None,
    act: object = gelu_tanh,
    tied: bool = True,
    window: int | None = None,
    embed_dropout: float = 0.0,
    dropout: float = 0.0,
    weight_dropout: float = 0.0,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are GPT-2 small, without its dropout of 0.1 everywhere. length: of the table of positions. hidden: None for 4 D.
    window: tokens that every second layer sees, from the second on; None for all (GPT-3; its width of the band was not published)."""
    if D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it")
    norm, out = LayerNorm(eps), FanIn((2 * layers) ** -0.5)
    attention = Attention(heads, heads, D // heads, bias=True, out_bias=True, dropout=dropout, weight_dropout=weight_dropout, out_init=out)
    mlp = PreNorm(MLP(hidden or 4 * D, act, bias=True, dropout=dropout, out_init=out), norm)
    blocks = [(PreNorm(replace(attention, window=window if i % 2 else None), norm), mlp) for i in range(layers)]
    return Decoder(vocab, D, fold(blocks), norm, tied, position=Learned(length), dropout=embed_dropout)


FIELDS = {
    "vocab_size": Arg("vocab", 50_257),
    "n_positions": Arg("length", 1024),
    "n_embd": Arg("D", 768),
    "n_layer": Arg("layers", 12),
    "n_head": Arg("heads", 12),
    "n_inner": Arg("hidden", None),
    "activation_function": Arg("act", gelu_tanh, {"gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu, "relu": relu,
                                                  "silu": silu, "swish": silu}),
    "layer_norm_epsilon": Arg("eps", 1e-5),
    "embd_pdrop": Arg("embed_dropout", 0.1),
    "resid_pdrop": Arg("dropout", 0.1),
    "attn_pdrop": Arg("weight_dropout", 0.1),
    "tie_word_embeddings": Arg("tied", True),
    "scale_attn_weights": Only(True),
    "scale_attn_by_inverse_layer_idx": Only(False),
    "reorder_and_upcast_attn": Only(False),
    "add_cross_attention": Only(False),
}  # fmt: skip
_QKV = ("layers/{i}/0/inner/q", "layers/{i}/0/inner/k", "layers/{i}/0/inner/v")
WEIGHTS = {
    "transformer.wte.weight": ("embed", "v d -> v d"),
    "transformer.wpe.weight": ("position/table", "t d -> t d"),
    "transformer.h.{i}.ln_1.weight": ("layers/{i}/0/norm/scale", "d -> d"),
    "transformer.h.{i}.ln_1.bias": ("layers/{i}/0/norm/bias", "d -> d"),
    "transformer.h.{i}.attn.c_attn.weight": (_QKV, "d (n h + n h + n h) -> d n h, d n h, d n h"),
    "transformer.h.{i}.attn.c_attn.bias": (tuple(f"{path}_bias" for path in _QKV), "(n h + n h + n h) -> n h, n h, n h"),
    "transformer.h.{i}.attn.c_proj.weight": ("layers/{i}/0/inner/o", "(n h) d -> n h d"),
    "transformer.h.{i}.attn.c_proj.bias": ("layers/{i}/0/inner/o_bias", "d -> d"),
    "transformer.h.{i}.ln_2.weight": ("layers/{i}/1/norm/scale", "d -> d"),
    "transformer.h.{i}.ln_2.bias": ("layers/{i}/1/norm/bias", "d -> d"),
    "transformer.h.{i}.mlp.c_fc.weight": ("layers/{i}/1/inner/up", "d f -> d f"),
    "transformer.h.{i}.mlp.c_fc.bias": ("layers/{i}/1/inner/up_bias", "f -> f"),
    "transformer.h.{i}.mlp.c_proj.weight": ("layers/{i}/1/inner/down", "f d -> f d"),
    "transformer.h.{i}.mlp.c_proj.bias": ("layers/{i}/1/inner/down_bias", "d -> d"),
    "transformer.ln_f.weight": ("norm/scale", "d -> d"),
    "transformer.ln_f.bias": ("norm/bias", "d -> d"),
    "lm_head.weight": ("head", "v d -> d v"),
}
PRESETS = {
    "small": {},
    "medium": dict(D=1024, layers=24, heads=16),
    "large": dict(D=1280, layers=36, heads=20),
    "xl": dict(D=1600, layers=48, heads=25),
}
# What only the classes with other heads read, and the length under an older name.
_BENIGN = BENIGN | {"n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
                    "task_specific_params"}  # fmt: skip
_MASKS = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")
FAMILY = {"gpt2": Family("gpt2", "GPT2LMHeadModel", gpt2, PRESETS, FIELDS, WEIGHTS, "transformer.", _MASKS, _BENIGN)}
