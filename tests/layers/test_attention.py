"""The attention layer against torch and Hugging Face, and what it makes of prefixes, padding and missing positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, MistralConfig, Olmo2Config, Qwen3Config
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen3 import modeling_qwen3

from minllm import spec
from minllm.layer import Context, Execution
from minllm.layers.attention import Attention
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope
from minllm_kernels.mask import Causal, Full, Window

B, T, D = 2, 23, 32
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
POSITIONS = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))


def apply(layer, p, x=X, positions=None, **ctx):
    x = jnp.asarray(x)
    return layer.apply(p, x, Context(positions=POSITIONS[: x.shape[0], : x.shape[1]] if positions is None else positions, **ctx)).x


def compare(layer, module, view, y, t):
    """Values to 1e-5 (float32, inputs of size one) and gradients to 1e-4 in relative L2, the inventory's bars; 1e-5 more for the gradient
    of a key bias, which is zero. view: our tree from the module's named parameters, and linear, so that it maps gradients too."""
    named = dict(module.named_parameters())
    direction = np.random.default_rng(9).standard_normal(X.shape).astype(np.float32)
    dt, *grads = torch.autograd.grad(y, [t, *named.values()], torch.tensor(direction))
    p = jax.tree.map(jnp.asarray, view({n: q.detach().numpy() for n, q in named.items()}))
    assert jax.tree.map(jnp.shape, p) == jax.tree.map(lambda s: s.shape, layer.params(D), is_leaf=spec.is_spec)
    ours, vjp = jax.vjp(jax.jit(partial(apply, layer)), p, jnp.asarray(X))
    dp, dx = vjp(jnp.asarray(direction))
    assert np.abs(np.asarray(ours) - y.detach().numpy()).max() <= 1e-5
    theirs = view({n: g.numpy() for n, g in zip(named, grads)})
    for (path, a), b in zip(jax.tree.leaves_with_path((dx, dp)), jax.tree.leaves((dt.numpy(), theirs)), strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-4 * np.linalg.norm(b) + 1e-5, spec.path_name(path)


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
def test_torchs_multi_head_attention(mask):
    m = torch.nn.MultiheadAttention(D, 4, batch_first=True)
    torch.nn.init.normal_(m.in_proj_bias)
    torch.nn.init.normal_(m.out_proj.bias)
    t = torch.tensor(X, requires_grad=True)
    hidden = torch.triu(torch.ones(T, T, dtype=bool), 1) if mask == Causal() else None
    y, _ = m(t, t, t, attn_mask=hidden, need_weights=False)

    def view(w):
        p = {"o": w["out_proj.weight"].T.reshape(4, 8, D), "o_bias": w["out_proj.bias"]}
        for i, name in enumerate("qkv"):
            p[name] = w["in_proj_weight"][i * D : (i + 1) * D].T.reshape(D, 4, 8)
            p[f"{name}_bias"] = w["in_proj_bias"][i * D : (i + 1) * D].reshape(4, 8)
        return p

    compare(Attention(4, 4, 8, mask=mask, bias=True, out_bias=True), m, view, y, t)


def qkvo(w):
    into = lambda name: w[f"{name}.weight"].T.reshape(D, -1, 16)
    return {"q": into("q_proj"), "k": into("k_proj"), "v": into("v_proj"), "o": w["o_proj.weight"].T.reshape(-1, 16, D)}


def with_norms(w):
    return qkvo(w) | {"q_norm": {"scale": w["q_norm.weight"]}, "k_norm": {"scale": w["k_norm.weight"]}}


LAYER = dict(heads=4, kv_heads=2, head_dim=16, position=Rope())
HUGGING_FACE = {
    "qwen3": (Attention(**LAYER, qk_norm=RMSNorm(1e-6)), modeling_qwen3, "Qwen3", Qwen3Config, {}, with_norms),
    "olmo2": (Attention(**LAYER, qk_norm=RMSNorm(1e-6), qk_norm_flat=True), modeling_olmo2, "Olmo2", Olmo2Config,
              dict(rms_norm_eps=1e-6), with_norms),
    "gemma2": (Attention(**LAYER, softcap=1.5, scale=10**-0.5), modeling_gemma2, "Gemma2", Gemma2Config,
               dict(attn_logit_softcapping=1.5, query_pre_attn_scalar=10), qkvo),
    "mistral": (Attention(**LAYER, window=6), modeling_mistral, "Mistral", MistralConfig, dict(sliding_window=6), qkvo),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_attention(name):
    layer, module, prefix, config, more, view = HUGGING_FACE[name]
    shape = dict(hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=1, attn_implementation="eager")
    config = config(**shape, **more)
    torch.manual_seed(0)
    m = getattr(module, f"{prefix}Attention")(config, 0)
    for n, p in m.named_parameters():  # keys and queries that differ: attention far from uniform
        torch.nn.init.normal_(p, *((1.0, 0.3) if "norm" in n else (0.0, 1.5 * D**-0.5)))
    t = torch.tensor(X, requires_grad=True)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    see = (distance >= 0) & (distance < (layer.window or T))
    where = getattr(module, f"{prefix}RotaryEmbedding")(config)(t, torch.arange(T)[None])
    y, _ = m(t, position_embeddings=where, attention_mask=torch.where(see, 0.0, -torch.inf)[None, None])
    compare(layer, m, view, y, t)


def params(layer, seed=0):
    return spec.init(layer.params(D), jax.random.key(seed))


def test_groups_are_heads_with_shared_keys():
    """n_kv = n_h is MHA, n_kv = 1 is MQA: GQA equals MHA whose key and value weights are repeated. 1e-6: one rounding."""
    for kv_heads in (1, 2, 4):
        layer, full = Attention(4, kv_heads, 8, Rope()), Attention(4, 4, 8, Rope())
        p = params(layer)
        repeated = p | {n: jnp.repeat(p[n], 4 // kv_heads, 1) for n in "kv"}
        assert jnp.abs(apply(layer, p) - apply(full, repeated)).max() <= 1e-6


def test_without_positions_order_does_not_matter():
    """NoPE: with every key in sight a permutation of the tokens permutes the output; with RoPE it does not."""
    order = np.random.default_rng(1).permutation(T)
    for position, equal in ((None, True), (Rope(), False)):
        layer = Attention(4, 2, 8, position, mask=Full())
        p = params(layer)
        difference = jnp.abs(apply(layer, p)[:, order] - apply(layer, p, X[:, order])).max()
        assert (difference <= 1e-6) == equal and (equal or difference > 1e-2)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_prefix_sees_itself_both_ways(kernels):
    """One prefix length a row, against torch with the mask written out (PaliGemma's)."""
    layer, prefix = Attention(4, 4, 8), np.array([[5], [0]])
    p = params(layer)
    ours = apply(layer, p, prefix=jnp.asarray(prefix), run=Execution(kernels=kernels))
    q, k, v = (torch.tensor(np.einsum("btd,dnh->bnth", X, np.asarray(p[w]))) for w in "qkv")
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    see = torch.tensor((s <= t) | (s < prefix[..., None]))  # what follows a prefix sees it anyway
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, see[:, None])
    assert np.abs(np.asarray(ours) - np.einsum("bnth,nhd->btd", o.numpy(), np.asarray(p["o"]))).max() <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [dict(), dict(mask=Full()), dict(window=4)], ids=str)
def test_padding_on_either_side_changes_nothing(kind, side):
    layer, n = Attention(4, 2, 8, Rope(), **kind), 15
    p = params(layer)
    at = jnp.arange(T) - (T - n if side == "left" else 0)
    positions = jnp.where((at >= 0) & (at < n), at, -1)[None].repeat(B, 0)
    here = slice(T - n, T) if side == "left" else slice(0, n)
    ours = apply(layer, p, positions=positions)
    assert jnp.abs(ours[:, here] - apply(layer, p, X[:, here])).max() <= 1e-5
    assert bool(jnp.isfinite(ours).all())


def test_a_window_is_a_mask():
    p = params(Attention(4, 2, 8, Rope()))
    window, mask = Attention(4, 2, 8, Rope(), window=5), Attention(4, 2, 8, Rope(), mask=Causal() & Window(5))
    assert (apply(window, p) == apply(mask, p)).all() and jnp.abs(apply(window, p) - apply(Attention(4, 2, 8, Rope()), p)).max() > 1e-3


def test_dropout_of_the_probabilities_is_right_on_average():
    """The mean over 2,000 masks is the output without dropout: 4 sigma of its own spread, for each of 736 numbers."""
    layer, x = Attention(2, 1, 4, weight_dropout=0.3), X[:1]
    p = params(layer)
    draw = jax.jit(jax.vmap(lambda key: apply(layer, p, x, key=key)))
    ys = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)), np.float64)
    plain = np.asarray(apply(layer, p, x), np.float64)
    sigma = ys.std(0) / np.sqrt(len(ys))
    assert (sigma > 0).all() and (np.abs(ys.mean(0) - plain) <= 4 * sigma).mean() > 0.999


@pytest.mark.parametrize("make, message", [
    (lambda: Attention(4, 3, 8), "4 heads for 3 kv_heads"),
    (lambda: Attention(4, 2, 8, window=0), "at least 1; got 0"),
    (lambda: Attention(4, 2, 8).apply(None, jnp.asarray(X), Context(segments=POSITIONS), {"k": 0}), "a packed row cannot be decoded"),
], ids=["heads", "window", "packed"])  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
