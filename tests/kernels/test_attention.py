"""Attention against a float64 formula of its own, differentiated by torch: value and every gradient, whole and block by block."""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding

from minllm_kernels import attention
from minllm_kernels.dispatch import Branch
from minllm_kernels.mask import Causal, Chunk, Dilated, Full, Global, Mask, Prefix, Strided, Window
from minllm_kernels.ops import attention as op
from minllm_kernels.ops.attention import chunked, cpu, tiles, tpu
from minllm_kernels.score import Alibi, Buckets, Clipped


def strictly():
    """TPU kernels on a CPU: memory starts as NaN, reads outside an array and races raise."""
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", dma_execution_mode="on_wait")
    )


# What each mask says, in plain Python: q and k are single positions.
SEES = {
    Causal(): lambda q, k: k <= q,
    Full(): lambda q, k: True,
    Causal() & Window(5): lambda q, k: q - 5 < k <= q,
    Causal() | Prefix(6): lambda q, k: k <= q or k < 6,
    Window(3, 3) | Global(2): lambda q, k: abs(q - k) < 3 or q < 2 or k < 2,
    Causal() & Dilated(3): lambda q, k: k <= q and (q - k) % 3 == 0,
    Causal() & Strided(8, 2): lambda q, k: k <= q and (k % 8 >= 6 or q // 8 == k // 8),
    Causal() & Chunk(10): lambda q, k: k <= q and q // 10 == k // 10,
}
WIDER = {Causal() & Window(n): lambda q, k, n=n: q - n < k <= q for n in (140, 150)}  # than a tile of the TPU's tests
IMPLS = ("reference", "xla", "cpu")
DIFFERENTIABLE = ("q", "k", "v", "sinks", "bias")


@dataclass(frozen=True)
class Case:
    """positions: plain (0, 1, ...), last (the queries are the last tokens), ring (keys in any order, some missing, in one row all),
    shuffled (queries and keys alike). bias: its first two dims. block: of the forms that go block by block; None where they cannot serve
    the case. half: values that bfloat16 can hold."""

    T: int = 37
    S: int | None = None
    N: int = 4
    K: int = 2
    H: int = 8
    h: int = 8
    mask: Mask = Causal()
    positions: str = "plain"
    segments: str | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: tuple[int, int] | None = None
    keep: bool = False
    block: int | None = 16
    half: bool = False

    @cached_property
    def inputs(self):
        """Values of float32 (or bfloat16) in float64 arrays: rounding them is no error of the op."""
        random, B, T, S = np.random.default_rng(crc32(repr(self).encode())), 2, self.T, self.S or self.T
        kind = jnp.bfloat16 if self.half else np.float32
        normal = lambda *shape: random.standard_normal(shape).astype(kind).astype(np.float64)
        x = {"q": normal(B, T, self.N, self.H), "k": normal(B, S, self.K, self.H), "v": normal(B, S, self.K, self.h)}
        x["do"] = normal(B, T, self.N, self.h)
        x["sinks"] = normal(self.N) if self.sinks else None
        x["bias"] = normal(*self.bias, T, S) if self.bias else None
        x["keep"] = random.integers(0, 2, (B, self.N, T, S)) * 2.0 if self.keep else None
        x["q_pos"], x["kv_pos"] = np.tile(np.arange(T), (B, 1)), np.tile(np.arange(S), (B, 1))
        if self.positions == "last":
            x["q_pos"] += S - T
        if self.positions == "shuffled":
            x["q_pos"] = x["kv_pos"] = random.permuted(x["q_pos"], axis=1)
        if self.positions == "ring":
            x["kv_pos"] = random.permuted(x["kv_pos"], axis=1)
            x["kv_pos"][random.random((B, S)) < 0.3] = -1
            x["kv_pos"][1] = -1
            x["q_pos"][0, -2:] = -1
        x["q_seg"] = x["kv_seg"] = None
        if self.segments == "packed":
            x["q_seg"] = x["kv_seg"] = np.sort(random.integers(1, 5, (B, T)), axis=1)
        elif self.segments == "disjoint":  # no query of the first row sees anything
            x["q_seg"] = random.integers(1, 4, (B, T))
            x["kv_seg"] = x["q_seg"] + np.array([[10], [0]])
        return x

    @cached_property
    def see(self):
        x, rule = self.inputs, (SEES | WIDER)[self.mask]
        table = np.zeros((2, self.T, self.S or self.T), bool)
        for b, t, s in np.ndindex(table.shape):
            q, k = int(x["q_pos"][b, t]), int(x["kv_pos"][b, s])
            same = x["q_seg"] is None or x["q_seg"][b, t] == x["kv_seg"][b, s]
            table[b, t, s] = k >= 0 and same and rule(q, k)
        return table

    def torch(self, dtype, formula):
        """(value, gradients) of a formula in torch, by its autograd."""
        x = {n: None if a is None else torch.tensor(a).to(dtype if a.dtype == np.float64 else torch.int64) for n, a in self.inputs.items()}
        wrt = {n: x[n].requires_grad_() for n in DIFFERENTIABLE if x[n] is not None}
        o = formula(self, **{n: x[n] for n in ("q", "k", "v", "sinks", "bias", "keep")})
        return o.detach(), dict(zip(wrt, torch.autograd.grad(o, list(wrt.values()), x["do"])))

    def ours(self, dtype, impl):
        """(value, gradients) of the op."""
        x = {n: None if a is None else jnp.asarray(a, dtype if a.dtype == np.float64 else jnp.int32) for n, a in self.inputs.items()}
        do = x.pop("do")
        wrt = {n: x.pop(n) for n in DIFFERENTIABLE if x[n] is not None}

        @jax.jit
        def value_and_grad(wrt, x, do):
            static = dict(mask=self.mask, scale=self.scale, softcap=self.softcap, impl=impl)
            o, vjp = jax.vjp(lambda wrt: attention(**x, **wrt, **static), wrt)
            return o, vjp(do)[0]

        with strictly() if impl == "tpu" else nullcontext():
            return jax.block_until_ready(value_and_grad(wrt, {n: a for n, a in x.items() if a is not None}, do))


def naive(case, q, k, v, sinks, bias, keep, softmax=torch.softmax):
    see = torch.tensor(case.see)[:, None]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    k, v = (a.repeat_interleave(case.N // case.K, 1) for a in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ k.to(wide).transpose(2, 3) * (case.scale or case.H**-0.5)
    s = s if case.softcap is None else case.softcap * torch.tanh(s / case.softcap)
    s = (s if bias is None else s + bias).masked_fill(~see, -torch.inf)
    some = see.any(-1, keepdim=True)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1)
        some = torch.ones_like(some)
    p = softmax(torch.where(some, s, 0), -1) * some  # a row that sees nothing is zero
    p = p[..., : see.shape[-1]]
    return ((p if keep is None else p * keep).to(v.dtype) @ v).transpose(1, 2)


def saving_lse(*args, **kwargs):
    """The formula of a gradient that saves one number a row: its last bit is an error of the probabilities."""
    return naive(*args, **kwargs, softmax=lambda s, dim: torch.exp(s - torch.logsumexp(s, dim, keepdim=True)))


def torchs_own(case, q, k, v, sinks, bias, keep):
    """The same by torch's own op: the soft cap and dropout it cannot express. A sink is one more key, of value zero."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    B, N, T, S = *q.shape[:3], k.shape[2]
    s = torch.zeros(B, N, T, S, dtype=q.dtype) if bias is None else bias.expand(B, N, T, S)
    s = s.masked_fill(~torch.tensor(case.see)[:, None], -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(B, N, T, 1)], -1)
        k, v = (torch.cat([a, torch.zeros_like(a[:, :, :1])], 2) for a in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, s, scale=case.scale, enable_gqa=True).transpose(1, 2)


CASES = {
    "mha": Case(K=4),
    "gqa": Case(),
    "mqa": Case(K=1),
    "one_token": Case(T=1),
    "length_15": Case(T=15, block=4),
    "length_100": Case(T=100, mask=Causal() & Window(5)),
    "length_111": Case(T=111),
    "full": Case(mask=Full()),
    "window": Case(mask=Causal() & Window(5)),
    "prefix": Case(mask=Causal() | Prefix(6)),
    "local_global": Case(mask=Window(3, 3) | Global(2)),
    "dilated": Case(mask=Causal() & Dilated(3)),
    "strided": Case(mask=Causal() & Strided(8, 2)),
    "chunk": Case(mask=Causal() & Chunk(10)),
    "softcap": Case(softcap=1.5, scale=0.9),
    "segments": Case(segments="packed"),
    "nothing_seen": Case(segments="disjoint"),
    "sinks": Case(sinks=True),
    "sinks_alone": Case(sinks=True, segments="disjoint"),
    "sinks_softcap_window_segments": Case(T=50, sinks=True, softcap=2.0, mask=Causal() & Window(5), segments="packed"),
    "wide_values": Case(h=24),
    "narrow_values": Case(h=3, softcap=2.0),
    "decode": Case(T=1, S=37, positions="last"),
    "late_chunk": Case(T=9, S=37, positions="last"),
    "late_chunk_window": Case(T=9, S=37, positions="last", mask=Causal() & Window(5)),
    "cross": Case(T=21, S=40, mask=Full(), K=1),
    "ring": Case(T=20, S=37, positions="ring"),
    "ring_full": Case(T=20, S=37, positions="ring", mask=Full(), softcap=3.0),
    "shuffled": Case(positions="shuffled"),
    "bias": Case(T=15, bias=(1, 1), block=None),
    "bias_of_heads": Case(T=15, bias=(1, 4), softcap=2.0, block=None),
    "bias_of_rows": Case(T=15, bias=(2, 1), sinks=True, block=None),
    "bias_of_all": Case(T=15, bias=(2, 4), segments="disjoint", block=None),
    "dropout": Case(T=15, keep=True, block=None),
    "dropout_bias_sinks": Case(T=15, keep=True, bias=(1, 4), sinks=True, softcap=2.0, K=1, block=None),
}
BOTH = [pytest.param(n, i, id=f"{n}-{i}") for n, case in CASES.items() for i in IMPLS if i == "reference" or case.block]


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of a given size for any length, however short."""

    def use(size):
        for impl, module in (("xla", chunked), ("cpu", cpu)):
            monkeypatch.setattr(module, "BLOCK", size)
            monkeypatch.setitem(op.FORWARD, impl, Branch(module.forward))
            monkeypatch.setitem(op.BACKWARD, impl, Branch(module.backward))

    return use


def pairs(ours, theirs):
    """(name, our array, their array) of the value and of each gradient, as float64."""
    assert ours[1].keys() == theirs[1].keys()
    for name in ("o", *sorted(ours[1])):
        a, b = (ours[0], theirs[0]) if name == "o" else (ours[1][name], theirs[1][name])
        yield name, *(x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64) for x in (a, b))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.softcap is None and not c.keep and c.see.any(-1).all()])
