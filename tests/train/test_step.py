"""The step: a pure function, whatever the microbatches, the mesh, the remat policy; its guard, its averages, its precision. What it
sends between devices is law 10 (tests/laws/test_communication.py)."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import spec
from minllm.data import Data
from minllm.layer import Precision
from minllm.layers.mlp import GLU
from minllm.optim import SGD, Adafactor, AdamW, Lion, Muon, Schedule
from minllm.run import Mesh, Model, Run
from minllm.step import build, make_step

B, T, V = 8, 16, 32
ARGS = dict(D=16, layers=2, heads=4, kv_heads=2, hidden=32, scaling=None)
FLAT = Schedule(shape="constant", warmup=0)
PLAIN = SGD(lr=1024.0, momentum=0.0)  # one step of it is the gradient, large enough to bury the rounding of the parameters


@cache
def program(devices=1, length=T, args=(), compute="float32", reduce="float32", mesh=(), optimizer=PLAIN, **changes):
    """(what was built, its compiled step): once for each combination, whichever test asks for it."""
    run = Run(
        model=Model(args={**ARGS, **dict(args)}), data=Data(length=length), batch=B, steps=1000, schedule=FLAT, optimizer=optimizer,
        precision=Precision(compute=compute, reduce=reduce), mesh=Mesh(**dict(mesh)), **changes,
    )  # fmt: skip
    built = build(run, V, jax.devices()[:devices])
    return built, built.compile(B, length)


def batch(seed, length=T):
    """Row i has its first i + 2 tokens: no two microbatches weigh the same."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, length + 1)).astype(np.int32)
    tokens[:, 0] = rng.permutation(V)[:B]  # what follows is then certain, once the row is known
    weights = (np.arange(length) < np.arange(2, B + 2)[:, None]).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "positions": positions,
            "segments": np.ones((B, length), np.int32)}  # fmt: skip


def put(built, host):
    where = built.place(host["tokens"].shape)
    return jax.device_put(host, where) if where is not None else jax.device_put(host)


def go(steps=1, seed=0, fixed=False, **settings):
    """(state, metrics of each step) after some steps from the same start."""
    built, step = program(**settings)
    state, seen = built.init(jax.random.key(seed)), []
    for i in range(steps):
        state, values = step(state, put(built, batch(0 if fixed else i, built.run.data.length)))
        seen.append(jax.device_get(values))
    return state, seen


def losses(seen):
    return np.array([values["loss"] for values in seen], np.float64)


