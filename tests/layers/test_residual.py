"""Where the norm goes: each block against its formula, and against torch's and Hugging Face's layers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GPTNeoXConfig, Olmo2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2RotaryEmbedding

from minllm import spec
from minllm.layer import Context, Layer, Out
from minllm.layers.attention import Attention
from minllm.layers.mlp import GLU, MLP, gelu, gelu_tanh, relu, silu
from minllm.layers.norm import LayerNorm, RMSNorm, rms_norm
from minllm.layers.position import Rope
from minllm.layers.residual import DeepNorm, Parallel, PostNorm, PreNorm, ReorderedNorm, SandwichNorm
from minllm.spec import FanIn, Spec

B, T, D = 2, 11, 32
X = jax.random.normal(jax.random.key(0), (B, T, D))
POSITIONS = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))


@dataclass(frozen=True)
class Probe(Layer):
    """A matrix, and everything else that a layer may give."""

    name: str = "probe"

    def params(self, D):
        return {"w": Spec((D, D), "embed -> mlp", FanIn())}

    def cache(self, D, B, S, dtype):
        return {"seen": Spec((B, S, D), "batch kv_seq _", dtype=dtype)}

    def apply(self, p, x, ctx, cache=None):
        noise = 0 if ctx.key is None else jax.random.normal(ctx.key, x.shape)
        y = x @ p["w"] + noise
        return Out(y, cache and {"seen": cache["seen"] + 1}, {self.name: ((x**2).sum(), jnp.float32(x.size))}, {"size": jnp.abs(y).mean()})

    def update(self, p, stats):
        return {"w": p["w"] * stats["size"]}


N = lambda x, g: rms_norm(x, g["scale"])
FORMULAS = {
    "pre": (PreNorm(Probe()), lambda x, p: x + N(x, p["norm"]) @ p["inner"]["w"]),
    "post": (PostNorm(Probe()), lambda x, p: N(x + x @ p["inner"]["w"], p["norm"])),
    "deep": (DeepNorm(Probe(), alpha=2.0), lambda x, p: N(2 * x + x @ p["inner"]["w"], p["norm"])),
    "reordered": (ReorderedNorm(Probe()), lambda x, p: x + N(x @ p["inner"]["w"], p["norm"])),
    "sandwich": (SandwichNorm(Probe()), lambda x, p: x + N(N(x, p["norm"]) @ p["inner"]["w"], p["outer_norm"])),
    "parallel": (Parallel((Probe("a"), Probe("b"))), lambda x, p: x + N(x, p["norm"]) @ (p["inner"][0]["w"] + p["inner"][1]["w"])),
    "parallel_own": (Parallel((Probe("a"), Probe("b")), shared=False),
                     lambda x, p: x + sum(N(x, p["norm"][i]) @ p["inner"][i]["w"] for i in (0, 1))),
}  # fmt: skip


def random_params(layer):
    """Gains away from 1, so that a norm in the wrong place is seen."""
    p = spec.init(layer.params(D), jax.random.key(1))
    wiggle = lambda path, a: a * jax.random.uniform(jax.random.key(a.size), a.shape, minval=0.5, maxval=2.0) if a.ndim == 1 else a
    return jax.tree_util.tree_map_with_path(wiggle, p)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    layer, formula = FORMULAS[name]
    p = random_params(layer)
    out = layer.apply(p, X, Context(positions=POSITIONS))
    assert jnp.abs(out.x - formula(X, p)).max() <= 1e-5  # float32, values of size one
    alike = lambda other: jax.tree.structure(other.params(D)) == jax.tree.structure(layer.params(D))
    for other, wrong in FORMULAS.values():  # no two places are the same
        assert other is layer or not alike(other) or jnp.abs(out.x - wrong(X, p)).max() > 0.1


@pytest.mark.parametrize("name", FORMULAS)
def test_caches_losses_stats_and_updates_pass_through(name):
    layer, _ = FORMULAS[name]
    p, parallel = random_params(layer), isinstance(layer, Parallel)
    cache = spec.init(layer.cache(D, B, 5, jnp.float32), jax.random.key(0))
    out = layer.apply(p, X, Context(positions=POSITIONS), cache)
    assert jax.tree.structure(out.cache) == jax.tree.structure(cache) and all((a == 1).all() for a in jax.tree.leaves(out.cache))
    assert set(out.losses) == ({"a", "b"} if parallel else {"probe"})
    updated = layer.update(p, out.stats)
    each = (p["inner"], updated["inner"], out.stats) if parallel else ([p["inner"]], [updated["inner"]], [out.stats])
    for old, new, stats in zip(*each, strict=True):
        assert (new["w"] == old["w"] * stats["size"]).all()
    assert layer.apply(p, X, Context(positions=POSITIONS)).cache is None


def test_parallel_losses_of_one_name_add_up():
    layer = Parallel((Probe("a"), Probe("a")))
    p = random_params(layer)
    total, weight = layer.apply(p, X, Context()).losses["a"]
    assert weight == 2 * X.size and total == pytest.approx(2 * float((N(X, p["norm"]) ** 2).sum()), rel=1e-6)


def test_parallel_branches_draw_apart():
    layer = Parallel((Probe("a"), Probe("b")))
    p = random_params(layer)
    noise = layer.apply(p, X, Context(key=jax.random.key(3))).x - layer.apply(p, X, Context()).x
    assert float(noise.std()) == pytest.approx(2**0.5, rel=0.1)  # 2 if both branches had the same noise


def torch_view(w, heads):
    """torch.nn.TransformerEncoderLayer's parameters as ours."""
    attention = {"o": w["self_attn.out_proj.weight"].T.reshape(heads, -1, D), "o_bias": w["self_attn.out_proj.bias"]}
    for i, n in enumerate("qkv"):
        attention[n] = w["self_attn.in_proj_weight"][i * D : (i + 1) * D].T.reshape(D, heads, -1)
        attention[f"{n}_bias"] = w["self_attn.in_proj_bias"][i * D : (i + 1) * D].reshape(heads, -1)
    mlp = {"up": w["linear1.weight"].T, "up_bias": w["linear1.bias"], "down": w["linear2.weight"].T, "down_bias": w["linear2.bias"]}
    norm = lambda i: {"scale": w[f"norm{i}.weight"], "bias": w[f"norm{i}.bias"]}
    return {"norm": norm(1), "inner": attention}, {"norm": norm(2), "inner": mlp}


