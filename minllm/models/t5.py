"""T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1) and T5 v1.1, which gates the feed-forward layers and unties the head.

An encoder and a decoder that attends over it. RMSNorm before each layer, no biases, scores not divided by sqrt(H), distances of tokens in
buckets whose table all layers of a half share; a tied head reads the last states times D^-1/2.
"""

from dataclasses import dataclass, fields, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Layer, Out
from minllm.layers.attention import Attention
from minllm.layers.cross import CrossAttention
from minllm.layers.dropout import dropout as drop
from minllm.layers.mlp import GLU, MLP, gelu_tanh, relu
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Buckets
from minllm.layers.residual import PreNorm
from minllm.layers.stack import Stack
from minllm.models.family import BENIGN, Arg, Family, Field, Only
from minllm.models.transformer import fold, gathered, through, with_positions
from minllm.sharding import constrain
from minllm.spec import FanIn, Normal, Spec, Tree
from minllm.weights import einsum, take
from minllm_kernels.mask import Full


@dataclass(frozen=True)
class Half:
    """An encoder or a decoder, from embeddings to normed states. heads: of the shared table of distances."""

    trunk: tuple[Layer, ...]
    norm: RMSNorm
    relative: Buckets
    heads: int

    def params(self, D: int) -> Tree:
        return {
            "trunk": tuple(layer.params(D) for layer in self.trunk),
            "norm": self.norm.params(D),
            "relative": replace(self.relative, shared=False).params(self.heads),
        }

    def apply(self, p: Tree, x: Float[Array, "B T D"], ctx: Context, cache: Tree = None) -> Out:
        out = through(self.trunk, p["trunk"], x, ctx.replace(shared=p["relative"]), cache)
        return out._replace(x=self.norm.apply(p["norm"], out.x, ctx).x)


