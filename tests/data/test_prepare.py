"""From a config to batches: caching, nats/byte accounting, errors before anything is built, constant memory, throughput, the script."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minllm.data import (
    BPE,
    JSONL,
    BestFit,
    Bucket,
    Bytes,
    Characters,
    Data,
    Mixture,
    PythonStdlib,
    SentencePiece,
    Text,
    prepare,
)  # fmt: skip
from minllm.data.sources import unit

ROOT = Path(__file__).resolve().parents[2]
LINES = [f"line {i}: " + "the quick brown fox "[: 3 + i % 17] for i in range(400)]


@pytest.fixture
def corpus(tmp_path) -> Text:
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    return Text(globs=(str(tmp_path / "corpus.txt"),), document="line")


def made(tmp_path, corpus, **options):
    return prepare(Data(**{"source": corpus, "length": 32, "cache": str(tmp_path / "cache")} | options))


def text_of(prepared, rows) -> bytes:
    batches = (part.batch(range(len(part))) for part in rows)
    return b"".join(prepared.tokenizer.decode_bytes(batch["tokens"][batch["segments"] > 0]) for batch in batches)


def test_the_split_is_by_document_and_nothing_is_lost(tmp_path, corpus):
    prepared = made(tmp_path, corpus, holdout=0.2)
    held = [line for i, line in enumerate(LINES) if unit(f"corpus.txt#{i}") < 0.2]
    assert 40 < len(held) < 120 and text_of(prepared, prepared.held_out).decode() == "".join(held)
    assert text_of(prepared, prepared.train).decode() == "".join(line for line in LINES if line not in held)
    stats = prepared.stats["held_out"]
    assert (stats.documents, stats.bytes, stats.tokens) == (len(held), len("".join(held)), len("".join(held)) + 2 * len(held))
    assert prepared.stats["train"].documents == len(LINES) - len(held)


def test_shakespeare_style_tail_in_characters(tmp_path):
    text = "To be, or not to be: that is the question.\n" * 30
    (tmp_path / "play.txt").write_text(text)
    source = Text(globs=(str(tmp_path / "play.txt"),))
    prepared = made(tmp_path, source, tokenizer=Characters(), holdout_tail=0.1)
    assert text_of(prepared, prepared.train).decode() == text[: int(len(text) * 0.9)]
    assert text_of(prepared, prepared.held_out).decode() == text[int(len(text) * 0.9) :]
    evaluation = prepared.evaluation(4)
    # One document and no bos: all its characters but the first are predicted, and only those are counted.
    assert evaluation.tokens == evaluation.bytes == len(text) - int(len(text) * 0.9) - 1


def test_a_validation_source_is_the_held_out_set(tmp_path, corpus):
    (tmp_path / "other.txt").write_text("held out")
    prepared = made(tmp_path, corpus, validation=Text(globs=(str(tmp_path / "other.txt"),)))
    assert text_of(prepared, prepared.held_out) == b"held out" and prepared.stats["train"].documents == len(LINES)


def test_a_trained_tokenizer_never_sees_the_held_out_text(tmp_path):
    (tmp_path / "x.txt").write_text("a" * 900 + "z" * 100)
    source = Text(globs=(str(tmp_path / "x.txt"),))
    with pytest.raises(ValueError, match="character 'z' is not among the 1 characters"):
        made(tmp_path, source, tokenizer=Characters(), holdout_tail=0.1)
    assert made(tmp_path, source, tokenizer=Characters(unknown=True), holdout_tail=0.1).tokenizer.vocab_size == 2


def test_the_second_time_reads_the_cache(tmp_path, corpus):
    calls = []
    data = Data(source=corpus, length=32, cache=str(tmp_path / "cache"), tokenizer=BPE(vocab_size=270))
    first = prepare(data, lambda *progress: calls.append(progress))
    assert {what for what, _, _ in calls} == {"reading", "training the tokenizer", "tokenising"}
    assert all(done <= total for _, done, total in calls if total)
    calls.clear()
    second = prepare(data, lambda *progress: calls.append(progress))
    assert not calls and second.identity == first.identity and second.stats == first.stats
    os.utime(corpus.globs[0])  # touched, not changed: read again, tokenised no more
    assert prepare(data, lambda *progress: calls.append(progress)).identity == first.identity
    assert {what for what, _, _ in calls} == {"reading"}
    Path(corpus.globs[0]).write_text("\n".join(LINES[::-1]))
    assert prepare(data).identity != first.identity


def test_identity_names_all_that_batches_depend_on(tmp_path, corpus):
    changes = [{}, {"length": 16}, {"seed": 1}, {"packing": BestFit()}, {"holdout": 0.3}, {"tokenizer": Bytes(specials=())}]
    assert len({made(tmp_path, corpus, **change).identity for change in changes}) == len(changes)


def test_a_mixture_of_sources(tmp_path, corpus):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "json {i}"}}\n' for i in range(300)))
    source = Mixture(sources=(corpus, JSONL(globs=(str(tmp_path / "x.jsonl"),))), weights=(0.25, 0.75))
    prepared = made(tmp_path, source)
    loader = prepared.loader(8)
    assert np.bincount(loader.origin(range(1000))[:, 0]).tolist() == [250, 750]
    assert prepared.stats["train"].documents + prepared.stats["held_out"].documents == 700
    assert b"json" in text_of(prepared, prepared.held_out) and b"line" in text_of(prepared, prepared.held_out)
    evaluation = prepared.evaluation(8)
    assert sum(float(b["weights"].sum()) for b in evaluation) == evaluation.tokens
    by_size = made(tmp_path, Mixture(sources=source.sources)).weights
    assert by_size == tuple(float(rows.tokens.tokens) for rows in prepared.train)


def test_bucket_packing(tmp_path, corpus):
    prepared = made(tmp_path, corpus, packing=Bucket(lengths=(16, 32)))
    shapes = {prepared.loader(4).batch(step)["tokens"].shape for step in range(20)}
    assert shapes == {(8, 16), (4, 32)}
    with pytest.raises(ValueError, match=r"longest length, 16, as data\.length, which is 32"):
        made(tmp_path, corpus, packing=Bucket(lengths=(8, 16)))
    with pytest.raises(ValueError, match="not the ramp"):
        prepared.loader(((0, 4), (2, 8)))


# ---------------------------------------------------------------------------------------------------------------- errors


def test_a_corpus_shorter_than_a_row(tmp_path):
    (tmp_path / "x.txt").write_text("short")
    source = Text(globs=(str(tmp_path / "x.txt"),))
    with pytest.raises(ValueError, match=r"has 7 tokens, but a row and its last target take 33: lower data\.length, .*pad_short"):
        made(tmp_path, source, holdout=0.0)
    prepared = made(tmp_path, source, holdout=0.0, pad_short=True)
    batch = prepared.loader(2).batch(0)
    assert batch["tokens"].shape == (2, 32) and batch["weights"].sum() == 12
    with pytest.raises(ValueError, match="nothing is held out of 1 documents"):
        prepared.evaluation(1)


def test_errors_come_before_anything_is_built(tmp_path, corpus):
    with pytest.raises(ValueError, match="holdout and holdout_tail are given"):
        Data(holdout=0.1, holdout_tail=0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data cache .*file.* cannot be written .* set data\.cache"):
        made(tmp_path, corpus, cache=str(tmp_path / "file"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"is empty"):
        made(tmp_path, Text(globs=(str(tmp_path / "empty.txt"),)))
    assert not (tmp_path / "cache" / "tokens").exists()


def test_a_flipped_byte_in_the_cache_names_the_shard(tmp_path, corpus):
    prepared = made(tmp_path, corpus)
    shard = next(prepared.train[0].tokens.folder.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"train/shard-00000\.array_record is corrupt .* delete"):
        made(tmp_path, corpus)


FULL = """
import resource, signal, sys
from minllm.data import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
data = Data(source=Text(globs=(sys.argv[1],), document="line"), cache=sys.argv[2], length=32)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    prepare(data)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 10_000])  # the survey does not fit; the shards do not
def test_a_full_disk_leaves_nothing_half_made(tmp_path, corpus, limit):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", FULL, corpus.globs[0], str(tmp_path / "cache"), str(limit)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "cannot be written" in ran.stdout and "free some space" in ran.stdout, ran.stdout + ran.stderr
    assert made(tmp_path, corpus).stats["train"].tokens > 0  # and when there is room again, it is simply made


