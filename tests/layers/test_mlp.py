"""Activations and feed-forward layers against torch and Hugging Face."""

from dataclasses import is_dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, T5Config
from transformers.activations import ACT2FN, XIELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from minllm import spec
from minllm.layer import Context
from minllm.layers.mlp import (
    GLU,
    MLP,
    XIELU,
    Swish,
    gelu,
    gelu_quick,
    gelu_tanh,
    identity,
    mish,
    relu,
    relu2,
    sigmoid,
    silu,
    softplus,
    tanh,
)

F = torch.nn.functional
ACTIVATIONS = {
    "relu": (relu, F.relu), "tanh": (tanh, torch.tanh), "sigmoid": (sigmoid, torch.sigmoid), "softplus": (softplus, F.softplus),
    "gelu": (gelu, F.gelu), "gelu_tanh": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")), "gelu_new": (gelu_tanh, ACT2FN["gelu_new"]),
    "gelu_quick": (gelu_quick, ACT2FN["quick_gelu"]), "silu": (silu, F.silu), "mish": (mish, F.mish), "identity": (identity, lambda x: x),
    "relu2": (relu2, ACT2FN["relu2"]), "swish_1": (Swish(), F.silu), "swish": (Swish(1.3), lambda x: x * torch.sigmoid(1.3 * x)),
    "xielu": (XIELU(), XIELUActivation(dtype=torch.float64)),
    "xielu_other": (XIELU(0.5, 0.9), XIELUActivation(0.5, 0.9, dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_gradient_in_float64(name):
    """1e-10: the inventory's bar where both sides are float64."""
    ours, theirs = ACTIVATIONS[name]
    x = np.concatenate([np.linspace(-9, 9, 400), [0.0, 1e-9, -1e-9, 1e-3, -1e-3]])
    t = torch.tensor(x, requires_grad=True)
    y = theirs(t)
    (dy,) = torch.autograd.grad(y.sum(), t)
    with jax.enable_x64(True):
        a, da = ours(jnp.asarray(x)), jax.vmap(jax.grad(ours))(jnp.asarray(x))
    assert np.abs(np.asarray(a) - y.detach().numpy()).max() <= 1e-10
    assert np.abs(np.asarray(da) - dy.numpy()).max() <= 1e-10


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_hashable_finite_and_keep_bfloat16(name):
    act = ACTIVATIONS[name][0]
    assert MLP(8, act) == MLP(8, replace(act) if is_dataclass(act) else act) and isinstance(hash(MLP(8, act)), int)
    x = jnp.asarray([-1e4, -80.0, 80.0, 1e4], jnp.bfloat16)
    assert act(x).dtype == jnp.bfloat16 and bool(jnp.isfinite(act(x)).all()) and bool(jnp.isfinite(jax.vmap(jax.grad(act))(x)).all())


def compare(layer, p, module, x, names):
    """Values to 1e-5 (float32, inputs of size one) and gradients to 1e-4 in relative L2, the inventory's bars.
    names: our parameter -> (the module's parameter, our view of it)."""
    t = torch.tensor(x, requires_grad=True)
    y = module(t)
    direction = np.random.default_rng(9).standard_normal(y.shape).astype(np.float32)
    theirs = torch.autograd.grad(y, [t, *(q for q, _ in names.values())], torch.tensor(direction))
    ours, vjp = jax.vjp(lambda p, x: layer.apply(p, x, Context()).x, p, jnp.asarray(x))
    dp, dx = vjp(jnp.asarray(direction))
    assert p.keys() == names.keys() and np.abs(np.asarray(ours) - y.detach().numpy()).max() <= 1e-5
    for a, b in zip((dx, *(dp[n] for n in names)), (theirs[0], *(view(g) for g, (_, view) in zip(theirs[1:], names.values())))):
        assert a.shape == b.shape and np.linalg.norm(np.asarray(a) - b.numpy()) <= 1e-4 * np.linalg.norm(b.numpy())


def flip(w):
    return w.T


def plain(w):
    return w


def against(layer, module, x, names):
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, 0.0, 0.3 if "bias" in name else 32**-0.5)
    compare(layer, {n: jnp.asarray(view(q.detach()).numpy()) for n, (q, view) in names.items()}, module, x, names)


X = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)


def test_swiglu_is_llamas():
    m = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48))
    against(GLU(48, silu), m, X, {"gate": (m.gate_proj.weight, flip), "up": (m.up_proj.weight, flip), "down": (m.down_proj.weight, flip)})


def test_geglu_is_t5s():
    m = T5DenseGatedActDense(T5Config(d_model=32, d_ff=48, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    against(GLU(48, gelu_tanh), m, X, {"gate": (m.wi_0.weight, flip), "up": (m.wi_1.weight, flip), "down": (m.wo.weight, flip)})


def test_mlp_is_gpt2s():
    m = GPT2MLP(48, GPT2Config(n_embd=32, resid_pdrop=0.0))
    names = {"up": m.c_fc.weight, "down": m.c_proj.weight, "up_bias": m.c_fc.bias, "down_bias": m.c_proj.bias}
    against(MLP(48, gelu_tanh, bias=True), m, X, {n: (w, plain) for n, w in names.items()})


def test_clamped_swiglu_is_gpt_oss():
    """Its gate in the middle of an expert, on inputs beyond the clamp."""
    layer, x = GLU(48, Swish(1.702), limit=7.0, shift=1.0), jnp.asarray(X) * 6
    p = spec.init(layer.params(32), jax.random.key(0))
    p["down"] = jnp.eye(48)[:, :32]
    gate, up = (np.asarray(x @ p[n]) for n in ("gate", "up"))
    assert (gate > 7).any() and (up > 7).any() and (up < -7).any()
    theirs = GptOssExperts._apply_gate(SimpleNamespace(limit=7.0, alpha=1.702), torch.tensor(np.stack([gate, up], -1)).flatten(-2))
    ours = layer.apply(p, x, Context()).x
    assert np.abs(np.asarray(ours) - theirs[..., :32].numpy()).max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("act, theirs", [(sigmoid, torch.sigmoid), (identity, plain), (relu, F.relu), (gelu, F.gelu), (silu, F.silu)],
                         ids=["glu", "bilinear", "reglu", "geglu", "swiglu"])  # fmt: skip
def test_glu_family_in_float64(act, theirs):
    """act(x W) * (x V), the sigmoid one also by torch's own glu. 1e-10: both sides float64."""
    with jax.enable_x64(True):
        p = spec.init(GLU(48, act).params(32), jax.random.key(0), jnp.float64)
        ours = np.asarray(GLU(48, act).apply(p, jnp.asarray(X, jnp.float64), Context()).x)
        gate, up, down = (torch.tensor(np.asarray(p[n])) for n in ("gate", "up", "down"))
    x = torch.tensor(X).double()
    assert np.abs(ours - ((theirs(x @ gate) * (x @ up)) @ down).numpy()).max() <= 1e-10
    if act is sigmoid:
        assert np.abs(ours - (F.glu(torch.cat([x @ up, x @ gate], -1)) @ down).numpy()).max() <= 1e-10


def test_bias_is_declared_only_when_asked_for():
    assert set(MLP(8).params(4)) == {"up", "down"} and set(MLP(8, bias=True).params(4)) == {"up", "down", "up_bias", "down_bias"}
    assert MLP(8, bias=True).params(4)["up_bias"].role == "bias"
