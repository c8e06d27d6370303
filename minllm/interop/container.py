"""GGUF as a file: metadata, the places of tensors, and their bytes.

    "GGUF" version counts | key type value ... | name dims format offset ... | padding | data, each tensor at a multiple of the alignment

Everything is little-endian; a string is its length and its bytes; dims are written last first. Only the head is read: tensors are read one
by one, when they are asked for. (The `gguf` package reads the same files; the head of a model with 49,152 tokens takes it 2.5 s, this 0.1.)
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minllm.interop.blocks import FORMATS, decode, encode

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
NAMES = {known.number: name for name, known in FORMATS.items()}


class Entry(NamedTuple):
    """A tensor in a file; `shape` is in the order of Hugging Face and NumPy, the last dim contiguous."""

    path: Path
    format: str
    shape: tuple[int, ...]
    offset: int

    def part(self, i: int) -> "Entry":
        """The i-th of a tensor of several."""
        return self._replace(shape=self.shape[1:], offset=self.offset + i * FORMATS[self.format].bytes(prod(self.shape[1:])))

    def read(self) -> Float[np.ndarray, "*shape"]:
        """The weights in float32."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = np.fromfile(file, np.uint8, FORMATS[self.format].bytes(prod(self.shape)))
        return decode(data, self.format).reshape(self.shape)


@dataclass(frozen=True)
class File:
    """metadata: numbers, strings, lists of strings, and arrays, as Python and NumPy have them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]


class _Reader:
    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        self.at += dtype.itemsize
        return np.frombuffer(self.data, dtype, 1, self.at - dtype.itemsize)[0].item()

    def count(self) -> int:
        (n,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        if n > len(self.data):
            raise ValueError(f"a length of {n} at byte {self.at - 8}")
        return n

    def string(self) -> str:
        n = self.count()
        self.at += n
        if self.at > len(self.data):
            raise ValueError(f"a text beyond the end at byte {self.at - n}")
        return bytes(self.data[self.at - n : self.at]).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        inner, n = self.number("<u4"), self.count()
        if inner not in NUMBERS:
            return [self.value(inner) for _ in range(n)]
        dtype = np.dtype(NUMBERS[inner])
        self.at += n * dtype.itemsize
        return np.frombuffer(self.data, dtype, n, self.at - n * dtype.itemsize).copy()


def read(path: str | Path) -> File:
    """The head of a file. ValueError for what is no GGUF file, a truncated one, and a format of weights that is not known."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
    data = memoryview(np.memmap(path, np.uint8, "r"))
    reader = _Reader(data)
    reader.at = 4
    try:
        version = reader.number("<u4")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are known, little-endian")
        tensors, keys = reader.count(), reader.count()
        metadata = {reader.string(): reader.value(reader.number("<u4")) for _ in range(keys)}
        entries = []
        for _ in range(tensors):
            name = reader.string()
            dims = [reader.count() for _ in range(reader.number("<u4"))]
            entries.append((name, tuple(reversed(dims)), reader.number("<u4"), reader.count()))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path} is no GGUF file that can be read, or a truncated one: {error}") from None
    alignment = metadata.get("general.alignment", ALIGNMENT)
    begin, found = -(-reader.at // alignment) * alignment, {}
    for name, shape, number, offset in entries:
        if number not in NAMES:
            raise ValueError(f"{path}: {name} is in the format number {number}; known are {', '.join(FORMATS)}")
        entry = Entry(path, NAMES[number], shape, begin + offset)
        if shape and shape[-1] % FORMATS[entry.format].size:
            raise ValueError(f"{path}: {name} has rows of {shape[-1]} weights, which are no whole blocks of {entry.format}")
        if entry.offset + FORMATS[entry.format].bytes(prod(shape)) > len(data):
            raise ValueError(f"{path} is truncated: it has {len(data)} bytes, and {name} ends after them; fetch it again")
        found[name] = entry
    return File(path, metadata, found)


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    format: str
    shape: tuple[int, ...]


def write(path: str | Path, metadata: Mapping[str, Any], plan: Sequence[Planned], arrays: Iterable[Float[np.ndarray, "..."]]) -> None:
    """Writes a file: `arrays` yields the tensors of the plan in its order, one held at a time. The file has its name when it is whole.

    Integers are written as 32 bits, unsigned, those in lists signed; real numbers in float32.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(_head(metadata, plan))
            for planned, array in zip(plan, arrays, strict=True):
                assert array.shape == planned.shape, planned
                data = encode(array, planned.format)
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                file.write(data.data)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _head(metadata: Mapping[str, Any], plan: Sequence[Planned]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(plan), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), *_value(value)]
    offset = 0
    for name, kind, shape in plan:
        parts += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), FORMATS[kind].number, offset)]
        offset += -(-FORMATS[kind].bytes(prod(shape)) // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> Iterator[bytes]:
    """The type and the bytes of a value."""
    if isinstance(value, str):
        yield struct.pack("<I", STRING) + _string(value)
    elif isinstance(value, bool | int | float):
        kind = 7 if isinstance(value, bool) else 6 if isinstance(value, float) else 4
        yield struct.pack("<I", kind) + np.array(value, NUMBERS[kind]).tobytes()
    elif not len(value) or isinstance(value[0], str):
        yield struct.pack("<IIQ", ARRAY, STRING, len(value))
        yield from map(_string, value)
    else:
        kind = 6 if isinstance(value[0], float | np.floating) else 7 if isinstance(value[0], bool | np.bool_) else 5
        yield struct.pack("<IIQ", ARRAY, kind, len(value)) + np.asarray(value, NUMBERS[kind]).tobytes()