# ------------------------------------------------------------------------------------------------------- speed, memory


def test_the_loader_outruns_training(tmp_path):
    """The bar is 5 x what two CPU cores train on: 200,000 tokens/s. It does 5 million on an idle machine."""
    prepared = prepare(Data(source=PythonStdlib(), cache=str(tmp_path / "cache")))
    with prepared.loader(16).batches() as batches:
        next(batches)
        before = time.perf_counter()
        tokens = sum(next(batches)["tokens"].size for _ in range(150))
        assert tokens / (time.perf_counter() - before) > 200_000


MEASURE = """
import sys
from pathlib import Path
from minllm.data import *
folder, size = Path(sys.argv[1]), int(sys.argv[2])
line = "".join(chr(97 + i * i % 26) for i in range(90))
for i in range(4):
    with open(folder / f"{i}.txt", "w") as file:
        for n in range(size // 400):
            file.write(f"{i} {n:8d} {line[n % 9:]}\\n")
source = Text(globs=(f"{folder}/*.txt",), document="line")
prepared = prepare(Data(source=source, cache=str(folder / "cache"), packing=BestFit()))
with prepared.loader(16).batches() as batches:
    for _ in range(200):
        next(batches)
for batch in prepared.evaluation(16):
    pass
# VmHWM, not ru_maxrss: that one starts at the size of the process we were forked from
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for size in (12_000_000, 28_000_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        ran = subprocess.run([sys.executable, "-c", MEASURE, str(folder), str(size)], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout) / 1024)
    assert peaks[1] - peaks[0] < 6, peaks  # 16 MB more text, 4 MB more plan


# -------------------------------------------------------------------------------------------------------------- script


def test_the_script(tmp_path, corpus):
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model: {{kind: llama}}
data:
  source: {{kind: text, globs: ["{corpus.globs[0]}"], document: line}}
  tokenizer: {{kind: sentencepiece, vocab_size: 300}}
  length: 32
  cache: {tmp_path / "cache"}
""")
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "COLUMNS": "200"}

    def run(*arguments):
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)

    ran = run("--verify", "data.packing={kind: best_fit}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "held_out" in ran.stdout and "tokenising" in ran.stdout
    tokenizer = SentencePiece(vocab_size=300)
    again = prepare(Data(source=corpus, tokenizer=tokenizer, length=32, cache=str(tmp_path / "cache"), packing=BestFit()))
    assert f"{again.stats['train'].tokens:,}" in ran.stdout
    wrong = run("data.lenght=3")
    assert wrong.returncode == 2 and "did you mean" in wrong.stdout and "Traceback" not in wrong.stdout + wrong.stderr
