"""Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Llama 3: arXiv 2407.21783, table 3).

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.
"""

from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, silu
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Llama3Scaling, Rope, Scaling
from minllm.layers.residual import PreNorm
from minllm.layers.stack import Stack
from minllm.models.transformer import Decoder
from minllm.spec import FanIn


def llama3(
    D: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
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
    """A Llama of any generation; the defaults are Llama 3.1 8B. `dropout` is of the embeddings and of each layer's output."""
    if head_dim is None and D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it, or give head_dim")
    norm, out_init = RMSNorm(eps), FanIn((2 * layers) ** -0.5)  # the residual stream's variance does not grow with depth
    attention = Attention(heads, kv_heads, head_dim or D // heads, Rope(theta, scaling), window=window, dropout=dropout, out_init=out_init)
    block = (PreNorm(attention, norm), PreNorm(GLU(hidden, silu, dropout=dropout, out_init=out_init), norm))
    return Decoder(vocab, D, trunk=(Stack(block, layers),), norm=norm, tied=tied, dropout=dropout)


BUILDER = llama3
PRESETS = {
    "8b": {},
    "70b": dict(D=8192, layers=80, heads=64, hidden=28_672),
    "405b": dict(D=16_384, layers=126, heads=128, hidden=53_248),
    "1b": dict(D=2048, layers=16, hidden=8192, scaling=Llama3Scaling(factor=32.0), tied=True),
    "mini": dict(D=256, layers=6, heads=8, kv_heads=4, hidden=704, vocab=512, theta=10_000.0, scaling=None, tied=True),
}
