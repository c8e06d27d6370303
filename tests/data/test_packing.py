"""Packing against plain loops: every token once, no target across documents, waste no more than textbook best-fit-decreasing."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllm.data import packing as module
from minllm.data.packing import BestFit, Bucket, Concat, Rows, Single, padding, write_plan
from minllm.data.shards import Tokens, Writer
from minllm.data.tokenizer import Bytes

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=40)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 11)


def packed(folder: Path, sizes, policy, T) -> tuple[Rows, list[bytes]]:
    """Documents of the given sizes, no byte repeated inside one, so that a token names its place."""
    documents = [bytes((17 * d + i) % 128 for i in range(n)) for d, n in enumerate(sizes)]
    writer = Writer(folder / "tokens", Bytes(specials=()).build())
    writer.add([d.decode() for d in documents])
    writer.close()
    (folder / "plan").mkdir()
    tokens = Tokens(folder / "tokens")
    write_plan(folder / "plan", policy, tokens, T)
    return Rows(tokens, folder / "plan", pad=255), documents


@given(lengths, st.integers(1, 20), st.sampled_from([Concat(), BestFit(), Single()]))
@settings(max_examples=150, deadline=None)
def test_rows_say_what_the_documents_say(sizes, T, policy):
    with tempfile.TemporaryDirectory() as folder:
        rows, documents = packed(Path(folder), sizes, policy, T)
        batch = rows.batch(range(len(rows)))
        covered = np.zeros((len(documents), 41), int)
        predicted = covered.copy()
        for r in range(len(rows)):
            entries = rows.entries[rows.row_starts[r] : rows.row_starts[r + 1]].tolist()
            column = 0
            for segment, (d, offset, length) in enumerate(entries, 1):
                assert length > 0
                for p in range(length):
                    at = r, column + p
                    assert batch["tokens"][at] == documents[d][offset + p]
                    assert (batch["segments"][at], batch["positions"][at]) == (segment, p)
                    last = offset + p + 1 == len(documents[d])
                    assert batch["weights"][at] == (not last)
                    assert batch["targets"][at] == (255 if last else documents[d][offset + p + 1])
                    covered[d, offset + p] += 1
                    predicted[d, offset + p + 1] += not last
                column += length
            assert column <= T
            for name, fill in {"tokens": 255, "targets": 255, "segments": 0, "positions": 0, "weights": 0}.items():
                assert (batch[name][r, column:] == fill).all()
        for d, document in enumerate(documents):
            assert covered[d].tolist() == [1] * len(document) + [0] * (41 - len(document))  # every token once
            assert predicted[d].tolist() == [i not in (0,) and i < len(document) for i in range(41)]  # and predicted once, but the first
        assert batch["weights"].sum() == rows.tokens.predicted_tokens


@given(lengths, st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_concat_is_the_text_in_rows(sizes, T):
    with tempfile.TemporaryDirectory() as folder:
        rows, documents = packed(Path(folder), sizes, Concat(), T)
        stream = b"".join(documents)
        assert len(rows) == -(-len(stream) // T)
        batch = rows.batch(range(len(rows)))
        assert batch["tokens"][batch["segments"] > 0].tolist() == list(stream)
        assert (batch["segments"].ravel()[: len(stream)] > 0).all()  # padding at the very end alone


def textbook_best_fit(sizes, T):
    """Room left in each row, by search through all rows."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else T) - size)
    return sorted(rooms)


@given(lengths, st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_best_fit_fills_rows_as_the_textbook_does(sizes, T):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", 2**16)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        chunks = list(BestFit().rows(starts, T))
    pieces = [piece for n in sizes for piece in [T] * (n // T) + [n % T] * bool(n % T)]
    row = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts, _ in chunks] or [[]]).astype(int)
    used = np.bincount(row, np.concatenate([entries[:, 2] for _, entries in chunks] or [[]]))
    assert sorted((T - used).tolist()) == textbook_best_fit(pieces, T)


def test_best_fit_wastes_little_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 1000)
    sizes = np.random.default_rng(0).geometric(1 / 30, 5000).clip(1, 120).tolist()
    rows, _ = packed(tmp_path, sizes, BestFit(), 128)
    assert padding(rows) < 0.01
    assert padding(rows) == pytest.approx((rows.batch(range(len(rows)))["segments"] == 0).mean())


@given(lengths)
@settings(max_examples=60, deadline=None)
def test_buckets_hold_each_piece_in_the_least_length(sizes):
    policy, starts, seen = Bucket(lengths=(4, 10, 16)), np.concatenate([[0], np.cumsum(sizes)]), []
    for shorter, T in ((0, 4), (4, 10), (10, 16)):
        for counts, entries in policy.rows(starts, T):
            assert (counts == 1).all() and ((entries[:, 2] > shorter) & (entries[:, 2] <= T)).all()
            seen += [(d, offset + i) for d, offset, length in entries.tolist() for i in range(length)]
    assert sorted(seen) == [(d, i) for d, n in enumerate(sizes) for i in range(n)]


def test_bucket_lengths_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        Bucket(lengths=(8, 8))
