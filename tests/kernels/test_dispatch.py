"""One op, several implementations: which one runs where, and what the choice costs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm_kernels import attention, dispatch
from minllm_kernels.dispatch import Branch, choose
from minllm_kernels.ops import attention as op

X = jnp.linspace(0.1, 1, 8)
WORDS = {"reference": "log", "xla": "exponential", "cpu": "sine", "tpu": "cosine", "gpu": "tanh"}  # what StableHLO calls them
CHIP = {"cpu": None, "tpu": "TPU v5 lite", "cuda": "NVIDIA H200"}
CALLS = {"reference": jnp.log, "xla": jnp.exp, "cpu": jnp.sin, "tpu": jnp.cos, "gpu": jnp.tanh}


@pytest.fixture(autouse=True)
def fresh_warnings():
    dispatch._say_once.cache_clear()


def reference(x, y=None, *, power):
    return jnp.log(x) * power


def branches(*names, refuse=()):
    def branch(name):
        def run(x, y=None, *, power, **chip):
            return CALLS[name](x) * power

        return Branch(run, lambda *args, **static: f"power {static['power']} is above 2" if name in refuse else None)

    return {name: branch(name) for name in names}


def taken(platform, offered, impl="auto"):
    """Which implementations stand in the program that is lowered for a platform."""
    call = jax.jit(lambda x: choose("op", impl, reference, offered, x, chip=CHIP[platform], power=3))
    text = call.trace(X).lower(lowering_platforms=(platform,)).as_text()
    return [name for name, word in WORDS.items() if f"stablehlo.{word} " in text]


@pytest.mark.parametrize("names, expected", [
    (("xla", "cpu", "tpu", "gpu"), ("cpu", "tpu", "gpu")),
    (("tpu", "gpu"), ("reference", "tpu", "gpu")),
    (("xla", "tpu"), ("xla", "tpu", "xla")),
    (("xla",), ("xla", "xla", "xla")),
    ((), ("reference", "reference", "reference")),
], ids=str)  # fmt: skip
def test_the_platform_is_chosen_when_lowering(names, expected):
    """On a CPU: the program for a TPU holds the TPU's branch and no other. The chip says that one is meant."""
    assert tuple(taken(platform, branches(*names)) for platform in ("cpu", "tpu", "cuda")) == tuple([name] for name in expected)


@pytest.mark.parametrize("impl", ["reference", "xla", "cpu", "tpu", "gpu"])
def test_a_named_implementation_is_taken_everywhere(impl):
    for platform in ("cpu", "tpu"):
        assert taken(platform, branches("xla", "cpu", "tpu", "gpu"), impl) == [impl]


def test_the_value_is_that_of_the_branch():
    ours = lambda names, impl="auto": choose("op", impl, reference, branches(*names), X, None, power=3)
    assert np.allclose(ours(("cpu", "xla", "tpu")), 3 * jnp.sin(X)) and np.allclose(ours(("xla", "tpu")), 3 * jnp.exp(X))
    assert np.allclose(ours(("tpu",)), 3 * jnp.log(X)) and np.allclose(ours(("cpu", "tpu"), "tpu"), 3 * jnp.cos(X))


def test_an_explicit_implementation_that_cannot_serve_is_an_error():
    with pytest.raises(ValueError, match=r"op\(impl='tpu'\) cannot serve this call: power 3 is above 2; use impl='auto' or 'reference'"):
        choose("op", "tpu", reference, branches("tpu", refuse=["tpu"]), X, power=3)


def test_an_unknown_implementation_names_those_there_are():
    with pytest.raises(ValueError, match="op has no 'gpu' implementation; choose from auto, reference, xla, tpu"):
        choose("op", "gpu", reference, branches("xla", "tpu"), X, power=3)


