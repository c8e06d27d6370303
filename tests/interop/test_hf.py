"""Hugging Face folders: what is read is what was written, wherever it is read to; what cannot be honoured is refused in one sentence, and
a refused or interrupted save leaves nothing. Parity with `transformers` is in tests/models/test_parity.py."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from minllm import models, pretrained, spec
from minllm.data.tokenizer import BPE, Bytes
from minllm.interop import hf
from minllm.interop import safetensors as ours
from minllm.interop.table import flat, parse, tensors
from minllm.layer import Execution
from minllm.layers.position import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from minllm.lora import LoRA
from minllm.models.family import difference, read_scaling, write_scaling
from minllm.sharding import make_mesh
from minllm.weights import unstack

MODEL = models.build("llama", D=32, layers=3, heads=4, kv_heads=2, hidden=48, vocab=300, scaling=None)
WINDOWED = models.build("mistral", D=32, layers=3, heads=4, kv_heads=2, hidden=48, vocab=300, window=8)


@pytest.fixture(scope="module")
def params():
    return spec.init(MODEL.params(), jax.random.key(0))


@pytest.fixture(scope="module")
def whole(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf.save(folder, MODEL, params)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x.dtype == y.dtype and bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not ...}))


def weights(folder, change):
    """The file's tensors, changed and written again by the safetensors package."""
    arrays = safetensors.numpy.load_file(folder / ours.SINGLE)
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / ours.SINGLE)


# --- reading and writing ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(whole, params):
    model, again = hf.load(whole)
    assert difference(model, MODEL) == ""
    same(again, params)


def test_the_safetensors_package_reads_and_writes_the_same(folder, params):
    weights(folder, lambda arrays: None)
    same(hf.load(folder)[1], params)


def test_on_a_mesh(whole, params):
    """Each device is given its part alone: every leaf is where the rules say, with the same values."""
    run = Execution(mesh=make_mesh(jax.devices()[:8], fsdp=2, tensor=4))
    _, loaded = hf.load(whole, run)
    same(jax.device_get(loaded), jax.device_get(params))
    q = loaded["trunk"][0].pattern[0]["inner"]["q"]
    assert q.addressable_shards[0].data.shape == (3, 16, 1, 8)
    assert jax.tree.all(jax.tree.map(lambda a: len(a.addressable_shards) == 8, loaded))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, params, tmp_path):
    low = jax.tree.map(lambda a: a.astype(dtype), params)
    hf.save(tmp_path / "low", MODEL, low)
    assert json.loads((tmp_path / "low/config.json").read_text())["torch_dtype"] == dtype
    same(hf.load(tmp_path / "low")[1], low)
    same(hf.load(tmp_path / "low", dtype="float32")[1], jax.tree.map(lambda a: a.astype("float32"), low))


def test_shards_and_their_index(params, tmp_path):
    hf.save(tmp_path / "shards", MODEL, params, shard=20_000)
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    same(hf.load(tmp_path / "shards")[1], params)


def test_weights_in_runs_and_low_rank_factors(params, whole, tmp_path):
    """Unstacked weights are the same model; a low-rank factor is added to its weight."""
    hf.save(tmp_path / "runs", MODEL, unstack(params))
    assert (tmp_path / "runs" / ours.SINGLE).read_bytes() == (whole / ours.SINGLE).read_bytes()
    adapted = LoRA().wrap(MODEL.params(), params, jax.random.key(1))
    hf.save(tmp_path / "lora", MODEL, adapted)
    same(hf.load(tmp_path / "lora")[1], params)  # the factor b starts at zero


