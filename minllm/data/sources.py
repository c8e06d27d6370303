"""Sources: where documents come from. A source streams `Document`s, an id and a text, in a canonical order, the same on every machine.

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
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union

import numpy as np
from pydantic import Field

from minllm.config import config
from minllm.data.chat import PLAIN, Ranges, Template

# surrogateescape keeps the raw bytes, for the bytes tokenizer alone: the others know only valid text.
Errors = Literal["strict", "replace", "surrogateescape"]


class Document(NamedTuple):
    id: str
    text: str
    special: Ranges = ()  # the ranges of characters that are special tokens; outside of them, a special token's text is text
    learned: Ranges | None = None  # the ranges that training minimises the loss of. None: the whole text, between bos and eos


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
    """The .py files of the running interpreter's standard library: 9 MB of real code on every machine.

    Left out is what a program wrote: the files that the build makes for one machine; encodings, a hundred tables in copies of one
    template, which a model would learn by heart; pydoc_data, the language reference as one string (7 % of all bytes in one file:
    whichever split drew it would be about prose). So are installed packages. The tests are 20 MB more.
    """

    kind: Literal["python_stdlib"] = "python_stdlib"
    tests: bool = False
    errors: Errors = "strict"

    def files(self) -> list[tuple[str, str]]:
        root = Path(sysconfig.get_path("stdlib"))
        unwanted = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
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
            for number, (where, item) in enumerate(_objects(path, self.errors)):
                if not isinstance(item, dict) or not isinstance(item.get(self.field), str):
                    keys = sorted(item) if isinstance(item, dict) else type(item).__name__
                    raise ValueError(f"{where} has no string under {self.field!r}: set the source's field to one of {keys}")
                yield Document(f"{id}#{number}", item[self.field])


def _objects(path: str, errors: Errors) -> Iterator[tuple[str, Any]]:
    """(where it is, value) of every line that is not empty."""
    for number, (offset, data) in enumerate(_lines(path)):
        where = f"{path}, object {number + 1} (byte {offset})"
        try:
            yield where, json.loads(_decode(data, errors, path, offset))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}): one object a line is expected") from None


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


# ------------------------------------------------------------------------------------------------------- conversations


@config
class Chat:
    """Conversations, one JSON object a line (.gz too), written out by a chat template; the loss is on what the assistant says.

    An object holds `messages`, a list of {"role", "content"} (what a template asks for beside, like tool_calls, is handed on), and
    perhaps "tools"; or `prompt` and `completion`, which are a user's and an assistant's message, or two lists of messages. A file keeps
    to one of the two forms.

    `template` is a Jinja template, a file with one, or a tokenizer_config.json (its chat_template); data/chat.py says how it runs and
    where the default, a plain one, puts what. The template writes all special tokens itself, bos_token and eos_token included: nothing
    is added, and the text of one in a message stays text.
    """

    kind: Literal["chat"] = "chat"
    globs: tuple[str, ...] = Field(min_length=1)
    template: str = PLAIN
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    errors: Errors = "strict"

    def spoken(self, tokenizer: Any = None) -> "Conversations":
        """With the special tokens of a live tokenizer; with none, as what a tokenizer is trained on."""
        if tokenizer is None:
            return Conversations(self)
        names = {id: text for text, id in tokenizer.specials.items()}
        return Conversations(self, tuple(sorted(names.values())), names.get(tokenizer.bos, ""), names.get(tokenizer.eos, ""))

    def fingerprint(self) -> str:
        return self.spoken().fingerprint()

    def documents(self) -> Iterator[Document]:
        return self.spoken().documents()

    def conversations(self, path: str) -> Iterator[tuple[str, list, Any]]:
        """(where it is, messages, tools) of every object of a file."""
        form: tuple[str, ...] = ()
        for where, item in _objects(path, self.errors):
            keys = item if isinstance(item, dict) else {}
            known = form or next((f for f in ((self.messages,), (self.prompt, self.completion)) if set(f) <= set(keys)), None)
            if known is None or not set(known) <= set(keys):
                wanted = " and ".join(map(repr, form)) or f"{self.messages!r}, nor {self.prompt!r} and {self.completion!r}"
                found = sorted(item) if isinstance(item, dict) else type(item).__name__
                raise ValueError(
                    f"{where} has no {wanted}{', as the objects before it have' * bool(form)}: "
                    f"set the source's messages, or prompt and completion, to the names in use, which are among {found}"
                )
            form = known
            parts = [item[name] for name in form]
            if len(form) == 2:
                roles = ("user", "assistant")
                parts = [[{"role": role, "content": x}] if isinstance(x, str) else x for role, x in zip(roles, parts)]
            if not all(isinstance(part, list) for part in parts):
                raise ValueError(f"{where} has no list of messages under {' or '.join(map(repr, form))}: give a list of objects")
            messages = [message for part in parts for message in part]
            for number, message in enumerate(messages, 1):
                if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not _said(message):
                    said = "is not an object with a role and a content, both strings"
                    raise ValueError(f"{where}, message {number} {said}: {str(message)[:100]}")
            yield where, messages, item.get("tools")


def _said(message: dict) -> bool:
    """A string, or parts of several media; an assistant that calls tools need not say anything."""
    return isinstance(message.get("content"), str | list) or (message.get("content") is None and bool(message.get("tool_calls")))


@dataclass(frozen=True)
class Conversations:
    """A `Chat` and the special tokens that its template may write: with others its documents are others."""

    chat: Chat
    specials: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    kind: ClassVar[str] = "chat"

    def fingerprint(self) -> str:
        # With the template's text, wherever it stands: a file can change within the same second and keep its size.
        return hashlib.sha256((_stat(self, _match(self.chat.globs)) + self._template()).encode()).hexdigest()

    def _template(self) -> str:
        given = self.chat.template
        if "{{" in given or "{%" in given:
            return given
        if not os.path.isfile(given):
            raise ValueError(f"the chat template {given!r} is no file, and holds no {{{{ or {{% as a Jinja template does: correct it")
        text = _decode(Path(given).read_bytes(), "strict", given)
        if not given.endswith(".json"):
            return text
        if not isinstance(template := json.loads(text).get("chat_template"), str):
            raise ValueError(f"{given} has no chat_template that is one string: give the template in a file of its own")
        return template

    def documents(self) -> Iterator[Document]:
        template = Template(self._template(), self.specials, self.bos, self.eos)
        for id, path in _match(self.chat.globs):
            for number, (where, messages, tools) in enumerate(self.chat.conversations(path)):
                try:
                    text, special, learned = template(messages, tools)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                yield Document(f"{id}#{number}", text, special, learned)


# -------------------------------------------------------------------------------------------------------------- mixture

Leaf = Annotated[Union[PythonStdlib, Text, JSONL, Parquet, TFDS, Chat], Field(discriminator="kind")]


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


Source = Annotated[Union[PythonStdlib, Text, JSONL, Parquet, TFDS, Chat, Mixture], Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------- survey, split


@dataclass(frozen=True)
class Survey:
    """What one pass over a source finds. `hash` covers ids and texts in order, and the ranges of those that have them."""

    hash: str
    documents: int
    characters: int
    bytes: int


def survey(source, progress: Callable[[int], None] = lambda n: None) -> Survey:
    """One streaming pass; ValueError when there is no text at all. `progress` gets the bytes read so far."""
    digest, documents, characters, size = hashlib.sha256(), 0, 0, 0
    for id, text, special, learned in source.documents():
        name, data = id.encode("utf-8", "surrogateescape"), text.encode("utf-8", "surrogateescape")
        digest.update(f"{len(name)} {len(data)}\n".encode() + name + data)
        if learned is not None:
            digest.update(f"{special} {learned}\n".encode())
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
            id, text = document.id, document.text
            before = max(0, min(len(text), cut - seen))
            if before:
                yield False, Document(id, text[:before])
            if before < len(text):
                yield True, Document(id, text[before:])
            seen += len(text)


def unit(id: str, salt: str = "") -> float:
    """A document's place in [0, 1), uniform over documents and fixed for ever."""
    return int.from_bytes(hashlib.sha256((salt + id).encode("utf-8", "surrogateescape")).digest()[:7], "big") / 2**56
