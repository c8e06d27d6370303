"""A family of models as data: how it is built, which shapes were published, and how others write its config and name its weights.

`fields` says of each field of a Hugging Face config.json what we do about it; one that it does not know is an error, because what is not
honoured changes the numbers. The same fields write the config: they are read back and must give the same model, so that a model that the
format cannot express is never written. `weights` is the table of `minllm.interop.table`.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

from minllm.layers.attention import Attention
from minllm.layers.mlp import Swish
from minllm.layers.moe import MoE
from minllm.layers.position import DynamicNTKScaling, Learned, LinearScaling, Llama3Scaling, LongRopeScaling, Rope, Scaling, YarnScaling
from minllm.layers.stack import Stack
from minllm.spec import FanIn

Fields = Mapping[str, Any]  # of a config.json
Paths = str | tuple[str, ...]
Rows = Mapping[str, tuple[Paths, str] | tuple[Paths, str, str]]  # see minllm.interop.table

# Fields that change no number: bookkeeping, fresh initialisation, ids of special tokens (the tokenizer's business), how long the model
# was trained to read, what a call returns, and settings of generation that old configs carry.
BENIGN = frozenset(
    """
    model_type architectures _name_or_path name_or_path transformers_version torch_dtype dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id max_position_embeddings pretraining_tp
    max_sequence_length cache_implementation output_attentions output_hidden_states return_dict id2label label2id problem_type
    max_length min_length temperature top_k top_p num_beams do_sample repetition_penalty
