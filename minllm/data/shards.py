"""Token shards: one split of a corpus as one long stream of ids, cut into blocks, a block a record of an ArrayRecord file.

    document d = stream[starts[d] : starts[d + 1]] = [bos] text [eos]        record b = stream[4096 b : 4096 (b + 1)], uint16 or uint32

Where only a part is learned (conversations), a document is what its template wrote, and a record ends with a bit a token.

A folder is written beside its final name, sealed with the size and sha256 of each file, flushed to disk and renamed: it exists
whole or not at all. Opening checks every size, and every sha256 up to a gigabyte in total; each record carries its own hash in any
case (Riegeli's, which ArrayRecord stands on), so a flipped byte is an error that names the shard, never a wrong token.
"""

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

BLOCK = 4096  # tokens a record: a row reads one or two of them
SHARD = 16_384  # blocks a file: 64 Mi tokens
EAGER = 2**30  # bytes whose sha256 is checked when a folder is opened
MANIFEST = "manifest.json"


# ------------------------------------------------------------------------------------------- folders that are whole or absent


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make(temporary folder)` unless it exists. Processes that want the same folder wait for the first."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.parent / f".{folder.name}.partial"  # what an interrupted writer left is swept: we hold the lock
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                for path in [*partial.rglob("*"), partial]:
                    _flush(path)
                partial.rename(folder)
                _flush(folder.parent)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise _full(folder, error.strerror) from None
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _full(path: Path, reason: object) -> ValueError:
    return ValueError(f"{path} cannot be written ({reason}): free some space, or set data.cache to a folder on another disk")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, **facts) -> None:
    """Writes the manifest: the facts, and the size and sha256 of every file."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(facts | {"files": files}, indent=1) + "\n")


def check(folder: Path, everything: bool = False) -> dict:
    """The manifest of a sealed folder. ValueError naming the file whose size or checksum is not the sealed one."""
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest["files"]
    eager = everything or sum(f["bytes"] for f in files.values()) <= EAGER
    for name, sealed in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != sealed["bytes"]:
            raise ValueError(f"{path} has {size} bytes, its manifest says {sealed['bytes']}: delete {folder} and it will be made again")
        if eager and (found := _sha256(path)) != sealed["sha256"]:
            raise ValueError(
                f"{path} is corrupt (its sha256 starts {found[:12]}, the manifest's {sealed['sha256'][:12]}): "
                f"delete {folder} and it will be made again"
            )
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------- write and read


class Column:
    """A file of int64 (rows of `width`), read by position. A memory map would do, but count every page it ever touched as resident."""

    def __init__(self, path: Path, width: int = 1):
        self.descriptor, self.shape = os.open(path, os.O_RDONLY), (-1, width) if width > 1 else (-1,)
        weakref.finalize(self, os.close, self.descriptor)
        self.width, self.count = width, path.stat().st_size // (8 * width)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, where: int | slice) -> Any:  # an int, or an array of the rows
        first, stop, _ = where.indices(self.count) if isinstance(where, slice) else (where, where + 1, 1)
        data = os.pread(self.descriptor, 8 * self.width * max(0, stop - first), 8 * self.width * first)
        values = np.frombuffer(data, "<i8").reshape(self.shape)
        return values if isinstance(where, slice) else int(values[0])


class Writer:
    """Streams documents into the shards of `folder`; memory is one block. `masked`: only parts of them are learned."""

    def __init__(self, folder: Path, tokenizer, masked: bool = False):
        folder.mkdir()
        self.folder, self.tokenizer, self.masked = folder, tokenizer, masked
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.held, self.marks, self.waiting, self.blocks, self.shard = [], [], 0, 0, None
        self.documents = self.tokens = self.bytes = self.predicted_tokens = self.predicted_bytes = 0
        self.starts = open(folder / "starts.i64", "wb")
        self.starts.write(np.int64(0).astype("<i8").tobytes())

    def add(self, texts: Iterable[str], ranges: Iterable[tuple[Sequence, Sequence]] = ()) -> None:
        """`ranges`: for each text of a masked writer, the characters that are special tokens, and those that are learned."""
        if self.masked:
            return self._add_masked(texts, ranges)
        bos, eos = ([] if id is None else [id] for id in (self.tokenizer.bos, self.tokenizer.eos))
        texts = list(texts)
        ends = []
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            size, count = len(text.encode("utf-8", "surrogateescape")), len(bos) + len(ids) + len(eos)
            # The first token of a document is given, not predicted; without bos it holds text, which no nats are paid for.
            given = 0 if bos or not len(ids) else len(self.tokenizer.decode_bytes(ids[:1]))
            self.held += [np.array(bos, self.dtype), ids.astype(self.dtype), np.array(eos, self.dtype)]
            self.waiting += count
            self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + count, self.bytes + size
            self.predicted_tokens += max(0, count - 1)
            self.predicted_bytes += size - given
            ends.append(self.tokens)
        self._end(ends)

    def _add_masked(self, texts: Iterable[str], ranges: Iterable[tuple[Sequence, Sequence]]) -> None:
        ends = []
        for text, (special, learned) in zip(texts, ranges, strict=True):
            ids, mask = self.tokenizer.encode_ranges(text, special, learned)
            self.held.append(ids.astype(self.dtype))
            self.marks.append(mask)
            self.waiting += len(ids)
            self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)
            self.bytes += len(text.encode("utf-8", "surrogateescape"))
            predicted = ids[1:][mask[1:]]
            self.predicted_tokens += len(predicted)
            self.predicted_bytes += len(self.tokenizer.decode_bytes(predicted))
            ends.append(self.tokens)
        self._end(ends)

    def _end(self, ends: list[int]) -> None:
        self.starts.write(np.array(ends, "<i8").tobytes())
        if self.waiting >= BLOCK:
            self._flush(self.waiting // BLOCK)

    def _flush(self, blocks: int) -> None:
        stream = np.concatenate(self.held) if self.held else np.zeros(0, self.dtype)
        marks = np.concatenate(self.marks) if self.marks else np.zeros(0, bool)
        for i in range(blocks):
            here = slice(i * BLOCK, (i + 1) * BLOCK)
            self._write(stream[here].tobytes() + np.packbits(marks[here]).tobytes())  # no bits where all is learned
        self.marks = [marks[blocks * BLOCK :]]
        self.held, self.waiting = [stream[blocks * BLOCK :]], max(0, self.waiting - blocks * BLOCK)

    def _write(self, record: bytes) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self.blocks % SHARD == 0:
            self._close_shard()
            path = self.folder / f"shard-{self.blocks // SHARD:05d}.array_record"
            self.shard = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # one record is one checked chunk
        self.shard.write(record)
        self.blocks += 1

    def _close_shard(self) -> None:
        try:
            if self.shard:
                self.shard.close()
        except RuntimeError as error:  # what ArrayRecord says of a full disk, whenever it was full
            raise _full(self.folder, error) from None

    def close(self) -> None:
        self._flush(-(-self.waiting // BLOCK))
        self._close_shard()
        self.starts.close()
        counts = {k: getattr(self, k) for k in ("documents", "tokens", "bytes", "predicted_tokens", "predicted_bytes")}
        seal(self.folder, dtype=self.dtype.str, block=BLOCK, shard=SHARD, masked=self.masked, **counts)


class Tokens:
    """One split's token stream, read at random. `starts[d]` is the place of document d, `starts[documents]` the end.

    `predicted_tokens` are those that the loss is on: all but the first of each document, or the learned ones among them (`masked`).
    """

    def __init__(self, folder: Path):
        self.folder, manifest = folder, check(folder)
        self.dtype, self.block, self.shard = np.dtype(manifest["dtype"]), manifest["block"], manifest["shard"]
        self.documents, self.tokens, self.bytes = manifest["documents"], manifest["tokens"], manifest["bytes"]
        self.predicted_tokens, self.predicted_bytes = manifest["predicted_tokens"], manifest["predicted_bytes"]
        self.masked = manifest.get("masked", False)
        self.starts = Column(folder / "starts.i64")
        # Bounded, so that memory does not grow with the corpus: 256 blocks are 2 MB.
        self._block = functools.lru_cache(256)(self._read_block)
        self._reader = functools.lru_cache(256)(self._open)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """stream[start:stop]"""
        return self._read(0, start, stop)

    def learned(self, start: int, stop: int) -> Bool[np.ndarray, " n"]:
        """Which of stream[start:stop] the loss is on, of a masked one."""
        return self._read(1, start, stop)

    def _read(self, which: int, start: int, stop: int) -> np.ndarray:
        first, last = start // self.block, (stop - 1) // self.block
        if first == last:
            return self._block(first)[which][start - first * self.block : stop - first * self.block]
        blocks = np.concatenate([self._block(b)[which] for b in range(first, last + 1)])
        return blocks[start - first * self.block : stop - first * self.block]

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.array_record"

    def _open(self, shard: int):
        from array_record.python.array_record_module import ArrayRecordReader

        return ArrayRecordReader(str(self._path(shard)), options="readahead_buffer_size:0", file_reader_buffer_size=32_768)

    def _read_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        shard, position = divmod(block, self.shard)
        count = min(self.block, self.tokens - block * self.block)
        size = count * self.dtype.itemsize
        expected = size + -(-count // 8) * self.masked
        try:
            data = self._reader(shard).read([position])[0]
            if len(data) != expected:
                raise IndexError(f"{len(data)} bytes where {expected} are due")
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{self._path(shard)} is corrupt (record {position}: {error}): delete {self.folder.parent} and it will be made again"
            ) from None
        bits = np.frombuffer(data, np.uint8, offset=size)
        return np.frombuffer(data[:size], self.dtype), np.unpackbits(bits, count=count if self.masked else 0).view(bool)