def test_the_oracle_is_torchs_own_attention(name):
    case = CASES[name]
    for what, a, b in pairs(case.torch(torch.float64, torchs_own), case.torch(torch.float64, naive)):
        assert np.abs(a - b).max() <= 1e-12, what


@pytest.mark.parametrize("name, impl", BOTH)
def test_value_and_every_gradient_in_float64(name, impl, blocks):
    """1e-10: the inventory's bar where both sides are float64."""
    case = CASES[name]
    blocks(case.block)
    with jax.enable_x64(True):
        ours = case.ours(jnp.float64, impl)
    for what, a, b in pairs(ours, case.torch(torch.float64, naive)):
        assert a.shape == b.shape and np.abs(a - b).max() <= 1e-10, what  # a NaN fails too


FEW = ("gqa", "length_111", "window", "sinks_softcap_window_segments", "ring_full", "late_chunk", "bias_of_all", "dropout_bias_sinks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, impl", [p for p in BOTH if p.values[0] in FEW])
def test_error_is_at_most_twice_that_of_the_formula_in_the_same_precision(name, impl, dtype, blocks):
    """Errors against float64, largest and root mean square. One rounding of a number of size one is allowed on top of the largest, because
    a formula may be exact by luck. The gradient of the sinks is a sum of do . o, and o is saved rounded: half a rounding more."""
    case = replace(CASES[name], half=dtype == torch.bfloat16)
    blocks(case.block)
    kind = jnp.bfloat16 if case.half else jnp.float32
    one, rms = float(jnp.finfo(kind).eps), lambda e: np.sqrt(np.mean(e**2))
    ours, exact = case.ours(kind, impl), case.torch(torch.float64, naive)
    same = case.torch(dtype, naive)[0], case.torch(dtype, saving_lse)[1]
    assert ours[0].dtype == kind and all(g.dtype == kind for g in ours[1].values())
    for (what, a, x), (_, b, _) in zip(pairs(ours, exact), pairs(same, exact)):
        assert np.abs(a - x).max() <= 2 * np.abs(b - x).max() + one * max(np.abs(x).max(), 1), what
        assert rms(a - x) <= 2 * rms(b - x) + (one / 2 * rms(x) if what == "sinks" else 0), what


