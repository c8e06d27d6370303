"""The model families. A family is one file: a builder, PRESETS of published shapes, a table of weight names."""

import difflib
import inspect
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from minllm.models import llama
from minllm.models.transformer import Decoder

FAMILIES = {"llama": llama}


def build(family: str, preset: str | None = None, **args: Any) -> Decoder:
    """A model of a family: the preset's shape with `args` in place of its own. Raises ValueError naming what there is."""
    module = FAMILIES[_known(family, FAMILIES, "model family")]
    shape = module.PRESETS[_known(preset, module.PRESETS, f"{family} preset")] if preset else {}
    hints = get_type_hints(module.BUILDER)
    for name, value in args.items():
        _known(name, inspect.signature(module.BUILDER).parameters, f"argument of {family}")
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError:
            raise ValueError(f"{family} argument {name} is {value!r}; it must be of type {hints[name]}") from None
    return module.BUILDER(**{**shape, **args})


def _known(name, known, what):
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
        raise ValueError(f"{name!r} is no {what}; {hint}")
    return name
