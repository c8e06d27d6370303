"""The NumPy twins: their gradients against finite differences, their values against torch, Hugging Face and minllm's own layers."""

import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minllm.course.numpy import gpt, layers, position, transformer
from minllm.course.numpy.attention import attention, causal, multi_head, multi_head_init
from minllm.course.numpy.gpt import GPT
from minllm.course.numpy.layers import tree_map
from minllm.course.numpy.transformer import Transformer
from minllm.layer import Context
from minllm.layers.attention import Attention
from minllm.layers.mlp import MLP, gelu_tanh, relu
from minllm.layers.norm import LayerNorm
from minllm.layers.position import Rope
from minllm.layers.residual import PostNorm, PreNorm
from minllm.layers.stack import Stack
from minllm.models.transformer import Decoder
from minllm.weights import Stacked
from minllm_kernels.mask import Full

rng = np.random.default_rng(0)
POSITIONS = ["learned", "sinusoidal", "rotary", "alibi"]


def leaves(tree, path=""):
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def shaken(p, size=0.3):
    """Zero biases and gains of one hide mistakes."""
    own = np.random.default_rng(1)
    return tree_map(lambda a: a + size * own.normal(size=a.shape), p)


def check_gradient(f, p, grads, bar=1e-6):
    """Along a random direction in each leaf, the slope of f is the product with its gradient: to 1e-6 of the gradient's length (the
    inventory's bar); central differences in float64 leave 1e-9."""
    own, h = np.random.default_rng(2), 1e-5
    found = dict(leaves(grads))
    assert found.keys() == dict(leaves(p)).keys()
    for path, a in leaves(p):
        direction = own.normal(size=a.shape)
        direction /= np.linalg.norm(direction)
        kept = a.copy()
        sides = []
        for sign in (1, -1):
            a[...] = kept + sign * h * direction
            sides.append(f(p))
        a[...] = kept
        slope = (sides[0] - sides[1]) / (2 * h)
        assert found[path].shape == a.shape
        assert abs(slope - (found[path] * direction).sum()) <= bar * max(np.linalg.norm(found[path]), 1e-3), path


# --- gradients --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_gpt_gradient(positions):
    model = GPT(vocab=11, context=7, D=8, layers=2, heads=2, positions=positions)
    p, rows = shaken(model.init()), rng.integers(0, 11, (3, 7))
    check_gradient(lambda p: model.loss(p, rows)[0], p, model.loss(p, rows)[1])


def test_transformer_gradient():
    model = Transformer(vocab=9, D=8, layers=2, heads=2, hidden=12)
    p, source, target = shaken(model.init(), 0.1), rng.integers(1, 9, (3, 5)), rng.integers(1, 9, (3, 4))
    check_gradient(lambda p: model.loss(p, source, target)[0], p, model.loss(p, source, target)[1])


@pytest.mark.parametrize("name", ["relu", "gelu", "layer_norm", "rotary_halves", "rotary_neighbours", "cross_entropy"])
def test_gradient_by_the_input(name):
    x, dy, ids = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(2, 3, 4, 6)), rng.integers(0, 6, (2, 3, 4))
    gains, weight = shaken(layers.layer_norm_init(6)), rng.random((2, 3, 4))
    if name == "cross_entropy":
        loss = lambda x: layers.cross_entropy(x, ids, 0.1, weight)[0]
        dx = layers.cross_entropy(x, ids, 0.1, weight)[1]
    else:
        f = {"relu": layers.relu, "gelu": layers.gelu, "layer_norm": lambda x: layers.layer_norm(gains, x),
             "rotary_halves": lambda x: position.rotary(x, np.arange(4)),
             "rotary_neighbours": lambda x: position.rotary(x, np.arange(4), pairs="neighbours")}[name]  # fmt: skip
        loss = lambda x: (f(x)[0] * dy).sum()
        dx = f(x)[1](dy)
        dx = dx[0] if isinstance(dx, tuple) else dx
    check_gradient(lambda p: loss(p["x"]), {"x": x.copy()}, {"x": dx})


