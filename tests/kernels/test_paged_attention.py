"""Paged attention: the reference against loops in float64, the TPU kernel against the reference in interpret mode (reads out of bounds
raise, memory starts as NaN, races are found), and against the real compiler for four chips."""

import functools
import inspect
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels import paged_attention
from minllm_kernels.ops.paged_attention import tpu

STRICT = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", dma_execution_mode="on_wait", random_seed=0
)


@dataclass(frozen=True)
class Case:
    """queries, lens: of each row. pool: pages beyond those in use, which hold NaN where the type has it."""

    queries: tuple[int, ...] = (1, 1, 1)
    lens: tuple[int, ...] = (5, 33, 17)
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (128, 128)
    page: int = 16
    q_type: str = "float32"
    cache: str = "float32"
    shared: bool = False
    sinks: bool = False
    scales: bool = False
    extra: dict = field(default_factory=dict)

    def make(self, seed=0):
        rng = np.random.default_rng(seed)
        (N, K), (H, h), S, B = self.heads, self.sizes, self.page, len(self.lens)
        M = max(-(-n // S) for n in self.lens) + 1
        P = sum(-(-n // S) for n in self.lens) + 3
        free = list(rng.permutation(P))
        table = np.full((B, M), 10**6, np.int32)            # what is not in use must not matter
        cache = jnp.dtype(self.cache)
        pools = []
        for size in (H, h)[: 1 if self.shared else 2]:
            x = rng.normal(size=(P, S, K * size)).astype(np.float32)
            pools.append(np.round(x * 40) if cache.kind == "i" else x)
        whole = cache.kind == "i"
        dirty = [np.full_like(x, 127 if whole else np.nan) for x in pools]
        for b, n in enumerate(self.lens):
            for i in range(-(-n // S)):
                table[b, i] = page = free.pop()
                for x, y in zip(pools, dirty):
                    y[page, : n - i * S] = x[page, : n - i * S]
        pools = [jnp.asarray(y, cache) for y in dirty]
        T = sum(self.queries)
        q = jnp.asarray(rng.normal(size=(T + 2, N, H)), self.q_type)
        args = dict(
            q=q, k_pages=pools[0], v_pages=None if self.shared else pools[1], table=jnp.asarray(table),
            q_starts=jnp.asarray(np.cumsum([0, *self.queries]), jnp.int32), kv_lens=jnp.asarray(self.lens, jnp.int32),
        )  # fmt: skip
        if self.sinks:
            args["sinks"] = jnp.asarray(rng.normal(size=N), jnp.float32)
        if self.scales:
            args |= {name: jnp.asarray(rng.uniform(0.01, 0.05, K), jnp.float32) for name in ("k_scale", "v_scale")}
        if self.shared:
            args["v_size"] = h
        return args | self.extra


def loops(
    q, k_pages, v_pages, table, q_starts, kv_lens, *,
    sinks=None, k_scale=None, v_scale=None, window=None, softcap=None, v_size=None, max_q=None,
):  # fmt: skip
    """Float64, one query, one head, one key at a time."""
    q, k_pages, table, q_starts, kv_lens = (np.asarray(x, np.float64 if x.dtype.kind not in "iu" or x.ndim == 3 else int)
                                            for x in (q, k_pages, table, q_starts, kv_lens))
    T, N, H = q.shape
    K, S = k_pages.shape[2] // H, k_pages.shape[1]
    h = v_size or v_pages.shape[2] // K
    out = np.zeros((T, N, h))
    for b, (begin, end, n) in enumerate(zip(q_starts[:-1], q_starts[1:], kv_lens)):
        for t in range(begin, end):
            position = n - (end - t)
            for head in range(N):
                kv = head // (N // K)
                scores, values = [], []
                for at in range(position + 1):
                    if window is not None and at <= position - window:
                        continue
                    page, slot = table[b, at // S], at % S
                    key = k_pages[page, slot, kv * H : (kv + 1) * H] * (1 if k_scale is None else float(k_scale[kv]))
                    value = key[:h] if v_pages is None else np.asarray(v_pages[page, slot, kv * h : (kv + 1) * h], np.float64)
                    values.append(value * (1 if v_scale is None else float(v_scale[kv])))
                    s = q[t, head] @ key * H**-0.5
                    scores.append(s if softcap is None else softcap * np.tanh(s / softcap))
                if not scores:
                    continue
                weights = np.exp(np.array(scores))
                total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head])))
                out[t, head] = weights @ np.array(values) / total
    return out


def interpreted(args):
    """The kernel as a CPU plays it, its table's entries not clamped."""
    names = ("q", "k_pages", "v_pages", "table", "q_starts", "kv_lens", "sinks", "k_scale", "v_scale")
    arrays = [args.get(name) for name in names]
    q, v_size = args["q"], args.get("v_size")
    static = dict(
        scale=q.shape[2] ** -0.5,
        window=args.get("window"),
        softcap=args.get("softcap"),
        max_q=args.get("max_q") or len(q),
        v_size=v_size or args["v_pages"].shape[2] // (args["k_pages"].shape[2] // q.shape[2]),
    )
    assert tpu.supports(*arrays, chip=None, **static) is None
    try:
        return jax.block_until_ready(tpu.forward(*arrays, **static, interpret=STRICT))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise


CASES = {
    "decode": Case(extra=dict(max_q=1)),
    "mixed": Case(queries=(1, 19, 0, 1, 7), lens=(40, 19, 0, 1, 70), sinks=True),
    "window and cap": Case(queries=(1, 5), lens=(70, 50), extra=dict(window=20, softcap=3.0)),
    "heads of 64": Case(heads=(8, 4), sizes=(64, 64), queries=(1, 3), lens=(37, 50), sinks=True),
    "one head of 64": Case(heads=(4, 1), sizes=(64, 64), extra=dict(max_q=1)),
    "192 and 128": Case(heads=(4, 2), sizes=(192, 128), queries=(2, 1, 1)),
    "latent": Case(heads=(16, 1), sizes=(576, 512), shared=True, page=32, queries=(1, 3, 1)),
    "int8": Case(cache="int8", scales=True, page=32, q_type="bfloat16", heads=(8, 2)),
    "fp8": Case(cache="float8_e4m3fn", scales=True, page=32, q_type="bfloat16", sizes=(64, 64)),
    "bfloat16": Case(cache="bfloat16", q_type="bfloat16", queries=(1, 5), lens=(40, 30), sinks=True),
    "sees nothing": Case(queries=(3, 1), lens=(1, 20)),
}


def check(ours, exact, same_precision, tight):
    """No worse than twice the error of the formula in the same precision; where that is float32, a few ulps of the largest value."""
    error = np.abs(np.asarray(ours, np.float64) - exact).max()
    allowed = 2 * np.abs(np.asarray(same_precision, np.float64) - exact).max() + tight * max(np.abs(exact).max(), 1e-3)
    assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_formula(name):
    args = CASES[name].make()
    exact = loops(**args)
    ours = np.asarray(paged_attention(**args, impl="reference"), np.float64)
    bound = 2e-6 if args["q"].dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(ours, exact, rtol=0, atol=bound * max(np.abs(exact).max(), 1))
    assert not ours[-2:].any()                          # tokens of no row


# Playing a kernel takes seconds; the rest runs at night.
EVERY_DAY = ("mixed", "heads of 64", "int8")


@pytest.mark.parametrize("name", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.nightly) for name in CASES])
def test_the_kernel_agrees_with_the_reference(name):
    args = CASES[name].make()
    exact = np.asarray(paged_attention(**args | {"q": args["q"].astype(jnp.float32)}, impl="reference"), np.float64)
    same = paged_attention(**args, impl="reference")
    check(interpreted(args), exact, same, tight=4e-6 if args["q"].dtype == jnp.float32 else 2**-8)


def test_blocks_of_any_size_give_the_same(monkeypatch):
    args = Case(lens=(130, 5, 60), extra=dict(max_q=1)).make()
    exact = np.asarray(paged_attention(**args, impl="reference"))
    for pages, cores in ((1, 1), (3, 2)):
        monkeypatch.setattr(tpu, "BLOCK_PAGES", pages)
        monkeypatch.setattr(tpu, "CORES", {"": cores})
        np.testing.assert_allclose(interpreted(args), exact, atol=3e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_form_agrees_with_the_reference(name):
    args = CASES[name].make()
    exact = np.asarray(paged_attention(**args | {"q": args["q"].astype(jnp.float32)}, impl="reference"), np.float64)
    same = paged_attention(**args, impl="reference")
    check(paged_attention(**args, impl="xla"), exact, same, tight=4e-6 if args["q"].dtype == jnp.float32 else 2**-8)


def test_the_plain_form_has_the_same_bits_in_any_company():
    """A row among short ones and among one of many splits, first and last, with a table of another width."""
    args = Case(lens=(5, 33, 700), sinks=True, extra=dict(max_q=1)).make()
    call = jax.jit(functools.partial(paged_attention, impl="xla", max_q=1))
    args = {name: x for name, x in args.items() if name != "max_q"}
    whole = np.asarray(call(**args))
    order = jnp.array([2, 1, 0])
    turned = call(**args | dict(q=args["q"].at[:3].set(args["q"][order]), table=args["table"][order], kv_lens=args["kv_lens"][order]))
    assert (np.asarray(turned)[[2, 1, 0]] == whole[:3]).all()
    short = call(**args | dict(kv_lens=jnp.array([5, 33, 0])))
    assert (np.asarray(short)[:2] == whole[:2]).all() and not np.asarray(short)[2].any()
    narrow = call(**args | dict(table=args["table"][:, :4], kv_lens=jnp.array([5, 33, 0])))
    assert (np.asarray(narrow)[:2] == whole[:2]).all()


def test_a_table_that_points_outside_the_pool_is_found():
    args = Case(extra=dict(max_q=1)).make()
    wrong = args | {"table": args["table"].at[1, 1].set(10**6)}
    with pytest.raises(ValueError, match=r"table\[1, 1\] is page 1000000 of a pool of"):
        paged_attention(**wrong)
    with pytest.raises(Exception, match=r"(?i)out-of-bounds|out of bounds"):
        interpreted(wrong)
    traced = jax.jit(functools.partial(paged_attention, impl="reference", max_q=1))
    arrays = {name: x for name, x in wrong.items() if name != "max_q"}
    assert np.isnan(traced(**arrays)[1]).all() and not np.isnan(traced(**arrays)[0]).any()


@pytest.mark.parametrize("change, message", [
    (dict(k_pages=jnp.zeros((4, 16, 100))), r"k_pages is \[pages, tokens, kv heads x 128\]"),
    (dict(q=jnp.zeros((5, 3, 128))), "3 query heads for 2 key/value heads"),
    (dict(v_pages=None), "needs v_pages, or v_size"),
    (dict(v_pages=jnp.zeros((1, 16, 256))), "beside k_pages"),
    (dict(k_pages=jnp.zeros((9, 16, 256), jnp.int32)), "a cache is of float32, bfloat16, int8"),
    (dict(kv_lens=jnp.zeros(7, jnp.int32)), r"table is \[B, M\]"),
    (dict(kv_lens=jnp.full(3, 10**4, jnp.int32)), "row 0 has 10000 tokens, its table of"),
    (dict(window=0), "a window counts its own token"),
    (dict(max_q=0), "max_q is the longest row"),
    (dict(q_starts=jnp.array([0, 1, 2, 5]), max_q=1), "max_q is 1, a row has 3 queries"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_bad_input_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(paged_attention)(**Case().make() | change)       # without the shape checks that the tests switch on


def test_a_kernel_that_cannot_serve_says_why():
    args = Case(page=8, q_type="bfloat16", cache="bfloat16").make()
    with pytest.raises(ValueError, match="pages of 8 tokens of bfloat16 are not a multiple of 16"):
        paged_attention(**args, impl="tpu")


# --- with the real compiler -------------------------------------------------------------------------------------------------------

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiled(case, chip):
    """The op as a server calls it: traced tables, the platform's own choice."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    args = {name: x for name, x in case.make().items() if hasattr(x, "shape")}
    static = {name: x for name, x in case.make().items() if not hasattr(x, "shape") and x is not None}
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in args.items()}
    call = lambda arrays: paged_attention(**{"v_pages": None} | arrays, **static, impl="tpu", chip=device.device_kind)
    return jax.jit(call).trace(abstract).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("chip, name", [("v5e", "mixed"), ("v6e", "heads of 64"), ("v5p", "decode"), ("tpu7x", "int8")], ids=str)
def test_it_compiles(chip, name):
    assert "paged_attention_decode" in compiled(CASES[name], chip).as_text()


@pytest.mark.nightly
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_compiles_for_every_chip(chip, name):
    assert "paged_attention_decode" in compiled(CASES[name], chip).as_text()
