"""BERT (Devlin et al. 2018, arXiv 1810.04805, section 3): an encoder with norms after each residual sum, learned positions and a vector for
each of two text parts; it is trained to fill in masked tokens and to tell whether one part follows the other.

    x = N(embed[token] + position[pos] + types[part])     pooled = tanh(x_0 W + b)
    filled in = N(gelu(x W + b)) embed^T + bias           follows = pooled W + b
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Layer, Out
from minllm.layers.attention import Attention
from minllm.layers.dropout import dropout
from minllm.layers.mlp import MLP, Activation, gelu, gelu_tanh, relu
from minllm.layers.norm import LayerNorm
from minllm.layers.position import Learned
from minllm.layers.residual import PostNorm
from minllm.models.family import BENIGN, Arg, Family, Field, Only
from minllm.models.transformer import fold, gathered, through, with_positions
from minllm.sharding import constrain
from minllm.spec import FanIn, Normal, Spec, Tree
from minllm.weights import einsum, take
from minllm_kernels.mask import Full


@dataclass(frozen=True)
class Bert:
    """types: kinds of text parts. heads: which of "pooler", "fill" (masked tokens) and "follows" the model has, "follows" on "pooler".
    act: of the head that fills in."""

    vocab: int
    D: int
    trunk: tuple[Layer, ...]
    norm: LayerNorm
    position: Learned
    types: int = 2
    parts: tuple[str, ...] = ("pooler",)
    act: Activation = gelu
    tied: bool = True
    dropout: float = 0.0

    def params(self) -> Tree:
        D = self.D
        dense = {"w": Spec((D, D), "embed -> _", FanIn()), "b": Spec((D,), "_", role="bias")}
        p = {
            "embed": Spec((self.vocab, D), "vocab embed", Normal(0.02), role="embedding"),
            "types": Spec((self.types, D), "_ embed", Normal(0.02), role="embedding"),
            "position": self.position.params(D),
            "norm": self.norm.params(D),
            "trunk": tuple(layer.params(D) for layer in self.trunk),
        }
        heads = {
            "pooler": dense,
            "fill": {**dense, "norm": self.norm.params(D), "bias": Spec((self.vocab,), "_", role="bias")},
            "follows": {"w": Spec((D, 2), "embed -> _", FanIn()), "b": Spec((2,), "_", role="bias")},
        }
        return p | {name: heads[name] for name in self.parts}

    def hidden(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, types: Int[Array, "B T"] | None = None) -> Out:
        """The encoded tokens "B T D". types: the part of each token; None for all in the first. Padding has positions of -1."""
        ctx = with_positions(ctx, tokens, None)
        kind = jnp.zeros_like(tokens) if types is None else types
        x = take(gathered(p["embed"], ctx.run), tokens) + take(gathered(p["types"], ctx.run), kind)
        x = self.norm.apply(p["norm"], self.position.apply(gathered(p["position"], ctx.run), x, ctx.positions), ctx).x
        x = constrain(dropout(x, self.dropout, ctx), "batch residual_seq act_embed", ctx.run)
        return through(self.trunk, p["trunk"], x, ctx, None)

    def pooled(self, p: Tree, h: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """What the first token says of the whole row."""
        return jnp.tanh(einsum("bd,de->be", h[:, 0], p["pooler"]["w"]) + p["pooler"]["b"].astype(h.dtype))

    def follows(self, p: Tree, h: Float[Array, "B T D"]) -> Float[Array, "B 2"]:
        """Logits of (the second part follows the first, it does not)."""
        return einsum("bd,do->bo", self.pooled(p, h), p["follows"]["w"]) + p["follows"]["b"].astype(h.dtype)

    def logits(self, p: Tree, h: Float[Array, "B T D"], ctx: Context) -> Float[Array, "B T V"]:
        """Of the token at each place."""
        fill = p["fill"]
        y = self.act(einsum("btd,de->bte", h, fill["w"]) + fill["b"].astype(h.dtype))
        y = einsum("btd,vd->btv", self.norm.apply(fill["norm"], y, ctx).x, p["embed"]) + fill["bias"].astype(h.dtype)
        return constrain(y, "batch seq act_vocab", ctx.run)

    def apply(self, p: Tree, tokens: Int[Array, "B T"], ctx: Context, cache: Tree = None) -> Out:
        """Logits where there is a head that fills in, else the encoded tokens."""
        if cache is not None:
            raise ValueError("BERT sees the whole row at once: there is nothing to decode with a cache")
        out = self.hidden(p, tokens, ctx)
        return out._replace(x=self.logits(p, out.x, ctx)) if "fill" in self.parts else out


def bert(
    D: int = 768,
    layers: int = 12,
    heads: int = 12,
    hidden: int = 3072,
    vocab: int = 30_522,
    length: int = 512,
    types: int = 2,
    parts: tuple[str, ...] = ("pooler",),
    act: object = gelu,
    dropout: float = 0.0,
    weight_dropout: float = 0.0,
    eps: float = 1e-12,
) -> Bert:
    """The defaults are BERT base, without its dropout of 0.1 everywhere, as an encoder with a pooler."""
    if D % heads:
        raise ValueError(f"a width D of {D} does not divide into {heads} heads; choose heads that divide it")
    norm = LayerNorm(eps)
    attention = Attention(heads, heads, D // heads, mask=Full(), bias=True, out_bias=True, dropout=dropout, weight_dropout=weight_dropout)
    block = (PostNorm(attention, norm), PostNorm(MLP(hidden, act, bias=True, dropout=dropout), norm))
    return Bert(vocab, D, fold([block] * layers), norm, Learned(length), types, parts, act, dropout=dropout)


_HEADS = {"BertModel": ("pooler",), "BertForMaskedLM": ("fill",), "BertForPreTraining": ("pooler", "fill", "follows")}


@dataclass(frozen=True)
class _Parts(Field):
    """The architecture says which heads a file has."""

    def read(self, name, given):
        said = (given.get(name) or ["BertModel"])[0]
        if said not in _HEADS:
            raise ValueError(f"{name} is {said}; supported are {', '.join(_HEADS)}")
        return {"parts": _HEADS[said]}

    def write(self, name, args):
        return {name: [next(said for said, parts in _HEADS.items() if parts == args["parts"])]}


FIELDS = {
    "architectures": _Parts(),
    "vocab_size": Arg("vocab", 30_522),
    "hidden_size": Arg("D", 768),
    "num_hidden_layers": Arg("layers", 12),
    "num_attention_heads": Arg("heads", 12),
    "intermediate_size": Arg("hidden", 3072),
    "max_position_embeddings": Arg("length", 512),
    "type_vocab_size": Arg("types", 2),
    "hidden_act": Arg("act", gelu, {"gelu": gelu, "gelu_new": gelu_tanh, "relu": relu}),
    "layer_norm_eps": Arg("eps", 1e-12),
    "hidden_dropout_prob": Arg("dropout", 0.1),
    "attention_probs_dropout_prob": Arg("weight_dropout", 0.1),
    "position_embedding_type": Only("absolute"),
    "tie_word_embeddings": Only(True),
    "is_decoder": Only(False),
    "add_cross_attention": Only(False),
}
_LAYER = "bert.encoder.layer.{i}."
WEIGHTS = {
    "bert.embeddings.word_embeddings.weight": ("embed", "v d -> v d"),
    "bert.embeddings.position_embeddings.weight": ("position/table", "t d -> t d"),
    "bert.embeddings.token_type_embeddings.weight": ("types", "t d -> t d"),
    "bert.embeddings.LayerNorm.weight": ("norm/scale", "d -> d"),
    "bert.embeddings.LayerNorm.bias": ("norm/bias", "d -> d"),
    _LAYER + "attention.self.query.weight": ("layers/{i}/0/inner/q", "(n h) d -> d n h"),
    _LAYER + "attention.self.query.bias": ("layers/{i}/0/inner/q_bias", "(n h) -> n h"),
    _LAYER + "attention.self.key.weight": ("layers/{i}/0/inner/k", "(n h) d -> d n h"),
    _LAYER + "attention.self.key.bias": ("layers/{i}/0/inner/k_bias", "(n h) -> n h"),
    _LAYER + "attention.self.value.weight": ("layers/{i}/0/inner/v", "(n h) d -> d n h"),
    _LAYER + "attention.self.value.bias": ("layers/{i}/0/inner/v_bias", "(n h) -> n h"),
    _LAYER + "attention.output.dense.weight": ("layers/{i}/0/inner/o", "d (n h) -> n h d"),
    _LAYER + "attention.output.dense.bias": ("layers/{i}/0/inner/o_bias", "d -> d"),
    _LAYER + "attention.output.LayerNorm.weight": ("layers/{i}/0/norm/scale", "d -> d"),
    _LAYER + "attention.output.LayerNorm.bias": ("layers/{i}/0/norm/bias", "d -> d"),
    _LAYER + "intermediate.dense.weight": ("layers/{i}/1/inner/up", "f d -> d f"),
    _LAYER + "intermediate.dense.bias": ("layers/{i}/1/inner/up_bias", "f -> f"),
    _LAYER + "output.dense.weight": ("layers/{i}/1/inner/down", "d f -> f d"),
    _LAYER + "output.dense.bias": ("layers/{i}/1/inner/down_bias", "d -> d"),
    _LAYER + "output.LayerNorm.weight": ("layers/{i}/1/norm/scale", "d -> d"),
    _LAYER + "output.LayerNorm.bias": ("layers/{i}/1/norm/bias", "d -> d"),
    "bert.pooler.dense.weight": ("pooler/w", "e d -> d e"),
    "bert.pooler.dense.bias": ("pooler/b", "e -> e"),
    "cls.predictions.transform.dense.weight": ("fill/w", "e d -> d e"),
    "cls.predictions.transform.dense.bias": ("fill/b", "e -> e"),
    "cls.predictions.transform.LayerNorm.weight": ("fill/norm/scale", "e -> e"),
    "cls.predictions.transform.LayerNorm.bias": ("fill/norm/bias", "e -> e"),
    "cls.predictions.bias": ("fill/bias", "v -> v"),
    "cls.seq_relationship.weight": ("follows/w", "o d -> d o"),
    "cls.seq_relationship.bias": ("follows/b", "o -> o"),
}
PRESETS = {"base": {}, "large": dict(D=1024, layers=24, heads=16, hidden=4096), "minilm-l6": dict(D=384, layers=6, hidden=1536)}
_BENIGN = (BENIGN - {"architectures", "max_position_embeddings"}) | {"classifier_dropout", "gradient_checkpointing"}
_IGNORED = ("bert.embeddings.position_ids",)
FAMILY = {"bert": Family("bert", "BertModel", bert, PRESETS, FIELDS, WEIGHTS, "bert.", _IGNORED, _BENIGN)}
