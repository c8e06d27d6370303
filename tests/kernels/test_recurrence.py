"""Linear attention and the delta rule: the recurrence in float64 is the oracle, for values and all gradients.

RMS ratios: 1e-5 in float32; in bfloat16 5e-3 for outputs, 8e-3 for the gradients of q, k, v and the state, 2e-2 for those of gates.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels import delta_rule, linear_attention
from minllm_kernels.ops import recurrence

NAMES = ("q", "k", "v", "beta", "log_decay", "state")
BARS = dict(y=5e-3, after=5e-3, q=8e-3, k=8e-3, v=8e-3, state=8e-3, beta=2e-2, log_decay=2e-2)
# by name: (is it a delta rule, has it a decay a channel; None: no decay)
RULES = {"plain": (False, None), "linear": (False, False), "gla": (False, True), "gdn": (True, False), "kda": (True, True)}


def inputs(rule, T, K=2, N=4, H=12, h=20, B=2, gates="mixed", beta=(0.0, 2.0), seed=0):
    """float64 arrays by name. mixed gates: a third saturated at -30, a third at 0, the others between; beta: its range."""
    delta, channels = RULES[rule]
    r = np.random.default_rng(seed)
    q, k, v = r.normal(size=(B, T, K, H)), r.normal(size=(B, T, K, H)), r.normal(size=(B, T, N, h))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    shape = (B, T, N, H) if channels else (B, T, N)
    g = -np.exp(2 * r.normal(size=shape) - 3)
    if gates == "mixed":
        g = np.select([r.random(shape) < 1 / 3, r.random(shape) < 1 / 2], [-30 * np.ones(shape), np.zeros(shape)], g)
    elif gates != "smooth":
        g = np.full(shape, float(gates))
    return dict(q=q / H**0.5, k=k, v=v, beta=r.uniform(*beta, size=(B, T, N)) if delta else None, log_decay=None if channels is None else g,
                state=r.normal(size=(B, N, H, h)))  # fmt: skip


def ragged(T, B=2, seed=3):
    """Documents of one, two and more tokens, many in one chunk; padding at the end of the first row."""
    r = np.random.default_rng(seed)
    rows = [np.repeat(np.arange(1, T + 1), r.choice([1, 2, 3, 9, 30], size=T, p=[0.3, 0.2, 0.2, 0.2, 0.1]))[:T] for _ in range(B)]
    rows[0][T - T // 8 :] = 0
    return np.stack(rows).astype(np.int32)


def by_hand(q, k, v, beta, log_decay, state, segments):
    """Token after token and head after head, in numpy: (y, after)."""
    B, T, N, h = v.shape
    r = N // q.shape[2]
    y, after = np.zeros(v.shape), np.array(state)
    for b in range(B):
        for n in range(N):
            S, document = after[b, n], None
            for t in range(T):
                if segments is not None and segments[b, t] == 0:
                    continue
                if segments is not None and document not in (None, segments[b, t]):
                    S = np.zeros_like(S)
                document = None if segments is None else segments[b, t]
                key, value, decay = k[b, t, n // r], v[b, t, n], 1.0 if log_decay is None else np.exp(log_decay[b, t, n])
                S = (decay[:, None] if np.ndim(decay) else decay) * S
                S = S + np.outer(key, value if beta is None else beta[b, t, n] * (value - S.T @ key))
                y[b, t, n] = S.T @ q[b, t, n // r]
            after[b, n] = S
    return y, after


def call(args, segments, impl="auto"):
    q, k, v, beta, *rest = args
    if beta is None:
        return linear_attention(q, k, v, *rest, segments, impl=impl)
    return delta_rule(q, k, v, beta, *rest, segments, impl=impl)


def everything(args, segments, impl, dtype=jnp.float32):
    """Value and gradients by name: through y of the tokens that are there, and through the state after the last."""
    kinds = dict(q=dtype, k=dtype, v=dtype)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    arrays = {n: jnp.asarray(x, kinds.get(n, wide)) for n, x in args.items() if x is not None}
    r = np.random.default_rng(9)
    dy, dafter = r.normal(size=args["v"].shape), r.normal(size=args["state"].shape)
    if segments is not None:
        dy = dy * (segments > 0)[..., None, None]
        segments = jnp.asarray(segments)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            y, after = call([arrays.get(n) for n in NAMES], segments, impl)
            assert y.dtype == dtype and after.dtype == wide
            return (y.astype(wide) * dy).sum() + (after * dafter).sum(), (y, after)

        return jax.grad(loss, has_aux=True)(arrays)

    grads, (y, after) = run(arrays)
    y = y if segments is None else jnp.where((segments > 0)[..., None, None], y, 0)
    return {"y": y, "after": after, **grads}


def agree(ours, oracle, bars):
    for name, b in oracle.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), name
        ratio = np.sqrt(((a - b) ** 2).mean()) / max(np.sqrt((b**2).mean()), 1e-6)
        assert ratio <= (bars if isinstance(bars, float) else bars[name]), (name, ratio)


def oracle(args, segments, dtype=jnp.float64):
    """The recurrence in float64, of arguments that `dtype` can hold."""
    if dtype == jnp.bfloat16:
        args = {n: np.asarray(jnp.asarray(x, dtype), np.float64) if n in "qkv" else x for n, x in args.items()}
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, everything(args, segments, "reference", jnp.float64))


@pytest.mark.parametrize("rule", RULES)
def test_the_reference_is_the_formula(rule):
    args, segments = inputs(rule, 23), ragged(23)
    for seg in (segments, None):
        y, after = by_hand(*args.values(), seg)
        with jax.enable_x64(True):
            arrays = [None if x is None else jnp.asarray(x) for x in args.values()]
            ours = call(arrays, None if seg is None else jnp.asarray(seg), "reference")
            there = slice(None) if seg is None else seg > 0
            np.testing.assert_allclose(np.asarray(ours[0])[there], y[there], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(ours[1], after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_chunks_are_the_recurrence(rule):
    """Values and gradients, saturated gates beside open ones, several documents in a chunk, beta up to 2, a state that goes in and out."""
    args, segments = inputs(rule, 111), ragged(111)
    exact = oracle(args, segments)
    agree(everything(args, segments, "xla"), exact, 1e-5)
    agree(everything(args, segments, "xla", jnp.bfloat16), oracle(args, segments, jnp.bfloat16), BARS)


@pytest.mark.parametrize("rule", RULES)
def test_the_chunk_does_not_matter(rule, monkeypatch):
    args, segments = inputs(rule, 70), ragged(70)
    found = []
    for C in (16, 32, 128):
        monkeypatch.setattr(recurrence, "CHUNK", C)
        found.append(everything(args, segments, "xla"))
    for other in found[1:]:
        agree(other, found[0], 1e-6)


@pytest.mark.parametrize("T", [1, 15])
def test_short_calls_are_walked(T):
    """Decoding: fewer tokens than a chunk is worth."""
    args = inputs("kda", T)
    agree(everything(args, None, "auto"), oracle(args, None), 1e-5)


def test_extremes():
    """Gates that never and always forget, beta of 0 and 2: finite, and the same as the recurrence."""
    for gates, beta in (("0", (2, 2)), ("-30", (0, 0)), ("-30", (2, 2)), ("0", (0, 0))):
        args = inputs("kda", 40, gates=gates, beta=beta)
        ours, exact = everything(args, None, "xla"), oracle(args, None)
        for name, b in exact.items():  # a gate of -30 has gradients of 1e-13: what counts is their size beside the others
            assert np.abs(np.asarray(ours[name]) - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-2), (gates, beta, name)


def test_a_state_of_another_document_is_not_seen():
    """The state belongs to the first document of a row, wherever it ends."""
    args = inputs("gdn", 40)
    segments = np.repeat([[1] * 20 + [2] * 20], 2, 0)
    other = args | {"state": 5 * args["state"]}
    a, b = everything(args, segments, "xla"), everything(other, segments, "xla")
    np.testing.assert_array_equal(a["y"][:, 20:], b["y"][:, 20:])
    np.testing.assert_array_equal(a["after"], b["after"])
    assert float(jnp.abs(a["y"][:, :20] - b["y"][:, :20]).max()) > 0.1
    assert float(jnp.abs(a["state"]).max()) > 0.01


def test_padding_on_either_side_leaves_the_state_alone():
    args = inputs("kda", 40)
    cut = {n: x if n == "state" else x[:, 5:33] for n, x in args.items()}
    segments = np.zeros((2, 40), np.int32)
    segments[:, 5:33] = 1
    padded, bare = everything(args, segments, "xla"), everything(cut, None, "xla")
    np.testing.assert_allclose(padded["after"], bare["after"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(padded["y"][:, 5:33], bare["y"], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_said():
    q, v = jnp.ones((1, 4, 3, 8)), jnp.ones((1, 4, 4, 8))
    with pytest.raises(ValueError, match="4 value heads for 3 query and key heads"):
        linear_attention(q, q, v)
    with pytest.raises(ValueError, match=r"q \(1, 4, 3, 8\), k \(1, 4, 3, 8\) and v \(1, 5, 3, 8\)"):
        recurrence.run("delta_rule", q, q, jnp.ones((1, 5, 3, 8)), None, None, None, None, "auto", None)


# --- other people's functions -----------------------------------------------------------------------------------------------------


def torch_grads(f, args):
    import torch

    leaves = {n: torch.tensor(x, dtype=torch.float32, requires_grad=True) for n, x in args.items()}
    y, after = f(**leaves)
    r = np.random.default_rng(9)
    dy, dafter = (torch.tensor(r.normal(size=args[n].shape), dtype=torch.float32) for n in ("v", "state"))
    ((y * dy).sum() + (after * dafter).sum()).backward()
    return {"y": y.detach(), "after": after.detach()} | {n: x.grad for n, x in leaves.items()}


def test_gated_delta_rule_of_transformers():
    """Qwen3-Next's recurrent and chunked functions, grouped value heads included; both scale q by H^-1/2."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

    args = inputs("gdn", 70, gates="smooth", beta=(0, 1))
    ours = everything(args, None, "xla")
    for theirs in (torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule):
        f = lambda q, k, v, beta, log_decay, state, theirs=theirs: theirs(
            q * q.shape[-1] ** 0.5, k, v, g=log_decay, beta=beta, initial_state=state, output_final_state=True)  # fmt: skip
        agree(ours, {n: np.asarray(x) for n, x in torch_grads(f, args).items()}, 1e-5)


