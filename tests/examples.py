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
from minllm.layers.conv import ShortConv
from minllm.layers.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from minllm.layers.dropout import Dropout
from minllm.layers.feature import Elu, Exp, Favor, Hedgehog, Relu, Taylor
from minllm.layers.latent import LatentAttention
from minllm.layers.linear import GatedLinearAttention, Lightning, LinearAttention, Retention
from minllm.layers.lru import RGLRU, MinGRU, MinLSTM
from minllm.layers.mlp import GLU, MLP, XIELU, Swish, gelu_quick, gelu_tanh, identity, mish, relu, relu2, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.norm import GroupNorm, LayerNorm, RMSNorm
from minllm.layers.position import (
    Alibi,
    AxialRope,
    Buckets,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Sinusoidal,
    YarnScaling,
)
from minllm.layers.relative import ShawAttention, XLAttention
from minllm.layers.residual import DeepNorm, Parallel, PostNorm, PreNorm, ReorderedNorm, SandwichNorm
from minllm.layers.rwkv import ChannelMix, TimeMix
from minllm.layers.ssm import Mamba, Mamba2
from minllm.layers.stack import Stack
from minllm.models.gpt2 import gpt2
from minllm.models.llama import llama3
from minllm.models.mixtral import mixtral
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
    "group_norm": Example(GroupNorm(4)),
    "dropout": Example(Dropout(0.1)),
    "mlp_gelu_bias": Example(MLP(48, bias=True, dropout=0.1)),
    **{f"mlp_{name}": Example(MLP(48, act)) for name, act in dict(relu=relu, gelu_tanh=gelu_tanh, gelu_quick=gelu_quick, mish=mish,
                                                                   relu2=relu2, xielu=XIELU(), swish=Swish(1.5)).items()},
    "swiglu": Example(GLU(48, silu, dropout=0.1)),
    "bilinear": Example(GLU(48, identity)),
    "clamped_swiglu": Example(GLU(48, Swish(1.702), limit=7.0, shift=1.0)),
    # mixtures of experts
    "moe": Example(MoE(Router(4, 2), GLU(24), balance=0.01, z_loss=0.001, dropout=0.1)),
    "moe_shared": Example(MoE(Router(4, 2, renormalize=False), GLU(24), shared=GLU(16), shared_gate=True)),
    "moe_groups": Example(MoE(Router(8, 3, "sigmoid", scale=2.5, groups=4, active_groups=2, group_top=2, correction=True), GLU(24),
                              shared=GLU(16), balance=0.01, balance_over="row"), no_gradient=(("correction", "chooses only"),)),
    "moe_gpt_oss": Example(MoE(Router(4, 2, bias=True), GLU(24, Swish(1.702), bias=True, limit=7.0, shift=1.0))),
    "moe_capacity": Example(MoE(Router(4, 2), MLP(24, bias=True), capacity=0.75),
                            splits="tokens queue with those before them in the call", packs="documents of a row share the room"),
    "moe_capacity_rows": Example(MoE(Router(4, 1, renormalize=False), GLU(24), capacity=0.75, group=2),
                                 rows_independent="rows of a group share the room",
                                 splits="tokens queue with those before them in the call", packs="documents of a row share the room"),
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
    "rope_axial": Example(attention(position=AxialRope(5))),
    "alibi": Example(attention(position=None, relative=Alibi())),
    "t5_buckets": Example(attention(position=None, relative=Buckets(8, 16))),
    "shaw": Example(ShawAttention(4, 8, reach=3)),
    "transformer_xl": Example(XLAttention(4, 8)),
    # few tokens take the absorbed form, many the other one
    "mla": Example(LatentAttention(4, 8, 4, 6, rank=12, q_rank=10)),
    "mla_yarn": Example(LatentAttention(4, 8, 4, 6, rank=200, q_rank=None, position=Rope(scaling=YarnScaling(4.0, 16)), mscale=0.7)),
    "attention_sinks_gate": Example(attention(sinks=True, gate=True)),
    # around the residual stream
    "pre_norm": Example(PreNorm(attention())),
    "deep_norm": Example(DeepNorm(attention(), LayerNorm(), alpha=2.0)),
    "post_norm": Example(PostNorm(attention(), LayerNorm())),
    "sandwich_norm": Example(SandwichNorm(attention(), RMSNorm(unit_offset=True))),
    "reordered_norm": Example(ReorderedNorm(attention())),
    "parallel": Example(Parallel((attention(), GLU(48, dropout=0.1)))),
    "parallel_own_norms": Example(Parallel((attention(), MLP(48)), LayerNorm(), shared=False)),
    # linear attention, delta rules, state spaces
    "short_conv": Example(ShortConv()),
    **{f"linear_{name}": Example(LinearAttention(4, 8, feature)) for name, feature in dict(
        elu=Elu(), relu=Relu(), exp=Exp(), taylor=Taylor(), favor=Favor(16), hedgehog=Hedgehog()).items()},
    "retention": Example(Retention(4, 8, 16)),
    "lightning": Example(Lightning(4, 8)),
    "simple_gla": Example(GatedLinearAttention(4, 8, 16, per_channel=False)),
    "gla": Example(GatedLinearAttention(4, 8, 16)),
    "delta_net": Example(DeltaNet(4, 4, 8, negative=True)),
    "gated_delta_net": Example(GatedDeltaNet(4, 2, 8, 16)),
    "kda": Example(KimiDeltaAttention(4, 4, 8)),
    "kda_bounded": Example(KimiDeltaAttention(4, 4, 8, floor=-5.0, rank=4)),
    "mamba": Example(Mamba(48, state=8, rank=4)),
    "mamba_norms": Example(Mamba(48, state=8, rank=4, norm=RMSNorm())),
    "mamba2": Example(Mamba2(4, head_dim=8, state=16, groups=2)),
    "rg_lru": Example(RGLRU(48, 4)),
    "min_gru": Example(MinGRU(48)),
    "min_lstm": Example(MinLSTM(48)),
    "rwkv_time_mix": Example(TimeMix(48)),
    "rwkv_channel_mix": Example(ChannelMix(48)),
    # depth
    "stack": Example(Stack((PreNorm(attention(dropout=0.1)), PreNorm(GLU(48))), 3)),
    "local_global_stack": Example(Stack((PreNorm(attention(window=4)), PreNorm(GLU(48)), PreNorm(attention()), PreNorm(GLU(48))), 2)),
    "hybrid_stack": Example(Stack((PreNorm(GatedDeltaNet(4, 2, 8)), PreNorm(attention())), 2)),
    # models
    "llama": Example(llama3(D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64)),
    "llama_tied_dropout": Example(llama3(D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64, tied=True, dropout=0.1)),
    "mixtral": Example(mixtral(D=32, layers=2, heads=4, kv_heads=2, hidden=24, vocab=64, experts=4, z_loss=0.001)),
    "gpt2": Example(gpt2(D=32, layers=2, heads=4, vocab=64, length=64)),
    "sinusoidal": Example(Decoder(64, 32, (Stack((PreNorm(attention(position=None)),), 1),), position=Sinusoidal())),
    "gemma_like": Example(Decoder(
        64, 32, (Stack((SandwichNorm(attention(window=4)), SandwichNorm(GLU(48, gelu_tanh)), SandwichNorm(attention())), 1),),
        tied=True, softcap=30.0, embed_scale=32**0.5)),
}  # fmt: skip
