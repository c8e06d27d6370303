"""Data: from a source of documents to batches that are a pure function of (seed, step).

    source -> documents -> tokenizer -> token shards -> plan of packed rows -> loader
              survey                    one pass         one pass             batch = f(seed, step)

Everything before the loader happens once and lies in the cache folder, keyed by what it was made from:

    cache/surveys/<fingerprint>/                      counts and content hash of a source
    cache/tokenizers/<corpora, split, config>/        a tokenizer trained on the training split
    cache/tokens/<corpus, tokenizer, split>/          train/ and held_out/: token shards
    cache/plans/<tokens, part, packing, T>/           which pieces share a row
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile

from pydantic import Field

from minllm.config import config
from minllm.data.loader import Batches, BucketLoader, Evaluation, Loader, Ramp, Share, index_shuffle
from minllm.data.packing import BestFit, Bucket, Concat, Packing, Rows, Single, write_plan
from minllm.data.shards import Tokens, Writer, once
from minllm.data.sources import JSONL, TFDS, Chat, Conversations, Mixture, Parquet, PythonStdlib, Source, Split, Survey, Text, survey, unit
from minllm.data.tokenizer import BPE, Bytes, Characters, HuggingFace, LiveTokenizer, SentencePiece, Tiktoken, Tokenizer, load

__all__ = [
    "BPE", "JSONL", "TFDS", "Batches", "BestFit", "Bucket", "BucketLoader", "Bytes", "Characters", "Chat", "Concat", "Data",
    "Evaluation", "HuggingFace", "LiveTokenizer", "Loader", "Mixture", "Packing", "Parquet", "Prepared", "PythonStdlib", "Ramp",
    "SentencePiece", "Single", "Source", "Stats", "Text", "Tiktoken", "Tokenizer", "index_shuffle", "load", "prepare",
]  # fmt: skip

Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all or 0)


@config
class Data:
    """What a run reads: rows of `length` tokens packed from `source`, and what is held out of training.

    Held out is one of: `holdout`, a fraction of the documents chosen by the hash of their id (0.05 when nothing is said, 0 for none);
    `holdout_tail`, the last fraction of the text; `validation`, another source.
    """

    source: Source = PythonStdlib()
    tokenizer: Tokenizer = Bytes()
    length: int = Field(default=256, ge=1)
    packing: Packing = Concat()
    holdout: float | None = Field(default=None, ge=0, lt=1)
    holdout_tail: float | None = Field(default=None, gt=0, lt=1)
    validation: Source | None = None
    pad_short: bool = False  # let a training split shorter than one row be a single padded row
    seed: int = 0
    cache: str = "data_cache"

    def __post_init__(self):
        said = [name for name in ("holdout", "holdout_tail", "validation") if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} are given, but a run has one held-out set: keep one of them")
        if self.holdout_tail is not None and any(isinstance(source, Chat) for source in _parts(self.source)):
            raise ValueError("holdout_tail cuts the text anywhere, and a conversation is held out whole: use holdout or validation")
        if isinstance(self.packing, Bucket) and (self.packing.lengths[-1] != self.length or isinstance(self.source, Mixture)):
            raise ValueError(
                f"bucket packing takes a single source and its longest length, {self.packing.lengths[-1]}, as data.length, which is "
                f"{self.length}: make them equal, and pack a mixture with best_fit"
            )

    @property
    def split(self) -> Split:
        if self.holdout_tail is not None:
            return Split(self.holdout_tail, tail=True)
        return Split(0.0 if self.validation is not None else 0.05 if self.holdout is None else self.holdout)


@dataclass(frozen=True)
class Stats:
    """Counts of one split. `rows` is the number of packed rows, so of samples in an epoch."""

    documents: int
    tokens: int
    bytes: int
    rows: int


@dataclass(frozen=True)
class Prepared:
    """A `Data` made ready. `stats` by split; `identity` names content and order: equal identities give equal batches."""

    data: Data
    tokenizer: LiveTokenizer
    train: tuple[Rows, ...]
    held_out: tuple[Rows, ...]
    weights: tuple[float, ...]
    stats: dict[str, Stats]
    identity: str

    def loader(
        self, batch: int | Ramp | Sequence[tuple[int, int]], *, seed: int | None = None, host_index: Share = 0, host_count: int = 1
    ) -> Loader | BucketLoader:
        """Training batches by step. The seed is the config's unless another is given."""
        seed, host = self.data.seed if seed is None else seed, {"host_index": host_index, "host_count": host_count}
        if not isinstance(self.data.packing, Bucket):
            return Loader(self.train, batch, weights=self.weights, seed=seed, **host)
        if not isinstance(batch, int):
            raise ValueError(f"bucket packing takes one batch size, not the ramp {batch}: give an int, counted in rows of data.length")
        return BucketLoader(self.train, batch * self.data.length, seed=seed, **host)

    def evaluation(self, batch_size: int, *, rows: int | None = None, host_index: Share = 0, host_count: int = 1) -> Evaluation:
        """The held-out split, once and whole; with `rows`, so many windows of it, evenly spaced."""
        if not self.stats["held_out"].tokens:
            raise ValueError(
                f"nothing is held out of {self.stats['train'].documents} documents: "
                "raise data.holdout, use data.holdout_tail, or give data.validation"
            )
        return Evaluation(self.held_out, batch_size, rows=rows, host_index=host_index, host_count=host_count)