""".split()
)
REQUIRED: Any = object()


@runtime_checkable
class Field(Protocol):
    """One field of a config.json, or several that are one thing; `name` is the first one's."""

    def names(self, name: str) -> tuple[str, ...]:
        """The fields that it honours."""
        return (name,)

    def read(self, name: str, given: Fields) -> dict[str, Any]:
        """Arguments of the builder. Raises ValueError for a value that we do not have."""
        ...

    def write(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Fields, from arguments of the builder."""
        ...


@dataclass(frozen=True)
class Arg(Field):
    """An argument of the builder. absent: what a config without the field means. values: the names of what is no plain value.
    other: another name of the field."""

    arg: str
    absent: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    other: str | None = None

    def names(self, name):
        return (name,) if self.other is None else (name, self.other)

    def read(self, name, given):
        if self.other in given and given.get(name, given[self.other]) != given[self.other]:
            raise ValueError(f"{name} is {given[name]!r} and {self.other} is {given[self.other]!r}; they are the same, leave one out")
        name = self.other if self.other in given else name
        if name not in given and self.absent is REQUIRED:
            raise ValueError(f"it has no {name}")
        if name not in given:
            return {self.arg: self.absent}
        if self.values is not None and given[name] not in self.values:
            raise ValueError(f"{name} is {given[name]!r}; known are {', '.join(map(str, self.values))}")
        return {self.arg: given[name] if self.values is None else self.values[given[name]]}

    def write(self, name, args):
        value = args[self.arg]
        if self.values is not None:
            value = next((key for key, known in self.values.items() if known == value), value)
        return {name: value}


@dataclass(frozen=True)
class Only(Field):
    """A field of which one value is honoured; a config without it means that value."""

    value: Any
    same: tuple = ()  # other words for it

    def read(self, name, given):
        if name in given and given[name] not in (self.value, *self.same):
            raise ValueError(f"{name} is {given[name]!r}; only {self.value!r} is supported")
        return {}

    def write(self, name, args):
        return {name: self.value}


@dataclass(frozen=True)
class Divides(Field):
    """The size of a head where it is D / heads and nothing else."""

    def read(self, name, given):
        size = given["hidden_size"] // given["num_attention_heads"]
        if given.get(name, size) != size:
            raise ValueError(f"{name} is {given[name]}; only hidden_size / num_attention_heads = {size} is supported")
        return {}

    def write(self, name, args):
        return {}


@dataclass(frozen=True)
class RopeFields(Field):
    """rope_theta and rope_scaling, or rope_parameters with both, as the arguments theta and scaling. fraction: the partial_rotary_factor of
    a config that has none; None in a family that turns whole heads."""

    absent: float = 10_000.0
    fraction: float | None = None

    def names(self, name):
        return name, "rope_scaling", "rope_parameters", *(["partial_rotary_factor"] if self.fraction is not None else [])

    def read(self, name, given):
        old, new = given.get("rope_scaling"), given.get("rope_parameters")
        if old and new and old != new:
            raise ValueError(f"rope_scaling {old} and rope_parameters {new} differ; leave one out")
        rope = dict(old or new or {})
        theta = rope.pop("rope_theta", given.get(name) or self.absent)
        part = {}
        if self.fraction is not None:
            part = {"fraction": float(rope.pop("partial_rotary_factor", given.get("partial_rotary_factor", self.fraction)))}
        return {"theta": float(theta), "scaling": read_scaling(rope, given), **part}

    def write(self, name, args):
        scaling = args["scaling"]
        # readers take the default of 2,048 where no length is said; a dynamic scaling begins where it ends
        stretch = 1.0 if isinstance(scaling, DynamicNTKScaling) else getattr(scaling, "factor", 1.0)
        length = {"max_position_embeddings": int(scaling.original * stretch)} if hasattr(scaling, "original") else {}
        part = {} if self.fraction is None else {"partial_rotary_factor": args["fraction"]}
        return {name: args["theta"], "rope_scaling": write_scaling(scaling), **length, **part}


@dataclass(frozen=True)
class TwoRopes(Field):
    """Gemma 3's: theta and scaling of layers that see everything, theta of those with a window."""

    absent: float
    local: float

    def names(self, name):
        return name, "rope_scaling", "rope_local_base_freq", "rope_parameters"

    def read(self, name, given):
        each = given.get("rope_parameters") or {}
        if strange := set(each) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"rope_parameters has {min(strange)!r}; it must have full_attention and sliding_attention")
        whole, local = dict(each.get("full_attention") or {}), dict(each.get("sliding_attention") or {})
        whole |= given.get("rope_scaling") or {}
        theta = whole.pop("rope_theta", given.get(name) or self.absent)
        local_theta = local.pop("rope_theta", given.get("rope_local_base_freq") or self.local)
        if read_scaling(local, given) is not None:
            raise ValueError(f"rope_parameters scales the layers with a window ({local}); only the others can be scaled")
        return {"theta": float(theta), "scaling": read_scaling(whole, given), "local_theta": float(local_theta)}

    def write(self, name, args):
        rope = {"rope_scaling": write_scaling(args["scaling"]), "rope_local_base_freq": args.get("local_theta", self.local)}
        return {name: args["theta"], **rope}


@dataclass(frozen=True)
class QueryScale(Field):
    """query_pre_attn_scalar: scores are multiplied by its inverse square root."""

    absent: float

    def read(self, name, given):
        return {"scale": float(given.get(name, self.absent)) ** -0.5}

    def write(self, name, args):
        number = args["scale"] ** -2
        return {name: next((n for n in (round(number), number) if n**-0.5 == args["scale"]), number)}


@dataclass(frozen=True)
class LayerTypes(Field):
    """layer_types: which layers have the window; without it, all but each `period`-th."""

    period: int

    def names(self, name):
        return name, "sliding_window_pattern", "_sliding_window_pattern"

    def read(self, name, given):
        types, layers = given.get(name), given["num_hidden_layers"]
        period = given.get("sliding_window_pattern") or given.get("_sliding_window_pattern") or self.period
        if types is None:
            return {"windowed": tuple((i + 1) % period > 0 for i in range(layers))}
        return {"windowed": windowed(name, types, layers)}

    def write(self, name, args):
        return {name: ["sliding_attention" if narrow else "full_attention" for narrow in args["windowed"]]}