def test_a_head_that_is_written_though_it_is_tied(folder):
    config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight in .* is not model.embed_tokens.weight, though config.json ties them"):
        hf.load(folder)
    weights(folder, lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"]}))
    model, params = hf.load(folder)
    assert model.tied and "head" not in params


def test_old_buffers_are_passed_over(folder, params):
    weights(folder, lambda arrays: arrays.update({"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    same(hf.load(folder)[1], params)


def test_files_of_the_bare_trunk(folder, params):
    def bare(arrays):
        for name in list(arrays):
            arrays[name.removeprefix("model.")] = arrays.pop(name)

    weights(folder, bare)
    same(hf.load(folder)[1], params)


# --- patterns ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, ours_, theirs", [
    ("(n h) d -> d n h", [(6, 2, 3)], (6, 6)),
    ("d (n h + k h + k h) -> d n h, d k h, d k h", [(5, 4, 2), (5, 1, 2), (5, 1, 2)], (5, 12)),
    ("(k (h + h + r v)) d -> d k h, d k h, d (k r) v", [(5, 2, 3), (5, 2, 3), (5, 4, 7)], (40, 5)),
    ("e d (f (1 + 1)) -> e d f, e d f", [(2, 3, 4), (2, 3, 4)], (2, 3, 8)),
    ("(n 2 p) d -> d n (p 2)", [(5, 2, 6)], (12, 5)),
    ("c 1 w -> w c", [(4, 6)], (6, 1, 4)),
])  # fmt: skip
def test_patterns(pattern, ours_, theirs):
    """Shapes follow from ours; apart and together again is the same tensor."""
    known = parse(pattern)
    assert known.shape(tuple(ours_)) == theirs
    tensor = np.random.default_rng(0).normal(size=theirs)
    parts = known.split(tensor, tuple(ours_))
    assert [part.shape for part in parts] == ours_
    np.testing.assert_array_equal(known.join(parts), tensor)


def test_patterns_by_hand():
    """Sums lie side by side, or inside a dim; digits turn pairs round."""
    x = np.arange(24).reshape(2, 12)
    q, k = parse("d (n h + k h) -> d n h, d k h").split(x, ((2, 2, 4), (2, 1, 4)))
    np.testing.assert_array_equal(q[0], [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(k[1], [[20, 21, 22, 23]])
    gate, up = parse("d (f (1 + 1)) -> d f, d f").split(x, ((2, 6), (2, 6)))
    np.testing.assert_array_equal(gate[0], [0, 2, 4, 6, 8, 10])
    np.testing.assert_array_equal(up[0], [1, 3, 5, 7, 9, 11])
    np.testing.assert_array_equal(parse("d (p 2) -> d (2 p)").split(x, ((2, 12),))[0][0], [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_preset_is_expressed(name):
    """Each published shape goes into a config.json and comes back, and the table covers each parameter once; nothing is allocated."""
    family = models.family(name)
    for preset in family.presets:
        model = models.build(name, preset)
        assert difference(family.model(family.config(model)), model) == ""
    model = models.build(name, next(iter(family.presets)), layers=7)  # past every period
    covered = tensors(model, family.rows(model))
    assert sum(int(np.prod(tensor.shape)) for tensor in covered) == spec.count(model.params())
    assert {target.path for tensor in covered for target in tensor.targets} == set(flat(model.params()))


@pytest.mark.parametrize("scaling", [
    None, LinearScaling(4.0), DynamicNTKScaling(2.0, 128), Llama3Scaling(original=128), YarnScaling(4.0, 128),
    YarnScaling(4.0, 128, 16.0, 2.0, 1.25, False), LongRopeScaling((1.0, 2.0), (3.0, 4.0), 4.0, 128, 1.5),
])  # fmt: skip
def test_scalings_go_there_and_back(scaling):
    assert read_scaling(write_scaling(scaling) or {}, {"max_position_embeddings": 128}) == scaling


# --- what is refused ------------------------------------------------------------------------------------------------------------------


def drop(name):
    return lambda folder: weights(folder, lambda arrays: arrays.pop(name))


def cut(folder):
    file = folder / ours.SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def unindexed(folder):
    """An index that lacks a tensor of its file."""
    names = list(safetensors.numpy.load_file(folder / ours.SINGLE))
    (folder / ours.SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names[1:], "model-00001-of-00001.safetensors")}
    (folder / ours.INDEX).write_text(json.dumps(index))


def stale_index(folder):
    (folder / ours.INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED = {
    "truncated": (cut, r"model.safetensors is truncated: it has \d+ bytes, its header promises \d+"),
    "no header": (lambda f: (f / ours.SINGLE).write_bytes(b"x" * 50), "is no safetensors file"),
    "missing tensor": (drop(Q), rf"lacks {Q}, of the tensors that its config.json \(llama\) asks for"),
    "extra tensor": (lambda f: weights(f, lambda a: a.update({"model.layers.1.self_attn.q_proj.bias": np.ones(32, np.float32)})),
                     r"holds model.layers.1.self_attn.q_proj.bias, for which its config.json \(llama\) has no place"),
    "missing layers": (lambda f: config(f, num_hidden_layers=4), r"lacks model.layers.3.input_layernorm.weight, .* and 4 more"),
    "wrong shape": (lambda f: config(f, intermediate_size=64), r"has shape \(48, 32\); by config.json it has \(64, 32\)"),
    "integers": (lambda f: weights(f, lambda a: a.update({Q: a[Q].astype(np.int32)})), rf"{Q} in .* has dtype int32; .*dequantize"),
    "index lacks a tensor": (unindexed, r"model-00001-of-00001.safetensors holds .*, which model.safetensors.index.json does not list"),
    "index names no file": (stale_index, "names model-00001-of-00002.safetensors, which is not there"),
    "no weights": (lambda f: (f / ours.SINGLE).unlink(), "has neither model.safetensors nor model.safetensors.index.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is not there"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "model_type": (lambda f: config(f, model_type="lama"), "has model_type 'lama'; known are llama, mistral"),
    "unknown field": (lambda f: config(f, head_dims=8), r"not known for model_type 'llama': head_dims = 8 \(did you mean head_dim\?\)"),
    "quantized": (lambda f: config(f, quantization_config={"bits": 4}), "quantization_config = {'bits': 4}"),
    "unsupported value": (lambda f: config(f, attention_bias=True), "attention_bias is True; only False is supported"),
    "unsupported activation": (lambda f: config(f, hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is supported"),
    "missing field": (lambda f: config(f, hidden_size=...), "it has no hidden_size"),
    "RoPE type": (lambda f: config(f, rope_scaling={"rope_type": "magic"}), "RoPE scaling of type 'magic' is not supported; known are"),
    "RoPE key": (lambda f: config(f, rope_scaling={"rope_type": "linear", "factor": 2.0, "ramp": 3}),
                 "RoPE scaling of type 'linear' has unknown keys: ramp=3"),
    "RoPE factor": (lambda f: config(f, rope_scaling={"rope_type": "linear"}), "RoPE scaling of type 'linear' has no factor"),
    "two RoPEs": (lambda f: config(f, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}),
                  "differ; leave one out"),
    "partial rotary": (lambda f: config(f, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case, folder):
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        hf.load(folder)
    assert "\n" not in str(caught.value)


def test_layers_of_different_dtypes(folder):
    weights(folder, lambda arrays: arrays.update({Q: arrays[Q].astype(np.float16)}))
    with pytest.raises(ValueError, match=r"layers of model.layers.\{i\}.self_attn.q_proj.weight have different dtypes .*ask for one"):
        hf.load(folder)
    assert hf.load(folder, dtype=jnp.bfloat16)[1]["trunk"][0].pattern[0]["inner"]["q"].dtype == jnp.bfloat16


def test_saves_that_are_refused_write_nothing(params, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        hf.save(tmp_path / "full", MODEL, params)
    odd = models.build("llama", D=32, layers=1, heads=4, kv_heads=2, hidden=48, vocab=300, window=8)
    with pytest.raises(ValueError, match=r"the model is no llama: trunk/0/pattern/0/inner/window is None there and 8 here"):
        hf.save(tmp_path / "odd", odd, spec.init(odd.params(), jax.random.key(0)), family="llama")
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens, the model only 97"):
        small = models.build("llama", D=32, layers=1, heads=4, kv_heads=2, hidden=48, vocab=97)
        hf.save(tmp_path / "small", small, spec.init(small.params(), jax.random.key(0)), Bytes().build())
    with pytest.raises(ValueError, match="a tokenizer of kind 'bytes' has no file that Hugging Face reads"):
        hf.save(tmp_path / "bytes", MODEL, params, Bytes().build())
    assert [file.name for file in tmp_path.iterdir()] == ["full"] and [file.name for file in (tmp_path / "full").iterdir()] == ["note"]


def test_an_interrupted_save_leaves_nothing(params, tmp_path):
    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "model", MODEL, params, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_family_is_found(tmp_path):
    hf.save(tmp_path / "model", WINDOWED, spec.init(WINDOWED.params(), jax.random.key(0)))
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "mistral"
    assert difference(hf.load(tmp_path / "model")[0], WINDOWED) == ""


# --- with a tokenizer -----------------------------------------------------------------------------------------------------------------


def test_a_folder_with_its_tokenizer(params, tmp_path):
    """The tokenizer goes along, transformers reads it, and one with more tokens than the model is refused."""
    from transformers import AutoTokenizer

    text = "the rain in Spain stays mainly in the plain, said the other one. " * 40
    tokenizer = BPE(vocab_size=280).build(texts=lambda limit: [text])
    hf.save(tmp_path / "model", MODEL, params, tokenizer)
    loaded = pretrained.load(tmp_path / "model")
    same(loaded.params, params)
    assert (
        loaded.tokenizer.encode(text).tolist()
        == tokenizer.encode(text).tolist()
        == AutoTokenizer.from_pretrained(tmp_path / "model").encode(text)
    )
    assert (loaded.tokenizer.bos, loaded.tokenizer.eos) == (tokenizer.bos, tokenizer.eos)
    assert json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"] == tokenizer.eos
    large = BPE(vocab_size=305).build(texts=lambda limit: [text + "peter piper picked a peck of pickled peppers " * 40])
    large.save(tmp_path / "other")
    shutil.copy(tmp_path / "other/tokenizer.json", tmp_path / "model/tokenizer.json")
    with pytest.raises(ValueError, match="the tokenizer has 305 tokens, the model only 300: they do not belong together"):
        pretrained.load(tmp_path / "model")


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"is no model: give a Hugging Face folder \(with config.json\), a run folder"):
        pretrained.load(tmp_path)


# --- the command line -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch):
    """scripts/convert.py as a function of its arguments."""
    found = importlib.util.spec_from_file_location("convert", Path(__file__).parents[2] / "scripts/convert.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        return module.main()

    return run


def test_convert(convert, folder, params, tmp_path, capsys):
    """A folder goes over in another dtype with what lies beside it and with its lengths; what is wrong is one line and exit status 1."""
    config(folder, max_position_embeddings=777)
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    assert convert(folder, tmp_path / "low", "--dtype", "bfloat16") == 0
    same(hf.load(tmp_path / "low")[1], jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    assert (tmp_path / "low/generation_config.json").read_text() == '{"top_k": 3}'
    written = json.loads((tmp_path / "low/config.json").read_text())
    assert (written["max_position_embeddings"], written["torch_dtype"]) == (777, "bfloat16")
    capsys.readouterr()
    assert convert(folder, tmp_path / "low") == 1
    assert "is there already" in capsys.readouterr().err
    assert convert(tmp_path / "none", tmp_path / "other") == 1
    assert "is no model" in capsys.readouterr().err and not (tmp_path / "other").exists()
