"""Mamba (Gu & Dao 2023, arXiv 2312.00752, figure 3 and table 12) and Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 7 and table 10).

Nothing but state space layers: no attention, no feed-forward layers. A layer is twice as wide inside as the stream.
"""

from dataclasses import dataclass, fields
from math import ceil, inf
from typing import Any

from minllm.layers.norm import RMSNorm
from minllm.layers.residual import PreNorm
from minllm.layers.ssm import Mamba, Mamba2
from minllm.layers.stack import Stack
from minllm.models.family import BENIGN, Arg, Family, Field, Only, sublayers
from minllm.models.transformer import Decoder
from minllm.spec import FanIn


def mamba(
    D: int = 768,
    layers: int = 24,
    inner: int | None = None,
    state: int = 16,
    rank: int | None = None,
    conv: int = 4,
    vocab: int = 50_280,
    tied: bool = True,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are Mamba 130M. inner: None for 2 D; rank: of the step's map, None for D / 16."""
    norm = RMSNorm(eps)
    mixer = Mamba(inner or 2 * D, state, rank or ceil(D / 16), conv, out_init=FanIn(layers**-0.5))
    return Decoder(vocab, D, (Stack((PreNorm(mixer, norm),), layers),), norm, tied)


def mamba2(
    D: int = 768,
    layers: int = 24,
    heads: int = 24,
    head_dim: int = 64,
    state: int = 128,
    groups: int = 1,
    conv: int = 4,
    vocab: int = 50_288,
    tied: bool = True,
    eps: float = 1e-5,
) -> Decoder:
    """The defaults are Mamba-2 130M. groups: of heads that share input and output maps and a norm."""
    norm = RMSNorm(eps)
    mixer = Mamba2(heads, head_dim, state, groups, conv, eps, FanIn(layers**-0.5))
    return Decoder(vocab, D, (Stack((PreNorm(mixer, norm),), layers),), norm, tied)


@dataclass(frozen=True)
class Expand(Field):
    """The width inside as a multiple of hidden_size. again: fields that may say it a second time."""

    again: tuple[str, ...] = ()

    def names(self, name):
        return name, *self.again

    def read(self, name, given):
        inner = int(given.get(name, 2) * given.get("hidden_size", 768))
        for other in self.again:
            if given.get(other, inner) != inner:
                raise ValueError(f"{other} is {given[other]}, and {name} times hidden_size {inner}; they are the same, leave one out")
        return {"inner": inner}

    def write(self, name, args):
        if args["inner"] % args["D"]:
            raise ValueError(f"{name} is a whole number, and {args['inner']} channels are no multiple of a width of {args['D']}")
        return {name: args["inner"] // args["D"]}


@dataclass(frozen=True)
class HeadWidth(Expand):
    """Of Mamba-2: the width inside is that of all heads."""

    def read(self, name, given):
        inner, heads, head_dim = super().read(name, given)["inner"], given.get("num_heads", 128), given.get("head_dim", 64)
        if heads * head_dim != inner:
            raise ValueError(f"num_heads x head_dim is {heads} x {head_dim}, and {name} times hidden_size {inner}; they must be equal")
        return {}

    def write(self, name, args):
        return super().write(name, args | {"inner": args["heads"] * args["head_dim"]})


@dataclass(frozen=True)
class StepRank(Field):
    """The rank of the step's map; "auto" is hidden_size / 16."""

    def read(self, name, given):
        rank = given.get(name, "auto")
        return {"rank": None if rank == "auto" else rank}

    def write(self, name, args):
        return {name: args["rank"]}


def _read(model: Decoder) -> dict[str, Any]:
    first, *rest = sublayers(model)
    found = {f.name: getattr(first, f.name) for f in fields(first)}
    return found | dict(D=model.D, layers=1 + len(rest), vocab=model.vocab, tied=model.tied, eps=model.norm.eps)


_SHARED = {
    "hidden_size": Arg("D", 768, other="d_model"),
    "num_hidden_layers": Arg("layers", 32, other="n_layer"),
    "conv_kernel": Arg("conv", 4),
    "layer_norm_epsilon": Arg("eps", 1e-5),
    "hidden_act": Only("silu", ("swish",)),
    "use_bias": Only(False),
    "use_conv_bias": Only(True),
    "rms_norm": Only(True),
}
MAMBA_FIELDS = _SHARED | {
    "vocab_size": Arg("vocab", 50_280),
    "state_size": Arg("state", 16),
    "expand": Expand(("intermediate_size", "d_inner")),
    "time_step_rank": StepRank(),
    "tie_word_embeddings": Arg("tied", True),
    "ssm_cfg": Only({}),
}
MAMBA2_FIELDS = _SHARED | {
    "vocab_size": Arg("vocab", 32_768),
    "hidden_size": Arg("D", 4096),
    "num_hidden_layers": Arg("layers", 64),
    "num_heads": Arg("heads", 128),
    "head_dim": Arg("head_dim", 64),
    "state_size": Arg("state", 128),
    "n_groups": Arg("groups", 8),
    "expand": HeadWidth(("intermediate_size",)),
    "time_step_limit": Only([0.0, inf], ([0.0, {"__float__": "Infinity"}],)),
    "tie_word_embeddings": Arg("tied", False),
}
# Steps at initialisation, kernels to choose from, and the dtype that the stream is added up in.
_BENIGN = BENIGN | {"time_step_scale", "time_step_min", "time_step_max", "time_step_floor", "time_step_init_scheme", "chunk_size",
                    "rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan", "fused_add_norm",
                    "pad_vocab_size_multiple"}  # fmt: skip
_IN = "layers/{i}/0/inner/"
_AROUND = {
    "backbone.embeddings.weight": ("embed", "v d -> v d"),
    "backbone.layers.{i}.norm.weight": ("layers/{i}/0/norm/scale", "d -> d"),
    "backbone.norm_f.weight": ("norm/scale", "d -> d"),
    "lm_head.weight": ("head", "v d -> d v"),
}


def mixer_rows(name: str, path: str) -> dict:
    """The table of a Mamba layer that is called `name` and lives at `path`."""
    return {
        f"{name}.in_proj.weight": ((f"{path}x", f"{path}gate"), "(f + f) d -> d f, d f"),
        f"{name}.conv1d.weight": (f"{path}conv", "f 1 w -> w f"),
        f"{name}.conv1d.bias": (f"{path}conv_bias", "f -> f"),
        f"{name}.x_proj.weight": ((f"{path}step/down", f"{path}into", f"{path}out"), "(r + s + s) f -> f r, f s, f s"),
        f"{name}.dt_proj.weight": (f"{path}step/up", "f r -> r f"),
        f"{name}.dt_proj.bias": (f"{path}step/bias", "f -> f"),
        f"{name}.A_log": (f"{path}rate", "f s -> f s"),
        f"{name}.D": (f"{path}skip", "f -> f"),
        f"{name}.out_proj.weight": (f"{path}down", "d f -> f d"),
    }


MAMBA_WEIGHTS = _AROUND | mixer_rows("backbone.layers.{i}.mixer", _IN)
MAMBA2_WEIGHTS = _AROUND | {
    "backbone.layers.{i}.mixer.in_proj.weight": (
        (f"{_IN}gate", f"{_IN}x", f"{_IN}into", f"{_IN}out", f"{_IN}step/weight"),
        "(n h + n h + g s + g s + n) d -> d n h, d n h, d g s, d g s, d n",
    ),
    "backbone.layers.{i}.mixer.conv1d.weight": (
        (f"{_IN}conv/x", f"{_IN}conv/into", f"{_IN}conv/out"), "(n h + g s + g s) 1 w -> w n h, w g s, w g s"),
    "backbone.layers.{i}.mixer.conv1d.bias": (
        (f"{_IN}conv/x_bias", f"{_IN}conv/into_bias", f"{_IN}conv/out_bias"), "(n h + g s + g s) -> n h, g s, g s"),
    "backbone.layers.{i}.mixer.dt_bias": (f"{_IN}step/bias", "n -> n"),
    "backbone.layers.{i}.mixer.A_log": (f"{_IN}rate", "n -> n"),
    "backbone.layers.{i}.mixer.D": (f"{_IN}skip", "n -> n"),
    "backbone.layers.{i}.mixer.norm.weight": (f"{_IN}scale", "(n h) -> n h"),
    "backbone.layers.{i}.mixer.out_proj.weight": (f"{_IN}o", "d (n h) -> n h d"),
}  # fmt: skip
MAMBA = {
    "130m": {},
    "370m": dict(D=1024, layers=48),
    "790m": dict(D=1536, layers=48),
    "1.4b": dict(D=2048, layers=48),
    "2.8b": dict(D=2560, layers=64),
}
MAMBA2 = {
    "130m": {},
    "370m": dict(D=1024, layers=48, heads=32),
    "780m": dict(D=1536, layers=48, heads=48),
    "1.3b": dict(D=2048, layers=48, heads=64),
    "2.7b": dict(D=2560, layers=64, heads=80),
    "codestral-7b": dict(D=4096, layers=64, heads=128, groups=8, vocab=32_768, tied=False),
}
FAMILY = {
    "mamba": Family(
        "mamba", "MambaForCausalLM", mamba, MAMBA, MAMBA_FIELDS, MAMBA_WEIGHTS, prefix="backbone.", benign=_BENIGN, read=_read
    ),
    "mamba2": Family(
        "mamba2", "Mamba2ForCausalLM", mamba2, MAMBA2, MAMBA2_FIELDS, MAMBA2_WEIGHTS, prefix="backbone.",
        benign=_BENIGN | {"time_step_rank"}, read=_read,
    ),
}  # fmt: skip
