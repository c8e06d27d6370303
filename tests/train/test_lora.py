"""LoRA: factors beside frozen weights, against its formula; what is trained, what is merged, and a run that tunes another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import spec, train
from minllm.data import Data
from minllm.layer import Context, Execution
from minllm.lora import Adapted, LoRA, merge
from minllm.models.llama import llama3
from minllm.optim import SGD, AdamW, Muon, Schedule
from minllm.run import Mesh, Model, Run
from minllm.step import build
from minllm.weights import LowRank, prepare

ARGS = dict(D=16, layers=3, heads=4, kv_heads=2, hidden=24, scaling=None)
MODEL = llama3(vocab=32, **ARGS)
LOW = LoRA(rank=3, alpha=6.0)
ADAPTED = Adapted(MODEL, LOW)
TOKENS = jax.random.randint(jax.random.key(9), (2, 12), 0, 32)
is_low = lambda x: isinstance(x, LowRank)


@pytest.fixture(scope="module")
def base():
    return spec.init(MODEL.params(), jax.random.key(0))


@pytest.fixture(scope="module")
def tuned(base):
    """Factors that both do something."""
    p = LOW.wrap(MODEL.params(), base, jax.random.key(1))
    fill = lambda x: x.replace(b=jax.random.normal(jax.random.key(x.b.size), x.b.shape)) if is_low(x) else x
    return jax.tree.map(fill, p, is_leaf=is_low)


def logits(model, p, run=Execution()):
    return jax.jit(lambda p: model.apply(p, TOKENS, Context(run=run)).x)(prepare(p, model.params(), run))


def test_it_starts_as_the_model_that_it_adapts(base):
    p = LOW.wrap(MODEL.params(), base, jax.random.key(1))
    np.testing.assert_array_equal(logits(ADAPTED, p), logits(MODEL, base))
    factors = [x for x in jax.tree.leaves(p, is_leaf=is_low) if is_low(x)]
    assert len(factors) == 7 and all((x.b == 0).all() and (x.a != 0).any() and x.scale == 2.0 for x in factors)
    assert jax.tree.structure(p) == jax.tree.structure(spec.init(ADAPTED.params(), jax.random.key(0)))


@pytest.mark.parametrize("name, equation", [("q", "ldr,lrnh->ldnh"), ("o", "lnhr,lrd->lnhd")])
def test_merging_is_the_formula(base, tuned, name, equation):
    """W + alpha / r A B of every layer, in float64: 1e-6, the rounding of float32 factors."""
    low, plain = (p["trunk"][0].pattern[0]["inner"][name] for p in (tuned, merge(tuned)))
    assert plain.dtype == low.base.dtype and plain.shape == low.base.shape
    a, b, w = (np.asarray(v, np.float64) for v in (low.a, low.b, low.base))
    np.testing.assert_allclose(plain, w + 2.0 * np.einsum(equation, a, b), rtol=0, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize("run", [Execution(), Execution(scan=False), Execution(layout="matrix")], ids=["scan", "unrolled", "matrix"])
def test_a_merged_model_is_a_plain_one_with_the_same_logits(base, tuned, run):
    """F32: 1e-5 of the largest logit."""
    merged = merge(tuned)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    want = logits(MODEL, merged, run)
    np.testing.assert_allclose(logits(ADAPTED, tuned, run), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - logits(MODEL, base)).max() > 0.1


def test_only_the_factors_are_trained():
    trained, frozen = spec.part(ADAPTED.params(), spec.init(ADAPTED.params(), jax.random.key(0)))
    names = [spec.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    assert len(names) == 14 and all(name.endswith(("/a", "/b")) for name in names)
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(MODEL.params(), is_leaf=spec.is_spec))
    D, H, F, r = 16, 4, 24, 3
    each = r * ((D + 4 * H) + 2 * (D + 2 * H) + (4 * H + D) + 2 * (D + F) + (F + D))
    assert spec.count(ADAPTED.params()) == 3 * each


def test_targets_choose_by_path():
    lora = LoRA(rank=2, targets="pattern/0/.*/(q|v)$")
    chosen = [x for x in jax.tree.leaves(lora.specs(MODEL.params()), is_leaf=lambda x: is_low(x) or spec.is_spec(x)) if is_low(x)]
    assert len(chosen) == 2
    with pytest.raises(ValueError, match="'nothing' matches no weight; paths look like embed"):
        LoRA(targets="nothing").specs(MODEL.params())


def run_of(**changes):
    return Run(**dict(model=Model(args=ARGS), data=Data(length=12), batch=8, steps=9, optimizer=AdamW(lr=1e-2), lora=LOW,
                      schedule=Schedule(shape="constant", warmup=0)) | changes)  # fmt: skip


def steps(run, devices, times=4):
    built = build(run, 32, jax.devices()[:devices])
    step, state, seen = built.compile(8, 12), built.init(jax.random.key(0)), []
    before = jax.tree.map(np.asarray, state.frozen)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (8, 13)).astype(np.int32)
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((8, 12), np.float32), segments=np.ones((8, 12), np.int32),
                 positions=np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12)))  # fmt: skip
    for _ in range(times):
        state, values = step(state, jax.device_put(batch, built.place((8, 12))))
        seen.append(float(values["loss"]))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    return state, seen


def test_training_moves_the_factors_and_nothing_else_on_any_mesh():
    """The frozen leaves stay bitwise; the losses fall, and are the same on eight devices to 1e-5."""
    state, one = steps(run_of(), 1)
    assert one[-1] < one[0] - 0.01 and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.params))
    _, eight = steps(run_of(mesh=Mesh(data=1, fsdp=2, context=1, tensor=4)), 8)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), Muon()], ids=lambda o: o.kind)
def test_other_optimizers_take_the_factors_as_matrices(optimizer):
    losses = steps(run_of(optimizer=optimizer), 1)[1]
    assert losses[-1] < losses[0]


def test_a_run_that_tunes_another(tmp_path, monkeypatch):
    """From a full run's parameters: the first loss is what the other had reached, and only factors are in `params` of the checkpoint."""
    import orbax.checkpoint as ocp

    from minllm import metrics

    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    (tmp_path / "corpus.txt").write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(400)))
    common = [
        "batch=8", "metrics=[jsonl]", "model.args={D: 16, layers: 2, heads: 2, kv_heads: 1, hidden: 24, scaling: null}",
        f"data={{source: {{kind: text, globs: [{tmp_path}/corpus.txt]}}, length: 16, holdout_tail: 0.1, cache: {tmp_path}/cache}}",
        "schedule={shape: constant, warmup: 0}",
    ]  # fmt: skip
    assert train.main([*common, f"out={tmp_path}/full", "steps=30", "optimizer.lr=1e-2"]) == 0
    low = [*common, f"out={tmp_path}/low", f"init_from={tmp_path}/full", "lora={rank: 2}", "optimizer.lr=1e-2"]
    assert train.main([*low, "steps=2"]) == 0 and train.main([*low, "steps=4"]) == 0
    read = lambda name: [line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in line]
    full, tuned = read("full"), read("low")
    assert len(tuned) == 4 and tuned[0] < full[0] - 0.5
    theirs, mine = (ocp.PyTreeCheckpointHandler().restore(tmp_path / name / "checkpoints" / step / "state")
                    for name, step in (("full", "30"), ("low", "4")))  # fmt: skip
    assert all(name.endswith(("/a", "/b")) for name in mine if name.startswith("params/"))
    for name, leaf in mine.items():
        if name.startswith("frozen/"):
            np.testing.assert_array_equal(leaf, theirs["params/" + name.removeprefix("frozen/").removesuffix("/base")], err_msg=name)


def test_half_precision_bases_keep_float32_factors():
    """compute bfloat16: the merged and the adapted model agree to bfloat16's rounding, and the factors stay float32."""
    from minllm.layer import Precision

    state, seen = steps(run_of(precision=Precision(compute="bfloat16")), 1, times=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")} and np.isfinite(seen).all()
