"""Every layer and model, once. Each law in `tests/laws` runs over this list, so a new layer gets causality, split decoding, packing,
sharding, remat and precision tests by one line here.

An exception is a reason in words: `causal="sees the whole row"`. The law then asserts the opposite, so that a wrong exception fails too.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from minllm import spec
from minllm.layer import Context, Layer
from minllm.layers.attention import Attention
from minllm.layers.dropout import Dropout
from minllm.layers.mlp import GLU, MLP, XIELU, Swish, gelu_quick, gelu_tanh, identity, mish, relu, relu2, silu
from minllm.layers.norm import LayerNorm, RMSNorm
from minllm.layers.position import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from minllm.layers.residual import Parallel, PostNorm, PreNorm, ReorderedNorm, SandwichNorm
from minllm.layers.stack import Stack
from minllm.models.llama import llama3
from minllm.models.transformer import Decoder
from minllm_kernels.mask import Causal, Dilated, Full, Global, Prefix, Window

D = 32


@dataclass(frozen=True)
class Example:
    """
    causal, rows_independent, splits, packs: True, or the reason why not.
    no_gradient: parameters (ends of their paths) that the loss cannot reach, each with its reason.
    """

    layer: Layer | Decoder
    causal: bool | str = True
    rows_independent: bool | str = True
    splits: bool | str = True
    packs: bool | str = True
    no_gradient: tuple[tuple[str, str], ...] = ()

    @cached_property
    def specs(self):
        return self.layer.params() if isinstance(self.layer, Decoder) else self.layer.params(D)

    def params(self, dtype=jnp.float32):
        return spec.init(self.specs, jax.random.key(1), dtype)

    def inputs(self, B, T, dtype=jnp.float32, seed=2):
        key = jax.random.key(seed)
        if isinstance(self.layer, Decoder):
            return jax.random.randint(key, (B, T), 0, self.layer.vocab)
        return jax.random.normal(key, (B, T, D), dtype)

    def cache(self, B, S, dtype=jnp.float32):
        specs = self.layer.cache(B, S, dtype) if isinstance(self.layer, Decoder) else self.layer.cache(D, B, S, dtype)
        return spec.init(specs, jax.random.key(0))

    def apply(self, p, x, cache=None, **ctx):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return self.layer.apply(p, x, Context(**{"positions": positions, **ctx}), cache)


def attention(**fields):
    return Attention(**{"heads": 4, "kv_heads": 2, "head_dim": 8, "position": Rope(), **fields})


WHOLE = "sees the whole row"
EXAMPLES = {
    # norms and feed-forward layers
    "rms_norm": Example(RMSNorm()),
    "rms_norm_offset": Example(RMSNorm(unit_offset=True)),
    "layer_norm": Example(LayerNorm()),
    "layer_norm_no_bias": Example(LayerNorm(bias=False, unit_offset=True)),
    "dropout": Example(Dropout(0.1)),
    "mlp_gelu_bias": Example(MLP(48, bias=True, dropout=0.1)),
    **{f"mlp_{name}": Example(MLP(48, act)) for name, act in dict(relu=relu, gelu_tanh=gelu_tanh, gelu_quick=gelu_quick, mish=mish,
                                                                   relu2=relu2, xielu=XIELU(), swish=Swish(1.5)).items()},
    "swiglu": Example(GLU(48, silu, dropout=0.1)),
    "bilinear": Example(GLU(48, identity)),
    "clamped_swiglu": Example(GLU(48, Swish(1.702), limit=7.0, shift=1.0)),
    # attention
    "mha": Example(attention(kv_heads=4, bias=True, out_bias=True)),
    "gqa": Example(attention()),
    "mqa": Example(attention(kv_heads=1, weight_dropout=0.1)),
    "nope": Example(attention(position=None)),
    "qk_norm": Example(attention(qk_norm=RMSNorm())),
    "qk_norm_flat": Example(attention(qk_norm=RMSNorm(), qk_norm_flat=True)),
    "softcap": Example(attention(softcap=2.0, scale=0.5)),
    "window": Example(attention(window=5)),
    "dilated": Example(attention(mask=Causal() & Dilated(2))),
    "prefix": Example(attention(mask=Causal() | Prefix(6)), causal="the prefix sees itself both ways",
                      splits="a prefix must come in one piece"),
    "bidirectional": Example(attention(mask=Full()), causal=WHOLE, splits=WHOLE),
    "local_global": Example(attention(mask=Window(3, 3) | Global(1)), causal="windows look both ways", splits="windows look both ways"),
    **{f"rope_{name}": Example(attention(position=rope)) for name, rope in dict(
        neighbours=Rope(pairs="neighbours"),
        partial=Rope(fraction=0.5),
        linear=Rope(scaling=LinearScaling(4.0)),
        llama3=Rope(500_000.0, Llama3Scaling(original=16)),
        yarn=Rope(scaling=YarnScaling(4.0, 16)),
    ).items()},
    "rope_dynamic": Example(attention(position=Rope(scaling=DynamicNTKScaling(2.0, 8))),
                            rows_independent="the base follows the longest row", splits="keys keep the base they were written with",
                            packs="the base follows the longest document"),
    "rope_long": Example(attention(position=Rope(scaling=LongRopeScaling((1.0,) * 4, (4.0,) * 4, 4.0, 8))),
                         rows_independent="the factors follow the longest row", splits="keys keep the factors they were written with",
                         packs="the factors follow the longest document"),
    # around the residual stream
    "pre_norm": Example(PreNorm(attention())),
    "post_norm": Example(PostNorm(attention(), LayerNorm())),
    "sandwich_norm": Example(SandwichNorm(attention(), RMSNorm(unit_offset=True))),
    "reordered_norm": Example(ReorderedNorm(attention())),
    "parallel": Example(Parallel((attention(), GLU(48, dropout=0.1)))),
    "parallel_own_norms": Example(Parallel((attention(), MLP(48)), LayerNorm(), shared=False)),
    # depth
    "stack": Example(Stack((PreNorm(attention(dropout=0.1)), PreNorm(GLU(48))), 3)),
    "local_global_stack": Example(Stack((PreNorm(attention(window=4)), PreNorm(GLU(48)), PreNorm(attention()), PreNorm(GLU(48))), 2)),
    # models
    "llama": Example(llama3(D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64)),
    "llama_tied_dropout": Example(llama3(D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64, tied=True, dropout=0.1)),
    "gemma_like": Example(Decoder(
        64, 32, (Stack((SandwichNorm(attention(window=4)), SandwichNorm(GLU(48, gelu_tanh)), SandwichNorm(attention())), 1),),
        tied=True, softcap=30.0, embed_scale=32**0.5)),
}  # fmt: skip