# --- torch and Hugging Face -------------------------------------------------------------------------------------------------------


def tensor(a):
    return torch.tensor(np.asarray(a), dtype=torch.float64)


def test_multi_head_is_torchs():
    D, heads = 12, 3
    p, x, memory = shaken(multi_head_init(rng, D)), rng.normal(size=(2, 5, D)), rng.normal(size=(2, 7, D))
    theirs = torch.nn.MultiheadAttention(D, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(tensor(np.concatenate([p[w]["w"].T for w in "qkv"])))
        theirs.in_proj_bias.copy_(tensor(np.concatenate([p[w]["b"] for w in "qkv"])))
        theirs.out_proj.weight.copy_(tensor(p["o"]["w"].T))
        theirs.out_proj.bias.copy_(tensor(p["o"]["b"]))
    y, back = multi_head(p, x, memory, heads)
    a, m, dy = tensor(x).requires_grad_(), tensor(memory).requires_grad_(), rng.normal(size=y.shape)
    out = theirs(a, m, m)[0]
    assert np.abs(y - out.detach().numpy()).max() < 1e-14
    out.backward(tensor(dy))
    dx, dmemory, grads = back(dy)
    assert np.abs(dx - a.grad.numpy()).max() < 1e-13
    assert np.abs(dmemory - m.grad.numpy()).max() < 1e-13
    assert np.abs(grads["o"]["w"].T - theirs.out_proj.weight.grad.numpy()).max() < 1e-13


def test_transformer_is_torchs():
    """torch's layers without the norm after the last one, which the paper does not have."""
    model = Transformer(vocab=13, D=12, layers=2, heads=3, hidden=20)
    p, source, target = shaken(model.init(), 0.1), rng.integers(1, 13, (2, 6)), rng.integers(1, 13, (2, 5))
    shape = dict(d_model=12, nhead=3, dim_feedforward=20, dropout=0.0, batch_first=True, norm_first=False, dtype=torch.float64)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(**shape), 2, enable_nested_tensor=False)
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**shape), 2)

    def fill(layer, q):
        mine = [(layer.self_attn, q["self"]), *([(layer.multihead_attn, q["cross"])] if "cross" in q else [])]
        for module, a in mine:
            module.in_proj_weight.copy_(tensor(np.concatenate([a["inner"][w]["w"].T for w in "qkv"])))
            module.in_proj_bias.copy_(tensor(np.concatenate([a["inner"][w]["b"] for w in "qkv"])))
            module.out_proj.weight.copy_(tensor(a["inner"]["o"]["w"].T))
            module.out_proj.bias.copy_(tensor(a["inner"]["o"]["b"]))
        for module, a in [(layer.linear1, q["mlp"]["inner"]["up"]), (layer.linear2, q["mlp"]["inner"]["down"])]:
            module.weight.copy_(tensor(a["w"].T))
            module.bias.copy_(tensor(a["b"]))
        for i, a in enumerate(q.values(), 1):
            getattr(layer, f"norm{i}").weight.copy_(tensor(a["norm"]["scale"]))
            getattr(layer, f"norm{i}").bias.copy_(tensor(a["norm"]["bias"]))

    with torch.no_grad():
        for layer, q in [*zip(encoder.layers, p["encoder"]), *zip(decoder.layers, p["decoder"])]:
            fill(layer, q)
        embed = lambda ids: tensor(p["embed"][ids] * 12**0.5 + position.sinusoidal(ids.shape[1], 12))
        memory = encoder(embed(source))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        theirs = decoder(embed(target), memory, tgt_mask=mask) @ tensor(p["embed"]).T
    ours = model.decode(p, target, model.encode(p, source)[0])[0]
    assert np.abs(ours - theirs.numpy()).max() < 1e-13


