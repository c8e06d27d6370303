"""Tokenizers: exact round trips, ids equal to the libraries' own, determinism, save and load, no special id from text."""

import base64
import io
import json
import random

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from minllm.data.tokenizer import BPE, PATTERNS, Bytes, Characters, HuggingFace, SentencePiece, Tiktoken, Tokenizer, load

WORDS = """def return self None import for in while yield lambda the of and to a be caf\u00e9 \u6771\u4eac \U0001f600 x y 1234 56
tokenizer vocabulary permutation document sequence attention gradient transformer checkpoint precision quantise language""".split()


def corpus(limit: int = 0):
    rng = random.Random(0)
    return ["\n".join("    " * rng.randrange(3) + " ".join(rng.choices(WORDS, k=8)) for _ in range(40)) for _ in range(12)]


@pytest.fixture(scope="module")
def bpe():
    return BPE(vocab_size=400, specials=("bos", "eos", "pad")).build(corpus)


@pytest.fixture(scope="module")
def piece():
    return SentencePiece(vocab_size=340).build(corpus)


def ranks_file(folder) -> str:
    """The 256 bytes and some merges of two and three."""
    tokens = [bytes([b]) for b in range(256)]
    for merged in (b"th", b"in", b"er", b"the", b"  ", b"\xc3\xa9", b"12", b"123"):
        tokens.append(merged)
    path = folder / "ranks.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return str(path)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = ranks_file(tmp_path_factory.mktemp("ranks"))
    return Tiktoken(ranks=path, specials=(("<|end|>", 270), ("<|begin|>", 264)), bos="<|begin|>", eos="<|end|>").build()


text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581"))  # no surrogates; SentencePiece's own space sign


@given(st.binary())
def test_bytes_keep_any_bytes(data):
    live = Bytes().build()
    ids = live.encode(data)
    assert live.decode_bytes(ids) == data and ids.tolist() == list(data)


@given(text)
@settings(max_examples=200, deadline=None)
def test_every_tokenizer_gives_the_text_back(bpe, piece, ranks, text):
    characters = Characters(vocabulary="".join(sorted(set(text)))).build()
    for live in (Bytes().build(), characters, bpe, piece, ranks):
        ids = live.encode(text)
        assert ids.dtype == np.int32 and live.decode(ids) == text
        assert live.decode_bytes(ids) == text.encode()
        # Bytes add up over tokens, wherever a character is cut: what nats/byte counts on.
        assert b"".join(live.decode_bytes([i]) for i in ids.tolist()) == text.encode()
        assert live.encode(text.encode()).tolist() == ids.tolist()
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < live.vocab_size


def test_batches_equal_single_texts(bpe, piece, ranks):
    for live in (Bytes().build(), bpe, piece, ranks):
        for one, many in zip(map(live.encode, corpus()), live.encode_batch(corpus()), strict=True):
            assert one.tolist() == many.tolist()


def test_special_tokens_are_outside_the_text(bpe, piece, ranks):
    for live in (Bytes(specials=("bos", "eos", "pad")).build(), bpe, piece, ranks):
        assert live.bos is not None and live.eos is not None
        for special, id in live.specials.items():
            quoted = f"a {special} b{special}"
            assert id not in live.encode(quoted) and live.decode(live.encode(quoted)) == quoted
            assert live.decode([id]) == "" and live.decode_bytes([id]) == b""


def test_saved_and_loaded_is_the_same(tmp_path, bpe, piece, ranks):
    for i, live in enumerate((Bytes().build(), Characters(unknown=True).build(corpus), bpe, piece, ranks)):
        live.save(tmp_path / str(i))
        again = load(tmp_path / str(i))
        assert (again.hash, again.vocab_size, again.bos, again.eos, again.pad) == (live.hash, live.vocab_size, live.bos, live.eos, live.pad)
        assert again.specials == live.specials
        assert again.encode(corpus()[0]).tolist() == live.encode(corpus()[0]).tolist()


def test_hash_tells_tokenizers_apart(bpe, piece):
    configs = Bytes(), Bytes(specials=()), Characters(vocabulary="ab"), Characters(vocabulary="abc")
    assert len({live.hash for live in (bpe, piece, *(config.build() for config in configs))}) == 6


def test_load_refuses_what_was_changed(tmp_path, bpe):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<bos>", "<BOS>"))
    with pytest.raises(ValueError, match=r"<bos>|hash"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"minllm_tokenizer\.json is missing"):
        load(tmp_path / "elsewhere")


@pytest.mark.parametrize("make", [
    lambda: BPE(vocab_size=350),
    lambda: SentencePiece(vocab_size=340),
    lambda: SentencePiece(vocab_size=340, model_type="bpe"),
    lambda: Characters(),
])  # fmt: skip
def test_training_twice_gives_the_same_tokenizer(make):
    assert make().trains
    assert make().build(corpus).hash == make().build(corpus).hash