def leaves(tree):
    raw = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    return {spec.path_name(path): np.asarray(raw(a)) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def distance(a, b):
    """|a - b| / |b| over all leaves."""
    a, b = leaves(a), leaves(b)
    return np.sqrt(sum(((a[n] - b[n]) ** 2).sum() for n in b) / sum((b[n] ** 2).sum() for n in b))


@cache
def start(**settings):
    return leaves(program(**settings)[0].init(jax.random.key(0)).params)


def gradient(**settings):
    """Of the batch, from one plain step."""
    before, after = start(**settings), leaves(go(**settings)[0].params)
    return {name: (before[name] - after[name]) / PLAIN.lr for name in before}


# --- pure -----------------------------------------------------------------------------------------------------------------------------


def test_the_step_is_a_function_bitwise():
    """G22: the same state and batch give the same state and metrics, and every leaf of the state takes part."""
    settings = dict(optimizer=AdamW(lr=1e-2), average=0.9)
    (a, seen), (b, again) = go(3, **settings), go(3, **settings)
    same(a, b)
    same(seen, again)
    assert int(a.step) == 3
    fresh = leaves(program(**settings)[0].init(jax.random.key(0)))
    still = {name for name, v in leaves(a).items() if np.array_equal(v, fresh[name])}
    assert still == {"key"}


def test_the_state_is_donated():
    built, step = program()
    state = built.init(jax.random.key(0))
    step(state, put(built, batch(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_batch_that_the_compiled_step_does_not_fit_is_refused():
    """Nothing compiles a second time behind the user's back."""
    built, step = program()
    short = {name: a[:, : T // 2] for name, a in batch(0).items()}
    with pytest.raises(TypeError, match="compiled"):
        step(built.init(jax.random.key(0)), jax.device_put(short))


def test_one_batch_is_learned_by_heart():
    """G31: below 0.05."""
    _, seen = go(250, fixed=True, optimizer=AdamW(lr=1e-2))
    assert losses(seen)[-1] < 0.05


def test_averages_follow_their_formula():
    """G20: a <- d a + (1 - d) p, d = min(decay, (1 + t) / (10 + t)). The average is float32: 1e-6, a few roundings."""
    built, step = program(optimizer=AdamW(lr=1e-2), average=0.3)
    state = built.init(jax.random.key(0))
    want = leaves(state.params)
    for t in range(8):
        state, _ = step(state, put(built, batch(t)))
        d = min(0.3, (1 + t) / (10 + t))
        want = {name: d * want[name].astype(np.float64) + (1 - d) * p for name, p in leaves(state.params).items()}
    for name, average in leaves(state.average).items():
        np.testing.assert_allclose(average, want[name], rtol=0, atol=1e-6)


# --- microbatches and precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 4])
def test_microbatches_of_uneven_weight_are_one_batch(pieces):
    """G15: 1e-6 relative, loss and gradient (tests/train/test_objectives.py has the same to 1e-12 in float64)."""
    settings = dict(clip=None, args=(("D", 64), ("hidden", 96)))
    assert distance(gradient(microbatches=pieces, **settings), gradient(**settings)) <= 1e-6
    a, b = go(**settings)[1], go(microbatches=pieces, **settings)[1]
    assert losses(b) == pytest.approx(losses(a), rel=1e-6)


def test_a_bfloat16_sum_of_microbatches_is_worse():
    """G15: why `precision.reduce` is float32."""
    whole, float32, bfloat16 = (gradient(clip=None, **more) for more in ({}, dict(microbatches=4), dict(microbatches=4, reduce="bfloat16")))
    assert distance(bfloat16, whole) > 100 * distance(float32, whole)


def test_float32_state_and_bfloat16_matmuls():
    """G16: parameters, moments and metrics float32; every product with a weight takes bfloat16 (as lowered: the CPU compiler widens)."""
    settings = dict(compute="bfloat16", optimizer=AdamW())
    state, seen = go(1, **settings)
    assert {a.dtype for a in jax.tree.leaves((state.params, state.opt_state[0].mu, state.opt_state[0].nu))} == {jnp.dtype("float32")}
    assert {np.asarray(seen[0][name]).dtype for name in ("loss", "grad_norm", "lr")} == {np.dtype("float32")}
    built = program(**settings)[0]
    text = jax.jit(make_step(built.model, built.transform, built.run, built.execution)).lower(built.state, built.batch(B, T)).as_text()
    dots = [re.findall(r"tensor<[\dx]*x(\w+)>", line.split(":")[-1]) for line in text.splitlines() if "dot_general" in line]
    weights = 7 * ARGS["layers"] + 1
    assert sum(kinds[:2] == ["bf16", "bf16"] for kinds in dots) >= 3 * weights, dots


def test_bfloat16_learns_what_float32_learns():
    """G16: within 1 % after 200 steps, the mean of the last ten."""
    a, b = (losses(go(200, optimizer=AdamW(lr=3e-3), compute=kind)[1])[-10:].mean() for kind in ("float32", "bfloat16"))
    assert b == pytest.approx(a, rel=0.01)


@pytest.mark.parametrize("kind", ["dots", "layer", "full"])
def test_remat_gives_the_same_gradient_in_less_memory(kind):
    """G18. Float32 here, 1e-6: the compiler may sum in another order (the law on execution has each layer)."""
    settings = dict(clip=None, length=64, args=(("layers", 4),), scan=True)
    (_, plain_step), (_, step) = program(**settings), program(remat=kind, **settings)
    assert distance(gradient(remat=kind, **settings), gradient(**settings)) <= 1e-6
    assert step.memory_analysis().temp_size_in_bytes < plain_step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mesh", [(), (("data", 1), ("fsdp", 2), ("context", 2), ("tensor", 2))], ids=["one", "mixed"])
def test_what_is_saved_by_name_is_not_computed_again(mesh):
    """Products in the program before it is compiled: with "attention" its two are not done again in any layer, and with all three names
    only the three that lead back to the residual stream are."""

    def products(**more):
        run = Run(model=Model(args=ARGS), data=Data(length=T), batch=B, mesh=Mesh(**dict(mesh)), scan=False, remat="layer", **more)
        return build(run, V, jax.devices()[: 8 if mesh else 1]).lower(B, T).as_text().count("dot_general")

    nothing, attention, names = (products(save=save) for save in ((), ("attention",), ("qkv", "attention", "mlp")))
    layers = ARGS["layers"]
    assert nothing - attention == 2 * layers  # q k^T and p v
    assert attention - names == 5 * layers  # q, k, v, gate, up
    assert distance(gradient(remat="layer", save=("attention",), clip=None), gradient(clip=None)) <= 1e-6


# --- the guard ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_number_of_the_step(value):
    """G27: bitwise, moments, averages and the norm's average included."""
    settings = dict(optimizer=AdamW(lr=1e-2), average=0.9)
    built, step = program(**settings)
    state, _ = go(2, **settings)
    before = leaves(state)
    bad = batch(2)
    bad["weights"] = bad["weights"].copy()
    bad["weights"][3, 1] = value
    state, values = step(state, put(built, bad))
    after = leaves(state)
    assert bool(values["skipped"]) and after.pop("step") == before.pop("step") + 1
    same(after, before)
    state, values = step(state, put(built, batch(3)))
    assert not values["skipped"] and all(np.isfinite(v).all() for name, v in leaves(state).items() if name != "key")


def test_a_spike_is_skipped_and_a_usual_norm_is_not():
    """spike times the moving average of the norm, which itself moves by 2 % a step and not at all on a skipped one."""
    settings = dict(optimizer=AdamW(lr=1e-3), spike=4.0)
    built, step = program(**settings)
    state, seen = go(4, **settings)
    norms = [float(v["grad_norm"]) for v in seen]
    want = norms[0]
    for norm in norms[1:]:
        want = 0.98 * want + 0.02 * norm
    assert not any(v["skipped"] for v in seen) and float(state.norm) == pytest.approx(want, rel=1e-5)
    before = leaves(state.params)
    low = state.replace(norm=state.norm / 8)
    kept = float(low.norm)
    state, values = step(low, put(built, batch(4)))
    assert values["skipped"] and float(state.norm) == kept
    same(leaves(state.params), before)


def test_norms_of_the_gradient_by_layer():
    """G28: the norm of every parameter, of a stacked one for each layer, together the norm that is clipped by."""
    _, seen = go(clip=None)
    norms, grads = seen[0]["layer_grad_norms"], gradient(clip=None)
    assert norms.keys() == grads.keys()
    for name, g in grads.items():
        axes = tuple(range(1, g.ndim)) if g.ndim and "pattern" in name else None
        # the gradient is read off the parameters before and after, so it carries their rounding: 1e-5
        np.testing.assert_allclose(norms[name], np.sqrt((g.astype(np.float64) ** 2).sum(axes)), rtol=1e-5, atol=1e-6)
    squares = sum((np.asarray(n, np.float64) ** 2).sum() for n in norms.values())
    assert np.sqrt(squares) == pytest.approx(float(seen[0]["grad_norm"]), rel=1e-5)


# --- meshes ---------------------------------------------------------------------------------------------------------------------------

MESHES = {
    "fsdp": (("data", 1), ("fsdp", 8)),
    "tensor": (("data", 2), ("tensor", 4)),
    "mixed": (("data", 1), ("fsdp", 2), ("context", 2), ("tensor", 2)),
}
DROPOUT = dict(optimizer=AdamW(lr=1e-3), args=(("dropout", 0.3),))


@pytest.mark.parametrize("mesh", MESHES)
def test_five_steps_on_eight_devices_are_those_of_one(mesh):
    """1e-5 relative, with dropout: a mask depends on step, layer and row, not on who draws it."""
    one, eight = losses(go(5, **DROPOUT)[1]), losses(go(5, devices=8, mesh=MESHES[mesh], **DROPOUT)[1])
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("zero", [1, 2])
def test_what_fsdp_shards_changes_nothing(zero, microbatches):
    """V03: the gradient of ZeRO-1 and 2 is that of 3 (1e-6: the order of float32 sums), and they hold the same state."""
    devices = B // microbatches
    settings = dict(devices=devices, mesh=(("data", 1), ("fsdp", devices)), clip=None, microbatches=microbatches)
    assert distance(gradient(zero=zero, **settings), gradient(**settings)) <= 1e-6
    a, b = (program(zero=z, **settings)[1].memory_analysis().argument_size_in_bytes for z in (zero, 3))
    assert a == b


@pytest.mark.parametrize("context", ["gather", "ring", "ulysses"])
def test_a_balanced_order_of_tokens_changes_nothing(context):
    """Five steps whose rows are spread over context=2 as early and late pieces: 1e-5, the order of float32 sums."""
    settings = dict(devices=8, mesh=(("data", 1), ("fsdp", 4), ("context", 2)), optimizer=AdamW(lr=1e-3))
    built, step = program(context=context, balance=True, **settings)
    state, seen = built.init(jax.random.key(0)), []
    for i in range(5):
        state, values = step(state, built.put(batch(i)))
        seen.append(jax.device_get(values))
    np.testing.assert_allclose(losses(seen), losses(go(5, optimizer=AdamW(lr=1e-3))[1]), rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    (dict(data=Data(length=24), mesh=Mesh(data=1, context=8), balance=True), "24 tokens do not divide into the 16 pieces"),
    (dict(data=Data(length=20), mesh=Mesh(data=1, context=8)), "20 does not divide over mesh context=8 x tensor=1; use a multiple of 8"),
    (dict(save=("attention",)), "save and offload say what remat keeps, and remat is 'none'; set remat: full or layer"),
    (dict(remat="full", save=("mlp",), offload=("mlp",)), "'mlp' cannot be both saved and offloaded"),
    (dict(mesh=Mesh(data=1, tensor=8)), "heads of 4 does not divide over the mesh axes tensor=8; choose sizes whose product divides 4"),
], ids=str)  # fmt: skip
def test_a_run_that_cannot_be_spread_out(changes, message):
    run = Run(**{**dict(model=Model(args=ARGS), data=Data(length=T), batch=B), **changes})
    with pytest.raises(ValueError, match=message):
        build(run, V, jax.devices())


def test_a_balanced_order_is_refused_to_layers_that_read_neighbours(monkeypatch):
    monkeypatch.setattr(GLU, "any_order", False)
    run = Run(model=Model(args=ARGS), data=Data(length=T), batch=B, mesh=Mesh(data=4, context=2), balance=True)
    with pytest.raises(ValueError, match="balance: true moves tokens, and GLU reads a token's neighbours; set balance: false"):
        build(run, V, jax.devices())


def test_dropout_draws_by_step_and_row():
    """The same masks for any number of microbatches (2e-6: the order of float32 sums), others at the next step."""
    settings = dict(clip=None, args=DROPOUT["args"])
    assert distance(gradient(microbatches=4, **settings), gradient(**settings)) <= 2e-6
    assert distance(gradient(**settings), gradient(clip=None)) > 0.1
    seen = losses(go(2, fixed=True, optimizer=AdamW(lr=1e-12), args=DROPOUT["args"])[1])
    assert abs(seen[0] - seen[1]) > 1e-4, "two steps drew the same mask"


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(), Lion(), Muon(), Adafactor()], ids=lambda o: o.kind)
def test_the_state_of_an_optimizer_lies_where_its_parameter_lies(optimizer):
    run = Run(model=Model(args=ARGS), data=Data(length=T), batch=B, optimizer=optimizer, average=0.9, mesh=Mesh(data=1, fsdp=4, tensor=2))
    state = build(run, V, jax.devices()).state
    where = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    big = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape in where and leaf.size > 64]
    assert len(big) >= len(where) - 3 and all(leaf.sharding.spec == where[leaf.shape] for leaf in big)
    assert all(leaf.sharding.spec == where[leaf.shape] for leaf in jax.tree.leaves(state.average))
    assert all(any(axis is not None for axis in leaf.sharding.spec) for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2)


def test_what_comes_out_of_a_step_lies_where_it_went_in():
    settings = dict(devices=8, mesh=MESHES["mixed"], **DROPOUT)
    state = go(1, **settings)[0]
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(program(**settings)[0].state), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