@pytest.fixture(scope="module")
def gpt2():
    """A GPT with the weights of Hugging Face's GPT-2, logits, loss and gradients of both."""
    model = GPT(vocab=17, context=9, D=12, layers=2, heads=3)
    p, rows = shaken(model.init(), 0.2), rng.integers(0, 17, (2, 10))
    config = GPT2Config(vocab_size=17, n_positions=9, n_embd=12, n_layer=2, n_head=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                        use_cache=False, attn_implementation="eager")  # fmt: skip
    theirs = GPT2LMHeadModel(config).double()

    def named(p):
        out = {"wte.weight": p["embed"], "wpe.weight": p["positions"], "ln_f.weight": p["norm"]["scale"], "ln_f.bias": p["norm"]["bias"]}
        for i, block in enumerate(p["blocks"]):
            for ours, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
                out |= {f"h.{i}.{name}.weight": block[ours]["scale"], f"h.{i}.{name}.bias": block[ours]["bias"]}
            qkv = [block["attention"][w] for w in "qkv"]
            joint = {key: np.concatenate([q[key] for q in qkv], -1) for key in "wb"}
            parts = {"attn.c_attn": joint, "attn.c_proj": block["attention"]["o"]}
            parts |= {"mlp.c_fc": block["mlp"]["up"], "mlp.c_proj": block["mlp"]["down"]}
            for name, q in parts.items():
                out |= {f"h.{i}.{name}.weight": q["w"], f"h.{i}.{name}.bias": q["b"]}
        return out

    theirs.transformer.load_state_dict({name: tensor(a) for name, a in named(p).items()}, strict=True)
    return model, p, rows, theirs, named


def test_gpt_is_gpt2(gpt2):
    model, p, rows, theirs, named = gpt2
    loss, grads = model.loss(p, rows)
    logits = theirs(torch.tensor(rows[:, :-1])).logits
    assert np.abs(model.apply(p, rows[:, :-1])[0] - logits.detach().numpy()).max() < 1e-12
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(rows[:, 1:]).flatten())
    assert abs(loss - their_loss.item()) < 1e-13
    their_loss.backward()
    for name, a in theirs.transformer.named_parameters():
        assert np.abs(named(grads)[name] - a.grad.numpy()).max() < 1e-12, name


def test_greedy_decoding_is_gpt2s(gpt2):
    model, p, rows, theirs, _ = gpt2
    out = theirs.generate(torch.tensor(rows[:1, :4]), max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None)
    assert model.generate(p, rows[0, :4].tolist(), 5) == out[0, 4:].tolist()


# --- positions --------------------------------------------------------------------------------------------------------------------


def test_sinusoids_shift_by_a_rotation():
    """PE(p + s) is the same linear map of PE(p) at every p: a rotation by s of each pair."""
    D, s = 10, 7
    table = position.sinusoidal(40, D)
    angle = s / 10_000 ** (np.arange(0, D, 2) / D)
    sin, cos = table[:33, ::2], table[:33, 1::2]
    assert np.abs(table[s:, ::2] - (sin * np.cos(angle) + cos * np.sin(angle))).max() < 1e-13
    assert np.abs(table[s:, 1::2] - (cos * np.cos(angle) - sin * np.sin(angle))).max() < 1e-13


def test_rotary_layouts():
    """Hugging Face's rotation is ours of halves, and of neighbours after the permutation; scores depend on the distance alone."""
    x, at = rng.normal(size=(1, 2, 9, 8)), np.arange(9)
    angle = np.concatenate([at[:, None] * 10_000.0 ** -(np.arange(0, 8, 2) / 8)] * 2, -1)[None]
    theirs, _ = apply_rotary_pos_emb(tensor(x), tensor(x), tensor(np.cos(angle)), tensor(np.sin(angle)))
    assert np.abs(position.rotary(x, at)[0] - theirs.numpy()).max() < 1e-14
    order = position.halves_of_neighbours(8)
    neighbours = position.rotary(x, at, pairs="neighbours")[0]
    assert np.array_equal(neighbours[..., order], position.rotary(x[..., order], at)[0])
    q, k = (np.broadcast_to(v, (1, 1, 9, 8)) for v in rng.normal(size=(2, 8)))
    scores = (position.rotary(q, at)[0] @ position.rotary(k, at)[0].swapaxes(-1, -2))[0, 0]
    assert max(np.ptp(np.diagonal(scores, d)) for d in range(-8, 9)) < 1e-13


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 25])
def test_alibi_slopes_are_blooms(heads):
    assert BloomConfig(n_head=heads).n_head == heads
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert np.abs(position.alibi_slopes(heads) - theirs.numpy()).max() < 1e-7  # theirs are float32


