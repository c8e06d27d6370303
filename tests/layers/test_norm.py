"""Norms against torch and Hugging Face: value and gradients in float64, bits in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minllm.layer import Context
from minllm.layers.norm import GroupNorm, LayerNorm, RMSNorm, rms_norm

random = np.random.default_rng(0)
X, DY, GAIN, BIAS = (random.standard_normal(shape) for shape in ((3, 7, 40), (3, 7, 40), (40,), (40,)))
X += 1.5  # a mean that LayerNorm must take out, and RMSNorm must not
F = torch.nn.functional
NORMS = {
    "rms": (RMSNorm(), lambda x, scale: F.rms_norm(x, (40,), scale, 1e-5)),
    "rms_eps": (RMSNorm(0.5), lambda x, scale: F.rms_norm(x, (40,), scale, 0.5)),
    "rms_offset": (RMSNorm(1e-6, unit_offset=True), lambda x, scale: F.rms_norm(x, (40,), 1 + scale, 1e-6)),
    "layer": (LayerNorm(), lambda x, scale, bias: F.layer_norm(x, (40,), scale, bias, 1e-5)),
    "layer_eps": (LayerNorm(0.5), lambda x, scale, bias: F.layer_norm(x, (40,), scale, bias, 0.5)),
    "layer_no_bias": (LayerNorm(bias=False), lambda x, scale: F.layer_norm(x, (40,), scale, None, 1e-5)),
    "group": (GroupNorm(8), lambda x, scale, bias: F.group_norm(x.reshape(21, 40), 8, scale, bias, 1e-5).reshape(x.shape)),
    "group_one": (GroupNorm(1), lambda x, scale, bias: F.layer_norm(x, (40,), scale, bias, 1e-5)),
    "layer_offset": (LayerNorm(unit_offset=True), lambda x, scale, bias: F.layer_norm(x, (40,), 1 + scale, bias, 1e-5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_value_and_gradients_in_float64(name):
    """1e-10: the inventory's bar where both sides are float64."""
    norm, theirs = NORMS[name]
    p = {n: {"scale": GAIN, "bias": BIAS}[n] for n in norm.params(40)}
    inputs = [torch.tensor(a, requires_grad=True) for a in (X, *p.values())]
    y = theirs(inputs[0], **dict(zip(p, inputs[1:])))
    grads = torch.autograd.grad(y, inputs, torch.tensor(DY))
    with jax.enable_x64(True):
        ours, vjp = jax.vjp(lambda p, x: norm.apply(p, x, Context()).x, p, jnp.asarray(X))
        dp, dx = vjp(jnp.asarray(DY))
    assert ours.dtype == jnp.float64
    for a, b in zip((ours, dx, *(dp[n] for n in p)), (y.detach(), *grads)):
        assert np.abs(np.asarray(a) - b.numpy()).max() <= 1e-10


@pytest.mark.parametrize("norm, theirs", [(RMSNorm(), LlamaRMSNorm(40, 1e-5)), (RMSNorm(1e-6, unit_offset=True), GemmaRMSNorm(40, 1e-6))],
                         ids=["llama", "gemma"])  # fmt: skip
def test_bfloat16_rounds_where_hugging_face_does(norm, theirs):
    """Bit for bit: Llama rounds before the gain, Gemma after it."""
    x, gain = (jnp.asarray(a, jnp.bfloat16) for a in (X, GAIN))
    theirs = theirs.bfloat16()
    theirs.weight.data = torch.tensor(np.asarray(gain, np.float32)).bfloat16()
    expected = theirs(torch.tensor(np.asarray(x, np.float32)).bfloat16()).float().detach().numpy()
    assert (np.asarray(norm.apply({"scale": gain}, x, Context()).x, np.float32) == expected).all()
    wide = rms_norm(x.astype(jnp.float32), gain + norm.unit_offset, norm.eps).astype(jnp.bfloat16)
    assert (np.asarray(wide, np.float32) != expected).any()  # another order gives other bits


@pytest.mark.parametrize("norm", [RMSNorm(unit_offset=True), LayerNorm(unit_offset=True)], ids=["rms", "layer"])
def test_an_offset_gain_keeps_small_values_in_bfloat16(norm):
    """1 + 0.001 is 1 in bfloat16; the gain must be formed in float32. The inputs are float32, so that nothing else is rounded."""
    p = {n: jnp.full(40, 0.001 if n == "scale" else 0.0, jnp.bfloat16) for n in norm.params(40)}
    one = {n: jnp.zeros(40) for n in p}
    x = jnp.asarray(X, jnp.float32)
    ratio = norm.apply(p, x, Context()).x / norm.apply(one, x, Context()).x
    assert jnp.abs(ratio - 1.001).max() <= 1e-5


def test_norms_survive_large_and_small_inputs():
    """Statistics are float32, where the squares of bfloat16 inputs up to 1e18 fit; a zero row stays zero."""
    for norm in (RMSNorm(), LayerNorm()):
        p = {n: jnp.ones(40) if n == "scale" else jnp.zeros(40) for n in norm.params(40)}
        y = norm.apply(p, jnp.asarray(X * 1e17, jnp.bfloat16), Context()).x
        assert bool(jnp.isfinite(y).all()) and 0.5 < float(jnp.abs(y).mean()) < 1.1
        zero = jnp.zeros((1, 2, 40))
        value, grad = jax.value_and_grad(lambda x: norm.apply(p, x, Context()).x.sum())(zero)
        assert value == 0 and bool(jnp.isfinite(grad).all())


def test_initial_norms_change_no_scale():
    x = jnp.asarray(X, jnp.float32)
    from minllm import spec

    for norm in (RMSNorm(), RMSNorm(unit_offset=True), LayerNorm(), LayerNorm(unit_offset=True)):
        y = norm.apply(spec.init(norm.params(40), jax.random.key(0)), x, Context()).x
        assert jnp.abs(jnp.sqrt(jnp.mean(y**2, -1)) - 1).max() <= 1e-4  # eps


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="a width of 40 does not divide into 3 groups"):
        GroupNorm(3).params(40)
