"""Sources: where documents come from. A source streams `Document(id, text)` in a canonical order, the same on every machine.

    held out  <=>  hash(document id) < fraction            (by document)        or        the last fraction of all characters (tail)

Ids are relative paths with the line, row or example number, so the held-out split does not depend on where the corpus lies.
`fingerprint` is a cheap stand-in for the content (configuration, file names, sizes and times): while it is unchanged, the content
hash of an earlier pass is reused. Nothing is skipped: a file that is not text, a missing field, a glob without a match are errors.
"""

import glob as globbing
import gzip
import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import numpy as np
from pydantic import Field

from minllm.config import config

# surrogateescape keeps the raw bytes, for the bytes tokenizer alone: the others know only valid text.
Errors = Literal["strict", "replace", "surrogateescape"]


class Document(NamedTuple):
    id: str
    text: str


def _decode(data: bytes, errors: Errors, where: str, offset: int = 0, encoding: str = "utf-8") -> str:
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        at = f"byte {offset + error.start} (0x{data[error.start]:02x})"
        way_out = "fix the file, or set errors: replace in the source's config"
        raise ValueError(f"{where}: {at} is not valid {encoding.upper()}: {way_out}") from None


def _match(globs: Sequence[str]) -> list[tuple[str, str]]:
    """(id, path) of every file a glob matches, by id: the path relative to the part of the pattern before its first wildcard."""
    found = {}
    for pattern in globs:
        base = pattern[: next((i for i, c in enumerate(pattern) if c in "*?["), len(pattern))]
        base = os.path.dirname(base) or "."
        paths = [p for p in globbing.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not paths:
            raise ValueError(f"no file matches {pattern!r} (from {os.getcwd()}): correct the glob or the working directory")
        found |= {path: Path(os.path.relpath(path, base)).as_posix() for path in paths}
    return sorted((id, path) for path, id in found.items())


def _stat(source, files: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(source), sort_keys=True).encode())
    for id, path in files:
        status = os.stat(path)
        digest.update(f"{id}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the standard library


@config
class PythonStdlib:
    """The .py files of the running interpreter's standard library: 11 MB of real code on every machine.

    Left out: installed packages, the files that the build writes for one machine, and pydoc_data, the language reference as one
    generated string (7 % of all bytes in one file: whichever split drew it would be about prose). The tests are 20 MB more.
    """

    kind: Literal["python_stdlib"] = "python_stdlib"
    tests: bool = False
    errors: Errors = "strict"

    def files(self) -> list[tuple[str, str]]:
        root = Path(sysconfig.get_path("stdlib"))
        unwanted = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
        unwanted |= set() if self.tests else {"test", "tests", "idle_test"}
        relative = ((path.relative_to(root), path) for path in root.rglob("*.py"))
        return sorted(
            (r.as_posix(), str(path))
            for r, path in relative
            if not unwanted & set(r.parts) and not r.parts[0].startswith("config-") and not r.name.startswith("_sysconfigdata")
        )

    def fingerprint(self) -> str:
        return _stat(self, self.files())

    def documents(self) -> Iterator[Document]:
        for id, path in self.files():
            with open(path, "rb") as file:
                try:
                    encoding = tokenize.detect_encoding(file.readline)[0]  # PEP 263: a source file may declare another encoding
                except SyntaxError:
                    encoding = "utf-8"
            yield Document(id, _decode(Path(path).read_bytes(), self.errors, path, encoding=encoding.removesuffix("-sig")))


# ---------------------------------------------------------------------------------------------------------------- files


@config
class Text:
    """Text files (.gz too). A document is a whole `file`, a `paragraph` (between blank lines) or a `line` that is not empty.

    The line ends and blank lines that separate documents belong to none of them.
    """

    kind: Literal["text"] = "text"
    globs: tuple[str, ...] = Field(min_length=1)
    document: Literal["file", "paragraph", "line"] = "file"
    errors: Errors = "strict"

    def fingerprint(self) -> str:
        return _stat(self, _match(self.globs))

    def documents(self) -> Iterator[Document]:
        for id, path in _match(self.globs):
            if self.document == "file":
                with _open(path) as file:
                    yield Document(id, _decode(file.read(), self.errors, path))
                continue
            parts = _paragraphs(path) if self.document == "paragraph" else _lines(path)
            for number, (offset, data) in enumerate(parts):
                yield Document(f"{id}#{number}", _decode(data, self.errors, path, offset))


def _open(path: str):
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line without its end) for every line that is not empty, one line in memory at a time."""
    offset = 0
    with _open(path) as file:
        for line in file:
            if content := line.rstrip(b"\r\n"):
                yield offset, content
            offset += len(line)


def _paragraphs(path: str) -> Iterator[tuple[int, bytes]]:
    offset, start, held = 0, 0, []
    with _open(path) as file:
        for line in file:
            if line.strip():
                start = start if held else offset
                held.append(line)
            elif held:
                yield start, b"".join(held).rstrip(b"\r\n")
                held = []
            offset += len(line)
    if held:
        yield start, b"".join(held).rstrip(b"\r\n")


@config
class JSONL:
    """One JSON object a line (.gz too); the document is its `field`."""

    kind: Literal["jsonl"] = "jsonl"
    globs: tuple[str, ...] = Field(min_length=1)
    field: str = "text"
    errors: Errors = "strict"

    def fingerprint(self) -> str:
        return _stat(self, _match(self.globs))

    def documents(self) -> Iterator[Document]:
        for id, path in _match(self.globs):
            for number, (offset, data) in enumerate(_lines(path)):
                where = f"{path}, object {number + 1} (byte {offset})"
                try:
                    item = json.loads(_decode(data, self.errors, path, offset))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not JSON ({error}): one object a line is expected") from None
                if not isinstance(item, dict) or not isinstance(item.get(self.field), str):
                    keys = sorted(item) if isinstance(item, dict) else type(item).__name__
                    raise ValueError(f"{where} has no string under {self.field!r}: set the source's field to one of {keys}")
                yield Document(f"{id}#{number}", item[self.field])


@config
class Parquet:
    """Parquet files; the documents are the values of one string column."""

    kind: Literal["parquet"] = "parquet"
    globs: tuple[str, ...] = Field(min_length=1)
    column: str = "text"
    errors: Errors = "strict"

    def fingerprint(self) -> str:
        return _stat(self, _match(self.globs))

    def documents(self) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for id, path in _match(self.globs):
            with pq.ParquetFile(path) as file:
                if self.column not in file.schema_arrow.names:
                    raise ValueError(f"{path} has no column {self.column!r}: set the source's column to one of {file.schema_arrow.names}")
                row = 0
                for batch in file.iter_batches(256, columns=[self.column]):
                    for data in batch.column(0).cast(pa.binary()).to_pylist():
                        if data is None:
                            raise ValueError(f"{path}, row {row}: {self.column!r} is null: remove the row or choose another column")
                        yield Document(f"{id}#{row}", _decode(data, self.errors, f"{path}, row {row}"))
                        row += 1


@config
class TFDS:
    """Any TensorFlow Datasets builder, read with random access and without TensorFlow.

    `name` as in tfds.builder (downloads and prepares on first use), or `folder`, a prepared builder's own version folder.
    """

    kind: Literal["tfds"] = "tfds"
    name: str | None = None
    folder: str | None = None
    data_dir: str | None = None
    splits: tuple[str, ...] = ("train",)
    field: str = "text"
    errors: Errors = "strict"

    def __post_init__(self):
        if (self.name is None) == (self.folder is None):
            raise ValueError("a tfds source takes either name (a builder) or folder (a prepared dataset), exactly one of them")

    def _builder(self):
        import tensorflow_datasets as tfds

        if self.folder is not None:
            return tfds.builder_from_directory(self.folder)
        builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")  # at once when it is there already
        return builder

    def fingerprint(self) -> str:
        folder = Path(self._builder().data_path)
        return _stat(self, sorted((p.name, str(p)) for p in folder.iterdir() if p.is_file()))

    def documents(self) -> Iterator[Document]:
        builder: Any = self._builder()
        if missing := [split for split in self.splits if split not in builder.info.splits]:
            raise ValueError(f"{builder.info.full_name} has no split {missing[0]!r}: choose from {sorted(builder.info.splits)}")
        if self.field not in builder.info.features:
            raise ValueError(f"{builder.info.full_name} has no field {self.field!r}: choose from {sorted(builder.info.features)}")
        for split in self.splits:
            examples = builder.as_data_source(split=split)
            for i in range(len(examples)):
                value, id = examples[i][self.field], f"{builder.info.full_name}/{split}#{i}"
                yield Document(id, value if isinstance(value, str) else _decode(bytes(value), self.errors, id))


# -------------------------------------------------------------------------------------------------------------- mixture

Leaf = Annotated[Union[PythonStdlib, Text, JSONL, Parquet, TFDS], Field(discriminator="kind")]


@config
class Mixture:
    """Several sources, each with its own held-out split and its own epochs; a sample comes from source k with share

        p_k  ~  w_k^(1/temperature)            w_k = weights[k], or the source's tokens when there are no weights

    Temperature 1 keeps the weights, a large one makes them equal (Devlin 2018, multilingual BERT; Xue et al. 2021, mT5).
    """  # fmt: skip

    kind: Literal["mixture"] = "mixture"
    sources: tuple[Leaf, ...] = Field(min_length=1)
    weights: tuple[float, ...] | None = None
    temperature: float = Field(default=1.0, gt=0)

    def __post_init__(self):
        if self.weights is not None and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            raise ValueError(f"a mixture of {len(self.sources)} sources needs as many weights, all above zero: got {list(self.weights)}")

    def shares(self, tokens: Sequence[int]) -> tuple[float, ...]:
        weights = self.weights or tokens
        if self.temperature == 1:  # untouched, so that decimal weights stay the decimals they are
            return tuple(float(w) for w in weights)
        powers = (np.asarray(weights, np.float64) / max(weights)) ** (1 / self.temperature)
        return tuple(float(p) for p in powers / powers.sum())


Source = Annotated[Union[PythonStdlib, Text, JSONL, Parquet, TFDS, Mixture], Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------- survey, split


@dataclass(frozen=True)
class Survey:
    """What one pass over a source finds. `hash` covers ids and texts in order."""

    hash: str
    documents: int
    characters: int
    bytes: int


def survey(source, progress: Callable[[int], None] = lambda n: None) -> Survey:
    """One streaming pass; ValueError when there is no text at all. `progress` gets the bytes read so far."""
    digest, documents, characters, size = hashlib.sha256(), 0, 0, 0
    for id, text in source.documents():
        name, data = id.encode("utf-8", "surrogateescape"), text.encode("utf-8", "surrogateescape")
        digest.update(f"{len(name)} {len(data)}\n".encode() + name + data)
        documents, characters, size = documents + 1, characters + len(text), size + len(data)
        progress(size)
    if not characters:
        raise ValueError(f"the corpus of source {source.kind!r} is empty (0 characters in {documents} documents): point it at some text")
    return Survey(digest.hexdigest(), documents, characters, size)


@dataclass(frozen=True)
class Split:
    """How a source is divided into training and held-out documents: by document, or the tail of the text."""

    fraction: float = 0.05
    tail: bool = False

    def __call__(self, documents: Iterable[Document], characters: int) -> Iterator[tuple[bool, Document]]:
        """(held out?, document) for each. A document that the tail's cut goes through becomes two."""
        cut, seen = int(characters * (1 - self.fraction)), 0
        for document in documents:
            if not self.tail:
                yield unit(document.id) < self.fraction, document
                continue
            id, text = document
            before = max(0, min(len(text), cut - seen))
            if before:
                yield False, Document(id, text[:before])
            if before < len(text):
                yield True, Document(id, text[before:])
            seen += len(text)


def unit(id: str, salt: str = "") -> float:
    """A document's place in [0, 1), uniform over documents and fixed for ever."""
    return int.from_bytes(hashlib.sha256((salt + id).encode("utf-8", "surrogateescape")).digest()[:7], "big") / 2**56
