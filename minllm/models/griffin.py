"""Griffin (De et al. 2024, arXiv 2402.19427, section 2) as released: RecurrentGemma (Botev et al. 2024, arXiv 2404.07839, table 1).

Of three layers two are gated linear recurrences and one is attention with one key head over a window, half of each head turning; Gemma's
norms, gated feed-forward layers, scaled embeddings and capped logits, with biases in the layers.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from minllm.layers.attention import Attention
from minllm.layers.lru import RGLRU
from minllm.layers.mlp import GLU, gelu_tanh
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope, Scaling
from minllm.layers.residual import PreNorm
from minllm.models import llama
from minllm.models.family import BENIGN, Arg, Divides, Family, Field, Only, RopeFields, arguments, first, sublayers
from minllm.models.transformer import Decoder, fold


def recurrent_gemma(
    D: int = 2560,
    layers: int = 26,
    heads: int = 10,
    kv_heads: int | None = 1,
    hidden: int = 7680,
    vocab: int = 256_000,
    inner: int | None = None,
    conv: int = 4,
    window: int = 2048,
    recurrent: tuple[bool, ...] | None = None,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    fraction: float = 0.5,
    softcap: float | None = 30.0,
    tied: bool = True,
    eps: float = 1e-6,
) -> Decoder:
    """The defaults are RecurrentGemma 2B. inner: channels of the recurrences, None for D. recurrent: which layers are recurrences; None
    for all but every third. fraction: of a head's dims, those that turn."""
    if D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it")
    norm = RMSNorm(eps, unit_offset=True)
    attention = Attention(heads, kv_heads or heads, D // heads, Rope(theta, scaling, fraction), window=window, out_bias=True)
    lru, glu = RGLRU(inner or D, heads, conv), GLU(hidden, gelu_tanh, bias=True)
    recurrent = recurrent or tuple((i + 1) % 3 > 0 for i in range(layers))
    blocks = [(PreNorm(lru if one else attention, norm), PreNorm(glu, norm)) for one in recurrent]
    scale = float(np.asarray(D**0.5, jnp.bfloat16))  # the release has it in bfloat16, whatever the rest is
    return Decoder(vocab, D, fold(blocks), norm, tied, softcap, scale)


@dataclass(frozen=True)
class BlockTypes(Field):
    """block_types: kinds of layers, again and again from the first."""

    def names(self, name):
        return name, f"_{name}"

    def read(self, name, given):
        types = given.get(name) or given.get(f"_{name}") or ["recurrent", "recurrent", "attention"]
        if strange := set(types) - {"recurrent", "attention"}:
            raise ValueError(f"{name} has {min(strange)!r}; supported are recurrent and attention")
        return {"recurrent": tuple(types[i % len(types)] == "recurrent" for i in range(given["num_hidden_layers"]))}

    def write(self, name, args):
        return {name: ["recurrent" if one else "attention" for one in args["recurrent"]]}


@dataclass(frozen=True)
class BothWidths(Field):
    """intermediate_size: of the gate and the other branch together."""

    def read(self, name, given):
        if given[name] % 2:
            raise ValueError(f"{name} is {given[name]}; it counts two branches of equal width, so it is even")
        return {"hidden": given[name] // 2}

    def write(self, name, args):
        return {name: 2 * args["hidden"]}


def _read(model: Decoder) -> dict[str, Any]:
    mixers = list(sublayers(model))[::2]
    lru = first(mixers, RGLRU)
    recurrent = tuple(isinstance(layer, RGLRU) for layer in mixers)
    return arguments(model) | dict(layers=len(mixers), recurrent=recurrent, inner=lru.inner, conv=lru.conv)


FIELDS = {name: known for name, known in llama.FIELDS.items() if name not in ("hidden_act", "mlp_bias")} | {
    "vocab_size": Arg("vocab", 256_000),
    "head_dim": Divides(),
    "intermediate_size": BothWidths(),
    "lru_width": Arg("inner", None),
    "attention_window_size": Arg("window", 2048, other="sliding_window"),
    "conv1d_width": Arg("conv", 4),
    "logits_soft_cap": Arg("softcap", 30.0),
    "rope_theta": RopeFields(fraction=0.5),
    "block_types": BlockTypes(),
    "tie_word_embeddings": Arg("tied", True),
    "hidden_activation": Only("gelu_pytorch_tanh"),
    "embeddings_scale_by_sqrt_dim": Only(True),
}
_IN, _MLP = "layers/{i}/0/inner/", "layers/{i}/1/inner/"
_MIX, _FEED = "model.layers.{i}.temporal_block.", "model.layers.{i}.mlp_block."
_LRU = f"{_IN}rate"
WEIGHTS = {
    "model.embed_tokens.weight": ("embed", "v d -> v d"),
    "model.layers.{i}.temporal_pre_norm.weight": ("layers/{i}/0/norm/scale", "d -> d"),
    "model.layers.{i}.channel_pre_norm.weight": ("layers/{i}/1/norm/scale", "d -> d"),
    "model.final_norm.weight": ("norm/scale", "d -> d"),
    "lm_head.weight": ("head", "v d -> d v"),
    f"{_MIX}q_proj.weight": (f"{_IN}q", "(n h) d -> d n h"),
    f"{_MIX}k_proj.weight": (f"{_IN}k", "(n h) d -> d n h"),
    f"{_MIX}v_proj.weight": (f"{_IN}v", "(n h) d -> d n h"),
    f"{_MIX}o_proj.weight": (f"{_IN}o", "d (n h) -> n h d"),
    f"{_MIX}o_proj.bias": (f"{_IN}o_bias", "d -> d"),
    f"{_MIX}linear_x.weight": (f"{_IN}x", "f d -> d f"),
    f"{_MIX}linear_x.bias": (f"{_IN}x_bias", "f -> f"),
    f"{_MIX}linear_y.weight": (f"{_IN}gate", "f d -> d f", _LRU),
    f"{_MIX}linear_y.bias": (f"{_IN}gate_bias", "f -> f"),
    f"{_MIX}linear_out.weight": (f"{_IN}down", "d f -> f d"),
    f"{_MIX}linear_out.bias": (f"{_IN}down_bias", "d -> d"),
    f"{_MIX}conv_1d.weight": (f"{_IN}conv", "f 1 w -> w f"),
    f"{_MIX}conv_1d.bias": (f"{_IN}conv_bias", "f -> f"),
    f"{_MIX}rg_lru.recurrent_param": (_LRU, "f -> f"),
    **{f"{_MIX}rg_lru.{theirs}_gate_weight": (f"{_IN}{ours}/weight", "n h g -> n h g")
       for theirs, ours in (("input", "input"), ("recurrent", "forget"))},
    **{f"{_MIX}rg_lru.{theirs}_gate_bias": (f"{_IN}{ours}/bias", "n h -> n h")
       for theirs, ours in (("input", "input"), ("recurrent", "forget"))},
    **{f"{_FEED}{w}_proj.weight": (f"{_MLP}{w}", "f d -> d f") for w in ("gate", "up")},
    f"{_FEED}down_proj.weight": (f"{_MLP}down", "d f -> f d"),
    **{f"{_FEED}{w}_proj.bias": (f"{_MLP}{w}_bias", "f -> f") for w in ("gate", "up", "down")},
}  # fmt: skip
PRESETS = {
    "2b": {},
    "9b": dict(D=4096, layers=38, heads=16, hidden=12_288),
}
_BENIGN = BENIGN | {"w_init_variance_scale", "final_w_init_variance_scale"}
FAMILY = {
    "recurrent_gemma": Family(
        "recurrent_gemma", "RecurrentGemmaForCausalLM", recurrent_gemma, PRESETS, FIELDS, WEIGHTS, benign=_BENIGN, read=_read
    )
}
