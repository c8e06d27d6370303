"""GGUF: the container against the gguf package, models there and back, vocabularies, and what is refused."""

import importlib.util
import json
from pathlib import Path

import gguf as theirs
import jax
import numpy as np
import pytest

from minllm import models
from minllm.data.tokenizer import BPE, Bytes, SentencePiece
from minllm.interop import container, gguf, vocabulary
from minllm.interop.blocks import FORMATS
from minllm.interop.container import Planned
from minllm.layer import Execution
from minllm.layers.position import Llama3Scaling, YarnScaling
from minllm.models.family import bare
from minllm.sharding import make_mesh

rng = np.random.default_rng(0)
SHAPE = dict(D=64, layers=3, heads=4, kv_heads=2, hidden=96, vocab=320)
script = importlib.util.spec_from_file_location("check_gguf", Path(__file__).parents[2] / "scripts/check_gguf.py")
check_gguf = importlib.util.module_from_spec(script)
script.loader.exec_module(check_gguf)
MODELS = check_gguf.gguf_models() | {
    "llama": models.build("llama", **SHAPE, scaling=None),
    "llama, 3.2": models.build("llama", **SHAPE, scaling=Llama3Scaling(factor=32.0)),
}
WRITTEN = [name for name, known in FORMATS.items() if known.encode]


@pytest.fixture(scope="module")
def params():
    return {name: check_gguf.random_weights(model) for name, model in MODELS.items()}


# --- the container ----------------------------------------------------------------------------------------------------------------


