"""Cross-entropy of a linear head against torch in float64: value and gradient, whole and chunk by chunk, and what it keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minllm.layer import Execution
from minllm.sharding import local, make_mesh
from minllm_kernels import cross_entropy
from minllm_kernels.ops.cross_entropy import chunked

IMPLS = ("reference", "xla")
CASES = {  # (B, T, D, V), chunk, options: sizes that the chunk divides, does not divide, exceeds, and chunks of one token
    "even": ((2, 16, 8, 32), 8, {}),
    "odd": ((3, 7, 5, 37), 4, {}),
    "one_chunk": ((1, 9, 4, 11), 8, dict(smoothing=0.1)),
    "single_tokens": ((2, 3, 4, 50), 1, {}),
    "smoothing": ((3, 7, 5, 37), 4, dict(smoothing=0.1)),
    "softcap": ((3, 7, 5, 37), 4, dict(softcap=2.0)),
    "both": ((2, 5, 6, 13), 3, dict(softcap=1.5, smoothing=0.3)),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def inputs(shape, dtype=np.float64):
    B, T, D, V = shape
    rng = np.random.default_rng(0)
    x, w = 2 * rng.normal(size=(B, T, D)).astype(dtype), rng.normal(size=(D, V)).astype(dtype)
    return x, w, rng.integers(0, V, (B, T)), rng.normal(size=(B, T)), rng.normal(size=(B, T))


def oracle(x, w, targets, a, b, softcap=None, smoothing=0.0):
    """torch's loss, log-sum-exp, and the gradients of sum(a loss + b lse^2): a is the weight of a token, b that of its z-loss."""
    x, w = (torch.tensor(np.asarray(v, np.float64), requires_grad=True) for v in (x, w))
    logits = x @ w
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten(), reduction="none", label_smoothing=smoothing)
    loss, lse = loss.reshape(targets.shape), logits.logsumexp(-1)
    (torch.tensor(a) * loss + torch.tensor(b) * lse**2).sum().backward()
    return [v.detach().numpy() for v in (loss, lse, x.grad, w.grad)]


