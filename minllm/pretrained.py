"""Any model that is on disk: a Hugging Face folder, a GGUF file, a run of ours or one of its checkpoints. The one place that knows all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from minllm import checkpoint, models, spec
from minllm.data import tokenizer as tokenizers
from minllm.data.tokenizer import HuggingFace, LiveTokenizer, SentencePiece
from minllm.interop import gguf, hf
from minllm.layer import Execution
from minllm.lora import Adapted, LoRA, merge
from minllm.sharding import sharding
from minllm.spec import Tree

Report = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


class Pretrained(NamedTuple):
    """tokenizer: None where none lies beside the weights."""

    model: Any
    params: Tree
    tokenizer: LiveTokenizer | None


def kind(path: str | Path) -> Literal["hf", "gguf", "run"]:
    """What lies at a path. Raises ValueError for anything else."""
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if (path / "config.json").is_file():
        return "hf"
    folder, step = _run(path)
    if step is not None or (folder.is_dir() and checkpoint.latest(folder) is not None):
        return "run"
    known = "a Hugging Face folder (with config.json), a run folder or one of its checkpoints/N, or a .gguf file"
    raise ValueError(f"{path} is no model: give {known}")


def load(path: str | Path, run: Execution = Execution(), dtype: Any = None, report: Report | None = None) -> Pretrained:
    """Model, parameters where `run` has them, and tokenizer.

    dtype: of the parameters; None keeps what is stored, and makes float32 of a GGUF file. Of a run, the moving average is taken where
    there is one, and low-rank factors are added to their weights. Raises ValueError for a path that is no model, and whatever its format's
    reader raises.
    """
    which, model, tokenizer = kind(path), describe(path), tokenizer_of(path)
    if tokenizer is not None:
        hf.fits(tokenizer, model.vocab)
    if which == "hf":
        return Pretrained(*hf.load(path, run, dtype, report), tokenizer)
    if which == "gguf":
        return Pretrained(*gguf.load(path, run, dtype or jnp.float32, report), tokenizer)
    return Pretrained(model, _restored(path, model, run, dtype), tokenizer)


def describe(path: str | Path) -> Any:
    """The model at a path, without its parameters."""
    if kind(path) == "hf":
        return hf.describe(path)[1]
    if kind(path) == "gguf":
        return gguf.describe(path)
    folder, step = _run(Path(path))
    settings = checkpoint.read_extra(folder, step)["config"]
    if like := settings.get("model.like"):
        return describe(like)
    args = {key.removeprefix("model.args."): value for key, value in settings.items() if key.startswith("model.args.")}
    return models.build(
        settings["model.family"], settings["model.preset"], **{"vocab": tokenizers.load(folder / "tokenizer").vocab_size, **args}
    )


def tokenizer_of(path: str | Path) -> LiveTokenizer | None:
    """The tokenizer beside a model; None where there is none. Raises ValueError for one of a kind that we do not read."""
    path = Path(path)
    if kind(path) == "run":
        return tokenizers.load(_run(path)[0] / "tokenizer")
    if kind(path) == "gguf":
        return gguf.tokenizer(path)
    if (path / tokenizers.MANIFEST).is_file():
        return tokenizers.load(path)
    if (path / "tokenizer.json").is_file():
        return HuggingFace(path=str(path)).build()
    if (path / "tokenizer.model").is_file():
        return SentencePiece(model=str(path / "tokenizer.model")).build()
    if other := [name for name in hf.BESIDE if name not in ("chat_template.jinja", "generation_config.json") and (path / name).is_file()]:
        raise ValueError(f"{path} has a tokenizer only as {other[0]}; read are tokenizer.json and tokenizer.model: make one of it")
    return None


def chat_template(path: str | Path) -> str | None:
    """The Jinja source of the model's chats; None where it has none."""
    path = Path(path)
    if kind(path) == "gguf":
        return gguf.chat_template(path)
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text("utf-8")
    beside = path / "tokenizer_config.json"
    stored = json.loads(beside.read_text("utf-8")).get("chat_template") if beside.is_file() else None
    return {one["name"]: one["template"] for one in stored}.get("default") if isinstance(stored, list) else stored


def opening(path: str | Path, tokenizer: LiveTokenizer) -> list[int]:
    """The tokens that the model expects before every text, which `encode` does not write: a bos or none."""
    path = Path(path)
    if kind(path) == "gguf":
        return gguf.opening(path)
    beside = path / "tokenizer_config.json"
    said = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    begins = said.get("add_bos_token", "tokenizer.model" in tokenizer.files)
    if "tokenizer.json" in tokenizer.files and "add_bos_token" not in said:  # what its post-processor puts before a text
        processor = json.loads(tokenizer.files["tokenizer.json"]).get("post_processor") or {}
        begins = '"SpecialToken"' in json.dumps([step.get("single", [{}])[:1] for step in processor.get("processors", [processor])])
    return [tokenizer.bos] if begins and tokenizer.bos is not None and kind(path) == "hf" else []


def _run(path: Path) -> tuple[Path, int | None]:
    """(run folder, step) of a run folder or of one of its checkpoints/N."""
    inside = path.name.isdecimal() and path.parent.name == "checkpoints"
    return (path.parent.parent, int(path.name)) if inside else (path, None)


def _restored(path: str | Path, model: Any, run: Execution, dtype: Any) -> Tree:
    folder, step = _run(Path(path))
    settings = checkpoint.read_extra(folder, step)["config"]
    stored = jnp.dtype(settings["precision.params"])

    def part(specs: Tree, under: str, kind: Any) -> Tree:
        where = lambda s: None if run.mesh is None else sharding(run.mesh, run.rules, s.axes, s.shape)
        leaf = lambda s: s if s is None else jax.ShapeDtypeStruct(s.shape, s.dtype or kind, sharding=where(s))
        return checkpoint.restore(folder, spec.tree_map(leaf, specs), step, under=under)[0]

    lora = {key.removeprefix("lora."): value for key, value in settings.items() if key.startswith("lora.")}
    declared = (Adapted(model, LoRA(**lora)) if lora else model).params()
    trained, frozen = spec.part(declared, declared)
    average = settings.get("average") is not None
    learned = part(trained, "average", jnp.float32) if average else part(trained, "params", stored)
    params = spec.join(learned, part(frozen, "frozen", stored))
    params = merge(params) if lora else params
    return params if dtype is None else jax.tree.map(lambda a: a.astype(dtype), params)
