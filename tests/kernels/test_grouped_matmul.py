"""Grouped matmul: every form against a loop in float64, and the TPU kernels in interpret mode and through the TPU compiler (law 9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from minllm import weights
from minllm.weights import LowRank, Mixed, PerGroup
from minllm_kernels import grouped_matmul
from minllm_kernels.ops.grouped_matmul import tpu

# (M, K, N, sizes): empty groups at either end, groups that share tiles and end inside them, rows of nobody, one row, one group
CASES = {
    "even": (64, 16, 24, (16, 16, 16, 16)),
    "empty groups": (40, 7, 5, (0, 10, 0, 0, 30, 0)),
    "rows of nobody": (40, 7, 5, (10, 0, 17, 3)),
    "nobody at all": (12, 8, 8, (0, 0)),
    "one row": (1, 8, 3, (0, 1)),
    "many tiles": (300, 24, 40, (1, 130, 0, 127, 20)),
    "one group": (260, 8, 8, (260,)),
}


def arrays(M, K, N, sizes, dtype=np.float64):
    rng = np.random.default_rng(M)
    x, w, dy = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (len(sizes), K, N), (M, N)))
    return x, w, np.asarray(sizes, np.int32), dy


def loop(x, w, sizes, dy):
    """(y, dx, dw), one group after the other."""
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(sizes)
    for e, (n, end) in enumerate(zip(sizes, ends)):
        own = slice(end - n, end)
        y[own], dx[own], dw[e] = x[own] @ w[e], dy[own] @ w[e].T, x[own].T @ dy[own]
    return y, dx, dw


def ours(x, w, sizes, dy, impl):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), impl=impl), jnp.asarray(x), jnp.asarray(w))
    return y, *vjp(jnp.asarray(dy))


@pytest.mark.parametrize("impl", ["reference", "xla", "cpu", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_against_a_loop_in_float64(case, impl):
    """1e-11: both sides are float64."""
    with jax.enable_x64(True):
        args = arrays(*CASES[case])
        for a, b in zip(ours(*args, impl), loop(*args)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


@pytest.fixture
def interpreter():
    """Memory past the end raises or holds NaNs, fresh memory too, and races are looked for."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["rows of nobody", "many tiles", "nobody at all"])
def test_law_9_interpreted(case, dtype, interpreter):
    """No worse than twice the error of the reference in the same dtype, against float64 on the same rounded inputs, plus one rounding
    of the largest entry."""
    check(arrays(*CASES[case]), dtype)


def test_law_9_interpreted_with_a_depth_and_columns_that_no_tile_divides(interpreter, monkeypatch):
    """K = 1100 in pieces of 1024 and N = 1030 in columns of 1024 (megablox is wrong where K is no multiple of its tile)."""
    monkeypatch.setattr(tpu, "_budget", lambda chip: 2**16)
    check(arrays(20, 1100, 1030, (11, 0, 7)), "float32")


def check(args, dtype):
    kind = jnp.dtype(dtype)
    x, w, sizes, dy = (a if a.dtype == np.int32 else np.asarray(jnp.asarray(a, kind), np.float64) for a in args)
    low = [jnp.asarray(a, kind) for a in (x, w)], jnp.asarray(dy, kind)
    exact = loop(x, w, sizes, dy)
    error = lambda impl: [np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip(ours(*low[0], sizes, low[1], impl), exact)]
    for ours_, theirs, b in zip(error("tpu"), error("reference"), exact):
        assert ours_ <= 2 * theirs + float(jnp.finfo(kind).eps) * np.abs(b).max(initial=0), (ours_, theirs)


SHAPES = [(8192, 4096, 14_336, 8, "bfloat16"), (8192, 14_336, 4096, 8, "bfloat16"), (2048, 2048, 768, 128, "bfloat16"),
          (300, 200, 72, 4, "float32"), (1000, 1100, 1030, 3, "bfloat16")]  # fmt: skip


def compiles(topology, shape):
    M, K, N, E, dtype = shape
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    spec = lambda shape, kind=dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=SingleDeviceSharding(device))

    def step(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl="tpu", chip=device.device_kind), x, w)
        return y, vjp(dy)

    traced = jax.jit(step).trace(spec((M, K)), spec((E, K, N)), spec((E,), "int32"), spec((M, N)))
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_law_9_compiles(topology):
    compiles(topology, SHAPES[0])


@pytest.mark.nightly
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_law_9_compiles_for_every_shape(topology, shape):
    compiles(topology, shape)


def test_visits_cover_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        E, M, tm = int(rng.integers(1, 9)), int(rng.integers(1, 200)), int(rng.choice([8, 16, 64]))
        cuts = np.sort(rng.integers(0, M + 1, E))
        sizes = np.diff(cuts, prepend=0)
        group, tile, starts, total = (np.asarray(a) for a in tpu.visits(jnp.asarray(sizes), M, tm, rest=True))
        seen = np.zeros(M, int)
        for g, t in zip(group[: total[0]], tile[: total[0]]):
            rows = np.arange(max(starts[g], t * tm), min(starts[g + 1], (t + 1) * tm, M))
            assert len(rows)
            seen[rows] += 1
        assert (seen == 1).all() and (np.diff(tile[: total[0]]) >= 0).all() and (np.diff(tile[: total[0]]) <= 1).all()
        group, *_, total = (np.asarray(a) for a in tpu.visits(jnp.asarray(sizes), M, tm, rest=False))
        assert set(group[: total[0]]) == set(range(E))


def test_weights_of_other_types():
    """A low-rank sum, a weight learned in another dtype, and a group's matrix standing for one."""
    x, w, sizes, _ = arrays(40, 6, 10, (10, 0, 25, 5), np.float32)
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((4, 6, 2), (4, 2, 10)))
    low = LowRank(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), 0.5)
    want = loop(x, w + 0.5 * a @ b, sizes, np.zeros((40, 10), np.float32))[0]
    np.testing.assert_allclose(weights.grouped(jnp.asarray(x), low, jnp.asarray(sizes)), want, rtol=0, atol=1e-4)
    mixed = lambda full: weights.grouped(jnp.asarray(x, jnp.bfloat16), Mixed(jnp.asarray(w, jnp.bfloat16), full), jnp.asarray(sizes)).sum()
    assert jax.grad(mixed)(jnp.asarray(w)).dtype == jnp.float32
    y = weights.einsum("btd,df->btf", jnp.asarray(x)[None], PerGroup(jnp.asarray(w), jnp.asarray(sizes)))
    np.testing.assert_allclose(y[0], loop(x, w, sizes, np.zeros((40, 10), np.float32))[0], rtol=0, atol=1e-5)