def test_kimi_delta_attention_of_transformers():
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    args = inputs("kda", 70, K=4, gates="smooth", beta=(0, 1))
    f = lambda q, k, v, beta, log_decay, state: recurrent_kimi_delta_attention(
        q * q.shape[-1] ** 0.5, k, v, log_decay, beta, state, True)  # fmt: skip
    agree(everything(args, None, "xla"), {n: np.asarray(x) for n, x in torch_grads(f, args).items()}, 1e-5)


# --- the TPU kernel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_tpu_kernel_in_the_interpreter(rule, monkeypatch):
    """Uninitialised memory is NaN, reads out of bounds raise, races are looked for."""
    monkeypatch.setattr(recurrence, "CHUNK", 16)
    # two groups of two value heads in one program, or eight value heads of one group in two
    args, segments = inputs(rule, 40, B=1, **(dict(K=1, N=8) if rule == "gdn" else {})), ragged(40, B=1)
    params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        ours = everything(args, segments, "tpu")
        low = everything(args, segments, "tpu", jnp.bfloat16)
    agree(ours, oracle(args, segments), 1e-5)
    agree(low, oracle(args, segments, jnp.bfloat16), BARS)


TOPOLOGIES = ["v5e:2x2", *(pytest.param(t, marks=pytest.mark.nightly) for t in ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"))]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "plain"])
def test_the_tpu_kernel_compiles(rule, topology):
    """Forward and backward, by the real compiler; two value heads a key head, and channels that are no multiple of the lanes."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    where = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    delta, channels = RULES[rule]
    B, T, K, N, H, h = 1, 256, 2, 4, 64, 128
    shaped = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    low = jnp.bfloat16
    args = [shaped(B, T, K, H, dtype=low), shaped(B, T, K, H, dtype=low), shaped(B, T, N, h, dtype=low), shaped(B, T, N) if delta else None,
            shaped(B, T, *((N, H) if channels else (N,))), shaped(B, N, H, h)]  # fmt: skip

    def loss(args):
        y, after = call(args, None, "tpu")
        return y.astype(jnp.float32).sum() + after.sum()

    compiled = jax.jit(jax.grad(loss)).trace(args).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2  # one forward, one backward


# --- the grid ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [1, 15, 63, 64, 100, 111, 1000, 8192])
@pytest.mark.parametrize("H", [32, 60, 64, 100, 128, 256])
def test_every_shape(rule, T, H):
    if T == 8192 and H not in (64, 128):
        H = 64
    size = dict(K=1, N=2, B=1, H=H, h=H) if T < 8192 else dict(K=1, N=1, B=1, H=H, h=H)
    args, segments = inputs(rule, T, **size), ragged(T, B=1) if T > 1 else None
    agree(everything(args, segments, "auto"), oracle(args, segments), 1e-5)
    agree(everything(args, segments, "auto", jnp.bfloat16), oracle(args, segments, jnp.bfloat16), BARS)
