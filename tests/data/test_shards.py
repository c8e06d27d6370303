"""Token shards and cache folders: what is read is what was written; nothing damaged or half written is ever taken for whole."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllm.data import shards
from minllm.data.shards import Tokens, Writer, check, once
from minllm.data.tokenizer import Bytes, Characters

documents = st.lists(st.text(max_size=30), max_size=30)


def written(folder: Path, texts, tokenizer=None) -> Tokens:
    writer = Writer(folder, tokenizer or Bytes().build())
    for i in range(0, len(texts), 7):  # batches of any size
        writer.add(texts[i : i + 7])
    writer.close()
    return Tokens(folder)


@given(documents, st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_range_reads_back(texts, specials):
    tokenizer = Bytes(specials=("bos", "eos") if specials else ()).build()
    wanted = [x for t in texts for x in ([256, *t.encode(), 257] if specials else t.encode())]
    # Small blocks and shards, so that a few documents span several of each.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", 16)
        patch.setattr(shards, "SHARD", 3)
        tokens = written(Path(folder) / "tokens", texts, tokenizer)
        assert (tokens.documents, tokens.tokens, tokens.bytes) == (len(texts), len(wanted), len("".join(texts).encode()))
        assert len(list(tokens.folder.glob("shard-*"))) == -(-len(wanted) // 48)
        for start in range(0, len(wanted), 5):
            for stop in {start + 1, min(start + 33, len(wanted)), len(wanted)}:
                assert tokens.read(start, stop).tolist() == wanted[start:stop]
        lengths = [len(t.encode()) + 2 * specials for t in texts]
        assert tokens.starts[:].tolist() == np.concatenate([[0], np.cumsum(lengths)]).tolist()
        assert tokens.predicted_tokens == sum(max(0, n - 1) for n in lengths)
        assert tokens.predicted_bytes == sum(len(t.encode()) if specials else max(0, len(t.encode()) - 1) for t in texts)


def test_sixteen_bits_when_they_are_enough(tmp_path):
    small = Characters(vocabulary="".join(map(chr, range(100, 100 + 2**11)))).build()
    assert written(tmp_path / "small", ["def"], small).dtype == np.uint16
    small.vocab_size = 2**16 + 1
    assert written(tmp_path / "large", ["def"], small).dtype == np.uint32


def test_any_flipped_byte_is_caught_when_opened(tmp_path):
    tokens = written(tmp_path / "tokens", ["some text, " * 2000])
    rng = np.random.default_rng(0)
    for path in (tokens.folder / "shard-00000.array_record", tokens.folder / "starts.i64"):
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 20):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=rf"{path.name} is corrupt .* delete"):
                Tokens(tokens.folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{path.name} has {len(whole) - 1} bytes, its manifest says {len(whole)}"):
            Tokens(tokens.folder)
        path.write_bytes(whole)
    (tokens.folder / "starts.i64").unlink()
    with pytest.raises(ValueError, match=r"starts.i64 has -1 bytes"):
        Tokens(tokens.folder)


def test_a_flipped_byte_never_gives_a_wrong_token(tmp_path, monkeypatch):
    """A corpus too large to hash when it is opened: each record is checked as it is read."""
    monkeypatch.setattr(shards, "EAGER", 0)
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 30_000)))
    tokens = written(tmp_path / "tokens", [text])
    wanted, path, caught = tokens.read(0, tokens.tokens).copy(), tokens.folder / "shard-00000.array_record", 0
    whole = path.read_bytes()
    for at in np.random.default_rng(1).integers(0, len(whole), 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert np.array_equal(Tokens(tokens.folder).read(0, tokens.tokens), wanted)  # the byte was padding
        except ValueError as error:
            assert "shard-00000.array_record is corrupt" in str(error)
            caught += 1
    assert caught >= 15  # half of the file is padding
    with pytest.raises(ValueError, match="corrupt"):
        check(tokens.folder, everything=True)


# --------------------------------------------------------------------------------------------- whole or absent, and once


def test_a_folder_is_made_once(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "x").write_text("x")

    assert once(tmp_path / "a" / "b", make) == once(tmp_path / "a" / "b", make) == tmp_path / "a" / "b"
    assert len(made) == 1 and (tmp_path / "a/b/x").read_text() == "x"


def test_a_failed_writer_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): free some space"):
        once(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]


def test_a_killed_writer_is_not_taken_for_complete(tmp_path):
    code = f"""
import os
from pathlib import Path
from minllm.data.shards import once
def make(folder):
    (folder / "x").write_text("half")
    os.kill(os.getpid(), 9)
once(Path({str(tmp_path / "x")!r}), make)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert not (tmp_path / "x").exists() and (tmp_path / ".x.partial" / "x").read_text() == "half"
    once(tmp_path / "x", lambda folder: (folder / "y").write_text("whole") and None)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["y"] and not (tmp_path / ".x.partial").exists()
