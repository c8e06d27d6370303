"""Models as Hugging Face keeps them: a folder with config.json, safetensors and a tokenizer. No torch in either direction.

Reading goes tensor by tensor straight to where each parameter lives: every device gets its own part of one layer at a time and stacks it
in place, so that the host holds the few tensors that are on their way. Everything is checked before the first is read. Writing goes
tensor by tensor into a folder beside the wanted one, which takes its name when it is whole.
"""

import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from minllm import models
from minllm.data.tokenizer import LiveTokenizer
from minllm.interop import safetensors
from minllm.interop.safetensors import Planned, Stored
from minllm.interop.table import Target, Tensor, flat, pick, tensors
from minllm.layer import Execution
from minllm.models.family import BENIGN, Family, Rows, difference
from minllm.sharding import sharding
from minllm.spec import Spec, Tree, is_spec, path_name

Report = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)
SHARD = 5 * 10**9  # bytes, what Hugging Face's own files have at most
READERS = min(8, os.cpu_count() or 1)  # tensors that are read and turned at once
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json")  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------------------------


def load(folder: str | Path, run: Execution = Execution(), dtype: Any = None, report: Report | None = None) -> tuple[Any, Tree]:
    """(model, parameters) of a Hugging Face folder, the parameters where `run` has them.

    dtype: of the parameters; None keeps each tensor's own. report: called as reading goes on.
    Raises ValueError, before any weight is read, for a family or a config that we cannot honour, and for files that are truncated or do
    not hold exactly the tensors of the model in its shapes.
    """
    folder = Path(folder)
    family, model = describe(folder)
    plan = _matched(folder, family, model)
    specs, places = flat(model.params()), {}
    spare: list[np.ndarray] = []  # touching fresh memory costs as much as filling it: what was written to a buffer is filled again
    total, done = sum(file.size for _, file in plan), 0
    rows = [list(row) for _, row in groupby(plan, key=lambda pair: pair[0].row)]
    with ThreadPoolExecutor(READERS) as pool:
        # rows of large tensors first, while there is most memory left
        for row in sorted(rows, key=lambda row: -row[0][1].size):
            for k in range(len(row[0][0].targets)):
                for tensor, _ in row:
                    path = tensor.targets[k].path
                    if path not in places:
                        places[path] = _Place(specs[path], run, _dtype(row, k, path, dtype))
            for (_, file), pieces in _ahead(pool, partial(_pieces, places, spare), row):
                for path, device, at, piece in pieces:
                    places[path].put(device, at, piece)
                    if at:
                        spare.append(piece)
                done += file.size
                if report:
                    report("reading weights", done, total)
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.params(), is_leaf=is_spec)
    return model, jax.tree.unflatten(structure, [places[path_name(path)].array() for path, _ in leaves])


def describe(folder: str | Path) -> tuple[Family, Any]:
    """(family, model) of a folder's config.json. No weight is read."""
    file = Path(folder) / "config.json"
    config = _config(file)
    name = config.get("model_type")
    if name not in models.FAMILIES:
        raise ValueError(f"{file} has model_type {name!r}; known are {', '.join(models.FAMILIES)}")
    family = models.family(name)
    try:
        return family, family.model(config)
    except ValueError as error:
        raise ValueError(f"{file} cannot be honoured: {error}") from None


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is not there: a Hugging Face model folder has one")
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None


def _matched(folder: Path, family: Family, model: Any) -> list[tuple[Tensor, Stored]]:
    """Each tensor of the model with its place in the files."""
    there, wanted = renamed(safetensors.stored(folder), family), tensors(model, family.rows(model))
    names = {tensor.name for tensor in wanted}
    if not any(name.startswith(family.prefix) for name in there):  # files of the bare trunk
        there = {name if name in names else family.prefix + name: file for name, file in there.items()}
    if model.tied:
        _tied_head(there, family.rows(model))
    extra = [name for name in there if name not in names and not safetensors.matches(name, family.ignored)]
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"{folder} lacks {_some(missing)}, of the tensors that its config.json ({family.name}) asks for")
    if extra:
        raise ValueError(f"{folder} holds {_some(extra)}, for which its config.json ({family.name}) has no place")
    for tensor in wanted:
        file = there[tensor.name]
        if file.shape != tensor.shape:
            raise ValueError(f"{tensor.name} in {file.file} has shape {file.shape}; by config.json it has {tensor.shape}")
        if not jnp.issubdtype(file.dtype, jnp.floating):
            raise ValueError(f"{tensor.name} in {file.file} has dtype {file.dtype}; only floating-point ones are read: dequantize it")
    return [(tensor, there[tensor.name]) for tensor in wanted]