def test_bpe_equals_the_library(bpe):
    own = tokenizers.Tokenizer.from_str(bpe.files["tokenizer.json"].decode())
    for document in corpus():
        assert own.encode(document, add_special_tokens=False).ids == bpe.encode(document).tolist()
    assert bpe.vocab_size == 400 and bpe.specials == {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    # Numbers are split into at most three digits (Llama 3), or not at all (GPT-2).
    assert max(len(own.decode([i]).strip()) for i in bpe.encode("1234567890" * 5).tolist()) <= 3


def test_bpe_merges_by_count():
    """A corpus without ties: ab occurs most, then the pair of ab and c."""
    live = BPE(vocab_size=258, specials=()).build(lambda limit: ["abc\nabc\nabc\nabd"])
    merges = json.loads(live.files["tokenizer.json"])["model"]["merges"]
    assert [tuple(m) for m in merges] == [("a", "b"), ("ab", "c")]


@pytest.mark.parametrize("split", ["gpt2", "llama3"])
def test_patterns_split_as_published(split):
    import regex

    pieces = regex.findall(PATTERNS[split], "I'll pay  12345 \u00e9t\u00e9s!\n\n  ok")
    assert "".join(pieces) == "I'll pay  12345 \u00e9t\u00e9s!\n\n  ok"
    assert ("123" in pieces) == (split == "llama3") and (" 12345" in pieces) == (split == "gpt2")


@given(text)
@settings(deadline=None)
def test_tiktoken_ids_equal_tiktokens(ranks, text):
    table = {base64.b64decode(t): int(r) for t, r in (line.split() for line in ranks.files["tokenizer.tiktoken"].splitlines())}
    own = tiktoken.Encoding("own", pat_str=PATTERNS["llama3"], mergeable_ranks=table, special_tokens={"<|end|>": 270, "<|begin|>": 264})
    assert own.encode(text, disallowed_special=()) == ranks.encode(text).tolist()
    assert ranks.vocab_size == 271


def test_sentencepiece_segments_as_the_library(piece, tmp_path):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, vocab_size=90, model_type="unigram", hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "own.model").write_bytes(out.getvalue())  # with the library's defaults: NFKC, dummy prefix
    own = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    live = SentencePiece(model="own.model").build(root=tmp_path)
    for document in corpus():
        ids = own.encode(document)
        assert live.encode(document).tolist() == ids and live.decode(ids) == own.decode(ids)
    assert (live.bos, live.eos, live.pad) == (1, 2, None)


def test_huggingface_folder_names_its_special_tokens(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_bytes(bpe.files["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}))
    live = HuggingFace(path=str(tmp_path)).build()
    assert (live.bos, live.eos, live.pad) == (0, 1, None)
    (tmp_path / "tokenizer_config.json").unlink()
    plain = HuggingFace(path=str(tmp_path / "tokenizer.json"), eos="<pad>").build()
    assert (plain.bos, plain.eos) == (None, 2)
    with pytest.raises(ValueError, match="no token '<nope>'"):
        HuggingFace(path=str(tmp_path), bos="<nope>").build()


def test_unknown_characters():
    with pytest.raises(ValueError, match=r"'z' is not among the 2 characters .*unknown: true"):
        Characters(vocabulary="ab").build().encode("abz")
    live = Characters(vocabulary="ab", unknown=True, specials=("eos",)).build()
    assert live.encode("abz").tolist() == [0, 1, 3] and live.decode([0, 3, 2]) == "a\ufffd" and live.eos == 2


@pytest.mark.parametrize(("call", "message"), [
    (lambda: SentencePiece(), "exactly one of model"),
    (lambda: SentencePiece(model="a", vocab_size=3), "exactly one of model"),
    (lambda: SentencePiece(model="absent.model").build(), "absent.model does not exist"),
    (lambda: SentencePiece(vocab_size=100_000).build(corpus), "choose another vocab_size"),
    (lambda: BPE(vocab_size=100_000).build(corpus), "set vocab_size to at most"),
    (lambda: HuggingFace(path="absent.json").build(), "absent.json does not exist"),
    (lambda: Tiktoken(ranks="absent").build(), "absent does not exist"),
    (lambda: Characters(vocabulary="aa").build(), "1 of them distinct"),
    (lambda: Characters().build(), "needs a corpus"),
])  # fmt: skip
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tiktoken_errors(tmp_path):
    path = ranks_file(tmp_path)
    with pytest.raises(ValueError, match="an id from 264 up"):
        Tiktoken(ranks=path, specials=(("<|end|>", 3),)).build()
    with pytest.raises(ValueError, match="add it there with its id"):
        Tiktoken(ranks=path, bos="<|begin|>").build()
    (tmp_path / "bad").write_text("not ranks at all\n")
    with pytest.raises(ValueError, match="not a tiktoken ranks file"):
        Tiktoken(ranks=str(tmp_path / "bad")).build()


def test_the_union_picks_by_kind_and_forbids_unknown_keys():
    read = TypeAdapter(Tokenizer).validate_python
    assert read({"kind": "bpe", "vocab_size": 300}) == BPE(vocab_size=300)
    with pytest.raises(ValidationError, match="vocab"):
        read({"kind": "bytes", "vocab_size": 300})