# --- minllm's layers --------------------------------------------------------------------------------------------------------------


def ours_of(block, heads):
    """minllm's parameters of a block: attention (bias on all four) and MLP."""
    attend, feed = block["attention"], block["mlp"]
    D = attend["q"]["w"].shape[0]
    p = {w: attend[w]["w"].reshape(D, heads, -1) for w in "qkv"} | {f"{w}_bias": attend[w]["b"].reshape(heads, -1) for w in "qkv"}
    p |= {"o": attend["o"]["w"].reshape(heads, -1, D), "o_bias": attend["o"]["b"]}
    return p, {"up": feed["up"]["w"], "up_bias": feed["up"]["b"], "down": feed["down"]["w"], "down_bias": feed["down"]["b"]}


@pytest.mark.parametrize("wide, bar", [(False, 1e-6), (True, 1e-10)], ids=["float32", "x64"])
def test_minllm_is_the_twin(wide, bar):
    """A whole model, forward and backward: without positions, whose table minllm's Decoder lacks. Relative to the largest value."""
    model = GPT(vocab=17, context=9, D=16, layers=2, heads=4)
    p, rows = shaken(model.init(), 0.2), rng.integers(0, 17, (2, 10))
    p["positions"] *= 0
    attend, feed = Attention(4, 4, 4, bias=True, out_bias=True), MLP(64, gelu_tanh, bias=True)
    block = tuple(PreNorm(layer, LayerNorm()) for layer in (attend, feed))
    ours = Decoder(17, 16, (Stack(block, 2),), norm=LayerNorm(), tied=True)

    def tree(p):
        parts = [ours_of(b, 4) for b in p["blocks"]]
        norms = [(b["attention_norm"], b["mlp_norm"]) for b in p["blocks"]]
        stacked = lambda *trees: tree_map(lambda *a: np.stack(a), *trees)
        pattern = tuple({"norm": stacked(*(n[i] for n in norms)), "inner": stacked(*(q[i] for q in parts))} for i in (0, 1))
        return {"embed": p["embed"], "trunk": (Stacked(pattern),), "norm": p["norm"]}

    def loss(q):
        logits = ours.apply(q, jnp.asarray(rows[:, :-1], jnp.int32), Context()).x
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], -1).mean(), logits

    with jax.enable_x64(wide):
        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(jax.tree.map(jnp.asarray if wide else jnp.float32, tree(p)))
        logits, grads = jax.tree.map(np.asarray, (logits, grads))
    theirs, their_grads = model.loss(p, rows)
    their_logits = model.apply(p, rows[:, :-1])[0]
    assert logits.dtype == (np.float64 if wide else np.float32)
    assert abs(float(value) - theirs) <= bar
    assert np.abs(logits - their_logits).max() <= bar * np.abs(their_logits).max()
    pairs = list(zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(tree(their_grads)), strict=True))
    # the keys' bias moves no score against another: its gradient is zero, and what is left is rounding of the others
    floor = 0.02 * max(np.linalg.norm(b) for _, b in pairs)
    for (path, a), b in pairs:
        assert np.linalg.norm(a - b) <= bar * max(np.linalg.norm(b), floor), path