def randomised(module):
    torch.manual_seed(0)
    for n, p in module.named_parameters():
        gain = "norm" in n and n.endswith("weight")
        torch.nn.init.normal_(p, 1.0 if gain else 0.0, 0.3 if gain or p.ndim == 1 else p.shape[-1] ** -0.5)
    return module, {n: p.detach().numpy() for n, p in module.named_parameters()}


def agree(block, views, expected):
    """1e-5: float32, values of size one."""
    x = X
    for layer, p in zip(block, views, strict=True):
        assert jax.tree.map(jnp.shape, p) == jax.tree.map(lambda s: s.shape, layer.params(D), is_leaf=spec.is_spec)
        x = layer.apply(jax.tree.map(jnp.asarray, p), x, Context(positions=POSITIONS)).x
    assert np.abs(np.asarray(x) - expected.detach().numpy()).max() <= 1e-5


@pytest.mark.parametrize("around", [PostNorm, PreNorm])
def test_torchs_encoder_layer(around):
    """Vaswani's (and BERT's) post-norm, and pre-norm."""
    module = torch.nn.TransformerEncoderLayer(D, 4, 48, dropout=0.0, batch_first=True, norm_first=around is PreNorm)
    module, w = randomised(module)
    hidden = torch.triu(torch.ones(T, T, dtype=bool), 1)
    expected = module.train()(torch.tensor(np.asarray(X)), src_mask=hidden)
    block = around(Attention(4, 4, 8, bias=True, out_bias=True), LayerNorm()), around(MLP(48, relu, bias=True), LayerNorm())
    agree(block, torch_view(w, 4), expected)