# TPU kernels, in tiles of 2 x 2 granules of 128 so that short lengths have several.
SMALL = tiles.Shape(256, 256, 128, 128)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tpu, "tile_shape", lambda *_: SMALL)
    jax.clear_caches()
    yield
    jax.clear_caches()


def check_tpu(case, impl="tpu"):
    """Value and each gradient by the rule of the test above. In float32 both are near the last bit, where the largest of a few errors is
    chance: there it is the largest of value and gradients together, of torch's forms and the op's own reference."""
    case_of = torch.bfloat16 if case.half else torch.float32
    kind = jnp.bfloat16 if case.half else jnp.float32
    one, rms, largest = float(jnp.finfo(kind).eps), lambda e: np.sqrt(np.mean(e**2)), lambda x: max(np.abs(x).max(), 1)
    ours, exact = case.ours(kind, impl), case.torch(torch.float64, naive)
    same = case.torch(case_of, naive)[0], case.torch(case_of, saving_lse)[1]
    others = [same] if case.half else [same, case.ours(kind, "reference")]
    found = [(what, a - x, [b - x for _, b, _ in b], x) for (what, a, x), *b in zip(*(pairs(other, exact) for other in (ours, *others)))]
    chance = 0 if case.half else max(np.abs(b).max() / largest(x) for _, _, b, x in found)
    for what, a, b, x in found:
        assert np.abs(a).max() <= 2 * max(np.abs(b).max(), chance * largest(x)) + one * largest(x), what
        assert rms(a) <= 2 * max(map(rms, b)) + (one / 2 * rms(x) if what == "sinks" else 0), what


