"""The model families. A family is one file: a builder, the published shapes, how its config and its weights are written elsewhere."""

import difflib
import importlib
import inspect
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from minllm.models.family import Family

# Family -> the file that it is in. A file is read when its family is asked for.
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "olmo2": "olmo",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "bert": "bert",
    "t5": "t5",
    "mamba": "mamba",
    "mamba2": "mamba",
    "jamba": "jamba",
    "qwen3_next": "qwen3_next",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "kimi_linear": "kimi",
    "recurrent_gemma": "griffin",
    "rwkv": "rwkv",
}


def family(name: str) -> Family:
    """Raises ValueError naming the families there are."""
    module = importlib.import_module(f"minllm.models.{FAMILIES[_known(name, FAMILIES, 'model family')]}")
    return module.FAMILY[name]


_lookup = family  # the next function has an argument of that name


def build(family: str, preset: str | None = None, **args: Any) -> Any:
    """A model of a family: the preset's shape with `args` in place of its own. Raises ValueError naming what there is."""
    known = _lookup(family)
    shape = known.presets[_known(preset, known.presets, f"{family} preset")] if preset else {}
    hints = get_type_hints(known.builder)
    for name, value in args.items():
        _known(name, inspect.signature(known.builder).parameters, f"argument of {family}")
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError:
            raise ValueError(f"{family} argument {name} is {value!r}; it must be of type {hints[name]}") from None
    return known.builder(**{**shape, **args})


def _known(name, known, what):
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
        raise ValueError(f"{name!r} is no {what}; {hint}")
    return name