def ours(x, w, targets, a, b, **options):
    def total(x, w):
        loss, lse = cross_entropy(x, w, jnp.asarray(targets), **options)
        return (a * loss + b * lse**2).sum(), (loss, lse)

    (dx, dw), (loss, lse) = jax.jit(jax.grad(total, (0, 1), has_aux=True))(jnp.asarray(x), jnp.asarray(w))
    return [np.asarray(v) for v in (loss, lse, dx, dw)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_torchs(name, impl, monkeypatch):
    """F64: 1e-10. The gradient goes through both results, so that a z-loss trains too."""
    shape, chunk, options = CASES[name]
    monkeypatch.setattr(chunked, "LOGITS", chunk * shape[-1])
    args = inputs(shape)
    for got, want in zip(ours(*args, impl=impl, **options), oracle(*args, **options), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_torchs_own_linear_cross_entropy(impl, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 4 * 37)
    x, w, targets, *_ = inputs((3, 7, 5, 37))
    tx, tw = torch.tensor(x.reshape(-1, 5), requires_grad=True), torch.tensor(w.T.copy(), requires_grad=True)
    want = F.linear_cross_entropy(tx, tw, torch.tensor(targets.ravel()), reduction="sum")
    want.backward()
    loss, _, dx, dw = ours(x, w, targets, 1.0, 0.0, impl=impl)
    np.testing.assert_allclose(loss.sum(), want.item(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(dx.reshape(-1, 5), tx.grad, rtol=0, atol=1e-10)
    np.testing.assert_allclose(dw.T, tw.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_inputs_keep_float32_logits(impl, dtype, monkeypatch):
    """Inputs that bfloat16 holds exactly: the loss must then be right to float32 (F32: 1e-5), which rounded logits (2^-8 of ~10) miss
    a thousandfold. The gradients come back in the dtypes of their inputs, to that dtype's rounding of the cotangent and the result."""
    shape, chunk, options = CASES["smoothing"]
    monkeypatch.setattr(chunked, "LOGITS", chunk * shape[-1])
    x, w, targets, a, b = inputs(shape)
    x, w = (jnp.asarray(v, jnp.bfloat16).astype(dtype) for v in (x, w))
    a, b = np.float32(a), np.float32(b)
    got, want = ours(x, w, targets, a, b, impl=impl, **options), oracle(x, w, targets, a.astype(float), b.astype(float), **options)
    assert [v.dtype for v in got] == [jnp.float32, jnp.float32, dtype, dtype]
    for g, t in zip(got[:2], want[:2]):
        np.testing.assert_allclose(g, t, rtol=1e-5, atol=1e-5)
    step = float(jnp.finfo(dtype).eps)
    for g, t in zip(got[2:], want[2:]):
        np.testing.assert_allclose(g.astype(np.float64), t, rtol=0, atol=max(1e-5, 2 * step) * np.abs(t).max())


def temporaries(B, T, D, V, impl):
    f = lambda x, w, t: cross_entropy(x, w, t, impl=impl)[0].sum()
    shapes = [jax.ShapeDtypeStruct(s, k) for s, k in (((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32))]
    return jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_one_chunk_of_logits(monkeypatch):
    """The compiled gradient: a few chunk x V arrays and the gradient of w, whatever T; the whole form holds T x V."""
    D, V, C = 8, 1024, 16
    monkeypatch.setattr(chunked, "LOGITS", C * V)
    short, long = (temporaries(1, T, D, V, "xla") for T in (512, 1024))
    logits, weights = 4 * C * V, 4 * D * V
    # unfused (as the suite compiles), a chunk has logits, probabilities, the one-hot and their products: no more than 12 at once
    assert long <= 12 * logits + 4 * weights + 8 * 1024 * D * 4
    assert long - short <= 512 * (4 * 4 * D), "grows by more than tokens x D"
    assert temporaries(1, 1024, D, V, "reference") >= 4 * 1024 * V


def test_auto_takes_chunks_when_the_logits_are_many(monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 16 * 1024)
    assert temporaries(1, 1024, 8, 1024, "auto") == temporaries(1, 1024, 8, 1024, "xla")
    with pytest.raises(ValueError, match="few enough to hold"):
        cross_entropy(jnp.ones((1, 2, 4)), jnp.ones((4, 8)), jnp.zeros((1, 2), int), impl="xla")


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(fsdp=2, context=2, tensor=2), dict(data=4, tensor=2)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_on_a_mesh(mesh, impl, monkeypatch):
    """Each device its own tokens, the gradient of w summed over them: F64."""
    shape = (8, 6, 5, 37)
    monkeypatch.setattr(chunked, "LOGITS", 2 * 37)
    x, w, targets, a, b = inputs(shape)
    run = Execution(mesh=make_mesh(**mesh))
    rows = "batch seq"

    def total(x, w):
        op = lambda x, w, t: cross_entropy(x, w, t, smoothing=0.1, impl=impl)
        loss, lse = local(op, ("batch seq _", "_ _", rows), (rows, rows), run)(x, w, jnp.asarray(targets))
        return (a * loss + b * lse**2).sum(), (loss, lse)

    (dx, dw), (loss, lse) = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, w)
    for got, want in zip((loss, lse, dx, dw), oracle(x, w, targets, a, b, smoothing=0.1), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_logits_stay_finite(impl, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 3 * 8)
    x, w, targets, *_ = inputs((1, 7, 4, 8))
    args = 1e4 * x, w, targets, 1.0, 0.0
    for got, want in zip(ours(*args, impl=impl), oracle(args[0], w, targets, np.ones((1, 7)), np.zeros((1, 7))), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_a_target_outside_the_vocabulary_has_no_logit():
    x, w = map(jnp.asarray, inputs((1, 4, 3, 5))[:2])
    loss, lse = cross_entropy(x, w, jnp.asarray([[-100, -1, 5, 99]]))
    np.testing.assert_array_equal(loss, lse)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_parts_of_the_vocabulary_add_up(smoothing):
    """lse - loss of the parts of a head adds up to that of the whole."""
    x, w, targets, _, _ = map(jnp.asarray, inputs((2, 5, 3, 12)))
    loss, lse = cross_entropy(x, w, targets, smoothing=smoothing)
    parts = [cross_entropy(x, w[:, i : i + 4], targets - i, smoothing=smoothing, vocab=12) for i in (0, 4, 8)]
    np.testing.assert_allclose(sum(b - a for a, b in parts), lse - loss, atol=1e-12)
    np.testing.assert_allclose(jax.nn.logsumexp(jnp.stack([b for _, b in parts]), 0), lse, atol=1e-12)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0])
def test_smoothing_has_limits(smoothing):
    with pytest.raises(ValueError, match=rf"{smoothing}; it must lie in \[0, 1\)"):
        cross_entropy(jnp.ones((1, 2, 4)), jnp.ones((4, 8)), jnp.zeros((1, 2), int), smoothing=smoothing)
