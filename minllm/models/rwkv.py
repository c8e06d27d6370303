"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048, section 3 and table 2): time mixing and channel mixing in pre-norm blocks, and a norm right
after the embeddings.
"""

from typing import Any

from minllm.layers.norm import LayerNorm
from minllm.layers.residual import PreNorm
from minllm.layers.rwkv import ChannelMix, TimeMix
from minllm.layers.stack import Stack
from minllm.models.family import BENIGN, Arg, Family, sublayers
from minllm.models.transformer import Decoder
from minllm.spec import FanIn


def rwkv4(
    D: int = 768,
    layers: int = 12,
    inner: int | None = None,
    hidden: int | None = None,
    vocab: int = 50_277,
    tied: bool = False,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are RWKV-4 169M. inner: channels of the recurrence, None for D; hidden: of channel mixing, None for 4 D."""
    norm, out = LayerNorm(eps), FanIn((2 * layers) ** -0.5)
    block = PreNorm(TimeMix(inner or D, out), norm), PreNorm(ChannelMix(hidden or 4 * D, out), norm)
    return Decoder(vocab, D, (Stack(block, layers),), norm, tied, embed_norm=norm)


def _read(model: Decoder) -> dict[str, Any]:
    time, channel, *rest = sublayers(model)
    return dict(D=model.D, layers=1 + len(rest) // 2, inner=time.inner, hidden=channel.hidden, vocab=model.vocab, tied=model.tied,
                eps=model.norm.eps)  # fmt: skip


FIELDS = {
    "vocab_size": Arg("vocab", 50_277),
    "hidden_size": Arg("D", 4096),
    "num_hidden_layers": Arg("layers", 32),
    "attention_hidden_size": Arg("inner", None),
    "intermediate_size": Arg("hidden", None),
    "layer_norm_epsilon": Arg("eps", 1e-5),
    "tie_word_embeddings": Arg("tied", False),
}
_TIME, _CHANNEL = "rwkv.blocks.{i}.attention.", "rwkv.blocks.{i}.feed_forward."
_MIX, _FEED = "layers/{i}/0/inner/", "layers/{i}/1/inner/"
_LETTER = {"key": "k", "value": "v", "receptance": "r"}
WEIGHTS = {
    "rwkv.embeddings.weight": ("embed", "v d -> v d"),
    **{f"rwkv.blocks.0.pre_ln.{w}": (f"embed_norm/{ours}", "d -> d") for w, ours in (("weight", "scale"), ("bias", "bias"))},
    **{f"rwkv.blocks.{{i}}.ln{k + 1}.{w}": (f"layers/{{i}}/{k}/norm/{ours}", "d -> d")
       for k in (0, 1) for w, ours in (("weight", "scale"), ("bias", "bias"))},
    **{f"{_TIME}time_mix_{w}": (f"{_MIX}mix/{ours}", "1 1 d -> d") for w, ours in _LETTER.items()},
    **{f"{_TIME}{w}.weight": (f"{_MIX}{ours}", "f d -> d f") for w, ours in _LETTER.items()},
    f"{_TIME}time_decay": (f"{_MIX}decay", "f -> f"),
    f"{_TIME}time_first": (f"{_MIX}first", "f -> f"),
    f"{_TIME}output.weight": (f"{_MIX}o", "d f -> f d"),
    **{f"{_CHANNEL}time_mix_{w}": (f"{_FEED}mix/{_LETTER[w]}", "1 1 d -> d") for w in ("key", "receptance")},
    **{f"{_CHANNEL}{w}.weight": (f"{_FEED}{ours}", "f d -> d f") for w, ours in _LETTER.items()},
    "rwkv.ln_out.weight": ("norm/scale", "d -> d"),
    "rwkv.ln_out.bias": ("norm/bias", "d -> d"),
    "head.weight": ("head", "v d -> d v"),
}  # fmt: skip
PRESETS = {
    "169m": {},
    "430m": dict(D=1024, layers=24),
    "1.5b": dict(D=2048, layers=24),
    "3b": dict(D=2560, layers=32),
    "7b": dict(D=4096, layers=32),
    "14b": dict(D=5120, layers=40),
}
# How far training went, and how often float16 inference halves the stream so that it does not overflow.
_BENIGN = BENIGN | {"context_length", "rescale_every"}
FAMILY = {"rwkv": Family("rwkv", "RwkvForCausalLM", rwkv4, PRESETS, FIELDS, WEIGHTS, prefix="rwkv.", benign=_BENIGN, read=_read)}
