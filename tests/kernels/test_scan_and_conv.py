"""The selective scan and the causal convolution against a loop over tokens in numpy and Mamba's own functions, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm_kernels import causal_conv, selective_scan

B, F, S = 2, 6, 5


def documents(T, lead=0):
    """Documents of one to seven tokens; padding at the end of the first row and before the second."""
    r = np.random.default_rng(3)
    rows = [np.repeat(np.arange(1, T + 1), r.integers(1, 8, size=T))[:T] for _ in range(B)]
    rows[0][T - T // 8 :], rows[1][:lead] = 0, 0
    return np.stack(rows).astype(np.int32)


def scan_inputs(T):
    r = np.random.default_rng(0)
    return {"x": r.normal(size=(B, T, F)), "step": np.log1p(np.exp(r.normal(size=(B, T, F)))), "decay": -np.exp(r.normal(size=(F, S))),
            "into": r.normal(size=(B, T, S)), "out": r.normal(size=(B, T, S)), "state": r.normal(size=(B, F, S))}  # fmt: skip


def conv_inputs(T, W):
    r = np.random.default_rng(0)
    return {"x": r.normal(size=(B, T, F)), "w": r.normal(size=(W, F)), "state": r.normal(size=(B, W - 1, F))}


def scan_by_hand(x, step, decay, into, out, state, segments):
    y, after = np.zeros_like(x), state.copy()
    for b in range(B):
        h, document = after[b], None
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if document not in (None, segments[b, t]):
                h = np.zeros_like(h)
            document = segments[b, t]
            h = np.exp(step[b, t][:, None] * decay) * h + np.outer(step[b, t] * x[b, t], into[b, t])
            y[b, t] = h @ out[b, t]
        after[b] = h
    return y, after


def conv_by_hand(x, w, state, segments):
    y, after = np.zeros_like(x), state.copy()
    for b in range(B):
        seen, document = list(state[b]), None
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            if document not in (None, segments[b, t]):
                seen = [np.zeros(F)] * (len(w) - 1)
            document = segments[b, t]
            seen = [*seen, x[b, t]][-len(w) :]
            y[b, t] = sum(w[i] * seen[i] for i in range(len(w)))
            seen = seen[1:]
        after[b] = np.reshape(seen, after[b].shape)
    return y, after


def everything(op, args, segments, impl, dtype):
    arrays = {n: jnp.asarray(x, dtype) for n, x in args.items()}
    r = np.random.default_rng(9)
    dy, dafter = r.normal(size=args["x"].shape) * (segments > 0)[..., None], r.normal(size=args["state"].shape)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            y, after = op(*(arrays[n] for n in args), jnp.asarray(segments), impl=impl)  # jit sorts a dict by its keys
            return (y * dy).sum() + (after * dafter).sum(), (jnp.where((segments > 0)[..., None], y, 0), after)

        return jax.grad(loss, has_aux=True)(arrays)

    grads, (y, after) = run(arrays)
    return {"y": y, "after": after} | {f"d{n}": g for n, g in grads.items()}


def close(a, b, tolerance):
    for name in b:
        x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
        assert x.shape == y.shape and np.abs(x - y).max(initial=0) <= tolerance * max(np.abs(y).max(initial=0), 1), name


@pytest.mark.parametrize("T", [1, 5, 70])
def test_selective_scan(T):
    args, segments = scan_inputs(T), documents(T)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, everything(selective_scan, args, segments, "reference", jnp.float64))
    y, after = scan_by_hand(*args.values(), segments)
    close({"y": y, "after": after}, {n: exact[n] for n in ("y", "after")}, 1e-12)
    close(everything(selective_scan, args, segments, "auto", jnp.float32), exact, 1e-5)


@pytest.mark.parametrize("W, T, lead", [(4, 40, 3), (4, 40, 0), (4, 2, 0), (4, 1, 0), (2, 9, 1), (1, 9, 0)])
def test_causal_conv(W, T, lead):
    """Chunks shorter than the window included, and the gradient through the state that goes out."""
    args, segments = conv_inputs(T, W), documents(T, lead)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, everything(causal_conv, args, segments, "reference", jnp.float64))
    y, after = conv_by_hand(*args.values(), segments)
    close({"y": y, "after": after}, {n: exact[n] for n in ("y", "after")}, 1e-12)
    close(everything(causal_conv, args, segments, "auto", jnp.float32), exact, 1e-5)
    if T > W:
        whole = np.ones_like(segments)
        bare = causal_conv(*(jnp.asarray(a, jnp.float32) for a in args.values()))
        same = everything(causal_conv, args, whole, "auto", jnp.float32)
        np.testing.assert_allclose(bare[0], same["y"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(bare[1], same["after"], rtol=0, atol=0)


def test_a_state_of_another_width_is_refused():
    with pytest.raises(ValueError, match="a state of 2 tokens for a width of 4; it holds the last 3"):
        causal_conv(jnp.ones((1, 4, 2)), jnp.ones((4, 2)), jnp.ones((1, 2, 2)))


def test_the_convolution_of_torch():
    import torch

    args = conv_inputs(12, 4)
    x, w = (torch.tensor(args[n]) for n in ("x", "w"))
    theirs = torch.nn.functional.conv1d(x.transpose(1, 2), w.T[:, None], padding=3, groups=F)[..., :12].transpose(1, 2)
    ours = causal_conv(jnp.asarray(args["x"], jnp.float32), jnp.asarray(args["w"], jnp.float32))[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