@dataclass(frozen=True)
class LateWindow(Field):
    """Qwen's: with use_sliding_window, the layers from max_window_layers on have a window; layer_types says it layer by layer."""

    def names(self, name):
        return name, "use_sliding_window", "max_window_layers", "layer_types"

    def read(self, name, given):
        layers, types = given["num_hidden_layers"], given.get("layer_types")
        window = given.get(name, 4096) if given.get("use_sliding_window", False) else None
        first = layers if window is None else given.get("max_window_layers", 28)
        narrow = tuple(i >= first for i in range(layers)) if types is None else windowed("layer_types", types, layers)
        if any(narrow) and window is None:
            raise ValueError("layer_types has sliding_attention, but no window is in use; set use_sliding_window and sliding_window")
        return {"window": window if any(narrow) else None, "windowed": narrow}

    def write(self, name, args):
        narrow = args["windowed"]
        types = ["sliding_attention" if one else "full_attention" for one in narrow]
        first = narrow.index(True) if any(narrow) else len(narrow)
        return {name: args["window"], "use_sliding_window": any(narrow), "max_window_layers": first, "layer_types": types}


@dataclass(frozen=True)
class SparseLayers(Field):
    """Qwen's: every decoder_sparse_step-th layer has experts, but for mlp_only_layers."""

    def names(self, name):
        return name, "decoder_sparse_step"

    def read(self, name, given):
        dense, step = given.get(name) or [], given.get("decoder_sparse_step", 1)
        return {"sparse": tuple(i not in dense and (i + 1) % step == 0 for i in range(given["num_hidden_layers"]))}

    def write(self, name, args):
        return {name: [i for i, one in enumerate(args["sparse"]) if not one], "decoder_sparse_step": 1}


@dataclass(frozen=True)
class BalanceLoss(Field):
    """router_aux_loss_coef, in use with output_router_logits alone. Hugging Face counts each of a token's choices, we the token."""

    active: int

    def names(self, name):
        return name, "output_router_logits"

    def read(self, name, given):
        k = given.get("num_experts_per_tok", self.active)
        return {"balance": k * given.get(name, 0.001) if given.get("output_router_logits") else 0.0}

    def write(self, name, args):
        return {name: args["balance"] / args["active"], "output_router_logits": args["balance"] > 0}


def windowed(name: str, types: list[str], layers: int) -> tuple[bool, ...]:
    """Which layers have a window, from a list of their types."""
    if strange := set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{name} has {min(strange)!r}; supported are sliding_attention and full_attention")
    if len(types) != layers:
        raise ValueError(f"{name} has {len(types)} entries for {layers} layers")
    return tuple(one == "sliding_attention" for one in types)


def read_scaling(rope: dict[str, Any], given: Fields) -> Scaling | None:
    """The scaling that Hugging Face's dictionary means. Raises ValueError for a type or a key that we do not have."""
    rope = {key: value for key, value in rope.items() if value is not None}
    old = rope.pop("type", None)
    kind = rope.pop("rope_type", old)
    trained = given.get("max_position_embeddings")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor in the RoPE parameters is not supported here")

    def take(key, *absent):
        if key not in rope and not absent:
            raise ValueError(f"RoPE scaling of type {kind!r} has no {key}")
        return rope.pop(key, *absent)

    match kind:
        case None | "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(float(take("factor")))
        case "dynamic":
            scaling = DynamicNTKScaling(float(take("factor")), int(trained))
        case "llama3":
            scaling = Llama3Scaling(float(take("factor")), float(take("low_freq_factor")), float(take("high_freq_factor")),
                                    int(take("original_max_position_embeddings", trained)))  # fmt: skip
        case "yarn":
            factor, original = float(take("factor")), int(take("original_max_position_embeddings", trained))
            scaling = YarnScaling(factor, original, float(take("beta_fast", 32.0)), float(take("beta_slow", 1.0)), None,
                                  bool(take("truncate", True)))  # fmt: skip
            m, m_all, attention = take("mscale", None), take("mscale_all_dim", None), take("attention_factor", None)
            if attention is not None:
                scaling = replace(scaling, temperature=float(attention))
            elif m and m_all:
                ratio = replace(scaling, factor=factor**m).magnitude(0) / replace(scaling, factor=factor**m_all).magnitude(0)
                scaling = replace(scaling, temperature=ratio)
        case "longrope":
            original = int(given.get("original_max_position_embeddings") or take("original_max_position_embeddings"))
            rope.pop("original_max_position_embeddings", None)
            stated = take("factor", None)
            factor = float(stated if stated is not None else trained / original)
            attention = take("attention_factor", None)
            scaling = LongRopeScaling(tuple(map(float, take("short_factor"))), tuple(map(float, take("long_factor"))), factor, original,
                                      None if attention is None else float(attention))  # fmt: skip
        case _:
            raise ValueError(f"RoPE scaling of type {kind!r} is not supported; known are default, linear, dynamic, llama3, yarn, longrope")
    if rope:
        raise ValueError(f"RoPE scaling of type {kind!r} has unknown keys: {', '.join(f'{k}={v!r}' for k, v in rope.items())}")
    return scaling


