"""Mistral (Jiang et al. 2023, arXiv 2310.06825, table 1): Llama with a sliding window. Later releases look at everything again."""

from minllm.layers.position import Scaling
from minllm.models import llama
from minllm.models.family import Arg, Family
from minllm.models.transformer import Decoder


def mistral(
    D: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = 8,
    hidden: int = 14_336,
    vocab: int = 32_000,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    head_dim: int | None = None,
    window: int | None = 4096,
    tied: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are Mistral 7B v0.1. window: None for the later releases."""
    return llama.llama3(D, layers, heads, kv_heads, hidden, vocab, theta, scaling, head_dim, window, tied, dropout, eps)


FIELDS = {
    **{name: known for name, known in llama.FIELDS.items() if name not in ("attention_bias", "mlp_bias")},
    "num_key_value_heads": Arg("kv_heads", 8),
    "sliding_window": Arg("window", 4096),
}
PRESETS = {
    "7b": {},
    "7b-v0.2": dict(theta=1e6, window=None),
    "7b-v0.3": dict(vocab=32_768, theta=1e6, window=None),
    "nemo": dict(D=5120, layers=40, head_dim=128, vocab=131_072, theta=1e6, window=None),
}
FAMILY = {"mistral": Family("mistral", "MistralForCausalLM", mistral, PRESETS, FIELDS, llama.WEIGHTS, ignored=llama.IGNORED)}