def test_minllms_post_norm_is_the_twins_encoder():
    model = Transformer(vocab=13, D=16, layers=1, heads=4, hidden=24)
    p, source = shaken(model.init(), 0.1), rng.integers(1, 13, (2, 6))
    layer = p["encoder"][0]
    attend, feed = ours_of({"attention": layer["self"]["inner"], "mlp": layer["mlp"]["inner"]}, 4)
    inner = Attention(4, 4, 4, mask=Full(), bias=True, out_bias=True), MLP(24, relu, bias=True)
    block = [PostNorm(layer, LayerNorm()) for layer in inner]
    x = jnp.asarray(p["embed"][source] * 4 + position.sinusoidal(6, 16), jnp.float32)
    ctx = Context(positions=jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6)))
    for f, q in zip(block, ({"norm": layer["self"]["norm"], "inner": attend}, {"norm": layer["mlp"]["norm"], "inner": feed})):
        x = f.apply(jax.tree.map(jnp.float32, q), x, ctx).x
    assert np.abs(np.asarray(x) - model.encode(p, source)[0]).max() < 5e-6


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_minllms_rope_is_the_twins(pairs):
    x = rng.normal(size=(2, 3, 50, 8))
    ours = Rope(pairs=pairs).apply(jnp.asarray(x.swapaxes(1, 2), jnp.float32), jnp.broadcast_to(jnp.arange(50, dtype=jnp.int32), (2, 50)))
    assert np.abs(np.asarray(ours).swapaxes(1, 2) - position.rotary(x, np.arange(50), pairs=pairs)[0]).max() < 5e-6


def test_a_masked_key_changes_nothing():
    q, k, v = rng.normal(size=(3, 1, 2, 5, 4))
    y, back = attention(q, k, v, causal(5))
    k[:, :, 3:], v[:, :, 3:] = 1e3, 1e6
    again = attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], causal(3))[0]
    assert np.array_equal(y[:, :, :3], again)
    dq, dk, dv = back(np.concatenate([np.ones((1, 2, 3, 4)), np.zeros((1, 2, 2, 4))], 2))
    assert not dk[:, :, 3:].any() and not dv[:, :, 3:].any()


# --- demos ------------------------------------------------------------------------------------------------------------------------


def test_gpt_learns_more_than_frequencies():
    """A04: a loss below the unigram entropy, in seconds."""
    text = np.frombuffer(b"the cat saw the dog and the dog saw the cat and it ran and the cat ran " * 4, np.uint8)
    ids = np.unique(text, return_inverse=True)[1]
    model, adam = GPT(vocab=int(ids.max()) + 1, context=16, D=32, layers=1), gpt.Adam()
    p = model.init()
    state, own = adam.init(p), np.random.default_rng(0)
    for _ in range(60):
        loss, grads = model.loss(p, gpt.batch(ids, 8, 16, own))
        p, state = adam.update(p, grads, state, 1e-2)
    assert loss < 0.5 * gpt.unigram_entropy(ids)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_transformer_writes_backwards():
    """A02: 99 % of the tokens of rows that it has not seen."""
    assert transformer.main([]) >= 0.99


@pytest.mark.parametrize("module, arguments, says", [
    ("attention", [], "   ran"), ("position", [], "ALiBi with 4 heads"), ("gpt", ["--steps", "2", "--write", "5"], "goes on:"),
    ("transformer", ["--steps", "2", "--length", "3"], "right tokens"),
])  # fmt: skip
def test_each_file_runs(module, arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, f"minllm.course.numpy.{module}")  # runpy warns of a second copy
    runpy.run_module(f"minllm.course.numpy.{module}", run_name="__main__")
    assert says in capsys.readouterr().out


def test_a_row_longer_than_the_context_is_refused():
    model = GPT(vocab=5, context=4, D=8, layers=1, heads=2)
    with pytest.raises(ValueError, match="5 tokens, the context is 4"):
        model.apply(model.init(), np.zeros((1, 5), int))
