"""Models as llama.cpp keeps them: one GGUF file with shape, vocabulary, chat template and weights.

A file says the same as Hugging Face's config.json and weights, in other words, so it is read through them: metadata -> config fields ->
`Family.model`, and a tensor is found by the name that the family's table gives it. What differs is data of a `Form`: the words, and two
habits. llama.cpp's Llama turns neighbouring dims (2i, 2i + 1) of a head where ours turns halves (i, i + H/2), so the rows of q and k are
permuted; a wrong order cannot be told from a right one in short texts. And it stores the whole gain of Gemma's norms, not gain - 1.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minllm import models
from minllm.data.tokenizer import LiveTokenizer
from minllm.interop import container, vocabulary
from minllm.interop.blocks import FORMATS
from minllm.interop.container import Entry, File, Planned
from minllm.interop.table import Tensor, flat, pick, tensors
from minllm.layer import Execution
from minllm.layers.position import Llama3Scaling
from minllm.models.family import Family, bare, write_scaling
from minllm.sharding import sharding
from minllm.spec import Tree, is_spec, path_name

Report = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)
Fields = dict[str, Any]  # of a config.json

# A config field -> the key after the architecture's name. The order is that of llama.cpp's converter.
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SAID_TWICE = {"attention.value_length": "head_dim", "rope.dimension_count": "head_dim"}
ROPE_FACTORS = "rope_freqs.weight"
# The tensors of a family, by the names of its table.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.{i}.input_layernorm.weight": "blk.{i}.attn_norm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blk.{i}.ffn_norm.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blk.{i}.attn_output.weight",
    **{f"model.layers.{{i}}.self_attn.{x}_proj.{kind}": f"blk.{{i}}.attn_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    **{f"model.layers.{{i}}.self_attn.{x}_norm.weight": f"blk.{{i}}.attn_{x}_norm.weight" for x in "qk"},
    **{f"model.layers.{{i}}.mlp.{x}_proj.weight": f"blk.{{i}}.ffn_{x}.weight" for x in ("gate", "up", "down")},
    **{f"model.layers.{{i}}.mlp.experts.{{e}}.{x}_proj.weight": f"blk.{{i}}.ffn_{x}_exps.weight" for x in ("gate", "up", "down")},
    **{f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{x}.weight": f"blk.{{i}}.ffn_{y}_exps.weight"
       for x, y in (("w1", "gate"), ("w2", "down"), ("w3", "up"))},
    **{f"model.layers.{{i}}.{x}.gate.weight": "blk.{i}.ffn_gate_inp.weight" for x in ("mlp", "block_sparse_moe")},
}  # fmt: skip
SANDWICH = NAMES | {
    "model.layers.{i}.post_attention_layernorm.weight": "blk.{i}.post_attention_norm.weight",
    "model.layers.{i}.pre_feedforward_layernorm.weight": "blk.{i}.ffn_norm.weight",
    "model.layers.{i}.post_feedforward_layernorm.weight": "blk.{i}.post_ffw_norm.weight",
}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


@dataclass(frozen=True)
class Form:
    """What an architecture of llama.cpp is here.

    architecture: llama.cpp's. family: ours. names: of tensors. experts: whether it has some (llama is Mixtral then).
    permuted: rows of q and k for neighbouring pairs. whole_gains: norms hold gain, not gain - 1.
    largest: the number of layers by which llama.cpp knows Gemma's 27 B models, whose scores are scaled by the width over the heads.
    """

    architecture: str
    family: str
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    experts: bool = False
    permuted: bool = False
    whole_gains: bool = False
    largest: int | None = None

    def implied(self, config: Fields) -> Fields:
        """Config fields that no file says."""
        if self.family == "qwen3_moe":
            return {"norm_topk_prob": True}
        if self.largest is None:
            return {}
        wide = config["num_hidden_layers"] == self.largest
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]}


# A Mistral without a window is a Llama.
FORMS = (
    Form("llama", "llama", permuted=True),
    Form("llama", "mixtral", permuted=True, experts=True),
    Form("qwen2", "qwen2"),
    Form("qwen3", "qwen3"),
    Form("qwen3moe", "qwen3_moe", experts=True),
    Form("gemma", "gemma", whole_gains=True),
    Form("gemma2", "gemma2", SANDWICH, whole_gains=True, largest=46),
    Form("gemma3", "gemma3_text", SANDWICH, whole_gains=True, largest=62),
)


# --- reading ----------------------------------------------------------------------------------------------------------------------


def load(path: str | Path, run: Execution = Execution(), dtype: Any = jnp.float32, report: Report | None = None) -> tuple[Any, Tree]:
    """(model, parameters) of a GGUF file, quantized weights as the numbers they stand for, the parameters where `run` has them.

    Raises ValueError, before any weight is read, for an architecture, a setting or a format that is not supported, and for files that are
    truncated or do not hold exactly the tensors of the model in its shapes.
    """
    file = container.read(path)
    form, family, model = _described(file)
    plan = _matched(file, form, family, model)
    specs = flat(model.params())
    by_path: dict[str, list[tuple[Tensor, Entry, int, int | None]]] = {}
    for tensor, entry, expert in plan:
        for part, target in enumerate(tensor.targets):
            by_path.setdefault(target.path, []).append((tensor, entry, part, expert))
    done, total, made = 0, sum(prod(s.shape) for s in specs.values()), {}
    for where, sources in by_path.items():  # one parameter at a time: the host holds no more
        spec = specs[where]
        whole = np.empty(spec.shape, spec.dtype or dtype)
        for tensor, entry, part, expert in sources:
            weights = _converted(form, tensor, (entry if expert is None else entry.part(expert)).read(), out=False)
            whole[tensor.targets[part].index] = tensor.pattern.split(weights, tuple(t.shape for t in tensor.targets))[part]
        made[where] = jax.device_put(whole, None if run.mesh is None else sharding(run.mesh, run.rules, spec.axes, spec.shape))
        done += spec.size
        if report:
            report("reading weights", done, total)
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.params(), is_leaf=is_spec)
    return model, jax.tree.unflatten(structure, [made[path_name(path)] for path, _ in leaves])


def tokenizer(path: str | Path) -> LiveTokenizer:
    """The tokenizer in a GGUF file. ValueError for a kind that is not supported."""
    return vocabulary.tokenizer(container.read(path).metadata)


def chat_template(path: str | Path) -> str | None:
    """The Jinja source in a GGUF file, or None."""
    return container.read(path).metadata.get("tokenizer.chat_template")


def opening(path: str | Path) -> list[int]:
    """The tokens that every text begins with."""
    metadata = container.read(path).metadata
    begins = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    return [metadata["tokenizer.ggml.bos_token_id"]] if begins and "tokenizer.ggml.bos_token_id" in metadata else []


def describe(path: str | Path) -> Any:
    """The model in a GGUF file, without its parameters."""
    return _described(container.read(path))[2]


def _described(file: File) -> tuple[Form, Family, Any]:
    """(form, family, model) of a file's metadata. No weight is read but the rotation's factors."""
    name = file.metadata.get("general.architecture")
    experts = bool(file.metadata.get(f"{name}.expert_count", 0))
    form = next((form for form in FORMS if (form.architecture, form.experts) == (name, experts)), None)
    if form is None:
        known = ", ".join(dict.fromkeys(form.architecture for form in FORMS))
        raise ValueError(f"{file.path} has the architecture {name!r}{' with experts' if experts else ''}; known are {known}")
    family = models.family(form.family)
    factors = file.tensors[ROPE_FACTORS].read() if ROPE_FACTORS in file.tensors else None
    try:
        config = _config(form, family, file.metadata, factors, "output.weight" not in file.tensors)
        if "token_embd.weight" in file.tensors:
            config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
        return form, family, family.model(config)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be honoured: {error}") from None


def _config(form: Form, family: Family, metadata: Mapping[str, Any], factors: np.ndarray | None, tied: bool) -> Fields:
    """The config.json that says what the metadata says."""
    name = form.architecture
    said = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    config: Fields = {}
    for ours, key in KEYS.items():
        if key in said:
            value = said.pop(key)
            if isinstance(value, np.ndarray):
                if len(set(value.tolist())) > 1:
                    raise ValueError(f"{name}.{key} differs from layer to layer ({value.tolist()}), which is not supported")
                value = value[0].item()
            if value or not key.startswith("expert"):  # dense models may say that they have 0 experts
                config[ours] = float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.999999747e-06
    missing = [f"{name}.{KEYS[f]}" for f in ("hidden_size", "num_hidden_layers", "num_attention_heads") if f not in config]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    for key, ours in SAID_TWICE.items():
        if said.pop(key, config[ours]) != config[ours]:
            raise ValueError(f"{name}.{key} is not the head size {config[ours]}, which is not supported")
    kind, factor = said.pop("rope.scaling.type", "none"), said.pop("rope.scaling.factor", None)
    factor = said.pop("rope.scale_linear", None) if factor is None else factor  # as old files say it
    trained = said.pop("rope.scaling.original_context_length", None)
    if factors is not None:
        config["rope_scaling"] = write_scaling(_banded(factors, config, trained))
    elif kind == "linear" or (kind == "none" and factor not in (None, 0.0, 1.0)):
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise ValueError(f"RoPE scaling of type {kind!r} is not supported; known are none, linear and the factors of Llama 3")
    if said:
        raise ValueError(f"it has settings that are not known: {', '.join(f'{name}.{k} = {v!r}' for k, v in said.items())}")
    config |= {"model_type": family.name, "tie_word_embeddings": tied} | form.implied(config)
    honoured = {other for ours, known in family.fields.items() for other in known.names(ours)} | family.benign
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"] and "head_dim" not in honoured:
        del config["head_dim"]
    return config


def _banded(factors: np.ndarray, config: Fields, trained: int | None) -> Llama3Scaling:
    """Llama 3's scaling, from what it divides each frequency by. Its four numbers are not in the file; two never differ."""
    base = float(config["rope_theta"]) ** -(np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"])
    for original in filter(None, (trained, 8192)):
        scaling = Llama3Scaling(float(str(factors.max())), 1.0, 4.0, original)
        if np.allclose(_factors(scaling, base, config["rope_theta"]), factors, rtol=1e-4):
            return scaling
    raise ValueError(f"the factors of {ROPE_FACTORS} are not those of a Llama 3 scaling")


def _factors(scaling: Llama3Scaling, base: np.ndarray, theta: float) -> np.ndarray:
    return base / np.asarray(scaling.frequencies(base, theta, jnp.asarray(1)))


def _matched(file: File, form: Form, family: Family, model: Any) -> list[tuple[Tensor, Entry, int | None]]:
    """Each tensor of the model with its place in the file, and which expert of it."""
    found, used = [], {ROPE_FACTORS}
    for tensor in tensors(model, family.weights):
        name, expert = _name(form, tensor)
        if name not in file.tensors:
            raise ValueError(f"{file.path} has no tensor {name}, which a {family.name} of its shape needs")
        entry = file.tensors[name]
        shape = entry.shape if expert is None else entry.shape[1:]
        if shape != tensor.shape:
            raise ValueError(f"{file.path}: {name} has shape {shape}, by the metadata it is {tensor.shape}")
        found.append((tensor, entry, expert))
        used.add(name)
    if extra := [name for name in file.tensors if name not in used]:
        raise ValueError(f"{file.path} has {len(extra)} tensors that the model has no place for: {', '.join(extra[:5])}")
    return found


def _name(form: Form, tensor: Tensor) -> tuple[str, int | None]:
    """What a tensor is called in the file, and which expert it is of: the file keeps a layer's experts in one tensor."""
    if tensor.row not in form.names:
        raise ValueError(f"{tensor.row} has no name in GGUF")
    pattern = re.escape(tensor.row).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    at = {letter: int(n) for letter, n in re.fullmatch(pattern, tensor.name).groupdict().items()}
    return form.names[tensor.row].format(**at), at.get("e")


def _converted(form: Form, tensor: Tensor, weights: Float[np.ndarray, "*shape"], out: bool) -> Float[np.ndarray, "*shape"]:
    """Hugging Face's tensor as llama.cpp has it (out), or the other way."""
    if form.permuted and re.search(r"\.[qk]_proj\.", tensor.row):
        N, H = tensor.targets[0].shape[-2:]
        pairs = (N, 2, H // 2) if out else (N, H // 2, 2)
        return weights.reshape(*pairs, -1).swapaxes(1, 2).reshape(weights.shape)
    if form.whole_gains and tensor.row.endswith("norm.weight"):
        return weights + np.float32(1 if out else -1)
    return weights


# --- writing ----------------------------------------------------------------------------------------------------------------------


def save(
    path: str | Path, model: Any, params: Tree, format: str = "F32", tokenizer: LiveTokenizer | None = None,
    chat_template: str | None = None, context: int = 2048, name: str = "minllm", report: Report | None = None,
) -> None:  # fmt: skip
    """Writes a model that llama.cpp loads.

    format: of matrices; those of 4 and 5 bits keep embedding and head in Q8_0, as llama.cpp's own files keep them finer. Norms and biases
    are F32. context: the longest text that the model is for. Without a tokenizer the file can be asked with token ids only.
    Raises ValueError, before anything is written, for a model, a tokenizer or a format that GGUF cannot express.
    """
    if format not in FILE_TYPES:
        raise ValueError(f"{format!r} is no format that can be written; choose from {', '.join(FILE_TYPES)}")
    form, family, metadata, factors = _metadata(model, context)
    words = vocabulary.metadata(tokenizer, model.vocab) if tokenizer else {"tokenizer.ggml.model": "none"}
    head = {"general.architecture": form.architecture, "general.type": "model", "general.name": name, **metadata,
            "general.file_type": FILE_TYPES[format], "general.quantization_version": 2, **words}  # fmt: skip
    if chat_template is not None:
        head["tokenizer.chat_template"] = chat_template
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors(model, family.weights):
        groups.setdefault(_name(form, tensor)[0], []).append(tensor)
    ends = "Q8_0" if format[:2] in ("Q4", "Q5") else format
    plan = [] if factors is None else [Planned(ROPE_FACTORS, "F32", factors.shape)]
    for where, members in groups.items():
        shape = list(members[0].shape)
        whole = len(shape) < 2 or where.endswith("ffn_gate_inp.weight")  # which expert is chosen hangs on little
        kind = "F32" if whole else ends if where in ("token_embd.weight", "output.weight") else format
        if shape[-1] % FORMATS[kind].size:
            raise ValueError(f"{where} has rows of {shape[-1]}, no whole blocks of {FORMATS[kind].size}: choose F32, F16 or BF16")
        plan.append(Planned(where, kind, tuple(shape if _name(form, members[0])[1] is None else [len(members), *shape])))

    def arrays() -> Iterator[np.ndarray]:
        if factors is not None:
            yield factors
        for done, (where, members) in enumerate(groups.items(), 1):
            each = []
            for tensor in members:
                parts = [np.asarray(pick(params, target), np.float32) for target in tensor.targets]
                each.append(_converted(form, tensor, tensor.pattern.join(parts), out=True))
            yield each[0] if _name(form, members[0])[1] is None else np.stack(each)
            if report:
                report(f"writing {where}", done, len(groups))

    container.write(path, head, plan, arrays())


def _metadata(model: Any, context: int) -> tuple[Form, Family, dict[str, Any], np.ndarray | None]:
    """The form that a model can be written in, and what the file says of it. It is read back and must give the same model."""
    said = []
    for form in FORMS:
        family = models.family(form.family)
        try:
            written, factors = _said(form.architecture, family.config(model), context)
            if bare(family.model(_config(form, family, written, factors, model.tied))) == bare(model):
                return form, family, written, factors
            said.append(f"{family.name}: read back it would be another model")
        except ValueError as error:
            said.append(str(error))
    raise ValueError("the model has no form in GGUF; " + "; ".join(said))


def _said(architecture: str, config: Fields, context: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """The metadata that says what the config says, and the rotation's factors."""
    config = {"max_position_embeddings": context, "num_experts": config.get("num_local_experts")} | config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config |= {"head_dim": head_dim, "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"]}
    metadata = {f"{architecture}.{key}": config[ours] for ours, key in KEYS.items() if config.get(ours) is not None}
    metadata |= {f"{architecture}.{key}": config[ours] for key, ours in SAID_TWICE.items()}
    scaling = config.get("rope_scaling")
    if not scaling:
        return metadata, None
    if scaling["rope_type"] == "linear":
        return metadata | {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": scaling["factor"]}, None
    if scaling["rope_type"] == "llama3":
        base = float(config["rope_theta"]) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        numbers = [scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")]
        original = f"{architecture}.rope.scaling.original_context_length"
        return metadata | {original: numbers[3]}, _factors(Llama3Scaling(*numbers), base, config["rope_theta"]).astype(np.float32)
    raise ValueError(f"RoPE scaling of type {scaling['rope_type']!r} cannot be written to GGUF here; linear and llama3 can")