SHAPE = dict(hidden_size=D, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, attn_implementation="eager")
MASK = torch.triu(torch.full((T, T), -torch.inf), 1)[None, None]


def hf_view(w):
    into = lambda name: w[f"self_attn.{name}.weight"].T.reshape(D, -1, 8)
    attention = {"q": into("q_proj"), "k": into("k_proj"), "v": into("v_proj"), "o": w["self_attn.o_proj.weight"].T.reshape(4, 8, D)}
    if "self_attn.q_norm.weight" in w:
        attention |= {n: {"scale": w[f"self_attn.{n}.weight"]} for n in ("q_norm", "k_norm")}
    return attention, {n: w[f"mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")}


def run_hf(module, rotary, **call):
    x = torch.tensor(np.asarray(X))
    y = module(x, attention_mask=MASK, position_embeddings=rotary(x, torch.arange(T)[None]), **call)
    return y[0] if isinstance(y, tuple) else y


def test_olmo2s_reordered_norm():
    config = Olmo2Config(**SHAPE, num_key_value_heads=2, rms_norm_eps=1e-6)
    module, w = randomised(Olmo2DecoderLayer(config, 0))
    attention, mlp = hf_view(w)
    names = "post_attention_layernorm", "post_feedforward_layernorm"
    views = [{"norm": {"scale": w[f"{n}.weight"]}, "inner": inner} for n, inner in zip(names, (attention, mlp))]
    norm = RMSNorm(1e-6)
    inner = Attention(4, 2, 8, Rope(), qk_norm=norm, qk_norm_flat=True), GLU(48, silu)
    agree([ReorderedNorm(f, norm) for f in inner], views, run_hf(module, Olmo2RotaryEmbedding(config)))


def test_gemma2s_sandwich_norm():
    config = Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    module, w = randomised(Gemma2DecoderLayer(config, 0))
    names = ("input_layernorm", "post_attention_layernorm"), ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    norms = [{"norm": {"scale": w[f"{a}.weight"]}, "outer_norm": {"scale": w[f"{b}.weight"]}} for a, b in names]
    views = [norm | {"inner": inner} for norm, inner in zip(norms, hf_view(w))]
    inner = Attention(4, 2, 8, Rope(), softcap=2.0), GLU(48, gelu_tanh)
    block = [SandwichNorm(f, RMSNorm(1e-6, unit_offset=True)) for f in inner]
    agree(block, views, run_hf(module, Gemma2RotaryEmbedding(config)))


def test_gpt_neoxs_parallel_block():
    """Two norms, partial rotation, biases."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    config = GPTNeoXConfig(**SHAPE, rope_parameters=rope, attention_dropout=0.0, hidden_dropout=0.0)
    module, w = randomised(GPTNeoXLayer(config, 0))
    fused, fused_bias = w["attention.query_key_value.weight"].reshape(4, 3, 8, D), w["attention.query_key_value.bias"].reshape(4, 3, 8)
    attention = {"o": w["attention.dense.weight"].T.reshape(4, 8, D), "o_bias": w["attention.dense.bias"]}
    for i, n in enumerate("qkv"):
        attention |= {n: fused[:, i].transpose(2, 0, 1), f"{n}_bias": fused_bias[:, i]}
    mlp = {"up": w["mlp.dense_h_to_4h.weight"].T, "up_bias": w["mlp.dense_h_to_4h.bias"],
           "down": w["mlp.dense_4h_to_h.weight"].T, "down_bias": w["mlp.dense_4h_to_h.bias"]}  # fmt: skip
    norms = tuple({"scale": w[f"{n}.weight"], "bias": w[f"{n}.bias"]} for n in ("input_layernorm", "post_attention_layernorm"))
    inner = Attention(4, 4, 8, Rope(fraction=0.5), bias=True, out_bias=True), MLP(48, gelu, bias=True)
    view = {"norm": norms, "inner": (attention, mlp)}
    agree([Parallel(inner, LayerNorm(), shared=False)], [view], run_hf(module, GPTNeoXRotaryEmbedding(config)))