def renamed(there: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """The tensors of a folder by the names of the family's table."""
    for other, ours in family.renamed:
        pattern, name = re.escape(other).replace(r"\{i\}", r"(\d+)"), ours.replace("{i}", r"\1")
        there = {re.sub(rf"{pattern}\Z", name, theirs): file for theirs, file in there.items()}
    return there


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tied_head(there: dict[str, Stored], rows: Rows) -> None:
    """Some files hold a tied head a second time: it is left out if it is the embedding, and an error if it is not."""
    name = {paths: name for name, (paths, *_) in rows.items() if isinstance(paths, str)}
    head, embed = there.pop(name.get("head", ""), None), there.get(name["embed"])
    same = head and embed and (head.shape, head.dtype) == (embed.shape, embed.dtype)
    if head and not (same and np.array_equal(_bits(head.read()), _bits(embed.read()))):
        raise ValueError(
            f"{name['head']} in {head.file} is not {name['embed']}, though config.json ties them; set tie_word_embeddings to false there"
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _dtype(row: list[tuple[Tensor, Stored]], k: int, path: str, dtype: Any) -> Any:
    kinds = {file.dtype for tensor, file in row if tensor.targets[k].path == path}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"the layers of {row[0][0].row} have different dtypes ({', '.join(map(str, kinds))}); ask for one with dtype")
    return dtype or kinds.pop()


def _pieces(places: dict[str, "_Place"], spare: list[np.ndarray], pair: tuple[Tensor, Stored]) -> list[tuple]:
    tensor, file = pair
    parts = tensor.pattern.split(file.read(), tuple(target.shape for target in tensor.targets))
    return [
        (target.path, *piece) for part, target in zip(parts, tensor.targets) for piece in places[target.path].pieces(target, part, spare)
    ]


def _ahead(pool: ThreadPoolExecutor, f: Callable, items: Iterable) -> Iterator[tuple[Any, Any]]:
    """(item, f(item)) in order, with `READERS` of them under way."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(f, item)))
        if len(waiting) > READERS:
            item, future = waiting.popleft()
            yield item, future.result()
    while waiting:
        item, future = waiting.popleft()
        yield item, future.result()


class _Place:
    """A parameter while it is filled: one buffer on each of this host's devices."""

    def __init__(self, spec: Spec, run: Execution, dtype: Any):
        self.shape, self.dtype = spec.shape, jnp.dtype(spec.dtype or dtype)
        one = SingleDeviceSharding(jax.local_devices()[0])
        self.sharding = one if run.mesh is None else sharding(run.mesh, run.rules, spec.axes, spec.shape)
        whole = self.sharding.addressable_devices_indices_map(self.shape)
        self.parts = {device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape)) for device, index in whole.items()}
        self.buffers: dict[Any, jax.Array] = {}

    def pieces(self, target: Target, part: np.ndarray, spare: list[np.ndarray]) -> Iterator[tuple[Any, tuple[int, ...], np.ndarray]]:
        """What each device needs of a layer's part: (device, where in its buffer, its piece)."""
        for device, index in self.parts.items():
            lead, own = index[: len(target.index)], index[len(target.index) :]
            if all(s.start <= i < s.stop for i, s in zip(target.index, lead)):
                yield device, tuple(i - s.start for i, s in zip(target.index, lead)), _contiguous(part[own], spare if target.index else [])

    def put(self, device: Any, at: tuple[int, ...], piece: np.ndarray) -> None:
        """Returns when the piece may be filled again, unless it became the parameter itself."""
        array = jax.device_put(piece, device)
        if not at:
            self.buffers[device] = array.astype(self.dtype)
            return
        if device not in self.buffers:
            shape = tuple(s.stop - s.start for s in self.parts[device])
            self.buffers[device] = jnp.zeros(shape, self.dtype, device=device)
        self.buffers[device] = _write(self.buffers[device], array, at).block_until_ready()

    def array(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, list(self.buffers.values()))


@partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, at: tuple) -> jax.Array:
    lead = len(at)
    part = part.astype(whole.dtype).reshape((1,) * lead + part.shape)
    return jax.lax.dynamic_update_slice(whole, part, (*at, *(0,) * (whole.ndim - lead)))


def _contiguous(view: np.ndarray, spare: list[np.ndarray]) -> np.ndarray:
    """A copy in C order, in one of the spare buffers if one is large enough. A transposition goes by 64 columns at a time: both sides
    then stay in the cache, four times as fast."""
    shape, strides = [view.shape[0]], [view.strides[0]]
    for n, stride in zip(view.shape[1:], view.strides[1:]):
        if strides[-1] == n * stride:  # this dim follows the one before in memory
            shape[-1], strides[-1] = shape[-1] * n, stride
        else:
            shape.append(n)
            strides.append(stride)
    bits = _bits(np.lib.stride_tricks.as_strided(view, shape, strides))
    space = next((one for one in _popped(spare) if one.nbytes >= view.nbytes), None)
    space = aligned(view.nbytes) if space is None else space.reshape(-1).view(np.uint8)[: view.nbytes]
    out = space.view(bits.dtype).reshape(shape)
    step = 64 if strides[-1] > view.itemsize else shape[-1]
    for i in range(0, shape[-1], step):
        out[..., i : i + step] = bits[..., i : i + step]
    return out.view(view.dtype).reshape(view.shape)


