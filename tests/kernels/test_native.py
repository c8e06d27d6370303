"""The C++ kernels of the CPU against the formula in float64: no worse than twice the formula's own float32."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from minllm_kernels import attention, native
from minllm_kernels.mask import Causal, Dilated, Full, Global, Prefix, Window

# name: (B, T, S, N, K, H, h), mask, documents, sinks
CASES = {
    "as_trained": ((2, 256, 256, 4, 4, 32, 32), Causal(), True, False),
    "grouped_odd_length": ((2, 100, 100, 4, 2, 48, 32), Causal(), True, True),
    "window_wide_values": ((1, 65, 65, 4, 1, 64, 128), Causal() & Window(20), False, False),
    "more_keys_than_queries": ((1, 70, 150, 4, 4, 16, 16), Full(), False, False),
    "last_queries": ((1, 16, 130, 2, 2, 80, 80), Causal(), False, False),
    "local_and_global": ((2, 200, 200, 2, 2, 32, 32), Window(3, 3) | Global(1), False, True),
    "dilated": ((1, 130, 130, 2, 1, 96, 96), Causal() & Dilated(3), False, False),
    "prefix": ((1, 192, 192, 2, 2, 32, 32), Causal() | Prefix(80), False, False),
}


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        native.build()
    except RuntimeError as error:
        pytest.skip(str(error))  # the kernels are optional; every other test runs without them
    yield


def inputs(shape, documents, sinks):
    B, T, S, N, K, H, h = shape
    random = np.random.default_rng(0)
    x = {n: random.standard_normal(s) for n, s in dict(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, h), do=(B, T, N, h)).items()}
    x["sinks"] = random.standard_normal(N) if sinks else None
    kv_pos = np.tile(np.arange(S), (B, 1))
    kv_pos[:, S // 3] = -1  # a padded key
    where = dict(q_pos=np.tile(np.arange(S - T, S), (B, 1)), kv_pos=kv_pos, q_seg=None, kv_seg=None)
    if documents:
        where["q_seg"] = where["kv_seg"] = np.sort(random.integers(0, 5, (B, T)), 1)
    return x, where


def value_and_grads(x, where, mask, impl, kind):
    x = {n: jnp.asarray(a, kind) for n, a in x.items() if a is not None}
    where = {n: jnp.asarray(a, jnp.int32) for n, a in where.items() if a is not None}
    do = x.pop("do")

    @jax.jit
    def run(x, do, where):
        o, vjp = jax.vjp(lambda x: attention(**x, **where, mask=mask, impl=impl), x)
        return {"o": o, **vjp(do)[0]}

    return {n: np.asarray(a, np.float64) for n, a in run(x, do, where).items()}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name):
    shape, mask, documents, sinks = CASES[name]
    x, where = inputs(shape, documents, sinks)
    with jax.enable_x64(True):
        exact = value_and_grads(x, where, mask, "reference", jnp.float64)
    ours, plain = (value_and_grads(x, where, mask, impl, jnp.float32) for impl in ("native", "reference"))
    for n, truth in exact.items():
        rms = [np.sqrt(np.mean((y[n] - truth) ** 2)) for y in (ours, plain)]
        rounding = 2**-24 * np.sqrt(np.mean(truth**2))
        assert rms[0] <= 2 * max(rms[1], rounding), (n, rms)


def test_rows_that_see_nothing_are_zero():
    x, where = inputs((1, 64, 64, 2, 2, 16, 16), False, False)
    where["q_pos"] = where["q_pos"] - 10  # the first ten see no key
    got = value_and_grads(x, where, Causal(), "native", jnp.float32)
    assert not got["o"][:, :10].any() and not got["q"][:, :10].any()
    assert all(np.isfinite(a).all() for a in got.values())


def test_every_transformation():
    """vmap, checkpoint and shard_map give what a plain call gives: 1e-6, a few roundings of float32 in the sums around the kernel."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((8, 20, n, 16)), jnp.float32) for n in (2, 1, 1))
    pos = jnp.tile(jnp.arange(20), (8, 1))

    def loss(q, k, v, pos):
        return (attention(q, k, v, q_pos=pos, kv_pos=pos, impl="native") ** 2).sum((1, 2, 3))

    rows = PartitionSpec("x")
    forms = {
        "vmap": jax.vmap(lambda q, k, v, pos: loss(q[None], k[None], v[None], pos[None])[0]),
        "checkpoint": jax.checkpoint(loss),
        "shard_map": jax.shard_map(loss, mesh=Mesh(np.array(jax.devices()), "x"), in_specs=(rows,) * 4, out_specs=rows, check_vma=False),
    }

    def run(form):
        return jax.jit(jax.grad(lambda *x: form(*x).sum(), (0, 1, 2)))(q, k, v, pos)

    plain = run(loss)
    for name, form in forms.items():
        for a, b in zip(run(form), plain):
            assert jnp.abs(a - b).max() <= 1e-6 * jnp.abs(b).max(), name


@pytest.mark.parametrize("change, words", [
    (dict(q=(1, 32, 2, 20), k=(1, 32, 2, 20)), "whole 16s"),
    (dict(q=(1, 8, 2, 16)), "T=8"),
    (dict(dtype=jnp.bfloat16), "float32"),
    (dict(softcap=2.0), "soft cap"),
])  # fmt: skip
def test_what_it_cannot_serve_is_said(change, words):
    q, k = change.get("q", (1, 32, 2, 16)), change.get("k", (1, 32, 2, 16))
    q, k, v = (jnp.zeros(s, change.get("dtype", jnp.float32)) for s in (q, k, (1, 32, 2, 16)))
    q_pos, kv_pos = jnp.zeros((1, q.shape[1]), int), jnp.zeros((1, 32), int)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, q_pos=q_pos, kv_pos=kv_pos, softcap=change.get("softcap"), impl="native")


def test_without_a_compiler_or_a_cache(tmp_path):
    """Attention runs without the library, and says what to do when it is asked for; the build says what it lacks, in one sentence."""
    env = os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    code = """if True:
        import jax.numpy as jnp
        from minllm_kernels import attention, native
        x, pos = jnp.ones((1, 128, 1, 16)), jnp.arange(128)[None]
        assert native.library() is None
        attention(x, x, x, q_pos=pos, kv_pos=pos)
        try:
            attention(x, x, x, q_pos=pos, kv_pos=pos, impl="native")
        except ValueError as error:
            assert "python -m minllm_kernels.native" in str(error), error
    """
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    for path, words in (("/nowhere", "need a C++ compiler"), (str(tmp_path), "no space left")):
        command = [sys.executable, "-m", "minllm_kernels.native"]
        done = subprocess.run(command, env=env | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
        assert not list(tmp_path.rglob("*.so"))