def write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicNTKScaling(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": original}  # fmt: skip
        case YarnScaling(factor, original, fast, slow, temperature, round_dims):
            written = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": fast,
                       "beta_slow": slow, "truncate": round_dims}  # fmt: skip
            return written if temperature is None else written | {"attention_factor": temperature}
        case LongRopeScaling(short, long, factor, original, temperature):
            written = {"rope_type": "longrope", "factor": factor, "original_max_position_embeddings": original,
                       "short_factor": list(short), "long_factor": list(long)}  # fmt: skip
            return written if temperature is None else written | {"attention_factor": temperature}
    raise ValueError(f"{scaling} has no form in a config.json")


@dataclass(frozen=True)
class Family:
    """
    name: Hugging Face's model_type, and ours. architecture: the class that transformers loads it with.
    builder: from plain arguments to a model. presets: the arguments of published models. fields, weights: see above.
    prefix: of the names, which files of the bare trunk leave out. ignored: tensors of old files that are no parameters.
    renamed: (what other writers call a tensor, its name in the table), {i} for any number.
    weights may be a function of the model, where its names depend on it. read: the builder's arguments, of a model.
    """

    name: str
    architecture: str
    builder: Callable[..., Any]
    presets: Mapping[str, dict[str, Any]]
    fields: Mapping[str, Field]
    weights: Rows | Callable[[Any], Rows]
    prefix: str = "model."
    ignored: tuple[str, ...] = ()
    benign: frozenset[str] = BENIGN
    read: Callable[[Any], dict[str, Any]] | None = None
    renamed: tuple[tuple[str, str], ...] = ()

    def rows(self, model: Any) -> Rows:
        """The table for a model of this family."""
        return self.weights(model) if callable(self.weights) else self.weights

    def model(self, config: Fields) -> Any:
        """The model that a config.json describes. Raises ValueError for what is missing, unknown or not supported."""
        honoured = {other for name, known in self.fields.items() for other in known.names(name)}
        if strange := {k: v for k, v in config.items() if k not in honoured and k not in self.benign and v is not None}:
            listed = "; ".join(f"{k} = {v!r}{_near(k, honoured)}" for k, v in strange.items())
            raise ValueError(
                f"it has fields that are not known for model_type {self.name!r}: {listed}. They may change the numbers, so nothing is "
                "loaded; if they do not, take them out of the file"
            )
        args: dict[str, Any] = {}
        for name, known in self.fields.items():
            args |= known.read(name, config)
        return self.builder(**args)

    def config(self, model: Any) -> dict[str, Any]:
        """The config.json of a model. Raises ValueError if the model is not of this family, or cannot be written as one."""
        written: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        try:
            found = (self.read or arguments)(model)
            args = {name: value for name, value in found.items() if name in inspect.signature(self.builder).parameters}
            for name, known in self.fields.items():
                written |= known.write(name, args)
            again = self.model(written)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the model is no {self.name} ({error})") from None
        if parts := difference(again, model):
            raise ValueError(f"the model is no {self.name}: {parts}")
        return written


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def sublayers(model: Any) -> Iterator[Any]:
    """The layers of a trunk in order, taken out of their stacks and out of what is around them."""
    for layer in model.trunk:
        for one in layer.pattern * layer.times if isinstance(layer, Stack) else (layer,):
            inner = getattr(one, "inner", None) or getattr(one, "layers", None) or one
            yield from inner if isinstance(inner, tuple) else (inner,)


