"""Packing: which pieces of which documents share a row of T positions. The answer is a plan file, not a copy of the tokens.

    row r = entries[row_starts[r] : row_starts[r + 1]],     entry = (document, offset, length)

    tokens     a a a b b b b c . .        pieces of documents a, b, c, then padding
    targets    a a . b b b . c . .        the next token of the same document: never the first of the next one
    weights    1 1 0 1 1 1 0 1 0 0        1 where there is a target, and it is learned (of a conversation: what the assistant says).
    segments   1 1 1 2 2 2 2 3 0 0        what may attend to what; 0 is padding
    positions  0 1 2 0 1 2 3 0 0 0

A piece that is cut at the row's end still predicts the token after it.
A plan is written in one streaming pass over the document lengths and read by position: neither holds the corpus in memory.
Every token of the corpus is in exactly one row; what does not fill a row is padded, never dropped.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Union

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from minllm.config import config
from minllm.data.shards import Column, Tokens, check, seal

WINDOW = 2**16  # pieces (or rows) that a pass holds at once

Starts = Column | Int[np.ndarray, " starts"]  # where each document begins in the stream, and where the last one ends
Chunk = tuple[Int[np.ndarray, " rows"], Int[np.ndarray, "entries 3"]]  # entries of each row, and the entries


def _pieces(starts: Starts, T: int) -> Iterator[Int[np.ndarray, "pieces 3"]]:
    """Every document cut into pieces of T tokens and a rest, a window at a time."""
    for d in range(0, len(starts) - 1, WINDOW):
        lengths = np.diff(starts[d : d + WINDOW + 1])
        ends = np.cumsum(-(-lengths // T))  # pieces up to and with each document
        for i in range(0, int(ends[-1]), WINDOW):
            piece = np.arange(i, min(i + WINDOW, int(ends[-1])))
            document = np.searchsorted(ends, piece, "right")
            offset = (piece - np.concatenate([[0], ends])[document]) * T
            yield np.stack([d + document, offset, np.minimum(T, lengths[document] - offset)], 1)


@config
class Concat:
    """Concatenate and chunk: documents end to end, a row every T tokens. No padding but in the last row."""

    kind: Literal["concat"] = "concat"

    def rows(self, starts: Starts, T: int) -> Iterator[Chunk]:
        total, window = int(starts[len(starts) - 1]), T * (1 + 2**20 // T)
        for a in range(0, total, window):
            b = min(a + window, total)
            low = bisect_right(starts, a) - 1
            nearby = starts[low : bisect_left(starts, b) + 1]
            cuts = np.unique(np.concatenate([np.arange(a, b, T), nearby[(nearby > a) & (nearby < b)]]))  # where a piece begins
            document = np.searchsorted(nearby, cuts, "right") - 1
            yield np.bincount((cuts - a) // T), np.stack([low + document, cuts - nearby[document], np.diff(np.append(cuts, b))], 1)


@config
class Single:
    """One document or piece a row, padded: rows never share."""

    kind: Literal["single"] = "single"

    def rows(self, starts: Starts, T: int) -> Iterator[Chunk]:
        for pieces in _pieces(starts, T):
            yield np.ones(len(pieces), np.int64), pieces


@config
class BestFit:
    """Best-fit decreasing (Ding et al. 2024, arXiv 2404.10830): a document is cut only when it is longer than a row, and each piece,
    longest first, goes to the fullest row that still has room. Windows of 65,536 pieces keep memory constant."""

    kind: Literal["best_fit"] = "best_fit"

    def rows(self, starts: Starts, T: int) -> Iterator[Chunk]:
        for pieces in _pieces(starts, T):
            order = np.argsort(-pieces[:, 2], kind="stable")
            row, rooms, room_sizes = np.empty(len(pieces), np.int64), [[] for _ in range(T + 1)], 0
            count = 0
            for i, length in zip(order.tolist(), pieces[order, 2].tolist(), strict=True):
                # room_sizes has bit s set when some row has room s: the lowest bit from `length` up is the best fit.
                if fits := room_sizes >> length:
                    room = length + (fits & -fits).bit_length() - 1
                    row[i] = rooms[room].pop()
                    room_sizes ^= (not rooms[room]) << room
                else:
                    room, row[i], count = T, count, count + 1
                rooms[room - length].append(row[i])
                room_sizes |= 1 << (room - length)
            # Rows in the order of their first piece, pieces of a row in the order of the corpus.
            rank = np.empty(count, np.int64)
            rank[row[np.sort(np.unique(row, return_index=True)[1])]] = np.arange(count)
            row = rank[row]
            yield np.bincount(row, minlength=count), pieces[np.argsort(row, kind="stable")]


@config
class Bucket:
    """Rows of several lengths: one document or piece a row, padded to the least of `lengths` that holds it.

    A batch holds rows of one length, as many as fill the same number of positions, so each length is one more compiled shape.
    """

    kind: Literal["bucket"] = "bucket"
    lengths: tuple[int, ...] = Field(min_length=1)

    def __post_init__(self):
        if self.lengths[0] < 1 or any(a >= b for a, b in pairwise(self.lengths)):
            raise ValueError(f"bucket lengths {list(self.lengths)} must rise, from at least 1")

    def rows(self, starts: Starts, T: int) -> Iterator[Chunk]:
        """The rows of the bucket of length T."""
        shorter = max((length for length in self.lengths if length < T), default=0)
        for pieces in _pieces(starts, self.lengths[-1]):
            pieces = pieces[(pieces[:, 2] > shorter) & (pieces[:, 2] <= T)]
            yield np.ones(len(pieces), np.int64), pieces


Packing = Annotated[Union[Concat, BestFit, Single, Bucket], Field(discriminator="kind")]


def write_plan(folder: Path, packing: Packing, tokens: Tokens, T: int) -> None:
    """The plan of one split for rows of T positions, in one streaming pass."""
    rows = entries = 0
    with open(folder / "row_starts.i64", "wb") as starts, open(folder / "entries.i64", "wb") as out:
        starts.write(np.zeros(1, "<i8").tobytes())
        for counts, chunk in packing.rows(tokens.starts, T):
            starts.write((entries + np.cumsum(counts)).astype("<i8").tobytes())
            out.write(chunk.astype("<i8").tobytes())
            rows, entries = rows + len(counts), entries + len(chunk)
    seal(folder, rows=rows, entries=entries, T=T)


class Rows:
    """The packed rows of one split: len(rows) of them, any of them in any order."""

    def __init__(self, tokens: Tokens, plan: Path, pad: int = 0):
        self.plan, manifest = plan, check(plan)
        self.tokens, self.T, self.pad, self.count = tokens, manifest["T"], pad, manifest["rows"]
        self.row_starts, self.entries = Column(plan / "row_starts.i64"), Column(plan / "entries.i64", 3)

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Sequence[int]) -> dict[str, Int[np.ndarray, "B T"] | Float[np.ndarray, "B T"]]:
        """tokens, targets, segments, positions (int32) and weights (float32) of the given rows, each [B, T]."""
        shape = (len(rows), self.T)
        tokens, targets = np.full(shape, self.pad, np.int32), np.full(shape, self.pad, np.int32)
        segments, positions, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for b, row in enumerate(rows):
            column = 0
            first, stop = self.row_starts[row : row + 2].tolist()
            for segment, (document, offset, length) in enumerate(self.entries[first:stop].tolist(), 1):
                start, end = self.tokens.starts[document : document + 2].tolist()
                ids = self.tokens.read(start + offset, min(start + offset + length + 1, end))
                here, predicted = slice(column, column + length), slice(column, column + len(ids) - 1)
                tokens[b, here] = ids[:length]
                targets[b, predicted] = ids[1:]
                weights[b, predicted] = self.tokens.learned(start + offset, start + offset + len(ids))[1:] if self.tokens.masked else 1
                segments[b, here] = segment
                positions[b, here] = np.arange(length)
                column += length
        return {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions, "weights": weights}


def padding(rows: Rows) -> float:
    """The share of positions that hold no token."""
    return 1 - rows.tokens.tokens / max(1, len(rows) * rows.T)