def prepare(data: Data, progress: Progress = lambda what, done, total: None) -> Prepared:
    """Tokenises and packs what is not in the cache yet; opens and checks what is. ValueErrors say what to change."""
    cache = Path(data.cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=cache).close()
    except OSError as error:
        raise ValueError(f"data cache {cache.absolute()} cannot be written ({error.strerror}): set data.cache to another folder") from None

    tokenizer = _tokenizer(cache, data, progress)
    parts = _parts(data.source, tokenizer)
    surveys = [_survey(cache, source, progress) for source in parts]
    folders = [_tokenise(cache, source, found, data.split, tokenizer, progress) for source, found in zip(parts, surveys, strict=True)]
    train, held_out = [f / "train" for f in folders], [f / "held_out" for f in folders]
    if data.validation is not None:
        others = [(s, _survey(cache, s, progress)) for s in _parts(data.validation, tokenizer)]
        held_out = [_tokenise(cache, s, found, Split(1.0), tokenizer, progress) / "held_out" for s, found in others]

    pad = tokenizer.pad or 0
    lengths = data.packing.lengths if isinstance(data.packing, Bucket) else (data.length,)
    rows = [_rows(cache, folder, data.packing, T, pad) for folder in train for T in lengths]
    for source, folder in zip(parts, train, strict=True):
        if (tokens := (found := Tokens(folder)).tokens) <= data.length and not (data.pad_short and tokens):
            raise ValueError(
                f"the training split of source {source.kind!r} has {tokens} tokens, but a row and its last target take {data.length + 1}: "
                "lower data.length, hold out less, give more text, or set data.pad_short: true"
            )
        if not found.predicted_tokens:
            raise ValueError(
                f"the training split of source {source.kind!r} has {tokens} tokens and none to learn: give conversations in which the role "
                "'assistant' speaks, and a template that says so"
            )
    # Evaluation is always concatenate-and-chunk, so that every held-out token is predicted once, with what precedes it in its window.
    windows = [_rows(cache, folder, Concat(), data.length, pad) for folder in held_out]
    weights = data.source.shares([part.tokens.tokens for part in rows]) if isinstance(data.source, Mixture) else (1.0,)
    stats = {"train": _stats(rows[:: len(lengths)], rows), "held_out": _stats(windows, windows)}
    identity = _key([[str(r.plan.name) for r in rows], weights, data.seed])
    return Prepared(data, tokenizer, tuple(rows), tuple(windows), weights, stats, identity)


def _parts(source: Source, tokenizer: LiveTokenizer | None = None) -> tuple:
    """The sources of a mixture, conversations as they are written out for a tokenizer."""
    parts = source.sources if isinstance(source, Mixture) else (source,)
    return tuple(part.spoken(tokenizer) if isinstance(part, Chat) else part for part in parts) if tokenizer else parts


def _key(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _stats(parts: Sequence[Rows], rows: Sequence[Rows]) -> Stats:
    documents, tokens, size = (sum(getattr(part.tokens, name) for part in parts) for name in ("documents", "tokens", "bytes"))
    return Stats(documents, tokens, size, sum(map(len, rows)))


def _survey(cache: Path, source, progress: Progress) -> Survey:
    def make(folder: Path) -> None:
        found = survey(source, lambda done: progress("reading", done, 0))
        (folder / "survey.json").write_text(json.dumps(asdict(found)))

    return Survey(**json.loads((once(cache / "surveys" / source.fingerprint()[:32], make) / "survey.json").read_text()))


def _tokenizer(cache: Path, data: Data, progress: Progress) -> LiveTokenizer:
    if not data.tokenizer.trains:
        return data.tokenizer.build()
    parts = _parts(data.source)
    surveys = [_survey(cache, source, progress) for source in parts]
    size = sum(s.bytes for s in surveys)

    def texts(limit: int) -> Iterator[str]:
        done = 0
        for source, found in zip(parts, surveys, strict=True):
            for held_out, document in data.split(source.documents(), found.characters):
                if not held_out and (size <= limit or unit(document.id, "tokenizer ") < limit / size):
                    yield document.text
                done += len(document.text.encode("utf-8", "surrogateescape"))
                progress("training the tokenizer", done, size)

    key = _key([[s.hash for s in surveys], asdict(data.split), asdict(data.tokenizer)])
    return load(once(cache / "tokenizers" / key, lambda folder: data.tokenizer.build(texts).save(folder)))


def _tokenise(cache: Path, source, found: Survey, split: Split, tokenizer: LiveTokenizer, progress: Progress) -> Path:
    """The folder with train/ and held_out/ token shards of a source."""

    def make(folder: Path) -> None:
        masked = isinstance(source, Conversations)
        writers = [Writer(folder / name, tokenizer, masked) for name in ("train", "held_out")]
        documents, done = split(source.documents(), found.characters), 0
        while group := list(_group(documents)):
            for held_out, writer in enumerate(writers):
                mine = [document for held, document in group if held == held_out]
                if mine:
                    writer.add([d.text for d in mine], [(d.special, d.learned) for d in mine] if masked else ())
            done += sum(len(document.text.encode("utf-8", "surrogateescape")) for _, document in group)
            progress("tokenising", done, found.bytes)
        if done != found.bytes:
            raise ValueError(f"source {source.kind!r} changed while it was read ({found.bytes} bytes, then {done}): start again")
        for writer in writers:
            writer.close()

    return once(cache / "tokens" / _key([found.hash, tokenizer.hash, asdict(split)]), make)


def _group(documents: Iterator) -> Iterator:
    """The next documents, about a megabyte of them: enough for the tokenizer's threads, little enough for any memory."""
    size = 0
    for item in islice(documents, 1024):
        yield item
        size += len(item[1].text)
        if size > 2**20:
            return


def _rows(cache: Path, folder: Path, packing: Packing, T: int, pad: int) -> Rows:
    tokens = Tokens(folder)
    plan = cache / "plans" / _key([folder.parent.name, folder.name, asdict(packing), T])
    return Rows(tokens, once(plan, partial(write_plan, packing=packing, tokens=tokens, T=T)), pad)
