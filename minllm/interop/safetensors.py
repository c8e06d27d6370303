"""safetensors: an 8-byte length, a JSON header {name: dtype, shape, offsets}, and the bytes; a big model is several files and an index.

Read tensor by tensor: each is mapped while it is copied and no longer, so that a process holds what it asked for. Written tensor by
tensor behind a header that is known beforehand.
"""

import json
import re
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64,
          "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole tensor, mapped: its pages are let go with it. Not to be kept."""
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        data = np.memmap(self.file, np.uint8, "r", self.offset, (self.size,))
        return np.asarray(data).view(self.dtype).reshape(self.shape)


def stored(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by name. Only headers are read. Raises ValueError for a folder without weights, a truncated or unreadable
    file, and an index that does not agree with its files."""
    if (folder / INDEX).is_file():
        try:
            where = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError):
            raise ValueError(f"{folder / INDEX} is no index of safetensors files: it must be JSON with a weight_map") from None
    elif (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    else:
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors are read: convert other weights to it first")
    found: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} names {name}, which is not there; the download is not complete")
        for tensor, entry in _header(folder / name).items():
            if where.get(tensor) != name:
                raise ValueError(
                    f"{folder / name} holds {tensor}, which {INDEX} {f'says is in {where[tensor]}' if tensor in where else 'does not list'}"
                )
            found[tensor] = entry
    if lost := [tensor for tensor in where if tensor not in found]:
        raise ValueError(f"{folder / INDEX} says that {lost[0]} is in {where[lost[0]]}, but it is not ({len(lost)} such tensors)")
    return found


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise ValueError(f"{file} is no safetensors file, or a truncated one: {size} bytes, its header would have {length}")
        try:
            header = json.loads(f.read(length))
        except ValueError:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    found, end = {}, 0
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}: dequantize the model first")
        dtype, shape, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if stop - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: {name} has {stop - start} bytes, its shape {shape} of {entry['dtype']} needs others")
        found[name], end = Stored(file, dtype, shape, 8 + length + start), max(end, 8 + length + stop)
    if size < end:
        raise ValueError(f"{file} is truncated: it has {size} bytes, its header promises {end}; fetch it again")
    return found


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(folder: Path, plan: Iterable[Planned], arrays: Iterator[np.ndarray], limit: int) -> None:
    """Writes the tensors, in the order of the plan, into files of at most `limit` bytes each (a larger tensor has a file of its own),
    and an index where there are several. `arrays` yields them in that order: one is held at a time."""
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > limit:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards):
        with (folder / file).open("wb") as f:
            f.write(_head(shard))
            for tensor in shard:
                array = next(arrays)
                assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), tensor
                f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if count > 1:
        total = sum(tensor.size for shard in shards for tensor in shard)
        where = {tensor.name: file for file, shard in zip(files, shards) for tensor in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", "utf-8")


def _head(shard: list[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what Hugging Face asks for: the dims are in PyTorch's order
    at = 0
    for tensor in shard:
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of `patterns`, in which {i} stands for any number."""
    return any(re.fullmatch(re.escape(p).replace(r"\{i\}", r"\d+"), name) for p in patterns)