def first(layers: Iterable[Any], kind: type) -> Any:
    """The first layer of a kind. Raises ValueError if there is none."""
    for layer in layers:
        if isinstance(layer, kind):
            return layer
    raise ValueError(f"it has no {kind.__name__}")


def arguments(model: Any) -> dict[str, Any]:
    """What builders ask for, read off a model. A builder takes of it what it knows; whoever uses it compares the result with the model."""
    inner = list(sublayers(model))
    attentions = [layer for layer in inner if isinstance(layer, Attention)]
    found: dict[str, Any] = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in ("trunk", "norm", "position")}
    found |= {"layers": len(attentions), "eps": model.norm.eps}
    windows = [a.window for a in attentions]
    said = lambda part: {f.name: getattr(part, f.name) for f in fields(part)}
    for layer in inner:
        if isinstance(layer, MoE):
            found = {"expert_hidden": getattr(layer.expert, "hidden", None), **said(layer.router)} | said(layer) | found
        elif not isinstance(layer, Attention):
            found = said(layer) | found
    for layer in inner:  # where there are no dense layers, experts are what there is
        if isinstance(layer, MoE):
            found = said(layer.expert) | found
    found |= {"alpha": found["act"].beta} if isinstance(found.get("act"), Swish) else {}
    found |= {"sparse": tuple(isinstance(layer, MoE) for layer in inner if not isinstance(layer, Attention))}
    if attentions:
        whole = [a for a in attentions if a.window is None] or attentions
        found |= {"heads": whole[0].heads, "kv_heads": whole[0].kv_heads, "head_dim": whole[0].head_dim, "bias": whole[0].bias,
                  "out_bias": whole[0].out_bias, "scale": whole[0].scale, "score_softcap": whole[0].softcap,
                  "window": max((w for w in windows if w is not None), default=None),
                  "windowed": tuple(w is not None for w in windows), "weight_dropout": whole[0].weight_dropout,
                  "dropout": whole[0].dropout, "embed_dropout": model.dropout}  # fmt: skip
        if isinstance(model.position, Learned):
            found |= {"length": model.position.length}
        if isinstance(whole[0].position, Rope):
            rope = whole[0].position
            found |= {"theta": rope.theta, "scaling": rope.scaling, "fraction": rope.fraction}
        local = [a.position for a in attentions if a.window is not None and isinstance(a.position, Rope)]
        found |= {"local_theta": local[0].theta} if local else {}
    return found


_TRAINING = {
    "dropout": 0.0,
    "weight_dropout": 0.0,
    "out_init": FanIn(),
    "balance": 0.0,
    "balance_over": "batch",
    "z_loss": 0.0,
    "rate": 0.0,
}


def bare(model: Any) -> Any:
    """The model without what matters in training only: dropout, fresh initialisation, auxiliary losses. Two that compute the same compare
    equal."""
    if isinstance(model, tuple):
        return tuple(bare(part) for part in model)
    if not is_dataclass(model) or isinstance(model, type):
        return model
    changes = {f.name: _TRAINING.get(f.name, bare(getattr(model, f.name))) for f in fields(model) if f.init}
    return replace(model, **changes)


def difference(a: Any, b: Any) -> str:
    """The first place where two models compute differently; nothing if they do not."""
    return "" if bare(a) == bare(b) else _difference(bare(a), bare(b), "")


def _difference(a: Any, b: Any, path: str) -> str:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return next((_difference(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b)) if x != y), "")
    if is_dataclass(a) and type(a) is type(b):
        return next((_difference(getattr(a, f.name), getattr(b, f.name), f"{path}/{f.name}") for f in fields(a)
                     if getattr(a, f.name) != getattr(b, f.name)), "")  # fmt: skip
    return f"{path.strip('/')} is {a!r} there and {b!r} here"