def _popped(spare: list[np.ndarray]) -> Iterator[np.ndarray]:
    while True:
        try:
            yield spare.pop()
        except IndexError:
            return


def aligned(size: int) -> np.ndarray:
    """Bytes that begin at a multiple of 64: an array of the host's own devices can then be made of them without a copy."""
    space = np.empty(size + 64, np.uint8)
    return space[-space.ctypes.data % 64 :][:size]


# --- writing --------------------------------------------------------------------------------------------------------------------------


def save(
    folder: str | Path, model: Any, params: Tree, tokenizer: LiveTokenizer | None = None, *, family: str | None = None,
    like: str | Path | None = None, shard: int = SHARD, report: Report | None = None,
) -> None:  # fmt: skip
    """Writes a model as a folder that `transformers.AutoModelForCausalLM` loads: config, weights in their dtypes, tokenizer.

    family: as what it is written; None takes the first of FAMILIES that can express it. like: the folder that the model came from; its
    fields that change no number (lengths, special tokens) are kept and, without a tokenizer, its tokenizer files.
    shard: bytes a file. Raises ValueError, with nothing written, if the folder is there and not empty, if no family can express the
    model, or if the tokenizer has more tokens than the model or no form in this format.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give a new folder, or empty it")
    known, config = _written(model, family)
    plan = tensors(model, known.rows(model))
    dtypes = {target.path: jax.eval_shape(partial(pick, target=target), params).dtype for tensor in plan for target in tensor.targets[:1]}
    planned = [Planned(tensor.name, np.dtype(dtypes[tensor.targets[0].path]), tensor.shape) for tensor in plan]
    config |= {"torch_dtype": max(planned, key=lambda tensor: tensor.size).dtype.name}
    files, ids = tokenizer_files(tokenizer, model.vocab) if tokenizer is not None else ({}, {})
    if like is not None:
        own = ("architectures", "model_type", "torch_dtype", "dtype")
        config |= {k: v for k, v in _config(Path(like) / "config.json").items() if k in BENIGN and k not in own}
        if parts := difference(known.model(config), model):
            raise ValueError(f"with the lengths of {like} the model would be another: {parts}; save without `like`")
        here = [name for name in BESIDE if (Path(like) / name).is_file() and (tokenizer is None or name == "generation_config.json")]
        files = {name: (Path(like) / name).read_bytes() for name in here} | files
    config |= ids

    total, done = sum(tensor.size for tensor in planned), 0

    def arrays() -> Iterator[np.ndarray]:
        nonlocal done
        for tensor, entry in zip(plan, planned):
            yield tensor.pattern.join([_host(pick(params, target)) for target in tensor.targets])
            done += entry.size
            if report:
                report("writing weights", done, total)

    if jax.process_index() > 0:  # every process hands its parts over; the first one writes
        deque(arrays(), maxlen=0)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        safetensors.write(fresh, planned, arrays(), shard)
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        fresh.chmod(0o755)
        fresh.replace(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _written(model: Any, family: str | None) -> tuple[Family, dict[str, Any]]:
    """(the family, its config.json) that express a model."""
    said = []
    for name in models.FAMILIES if family is None else [family]:
        known = models.family(name)
        try:
            return known, known.config(model)
        except ValueError as error:
            said.append(f"  {error}")
    raise ValueError("no family can express this model in a config.json:\n" + "\n".join(said))


def _host(x: jax.Array) -> np.ndarray:
    """The array here, wherever its parts are."""
    if not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return np.asarray(x)


def tokenizer_files(tokenizer: LiveTokenizer, vocab: int) -> tuple[dict[str, bytes], dict[str, int]]:
    """(files, ids of special tokens for config.json) of a tokenizer. Raises ValueError if it has more tokens than the model, or is of a
    kind that this format does not have."""
    fits(tokenizer, vocab)
    classes = {"tokenizer.json": "PreTrainedTokenizerFast", "tokenizer.model": "LlamaTokenizer"}
    if (name := next((name for name in classes if name in tokenizer.files), None)) is None:
        raise ValueError(
            f"a tokenizer of kind {tokenizer.config.kind!r} has no file that Hugging Face reads; train the model with kind bpe, "
            "huggingface or sentencepiece, or save without a tokenizer"
        )
    texts = {id: text for text, id in tokenizer.specials.items()}
    ids = {which: getattr(tokenizer, which) for which in ("bos", "eos", "pad") if getattr(tokenizer, which) is not None}
    settings = {"tokenizer_class": classes[name], "clean_up_tokenization_spaces": False}
    settings |= {f"{which}_token": texts[id] for which, id in ids.items() if id in texts}
    files = {name: tokenizer.files[name], "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}
    return files, {f"{which}_token_id": id for which, id in ids.items()}


def fits(tokenizer: LiveTokenizer, vocab: int) -> None:
    """Raises ValueError if the tokenizer gives tokens that a model of `vocab` tokens has no embedding for."""
    if tokenizer.vocab_size > vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab}: they do not belong together")