TPU_CASES = {
    "gqa": Case(T=300, half=True),
    "all_at_once": Case(T=300, sinks=True, softcap=2.0, mask=Causal() & Window(140), segments="packed", H=24, h=16, half=True),
    "float32": Case(T=150, N=2, h=24, sinks=True, segments="packed"),
    "late_chunk": Case(T=40, S=300, positions="last", mask=Causal() & Window(150), K=4),
    "ring": Case(T=20, S=300, positions="ring", K=1, half=True),
    "nothing_seen": Case(T=16, segments="disjoint", sinks=True),
    "bias": Case(T=150, bias=(1, 4), softcap=2.0, half=True),
    "bias_of_rows": Case(T=130, bias=(2, 1), mask=Full(), N=2),
    "local_global": Case(T=280, mask=Window(3, 3) | Global(2), N=2, half=True),
    "strided": Case(T=140, mask=Causal() & Strided(8, 2), N=2, half=True),
    "shuffled": Case(T=111, positions="shuffled", N=2, half=True),
    "one_token": Case(T=1),
}
FEATURES = [
    dict(), dict(half=True, K=1), dict(sinks=True, softcap=2.0, half=True), dict(segments="packed", half=True),
    dict(segments="disjoint", sinks=True), dict(bias=(1, 4), half=True), dict(bias=(2, 1), sinks=True, softcap=3.0),
    dict(H=80, h=96, half=True, K=4), dict(H=192, h=128, half=True, segments="packed"),
]  # fmt: skip
LENGTHS = [dict(T=8), dict(T=15), dict(T=100), dict(T=111), dict(T=257), dict(T=40, S=300, positions="last")]
GRID = [Case(mask=mask, **length, **feature) for mask in SEES for length in LENGTHS for feature in FEATURES
        if not (feature.get("segments") and "S" in length)]  # fmt: skip


@pytest.mark.parametrize("name", TPU_CASES)
def test_tpu_kernels_in_interpret_mode(name, small_tiles):
    check_tpu(TPU_CASES[name])


@pytest.mark.nightly
@pytest.mark.parametrize("case", GRID, ids=repr)
def test_tpu_kernels_over_the_grid(case, small_tiles):
    check_tpu(case)