def test_the_file_is_the_gguf_packages_file(tmp_path):
    """S16: byte for byte the same as their writer makes, and what their reader reads."""
    metadata = {"general.architecture": "llama", "general.name": "näme", "llama.block_count": 3, "llama.rope.freq_base": 1e4,
                "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.tokens": ["a", "", "é\n"], "tokenizer.ggml.scores": [0.5, -1.0],
                "tokenizer.ggml.token_type": [1, 6, 3]}  # fmt: skip
    arrays = {name: rng.normal(size=(5, 64)).astype(np.float32) for name in WRITTEN} | {"odd": rng.normal(size=7).astype(np.float32)}
    plan = [Planned(f"{name}.weight", name if name in WRITTEN else "F32", a.shape) for name, a in arrays.items()]
    container.write(tmp_path / "ours.gguf", metadata, plan, iter(arrays.values()))
    writer = theirs.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_string("general.name", "näme")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for key in ("tokens", "scores", "token_type"):
        writer.add_array(f"tokenizer.ggml.{key}", metadata[f"tokenizer.ggml.{key}"])
    for planned, array in zip(plan, arrays.values()):
        kind = theirs.GGMLQuantizationType[planned.format]
        writer.add_tensor(planned.name, theirs.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    file = container.read(tmp_path / "ours.gguf")
    assert json.loads(json.dumps(file.metadata, default=lambda a: a.tolist())) == metadata
    assert np.array_equal(file.tensors["F32.weight"].read(), arrays["F32"]) and file.tensors["odd.weight"].shape == (7,)


def test_nothing_half_written_stays(tmp_path):
    def fails():
        yield np.zeros((2, 32), np.float32)
        raise OSError("disk full")

    plan = [Planned("a", "F32", (2, 32)), Planned("b", "F32", (2, 32))]
    with pytest.raises(OSError):
        container.write(tmp_path / "x.gguf", {"general.architecture": "llama"}, plan, fails())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf.save(path, MODELS["llama"], params["llama"])
    return path


def test_a_file_cut_anywhere_is_truncated(whole, tmp_path):
    data = whole.read_bytes()
    for length in [*range(4, 700, 53), len(data) // 2, len(data) - 40]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated"):
            container.read(tmp_path / "cut.gguf")


def test_no_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="no GGUF file"):
        container.read(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="there is no file"):
        container.read(tmp_path / "y.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(16))
    with pytest.raises(ValueError, match="version"):
        container.read(tmp_path / "x.gguf")


# --- models -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back(name, params, tmp_path):
    """F32 is exact: the same model, and every parameter bitwise, but for Gemma's gains, of which the file holds 1 + g, rounded."""
    path = tmp_path / "model.gguf"
    gguf.save(path, MODELS[name], params[name])
    model, back = gguf.load(path)
    assert bare(model) == bare(MODELS[name]) == bare(gguf.describe(path))
    for (where, a), b in zip(jax.tree.leaves_with_path(back), jax.tree.leaves(params[name]), strict=True):
        gemma_gain = name.startswith("gemma") and "norm" in jax.tree_util.keystr(where)
        assert (np.abs(a - b) <= (np.spacing(np.abs(1 + b)) / 2 if gemma_gain else 0)).all(), where


@pytest.mark.parametrize("kind", WRITTEN)
def test_formats(kind, params, tmp_path):
    """A second writing of what was read is the same file: blocks are read as exactly what they stand for."""
    gguf.save(tmp_path / "a.gguf", MODELS["llama"], params["llama"], kind)
    model, back = gguf.load(tmp_path / "a.gguf")
    found = container.read(tmp_path / "a.gguf").tensors
    assert found["blk.0.ffn_up.weight"].format == kind and found["output_norm.weight"].format == "F32"
    assert found["token_embd.weight"].format == ("Q8_0" if kind[:2] in ("Q4", "Q5") else kind)
    error = max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(jax.tree.leaves(params["llama"]), jax.tree.leaves(back)))
    assert error <= {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(kind, 0.15)
    if kind in ("F16", "BF16"):
        gguf.save(tmp_path / "b.gguf", model, back, kind)
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_queries_are_permuted(whole, params):
    """Rows of a head in the file: dim 0, dim H/2, dim 1, dim H/2 + 1 ... of ours; values are not."""
    file, H = container.read(whole), 16
    attend = params["llama"]["trunk"][0].pattern[0]["inner"]
    q = np.asarray(attend["q"])[1].reshape(64, 4, H).transpose(1, 2, 0)
    order = np.arange(H).reshape(2, H // 2).T.reshape(-1)
    assert np.array_equal(file.tensors["blk.1.attn_q.weight"].read(), q[:, order].reshape(64, 64))
    assert np.array_equal(file.tensors["blk.1.attn_v.weight"].read(), np.asarray(attend["v"])[1].reshape(64, 32).T)


def test_onto_a_mesh(whole, params):
    run = Execution(mesh=make_mesh(jax.devices()[:4], fsdp=2, tensor=2))
    _, back = gguf.load(whole, run)
    jax.tree.map(np.testing.assert_array_equal, back, params["llama"])
    assert len(back["trunk"][0].pattern[0]["inner"]["q"].sharding.device_set) == 4


def test_bfloat16(whole):
    _, back = gguf.load(whole, dtype=jax.numpy.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(back)} == {jax.numpy.dtype("bfloat16")}


def changed(whole, tmp_path, metadata=lambda m: m, tensors=lambda t: t):
    """The file with other metadata or tensors."""
    file = container.read(whole)
    kept = tensors({name: entry.read() for name, entry in file.tensors.items()})
    plan = [Planned(name, "F32", a.shape) for name, a in kept.items()]
    container.write(tmp_path / "changed.gguf", metadata(dict(file.metadata)), plan, iter(kept.values()))
    return tmp_path / "changed.gguf"


def without(tree, *names):
    return {k: v for k, v in tree.items() if k not in names}


@pytest.mark.parametrize("metadata, tensors, message", [
    (lambda m: m | {"general.architecture": "rwkv7"}, None, "architecture 'rwkv7'; known are llama"),
    (lambda m: m | {"llama.attention.sliding_window_pattern": 4}, None, "settings that are not known: llama.attention.sliding_window"),
    (lambda m: m | {"llama.rope.scaling.type": "yarn"}, None, "'yarn' is not supported"),
    (lambda m: m | {"llama.rope.dimension_count": 8}, None, "rope.dimension_count is not the head size 16"),
    (lambda m: without(m, "llama.block_count"), None, "it has no llama.block_count"),
    (None, lambda t: without(t, "blk.1.ffn_up.weight"), "no tensor blk.1.ffn_up.weight"),
    (None, lambda t: t | {"blk.1.ffn_extra.weight": np.zeros((2, 2), np.float32)}, "no place for: blk.1.ffn_extra.weight"),
    (None, lambda t: t | {"blk.1.ffn_up.weight": np.zeros((2, 64), np.float32)}, r"shape \(2, 64\), by the metadata it is \(96, 64\)"),
    (None, lambda t: t | {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}, "not those of a Llama 3 scaling"),
])  # fmt: skip
def test_what_is_not_honoured_is_an_error(whole, tmp_path, metadata, tensors, message):
    path = changed(whole, tmp_path, metadata or (lambda m: m), tensors or (lambda t: t))
    with pytest.raises(ValueError, match=message):
        gguf.load(path)


@pytest.mark.parametrize("model, format, message", [
    (models.build("llama", **SHAPE, scaling=YarnScaling(4.0, 64)), "F32", "type 'yarn' cannot be written"),
    (models.build("mistral", **SHAPE, window=32), "F32", "the model has no form in GGUF"),
    (models.build("olmo2", **SHAPE), "F32", "the model has no form in GGUF"),
    (models.build("llama", **SHAPE, scaling=None), "Q4_K", "choose from F32"),
    (models.build("llama", **{**SHAPE, "hidden": 80}, scaling=None), "Q4_0", "no whole blocks of 32"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(tmp_path, model, format, message):
    with pytest.raises(ValueError, match=message):
        gguf.save(tmp_path / "x.gguf", model, check_gguf.random_weights(model), format)
    assert not list(tmp_path.iterdir())


# --- vocabularies -----------------------------------------------------------------------------------------------------------------

TEXT = "The quick brown fox — naïve, 12345 times; don't!\n\n  Größe 北京 🙂\t'LL end. "


def texts(limit):
    return [TEXT, "It is a truth universally acknowledged, that a single man in possession of a good fortune " * 3] * 20


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "llama3": BPE(vocab_size=320).build(texts),
        "gpt2": BPE(vocab_size=310, split="gpt2").build(texts),
        "sentencepiece": SentencePiece(vocab_size=320, model_type="bpe").build(texts),
    }


@pytest.mark.parametrize("name", ["llama3", "gpt2", "sentencepiece"])
def test_tokenizers_come_back(name, tokenizers, params, tmp_path):
    live = tokenizers[name]
    gguf.save(tmp_path / "m.gguf", MODELS["llama"], params["llama"], tokenizer=live, chat_template="{{ messages }}")
    back = gguf.tokenizer(tmp_path / "m.gguf")
    assert back.vocab_size == 320 and (back.bos, back.eos) == (live.bos, live.eos) and back.specials == live.specials
    for text in (TEXT, vocabulary.PROBE, "", " ", "a<eos>b"):
        assert np.array_equal(back.encode(text), live.encode(text))
        assert back.decode(back.encode(text)) == live.decode(live.encode(text))
    assert gguf.chat_template(tmp_path / "m.gguf") == "{{ messages }}" and gguf.opening(tmp_path / "m.gguf") == []
    reader = theirs.GGUFReader(tmp_path / "m.gguf")
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320
    expected = {"llama3": "llama-bpe", "gpt2": "gpt-2", "sentencepiece": "default"}[name]
    assert reader.fields["tokenizer.ggml.pre"].contents() == expected


def test_a_file_without_a_vocabulary(whole):
    with pytest.raises(ValueError, match="has no vocabulary"):
        gguf.tokenizer(whole)
    assert gguf.chat_template(whole) is None


def test_tokenizers_that_do_not_fit(tokenizers, params, tmp_path):
    small = models.build("llama", **{**SHAPE, "vocab": 300}, scaling=None)
    with pytest.raises(ValueError, match="the tokenizer has 320 tokens, the model 300"):
        gguf.save(tmp_path / "x.gguf", small, check_gguf.random_weights(small), tokenizer=tokenizers["llama3"])
    with pytest.raises(ValueError, match="a bytes tokenizer has no form in GGUF"):
        gguf.save(tmp_path / "x.gguf", MODELS["llama"], params["llama"], tokenizer=Bytes().build())
    with pytest.raises(ValueError, match="a unigram SentencePiece model has no form"):
        vocabulary.metadata(SentencePiece(vocab_size=320).build(texts), 320)
    with pytest.raises(ValueError, match="splits text by 'falcon'"):
        vocabulary.tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "falcon"})
    with pytest.raises(ValueError, match="kind 'bert'"):
        vocabulary.tokenizer({"tokenizer.ggml.model": "bert"})