@dataclass(frozen=True)
class T5:
    vocab: int
    D: int
    encoder: Half
    decoder: Half
    tied: bool = True
    dropout: float = 0.0

    def params(self) -> Tree:
        p = {
            "embed": Spec((self.vocab, self.D), "vocab embed", Normal(1.0), role="embedding"),
            "encoder": self.encoder.params(self.D),
            "decoder": self.decoder.params(self.D),
        }
        return p if self.tied else p | {"head": Spec((self.D, self.vocab), "embed -> vocab", FanIn())}

    def cache(self, B: int, S: int, dtype=jnp.float32) -> Tree:
        """For B rows of up to S tokens on either side."""
        return tuple(layer.cache(self.D, B, S, dtype) for layer in self.decoder.trunk)

    def encode(self, p: Tree, source: Int[Array, "B S"], ctx: Context) -> Context:
        """The context of the decoder: with the encoded source as memory. Padding of the source has positions of -1 in `ctx`."""
        ctx = with_positions(ctx, source, None)
        memory = drop(self.encoder.apply(p["encoder"], self._embedded(p, source, ctx), ctx).x, self.dropout, ctx)
        return ctx.replace(memory=memory, memory_positions=ctx.positions, positions=None)

    def hidden(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        """The decoder's states "B T D". ctx: of `encode`, or any with a cache that a call with one has filled."""
        ctx = with_positions(ctx, tokens, cache)
        out = self.decoder.apply(p["decoder"], self._embedded(p, tokens, ctx), ctx, cache)
        return out._replace(x=drop(out.x, self.dropout, ctx))

    def logits(self, p: Tree, h: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T V"]:
        y = einsum("btd,vd->btv", h * self.D**-0.5, p["embed"]) if self.tied else einsum("btd,dv->btv", h, p["head"])
        return constrain(y, "batch seq act_vocab", ctx.run)

    def apply(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        out = self.hidden(p, tokens, ctx, cache)
        return out._replace(x=self.logits(p, out.x, ctx))

    def _embedded(self, p, tokens, ctx):
        return constrain(drop(take(gathered(p["embed"], ctx.run), tokens), self.dropout, ctx), "batch residual_seq act_embed", ctx.run)


def t5(
    D: int = 512,
    layers: int = 6,
    decoder_layers: int | None = None,
    heads: int = 8,
    head_dim: int = 64,
    hidden: int = 2048,
    vocab: int = 32_128,
    buckets: int = 32,
    longest: int = 128,
    gated: bool = False,
    tied: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> T5:
    """The defaults are T5 small, without its dropout of 0.1. decoder_layers: None for as many as the encoder has. gated: v1.1, which is
    not tied. dropout: of embeddings, last states and each layer's output."""
    norm = RMSNorm(eps)
    glu = GLU(hidden, gelu_tanh, dropout=dropout) if gated else MLP(hidden, relu, dropout=dropout)
    both, back = (Buckets(buckets, longest, both=one, shared=True) for one in (True, False))
    own = Attention(heads, heads, head_dim, relative=back, scale=1.0, dropout=dropout)
    over = CrossAttention(heads, head_dim, scale=1.0, dropout=dropout)
    encoder = tuple(PreNorm(layer, norm) for layer in (replace(own, relative=both, mask=Full()), glu))
    decoder = tuple(PreNorm(layer, norm) for layer in (own, over, glu))
    halves = Half(fold([encoder] * layers), norm, both, heads), Half(fold([decoder] * (decoder_layers or layers)), norm, back, heads)
    return T5(vocab, D, *halves, tied, dropout)


def arguments(model: T5) -> dict:
    """The builder's."""
    if not isinstance(model, T5):
        raise ValueError("it is no encoder and decoder")
    before, after = model.encoder.trunk[0], model.decoder.trunk[0]
    assert isinstance(before, Stack) and isinstance(after, Stack)
    own, _, glu = (layer.inner for layer in after.pattern if isinstance(layer, PreNorm))
    assert isinstance(own, Attention) and isinstance(own.relative, Buckets) and isinstance(glu, GLU | MLP)
    said = {f.name: getattr(model, f.name) for f in fields(model)} | {"heads": own.heads, "head_dim": own.head_dim, "hidden": glu.hidden}
    depth = {"layers": before.times, "decoder_layers": after.times}
    table = {"buckets": own.relative.buckets, "longest": own.relative.longest}
    return said | depth | table | {"gated": isinstance(glu, GLU), "eps": model.decoder.norm.eps}


@dataclass(frozen=True)
class _Tied(Field):
    """A tied head reads scaled states. transformers 5 writes every T5 as tied, and an untied one as one that does not scale."""

    def names(self, name):
        return name, "scale_decoder_outputs"

    def read(self, name, given):
        tied = given.get(name, True)
        scaled = given.get("scale_decoder_outputs", tied)
        if scaled and not tied:
            raise ValueError("scale_decoder_outputs is True for a head that is not tied; only tied heads are scaled")
        return {"tied": bool(scaled)}

    def write(self, name, args):
        return {name: args["tied"]}


FIELDS = {
    "vocab_size": Arg("vocab", 32_128),
    "d_model": Arg("D", 512),
    "d_kv": Arg("head_dim", 64),
    "d_ff": Arg("hidden", 2048),
    "num_layers": Arg("layers", 6),
    "num_decoder_layers": Arg("decoder_layers", None),
    "num_heads": Arg("heads", 8),
    "relative_attention_num_buckets": Arg("buckets", 32),
    "relative_attention_max_distance": Arg("longest", 128),
    "layer_norm_epsilon": Arg("eps", 1e-6),
    "dropout_rate": Arg("dropout", 0.1),
    "feed_forward_proj": Arg("gated", False, {"relu": False, "gated-gelu": True}),
    "tie_word_embeddings": _Tied(),
    "is_encoder_decoder": Only(True),
    "is_decoder": Only(False),
}


def _half(half: str, names: dict[int, str]) -> dict:
    """Rows of one half: each sublayer k is layer.k of a block."""
    rows = {}
    for k, name in names.items():
        there, here = f"{half}.block.{{i}}.layer.{k}.", f"{half}/layers/{{i}}/{k}/"
        rows[f"{there}layer_norm.weight"] = (f"{here}norm/scale", "d -> d")
        if name == "DenseReluDense":
            rows[f"{there}{name}.wi.weight"] = (f"{here}inner/up", "f d -> d f")
            rows[f"{there}{name}.wo.weight"] = (f"{here}inner/down", "d f -> f d")
            continue
        for w in "qkv":
            rows[f"{there}{name}.{w}.weight"] = (f"{here}inner/{w}", "(n h) d -> d n h")
        rows[f"{there}{name}.o.weight"] = (f"{here}inner/o", "d (n h) -> n h d")
    rows[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (f"{half}/relative/table", "b n -> b n")
    return rows | {f"{half}.final_layer_norm.weight": (f"{half}/norm/scale", "d -> d")}


def _gated(rows: dict) -> dict:
    """wi is then two: the gate and the other branch."""
    found = {}
    for name, (path, pattern) in rows.items():
        if name.endswith(".wi.weight"):
            found[name.replace(".wi.", ".wi_0.")] = (path.replace("/up", "/gate"), pattern)
            found[name.replace(".wi.", ".wi_1.")] = (path, pattern)
        else:
            found[name] = (path, pattern)
    return found


PLAIN = {
    "shared.weight": ("embed", "v d -> v d"),
    **_half("encoder", {0: "SelfAttention", 1: "DenseReluDense"}),
    **_half("decoder", {0: "SelfAttention", 1: "EncDecAttention", 2: "DenseReluDense"}),
    "lm_head.weight": ("head", "v d -> d v"),
}


def rows(model: T5) -> dict:
    """The table of a model: gated feed-forward layers have other names."""
    return _gated(PLAIN) if arguments(model)["gated"] else PLAIN


PRESETS = {
    "small": {},
    "base": dict(D=768, layers=12, heads=12, hidden=3072),
    "large": dict(D=1024, layers=24, heads=16, hidden=4096),
    "v1.1-small": dict(layers=8, heads=6, hidden=1024, gated=True, tied=False),
    "v1.1-base": dict(D=768, layers=12, heads=12, hidden=2048, gated=True, tied=False),
}
# Said by feed_forward_proj already, or for training from nothing and for other heads.
_BENIGN = BENIGN | {"is_gated_act", "dense_act_fn", "initializer_factor", "classifier_dropout", "n_positions", "output_past",
                    "task_specific_params"}  # fmt: skip
# The table is written once more for each half, and by old files for the attention over the memory, which never read it.
_IGNORED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")  # fmt: skip
FAMILY = {"t5": Family("t5", "T5ForConditionalGeneration", t5, PRESETS, FIELDS, rows, "", _IGNORED, _BENIGN, arguments)}