@pytest.mark.nightly
@pytest.mark.parametrize("H, h", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("T", [1000, 1100])
def test_tpu_kernels_at_their_own_tile_size(T, H, h):
    check_tpu(Case(T=T, N=1, K=1, H=H, h=h, half=True))


@pytest.mark.nightly
@given(st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_tpu_kernels_on_anything(data):
    draw = lambda *options: data.draw(st.sampled_from(options))
    T, segments = data.draw(st.integers(1, 300)), draw(None, "packed", "disjoint")
    S = None if segments else draw(None, T + data.draw(st.integers(0, 200)))
    sizes = dict(T=T, S=S, K=draw(1, 2, 4), H=draw(8, 24, 64), h=draw(8, 40))
    seen = dict(mask=draw(*SEES), positions="plain" if S is None else draw("last", "ring"), segments=segments)
    scores = dict(softcap=draw(None, 2.0), sinks=draw(True, False), bias=draw(None, (1, 4), (2, 1)), half=draw(True, False))
    check_tpu(Case(**sizes, **seen, **scores))


def test_tile_size_changes_nothing_but_rounding_on_a_tpu(monkeypatch):
    case, results = Case(T=300, N=2, K=1, segments="packed", sinks=True), []
    for shape in (tiles.Shape(128, 128, 128, 128), SMALL, tiles.Shape(512, 256, 256, 128)):
        monkeypatch.setattr(tpu, "tile_shape", lambda *_, shape=shape: shape)
        jax.clear_caches()
        results.append(case.ours(jnp.float32, "tpu"))
    jax.clear_caches()
    for other in results[1:]:
        for what, a, b in pairs(other, results[0]):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), what


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
COMPILED = {
    "gqa": Case(T=150, H=64, h=64),
    "all_at_once": Case(T=150, H=80, h=96, sinks=True, softcap=2.0, segments="packed", mask=(Causal() & Window(140)) | Global(4)),
    "bias": Case(T=300, H=128, h=128, bias=(1, 4)),
    "latent": Case(T=300, H=192, h=128),
    "wide": Case(T=300, H=256, h=256, K=1),
    "float32": Case(T=300, H=96, h=96, half=False),
    "masks": Case(T=150, H=128, h=128, mask=(Causal() & Dilated(3)) | (Strided(8, 2) & Chunk(10))),
}
FIRST = [("v6e", "gqa"), ("v5e", "all_at_once")]


@pytest.mark.parametrize(
    "chip, name",
    [pytest.param(chip, name, marks=() if (chip, name) in FIRST else pytest.mark.nightly) for chip in CHIPS for name in COMPILED],
)
def test_tpu_kernels_compile(chip, name):
    """With the TPU's own compiler: forward and backward, as impl "auto" chooses them there."""
    case, kind = COMPILED[name], jnp.float32 if name == "float32" else jnp.bfloat16
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    B, T, N, H, h, K = 2, case.T, case.N, case.H, case.h, case.K
    x = dict(q=(B, T, N, H), k=(B, T, K, H), v=(B, T, K, h), q_pos=(B, T), kv_pos=(B, T))
    x |= dict(q_seg=(B, T), kv_seg=(B, T)) if case.segments else {}
    x |= dict(sinks=(N,)) if case.sinks else {}
    x |= dict(bias=(*case.bias, T, T)) if case.bias else {}
    dtype = lambda name: jnp.int32 if name.endswith(("pos", "seg")) else kind
    x = {n: jax.ShapeDtypeStruct(size, dtype(n), sharding=SingleDeviceSharding(device)) for n, size in x.items()}
    wrt = {n: x.pop(n) for n in DIFFERENTIABLE if n in x}

    def loss(wrt, x):
        o = attention(**wrt, **x, mask=case.mask, softcap=case.softcap, chip=device.device_kind)
        return o.astype(jnp.float32).sum()

    text = jax.jit(jax.value_and_grad(loss)).trace(wrt, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "attention_forward" in text and "attention_backward" in text


@pytest.mark.parametrize("impl", IMPLS)
def test_log_sum_exp_and_its_gradient(impl, blocks):
    blocks(8)
    case = CASES["sinks"]
    x = {n: None if a is None else jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else jnp.int32) for n, a in case.inputs.items()}
    do = x.pop("do")

    def loss(wrt, impl):
        o, lse = attention(**(x | wrt), impl=impl, return_lse=True)
        return (o * do).sum() + (lse**2).sum(), (o, lse)

    def plain(wrt):
        k = jnp.repeat(wrt["k"], 2, 2)
        s = jnp.einsum("btnh,bsnh->bnts", wrt["q"], k) * case.H**-0.5
        s = jnp.where(jnp.asarray(case.see)[:, None], s, -jnp.inf)
        s = jnp.concatenate([s, jnp.broadcast_to(wrt["sinks"][None, :, None, None], (*s.shape[:3], 1))], -1)
        lse = jax.nn.logsumexp(s, -1)
        o = jnp.einsum("bnts,bsnh->btnh", jnp.exp(s - lse[..., None])[..., :-1], jnp.repeat(wrt["v"], 2, 2))
        return (o * do).sum() + (lse**2).sum(), (o, lse.swapaxes(1, 2))

    wrt = {n: x[n] for n in ("q", "k", "v", "sinks")}
    ours, grads = jax.jit(jax.grad(lambda w: loss(w, impl), has_aux=True))(wrt)[::-1]
    theirs, expected = jax.jit(jax.grad(plain, has_aux=True))(wrt)[::-1]
    for a, b in zip(jax.tree.leaves((ours, grads)), jax.tree.leaves((theirs, expected)), strict=True):
        assert a.shape == b.shape and jnp.abs(a - b).max() <= 2e-5 * jnp.abs(b).max()


def test_log_sum_exp_of_nothing_is_minus_infinity():
    x, pos = jnp.ones((1, 2, 1, 4)), jnp.full((1, 2), -1)
    assert (attention(x, x, x, q_pos=pos, kv_pos=pos, return_lse=True)[1] == -jnp.inf).all()


def test_alibi_t5_and_shaw():
    """Value and the gradient of the table, against formulae of their own in float64."""
    random, B, T, N, H = np.random.default_rng(0), 2, 30, 4, 8
    with jax.enable_x64(True):
        q, k, v, do = (jnp.asarray(random.standard_normal((B, T, N, H))) for _ in range(4))
        pos = jnp.tile(jnp.arange(T), (B, 1))
        relative = jnp.asarray(random.standard_normal((2 * 5 + 1, H)))
        buckets = jnp.asarray(random.standard_normal((1, N, 1, 32)))
        place = np.arange(T)
        away = place[None, :] - place[:, None]
        far = lambda d: min(8 + int(np.log(d / 8) / np.log(16) * 8), 15)
        hf = np.vectorize(lambda d: (16 if d > 0 else 0) + (abs(d) if abs(d) < 8 else far(abs(d))))(away)
        schemes = {
            "alibi": (Alibi(), lambda t: t, Alibi.slopes(N)[None, :, None, None].astype(q.dtype), lambda t: t * away),
            "t5": (Buckets(), lambda t: t, buckets, lambda t: t[:, :, 0][:, :, hf]),
            "shaw": (Clipped(5), lambda a: jnp.einsum("btnh,rh->bntr", q, a) * H**-0.5, relative,
                     lambda a: jnp.einsum("btnh,tsh->bnts", q, a[np.clip(away, -5, 5) + 5]) * H**-0.5),
        }  # fmt: skip
        for name, (score, table, x, expected) in schemes.items():
            ours = lambda x, s=score, t=table: (attention(q, k, v, q_pos=pos, kv_pos=pos, score=s, table=t(x)) * do).sum()
            theirs = lambda x, e=expected: (attention(q, k, v, q_pos=pos, kv_pos=pos, bias=jnp.broadcast_to(e(x), (B, N, T, T))) * do).sum()
            (a, da), (b, db) = (jax.value_and_grad(f)(x) for f in (ours, theirs))
            assert abs(a - b) <= 1e-4 * abs(b) and jnp.abs(da - db).max() <= 1e-4 * jnp.abs(db).max(), name
    assert np.allclose(Alibi.slopes(8), [2.0**-i for i in range(1, 9)])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing_are_zero_and_send_no_gradient(impl, blocks):
    blocks(16)
    case = CASES["nothing_seen"]
    o, grads = case.ours(jnp.float32, impl)
    assert not o[0].any() and o[1].any()
    for name in ("q", "k", "v"):
        assert not grads[name][0].any() and grads[name][1].any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(impl, blocks):
    """Whole numbers up to 10,000, exact in float32. The value is as exact as small ones; the gradient recomputes exp(s - lse) from an lse
    of size 10,000, whose last bit is 1e-3 (measured: half of it), as in every flash attention."""
    blocks(8)
    random, T = np.random.default_rng(0), 40
    x = dict(q=random.integers(-50, 51, (1, T, 1, 4)), k=random.integers(-50, 51, (1, T, 1, 4)), v=random.standard_normal((1, T, 1, 4)))
    x = {n: a.astype(np.float32) for n, a in x.items()}
    pos = jnp.arange(T)[None]

    def f(x):
        return attention(**x, q_pos=pos, kv_pos=pos, scale=1.0, impl=impl)

    exact = [torch.tensor(x[n]).double().requires_grad_() for n in "qkv"]
    assert np.abs(np.einsum("btnh,bsnh->bts", x["q"], x["k"])).max() > 5000
    o = torch.nn.functional.scaled_dot_product_attention(*(a.transpose(1, 2) for a in exact), is_causal=True, scale=1.0).transpose(1, 2)
    assert np.abs(np.asarray(jax.jit(f)(x)) - o.detach().numpy()).max() <= 1e-6
    grads = jax.jit(jax.grad(lambda x: (f(x) ** 2).sum()))(x)
    for a, b in zip((grads[n] for n in "qkv"), torch.autograd.grad((o**2).sum(), exact)):
        assert np.abs(np.asarray(a) - b.numpy()).max() <= 1e-3 * max(b.abs().max(), 1)


@pytest.mark.parametrize("impl", ["xla", "cpu"])
def test_block_size_changes_nothing_but_rounding(impl, blocks):
    case = CASES["sinks_softcap_window_segments"]
    with jax.enable_x64(True):
        results = []
        for size in (7, 25, 64):
            blocks(size)
            results.append(case.ours(jnp.float64, impl))
    for other in results[1:]:
        for what, a, b in pairs(other, results[0]):
            assert np.abs(a - b).max() <= 1e-12, what


@pytest.mark.parametrize("impl", IMPLS)
def test_every_transformation(impl, blocks):
    """jit, vmap, checkpoint and shard_map give what plain calls give, differentiated too: 1e-6, a few roundings of float32."""
    blocks(8)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((8, 20, n, 4)), jnp.float32) for n in (2, 1, 1))
    pos = jnp.tile(jnp.arange(20), (8, 1))

    def loss(q, k, v, pos):
        o = attention(q, k, v, q_pos=pos, kv_pos=pos, impl=impl)
        return (o**2).sum((1, 2, 3))

    mesh, rows = Mesh(np.array(jax.devices()).reshape(-1), "x"), PartitionSpec("x")
    forms = {
        "vmap": jax.vmap(lambda q, k, v, pos: loss(q[None], k[None], v[None], pos[None])[0]),
        "checkpoint": jax.checkpoint(loss),
        "shard_map": jax.shard_map(loss, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False),
    }

    def value_and_grads(form):
        def summed(*x):
            value = form(*x)
            return value.sum(), value

        grads, value = jax.jit(jax.grad(summed, (0, 1, 2), has_aux=True))(q, k, v, pos)
        return value, *grads

    plain = value_and_grads(loss)
    for name, form in forms.items():
        for a, b in zip(value_and_grads(form), plain):
            assert jnp.abs(a - b).max() <= 1e-6 * jnp.abs(b).max(), name
    assert jnp.abs(loss(q, k, v, pos) - plain[0]).max() <= 1e-6 * plain[0].max()


