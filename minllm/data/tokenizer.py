"""Tokenizers: text -> ids and back, each a config that builds a live object, each live object a config plus files.

    config --build(texts)--> live --save--> folder --load--> live        hash(live) = sha256(config, files)

What a live tokenizer stores is the config that rebuilds it, so `load` needs no table of kinds: the `Tokenizer` union is the
registry. A tokenizer that is trained is trained on the training split only and is deterministic: the same texts give the same hash.

`encode` is for *text*: the text of a special token inside a document is encoded like any other text, never as its id (a web page
that quotes `<|eot_id|>` must not end a turn). Whoever builds prompts puts special ids there on purpose, from `specials`;
`encode_ranges` does so where a chat template wrote them.
"""

import base64
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field, TypeAdapter

from minllm.config import config

# GPT-2's split (Radford et al. 2019) and the one of cl100k and Llama 3 (numbers in runs of at most three digits).
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
MANIFEST = "minllm_tokenizer.json"

Ranges = Sequence[tuple[int, int]]  # of characters or bytes: in order, apart from each other
Ids = Sequence[int] | Int[np.ndarray, " n"]
Special = Literal["bos", "eos", "pad"]
Texts = Callable[[int], Iterable[str]]  # texts(limit): the training documents, thinned by document to about `limit` bytes