def test_auto_leaves_out_what_cannot_serve_and_says_so_once():
    offered = branches("xla", "cpu", "tpu", "gpu", refuse=["tpu", "cpu"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [taken(platform, offered) for platform in ("tpu", "cpu", "cuda")] == [["xla"], ["xla"], ["gpu"]]
        choose("op", "auto", reference, offered, X, power=3)
    said = [str(w.message) for w in caught if "kernel" in str(w.message)]
    assert said == ["op: no tpu kernel for this call (power 3 is above 2); the plain-JAX form runs instead"]


def test_auto_without_an_xla_form_falls_back_to_the_reference():
    assert taken("cpu", branches("xla", refuse=["xla"])) == ["reference"]


def test_the_chip_is_handed_to_kernels_only():
    seen = {}

    def branch(name):
        def run(x, *, power, **rest):
            seen[name] = rest
            return x

        def supports(x, *, power, chip):
            seen[f"{name} supports"] = chip

        return Branch(run, supports)

    offered = {name: branch(name) for name in ("xla", "cpu", "tpu", "gpu")}
    jax.make_jaxpr(lambda x: choose("op", "auto", reference, offered, x, chip="TPU v5e", power=3))(X)
    meant = ("xla", "cpu", "tpu")  # no GPU: tracing its kernel would take seconds
    assert seen == {f"{n} supports": "TPU v5e" for n in meant} | {"xla": {}, "cpu": {}, "tpu": {"chip": "TPU v5e"}}
    for name in offered:
        choose("op", name, reference, offered, X, chip="TPU v6e", power=3)
    assert seen["tpu"] == {"chip": "TPU v6e"} and seen["xla"] == {}


def test_a_missing_argument_reaches_every_branch_as_none():
    seen = []
    run = lambda x, y, *, power, **chip: seen.append(y) or x
    choose("op", "auto", run, {"tpu": Branch(run), "cpu": Branch(run)}, X, None, power=3)
    assert seen and all(y is None for y in seen)


# --- gradients --------------------------------------------------------------------------------------------------------


def residuals(f, *args):
    """Shapes of all that a differentiated call keeps for its backward pass."""
    return sorted(a.shape for a in jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)))


@pytest.fixture
def many_branches(monkeypatch):
    """Attention with a branch for every platform, each of which makes other intermediate arrays than the reference."""

    def other(plain, twist):
        def run(*args, chip=None, **static):
            out = plain(*args, **static)
            return jax.tree.map(lambda a: a + 0 * twist(a), out)

        return run

    for table, plain in ((op.FORWARD, op.reference.forward), (op.BACKWARD, op.reference.backward)):
        for name, twist in (("xla", jnp.exp), ("cpu", jnp.sin), ("tpu", jnp.cos), ("gpu", jnp.tanh)):
            monkeypatch.setitem(table, name, Branch(other(plain, twist)))


def test_a_gradient_keeps_the_same_residuals_whatever_the_branches(many_branches):
    q, kv = jnp.ones((1, 16, 2, 4)), jnp.ones((1, 12, 1, 4))
    q_pos, kv_pos = jnp.zeros((1, 16), jnp.int32), jnp.zeros((1, 12), jnp.int32)
    for impl in ("auto", "reference", "xla", "cpu", "tpu", "gpu"):
        f = lambda q, k, v, q_pos, kv_pos, impl=impl: attention(q, k, v, q_pos=q_pos, kv_pos=kv_pos, impl=impl)
        inputs, o, lse = (q, kv, kv, q_pos, kv_pos), q.shape, (1, 1, 2, 16)
        assert residuals(f, *inputs) == sorted([*(a.shape for a in inputs), o, lse]), impl


def test_differentiating_through_the_choice_would_keep_those_of_every_branch():
    """Why `choose` stands inside a custom_vjp: this is what the test above would see without."""

    def wide(n):
        return Branch(lambda x, **_: jnp.exp(jnp.outer(x, jnp.arange(n))).sum(1))

    offered = {"cpu": wide(3), "tpu": wide(5)}
    kept = residuals(lambda x: choose("op", "auto", reference, offered, x, chip=CHIP["tpu"], power=3), X)
    assert {(8, 3), (8, 5)} <= set(kept)


def test_the_backward_pass_is_chosen_when_lowering_too(many_branches):
    q, pos = jnp.ones((1, 16, 2, 4)), jnp.zeros((1, 16), jnp.int32)
    for platform, word in (("cpu", "sine"), ("tpu", "cosine"), ("cuda", "tanh")):
        grad = jax.jit(jax.grad(lambda q: attention(q, q, q, q_pos=pos, kv_pos=pos, chip=CHIP[platform]).sum()))
        text = grad.trace(q).lower(lowering_platforms=(platform,)).as_text()
        assert [w for w in ("sine", "cosine", "tanh") if f"stablehlo.{w} " in text] == [word]