@pytest.mark.parametrize("impl", ["xla", "auto"])
def test_memory_is_linear_in_a_long_length(impl):
    """As compiled at the real block size: twice the length takes at most twice the memory (a [T, S] array would take four times)."""

    def temporary(T, f):
        x = [jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, T), jnp.int32)]
        return jax.jit(f).lower(*x).compile().memory_analysis().temp_size_in_bytes

    forward = lambda q, k, v, pos: attention(q, k, v, q_pos=pos, kv_pos=pos, impl=impl)
    both = jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2))
    for f in (forward, both):
        short, long = temporary(2048, f), temporary(4096, f)
        assert 0 < long <= 2 * short + 4096 and long < 4096 * 4096 * 4 / 4


@pytest.mark.parametrize("mask, segments, expected", [
    (Full(), False, 64),
    (Causal(), False, 36),                      # the lower triangle of 8 x 8
    (Causal() & Window(16), False, 15),         # the diagonal and the one before it
    (Causal() & Window(17), False, 15),         # the first key of a block is 16 before the last one's first query
    (Causal() & Window(18), False, 21),
    (Chunk(32), False, 16),                     # 4 chunks of 2 x 2
    (Causal() | Prefix(16), False, 36),
    (Causal(), True, 20),                       # two documents of 4 blocks
], ids=str)  # fmt: skip
def test_blocks_that_cannot_matter_are_skipped(mask, segments, expected, blocks, monkeypatch):
    """Counted while it runs, forward and backward, with 128 tokens in blocks of 16."""
    blocks(16)
    seen, logits = [], chunked.logits

    def counted(*args, **static):
        jax.debug.callback(lambda: seen.append(1))
        return logits(*args, **static)

    monkeypatch.setattr(chunked, "logits", counted)
    x, pos = jnp.ones((1, 128, 1, 4)), jnp.arange(128)[None]
    seg = (pos >= 64).astype(jnp.int32) if segments else None
    f = lambda x: attention(x, x, x, mask=mask, q_pos=pos, kv_pos=pos, q_seg=seg, kv_seg=seg, impl="xla").sum()
    jax.block_until_ready(jax.jit(f)(x))
    jax.effects_barrier()
    assert len(seen) == expected
    jax.block_until_ready(jax.jit(jax.grad(f))(x))
    jax.effects_barrier()
    assert len(seen) == 3 * expected