class LiveTokenizer(ABC):
    """A tokenizer ready for use. `bos`, `eos`, `pad` are ids or None; `specials` maps every special token's text to its id.

    `config` and `files` (file name -> content) are what `save` writes and `hash` covers.
    """

    config: Any  # a member of Tokenizer
    files: dict[str, bytes] = {}
    vocab_size: int
    specials: dict[str, int]
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]: ...

    def encode_ranges(self, text: str, special: Ranges, learned: Ranges) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """The ids of a text whose `special` ranges are special tokens, and which of them lie wholly in a `learned` range.

        A token that crosses the border of a range is not learned: its beginning was given. Where the tokens of a piece do not spell it
        byte for byte (unknown characters, a prefix space), they have no places, and the piece is encoded in parts, cut at the borders.
        """
        ids, mask, at = [], [], 0
        for start, stop in [*special, (len(text), len(text))]:
            piece, inside = text[at:start], [(max(a, at) - at, min(b, start) - at) for a, b in learned if a < start and at < b]
            found = self.encode(piece) if piece else np.zeros(0, np.int32)
            if (marked := _spelled(piece, [self._bytes(i) for i in found.tolist()], inside)) is not None:
                ids.append(found)
                mask.append(marked)
            else:
                cuts = sorted({0, len(piece), *(border for pair in inside for border in pair)})
                for a, b in pairwise(cuts):
                    ids.append(self.encode(piece[a:b]))
                    mask.append(np.full(len(ids[-1]), any(low <= a and b <= high for low, high in inside)))
            if start < stop:
                ids.append(np.array([self.specials[text[start:stop]]], np.int32))
                mask.append(_inside(np.array([start]), np.array([stop]), learned))
            at = stop
        return np.concatenate(ids), np.concatenate(mask)

    def _bytes(self, id: int) -> bytes:
        """The bytes of one token, kept: vocabularies are small and conversations are many."""
        if id not in self._spelling:
            self._spelling[id] = self.decode_bytes([id])
        return self._spelling[id]

    @cached_property
    def _spelling(self) -> dict[int, bytes]:
        return {}

    @abstractmethod
    def decode_bytes(self, ids: Ids) -> bytes:
        """The exact bytes of a run of tokens, which need not end on a character. Special tokens stand for no bytes."""

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @cached_property
    def hash(self) -> str:
        content = [asdict(self.config), {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        manifest = {"hash": self.hash, "config": asdict(self.config)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def _special(self, id: int) -> bool:
        return id in self._special_ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.specials.values())


def load(folder: str | Path) -> LiveTokenizer:
    """The tokenizer that `save` wrote. ValueError if there is none or its content is no longer what was saved."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"no tokenizer in {folder}: {MANIFEST} is missing; name a folder written by a tokenizer's save()")
    stored = json.loads(manifest.read_text(encoding="utf-8"))
    live = TypeAdapter(Tokenizer).validate_python(stored["config"]).build(root=Path(folder))
    if live.hash != stored["hash"]:
        raise ValueError(f"the tokenizer in {folder} has hash {live.hash[:12]}, its manifest says {stored['hash'][:12]}: restore its files")
    return live


def _inside(starts: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], ranges: Ranges) -> Bool[np.ndarray, " n"]:
    """Which of the tokens [start, end) lie wholly in a range."""
    if not ranges:
        return np.zeros(len(starts), bool)
    lows, highs = np.array(ranges).T
    nearest = np.searchsorted(lows, starts, "right") - 1
    return (nearest >= 0) & (ends <= highs[nearest])


def _spelled(text: str, tokens: list[bytes], ranges: Ranges) -> Bool[np.ndarray, " n"] | None:
    """Which tokens lie in a range of the text that they spell. Bytes, because a token may hold half a character."""
    if b"".join(tokens) != text.encode("utf-8", "surrogateescape"):
        return None
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    return _inside(starts, ends, [tuple(len(text[:border].encode("utf-8", "surrogateescape")) for border in pair) for pair in ranges])


def _texts(texts: Sequence[str | bytes]) -> list[str]:
    return [t.decode("utf-8") if isinstance(t, bytes) else t for t in texts]


def _file(root: Path, path: str, what: str) -> Path:
    found = root / path
    if not found.is_file():
        raise ValueError(f"{what} {found} does not exist: give the path of an existing file")
    return found


# ---------------------------------------------------------------------------------------------------------------- bytes


@config
class Bytes:
    """Ids 0..255 are the bytes; then the special tokens asked for. Lossless on any input, valid UTF-8 or not."""

    trains: ClassVar[bool] = False
    kind: Literal["bytes"] = "bytes"
    specials: tuple[Special, ...] = ("bos", "eos")

    def build(self, texts: Texts | None = None, root: Path = Path()) -> LiveTokenizer:
        return _Bytes(self)


class _Bytes(LiveTokenizer):
    def __init__(self, config: Bytes):
        self.config = config
        self.specials = {f"<{name}>": 256 + i for i, name in enumerate(config.specials)}
        self.bos, self.eos, self.pad = (self.specials.get(f"<{name}>") for name in ("bos", "eos", "pad"))
        self.vocab_size = 256 + len(self.specials)

    def encode_batch(self, texts):
        return [np.frombuffer(t.encode("utf-8", "surrogateescape") if isinstance(t, str) else t, np.uint8).astype(np.int32) for t in texts]

    def decode_bytes(self, ids):
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes()


# ----------------------------------------------------------------------------------------------------------- characters


@config
class Characters:
    """One id a code point, in code point order. `vocabulary` None: the characters of the training split.

    With `unknown`, a character outside the vocabulary becomes `<unk>` (decoded as U+FFFD); without, it is an error.
    """

    kind: Literal["characters"] = "characters"
    vocabulary: str | None = None
    unknown: bool = False
    specials: tuple[Special, ...] = ()

    @property
    def trains(self) -> bool:
        return self.vocabulary is None

    def build(self, texts: Texts | None = None, root: Path = Path()) -> LiveTokenizer:
        if self.vocabulary is not None:
            return _Characters(self)
        if texts is None:
            raise ValueError("a characters tokenizer without a vocabulary needs a corpus: give tokenizer.vocabulary or a data source")
        seen: set[str] = set()
        for text in texts(2**63):
            seen.update(text)
        return _Characters(replace(self, vocabulary="".join(sorted(seen))))


class _Characters(LiveTokenizer):
    def __init__(self, config: Characters):
        self.config = config
        # Code points, not str: numpy looks a whole text up at once.
        self.points = np.unique(self._code_points(config.vocabulary))
        if len(self.points) != len(config.vocabulary):
            distinct, given = len(self.points), len(config.vocabulary)
            raise ValueError(f"tokenizer.vocabulary has {given} characters, {distinct} of them distinct: name each once")
        names = [f"<{name}>" for name in config.specials] + ["<unk>"] * config.unknown
        self.specials = {name: len(self.points) + i for i, name in enumerate(names)}
        self.bos, self.eos, self.pad = (self.specials.get(f"<{name}>") for name in ("bos", "eos", "pad"))
        self.vocab_size = len(self.points) + len(names)

    @staticmethod
    def _code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

    def encode_batch(self, texts):
        return [self._encode(text) for text in _texts(texts)]

    def _encode(self, text: str) -> np.ndarray:
        points = self._code_points(text)
        ids = np.searchsorted(self.points, points).astype(np.int32)
        known = np.append(self.points, 2**32 - 1)[ids] == points
        if known.all():
            return ids
        if not self.config.unknown:
            raise ValueError(
                f"character {chr(points[~known][0])!r} is not among the {len(self.points)} characters of the training split: "
                "set tokenizer.unknown: true, or give tokenizer.vocabulary"
            )
        return np.where(known, ids, self.specials["<unk>"]).astype(np.int32)

    def decode_bytes(self, ids):
        table = [*map(chr, self.points), *("�" if name == "<unk>" else "" for name in self.specials)]
        return "".join(table[i] for i in ids).encode("utf-8", "surrogatepass")


# -------------------------------------------------------------------------------------------------------- SentencePiece


@config
class SentencePiece:
    """SentencePiece (Kudo & Richardson 2018), unigram or BPE: load `model`, or train one of `vocab_size` pieces.

    A trained model keeps every space, tab and newline and falls back to bytes, so it is lossless but for U+2581, SentencePiece's own
    sign for a space. `train_bytes` bounds the training text; a larger corpus is thinned by document.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"
    model: str | None = None
    vocab_size: int | None = Field(default=None, gt=0)
    model_type: Literal["unigram", "bpe"] = "unigram"
    specials: tuple[Special, ...] = ("bos", "eos")
    train_bytes: int = Field(default=50_000_000, gt=0)

    def __post_init__(self):
        if (self.model is None) == (self.vocab_size is None):
            raise ValueError("a sentencepiece tokenizer takes exactly one of model (a .model file) and vocab_size (to train one)")

    @property
    def trains(self) -> bool:
        return self.model is None

    def build(self, texts: Texts | None = None, root: Path = Path()) -> LiveTokenizer:
        if self.model is not None:
            return _SentencePiece(_file(root, self.model, "SentencePiece model").read_bytes())
        if texts is None:
            raise ValueError("a sentencepiece tokenizer without a model needs a corpus: give tokenizer.model or a data source")
        import sentencepiece

        out = io.BytesIO()
        ids = {f"{name}_id": 1 + self.specials.index(name) if name in self.specials else -1 for name in ("bos", "eos", "pad")}
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts(self.train_bytes)), model_writer=out, vocab_size=self.vocab_size,
                model_type=self.model_type, unk_id=0, **ids, byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
                max_sentence_length=2**20, num_threads=2, minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            said = f"sentencepiece cannot train vocab_size {self.vocab_size} on this corpus ({error})"
            raise ValueError(f"{said}: choose another vocab_size, or give more text") from None
        return _SentencePiece(out.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    # The trainer drops over-long sentences silently: lines, cut at 4,096 characters, never are.
    for text in texts:
        for line in text.splitlines(keepends=True):
            for i in range(0, len(line), 4096):
                yield line[i : i + 4096]


class _SentencePiece(LiveTokenizer):
    def __init__(self, model: bytes):
        import sentencepiece

        self.config, self.files = SentencePiece(model="tokenizer.model"), {"tokenizer.model": model}
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        self.specials = {self.processor.id_to_piece(i): i for i in range(self.vocab_size) if self.processor.is_control(i)}
        self.bos, self.eos, self.pad = (
            i if i >= 0 else None for i in (self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id())
        )

    def encode_batch(self, texts):
        return [np.array(ids, np.int32) for ids in self.processor.encode(_texts(texts), out_type=int, num_threads=2)]

    def decode_bytes(self, ids):
        # Runs of byte pieces may hold half a character, which the library's own decoder would replace.
        out, run = [], []
        for i in map(int, ids):
            if self.processor.is_byte(i):
                out += [self.processor.decode(run).encode()] if run else []
                out.append(bytes([int(self.processor.id_to_piece(i)[3:-1], 16)]))
                run = []
            elif not self._special(i):
                run.append(i)
        return b"".join(out) + (self.processor.decode(run).encode() if run else b"")

    def decode(self, ids):
        return self.processor.decode([int(i) for i in ids if not self._special(int(i))])


# ----------------------------------------------------------------------------------- byte-level BPE, Hugging Face's JSON


@config
class BPE:
    """Byte-level BPE (Sennrich et al. 2016 on the bytes, as in GPT-2), trained with the `tokenizers` library."""

    trains: ClassVar[bool] = True
    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=4096, gt=256)
    split: Literal["gpt2", "llama3"] = "llama3"
    specials: tuple[Special, ...] = ("bos", "eos")
    min_frequency: int = 2
    train_bytes: int = Field(default=200_000_000, gt=0)

    def build(self, texts: Texts | None = None, root: Path = Path()) -> LiveTokenizer:
        if texts is None:
            raise ValueError("a bpe tokenizer is trained and needs a corpus: give a data source, or a trained one with kind: huggingface")
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        names = {name: f"<{name}>" for name in self.specials}
        bpe = Tokenizer(models.BPE())
        pieces = pre_tokenizers.Split(Regex(PATTERNS[self.split]), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, min_frequency=self.min_frequency, special_tokens=list(names.values()), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        bpe.train_from_iterator(_batches(texts(self.train_bytes), 256), trainer)
        if bpe.get_vocab_size() < self.vocab_size:
            raise ValueError(
                f"the corpus yields only {bpe.get_vocab_size()} BPE tokens seen at least {self.min_frequency} times, vocab_size is "
                f"{self.vocab_size}: set vocab_size to at most {bpe.get_vocab_size()} or give more text"
            )
        return _Json(HuggingFace(path="tokenizer.json", **names), bpe.to_str().encode())


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


@config
class HuggingFace:
    """A `tokenizer.json`, or a folder with one; bos, eos and pad are named here or by the `tokenizer_config.json` beside it."""

    trains: ClassVar[bool] = False
    kind: Literal["huggingface"] = "huggingface"
    path: str
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None

    def build(self, texts: Texts | None = None, root: Path = Path()) -> LiveTokenizer:
        path = root / self.path
        path = _file(Path(), str(path / "tokenizer.json" if path.is_dir() else path), "tokenizer")
        # In a saved run the config is complete, and what lies beside it has no say.
        beside = path.with_name("tokenizer_config.json")
        named = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() and not path.with_name(MANIFEST).is_file() else {}

        def name(which: Special) -> str | None:
            stored = named.get(f"{which}_token")
            return getattr(self, which) or (stored["content"] if isinstance(stored, dict) else stored)

        return _Json(HuggingFace(path="tokenizer.json", bos=name("bos"), eos=name("eos"), pad=name("pad")), path.read_bytes())


class _Json(LiveTokenizer):
    def __init__(self, config: HuggingFace, data: bytes):
        from tokenizers import Tokenizer

        self.config, self.files = config, {"tokenizer.json": data}
        self.tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self.tokenizer.encode_special_tokens = True  # a special token's text in a document is text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.specials = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have holes
        self.bos, self.eos, self.pad = (self._id(name) for name in (config.bos, config.eos, config.pad))
        self.byte_level = "ByteLevel" in json.dumps(json.loads(data).get("decoder"))

    def _id(self, name: str | None) -> int | None:
        id = None if name is None else self.tokenizer.token_to_id(name)
        if name is not None and id is None:
            raise ValueError(f"the tokenizer has no token {name!r}: name one of its tokens, for example one of {sorted(self.specials)[:8]}")
        return id

    def encode_batch(self, texts):
        return [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch_fast(_texts(texts), add_special_tokens=False)]

    def encode_ranges(self, text, special, learned):
        # In one go, as Hugging Face does: what is beside a special token may matter (a prefix space, a token that strips). A text that
        # quotes a special token has more of them than it should when it is read so, and goes piece by piece.
        self.tokenizer.encode_special_tokens = False
        try:
            e = self.tokenizer.encode(text, add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = True
        names = {id: name for name, id in self.specials.items()}
        found = [i for i, (a, b) in zip(e.ids, e.offsets) if i in names and text[a:b].strip() == names[i].strip()]  # not an <unk>
        if found != [self.specials[text[a:b]] for a, b in special]:
            return super().encode_ranges(text, special, learned)
        mask = _spelled(text, [names[i].encode() if i in names else self._bytes(i) for i in e.ids], learned)
        places = np.array(e.offsets, np.int64).reshape(-1, 2)  # of characters, but a ByteLevel post-processor leaves spaces out of them
        return np.array(e.ids, np.int32), _inside(places[:, 0], places[:, 1], learned) if mask is None else mask

    def decode_bytes(self, ids):
        if not self.byte_level:
            return self.decode(ids).encode()
        added = self.tokenizer.get_added_tokens_decoder()
        tokens = ((i, self.tokenizer.id_to_token(i)) for i in map(int, ids) if not self._special(i))
        return b"".join(token.encode() if i in added else bytes(_BYTE_OF[c] for c in token) for i, token in tokens if token is not None)

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _byte_of() -> dict[str, int]:
    # GPT-2's printable alphabet for the 256 bytes: visible Latin-1 characters stand for themselves, the rest follow at U+0100.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_of()


# ------------------------------------------------------------------------------------------------------- tiktoken ranks


@config
class Tiktoken:
    """Ranks in tiktoken's file format (base64 token, space, rank), as of GPT-4 and Llama 3.

    `pattern` is a name in PATTERNS or a regular expression; `specials` lists (text, id), ids above the ranks.
    """

    trains: ClassVar[bool] = False
    kind: Literal["tiktoken"] = "tiktoken"
    ranks: str
    pattern: str = "llama3"
    specials: tuple[tuple[str, int], ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None

    def build(self, texts: Texts | None = None, root: Path = Path()) -> LiveTokenizer:
        data = _file(root, self.ranks, "tiktoken ranks file").read_bytes()
        return _Ranks(replace(self, ranks="tokenizer.tiktoken"), data)


class _Ranks(LiveTokenizer):
    def __init__(self, config: Tiktoken, data: bytes):
        import tiktoken

        self.config, self.files = config, {"tokenizer.tiktoken": data}
        self.specials = dict(config.specials)
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}
        except ValueError:
            raise ValueError(f"{config.ranks} is not a tiktoken ranks file: each line is a base64 token, a space and its rank") from None
        if taken := [name for name, id in self.specials.items() if id in set(ranks.values())]:
            raise ValueError(f"special token {taken[0]!r} has the id of a rank: give it an id from {max(ranks.values()) + 1} up")
        pattern = PATTERNS.get(config.pattern, config.pattern)
        self.encoding = tiktoken.Encoding("minllm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials)
        self.vocab_size = self.encoding.n_vocab
        self.bos, self.eos, self.pad = (self._id(name) for name in (config.bos, config.eos, config.pad))

    def _id(self, name: str | None) -> int | None:
        if name is not None and name not in self.specials:
            raise ValueError(f"{name!r} is not in tokenizer.specials: add it there with its id")
        return None if name is None else self.specials[name]

    def encode_batch(self, texts):
        return [np.array(ids, np.int32) for ids in self.encoding.encode_ordinary_batch(_texts(texts), num_threads=2)]

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids if not self._special(int(i))])


Tokenizer = Annotated[Union[Bytes, Characters, SentencePiece, BPE, HuggingFace, Tiktoken], Field(discriminator="kind")]