def test_empty_slots_of_a_cache_are_skipped(blocks, monkeypatch):
    """A cache of 128 slots with 20 tokens in it costs two blocks, not eight."""
    blocks(16)
    seen, logits = [], chunked.logits
    monkeypatch.setattr(chunked, "logits", lambda *a, **s: (jax.debug.callback(lambda: seen.append(1)), logits(*a, **s))[1])
    kv_pos = jnp.where(jnp.arange(128) < 20, jnp.arange(128), -1)[None]
    kv = jnp.ones((1, 128, 1, 4))
    decode = lambda q: attention(q, kv, kv, mask=Full(), q_pos=jnp.full((1, 1), 20), kv_pos=kv_pos, impl="xla")
    jax.block_until_ready(jax.jit(decode)(kv[:, :1]))
    jax.effects_barrier()
    assert len(seen) == 2


@pytest.mark.parametrize("order, ordered", [("plain", True), ("packed", True), ("shuffled", False), ("ring", False)])
def test_a_cpu_leaves_out_the_keys_behind_a_block_where_the_row_is_in_order(order, ordered, blocks, monkeypatch):
    """Counted while it runs: the keys that each block of 16 queries is multiplied by."""
    blocks(16)
    seen, scores = [], cpu._scores

    def counted(q, k, *args):
        jax.debug.callback(lambda n=k.shape[1]: seen.append(n))
        return scores(q, k, *args)

    monkeypatch.setattr(cpu, "_scores", counted)
    x, pos, seg = jnp.ones((1, 64, 1, 4)), np.arange(64), None
    if order == "packed":
        pos, seg = pos % 40, jnp.asarray(pos // 40 + 1, jnp.int32)[None]
    q_pos = jnp.asarray(pos[::-1].copy() if order == "shuffled" else pos, jnp.int32)[None]
    kv_pos = jnp.roll(q_pos, 5, 1) if order == "ring" else q_pos
    jax.block_until_ready(jax.jit(lambda x: attention(x, x, x, q_pos=q_pos, kv_pos=kv_pos, q_seg=seg, kv_seg=seg, impl="cpu"))(x))
    jax.effects_barrier()
    assert sorted(seen) == ([16, 32, 48, 64] if ordered else [64] * 4)


@pytest.mark.parametrize("change, message", [
    (dict(k=(2, 5, 3, 8), v=(2, 5, 3, 8)), "4 query heads for 3 key/value heads"),
    (dict(kv_seg=(2, 5)), "segments for queries and keys, or for neither"),
    (dict(impl="xla", bias=(1, 1, 5, 5)), "cannot serve this call"),
    (dict(impl="xla"), "too short to gain"),
    (dict(impl="tpu", keep=(2, 4, 5, 5)), "a dropout mask"),
    (dict(q_seg=(2, 5), kv_seg=(2, 6)), r"kv_seg of shape \(2, 5\).*got \(2, 6\)"),
    (dict(sinks=(3,)), r"sinks of shape \(4,\)"),
    (dict(k=(2, 5, 2, 7)), r"k of shape \(2, 5, 2, 8\)"),
    (dict(score=Alibi()), "a score and its table"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_errors_name_the_numbers(change, message):
    args = dict(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8), q_pos=(2, 5), kv_pos=(2, 5)) | change
    kind = lambda name: jnp.int32 if name.endswith(("pos", "seg")) else jnp.float32
    args = {n: jnp.zeros(a, kind(n)) if isinstance(a, tuple) else a for n, a in args.items()}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(attention)(**args)  # as it is without the tests' own check of shapes
