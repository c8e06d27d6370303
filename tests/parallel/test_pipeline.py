"""The pipeline: its tables by simulation and against the formulae, and law 6: value, gradients and what travels with them are those of the
same microbatches without one."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import spec
from minllm.layer import Pipeline, Precision
from minllm.layers.mlp import GLU
from minllm.layers.residual import PreNorm
from minllm.layers.stack import Stack
from minllm.models import build as build_model
from minllm.models.transformer import Decoder
from minllm.objectives import NextToken
from minllm.optim import SGD, Schedule
from minllm.parallel import schedule
from minllm.parallel.pipeline import deal, plan, report
from minllm.run import Mesh, Model, Run
from minllm.step import build, make_step

# --- tables ---------------------------------------------------------------------------------------------------------------------------

SIZES = [(S, M, V, N) for S in (1, 2, 3, 4, 8) for M in (1, 2, 3, 5, 8, 13) for V, N in ((1, None), (2, None), (3, None), (2, 1), (2, M))]


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "zero_bubble"])
def test_a_table_does_everything_once_and_in_order(kind):
    """Any number of microbatches, fewer than the stages and not divisible by them too (K05)."""
    for S, M, V, N in SIZES:
        slots = schedule.table(kind, S, M, V, N)
        done = {}
        for t, slot in enumerate(slots):
            assert len(slot) == S and any(slot)
            for s, op in enumerate(slot):
                if op:
                    here = (op.kind, op.chunk * S + s, op.microbatch)
                    assert here not in done
                    done[here] = t
        kinds = "FBW" if kind == "zero_bubble" else "FB"
        assert done.keys() == {(k, p, m) for k in kinds for p in range(S * V) for m in range(M)}
        for (k, p, m), t in done.items():
            if k == "F" and p > 0:
                assert done["F", p - 1, m] < t
            if k == "B":
                assert done["F", p, m] < t and (p == S * V - 1 or done["B", p + 1, m] < t)
            if k == "W":
                assert done["B", p, m] < t


def test_bubbles_are_those_of_the_formulae():
    """Of any costs for GPipe and 1F1B, where slots hold one kind of operation; of equal ones for zero-bubble. Interleaved where the
    microbatches divide into groups, or go breadth first."""
    for S in (1, 2, 3, 4, 8):
        for M in (S, 2 * S, 3 * S, 3 * S + 1):
            for costs in ({"F": 1, "B": 2}, {"F": 1, "B": 3}, {"F": 2, "B": 1}):
                for V, N in ((1, None), (2, M), (3, M), *(((2, None), (3, None)) if M % S == 0 else ())):
                    for kind in ("gpipe", "1f1b"):
                        found = schedule.bubble(schedule.table(kind, S, M, V, N), costs)
                        np.testing.assert_allclose(found, (S - 1) / (V * M), rtol=1e-12, atol=1e-12)
            found = schedule.bubble(schedule.table("zero_bubble", S, M), {"F": 1, "B": 1, "W": 1})
            np.testing.assert_allclose(found, (S - 1) / (3 * M), rtol=1e-12, atol=1e-12)


def test_what_a_stage_holds():
    """GPipe holds every microbatch. 1F1B holds 2 (S - s) - 1 at stage s (a slot is shared by all stages, so twice the S - s of stages that
    do not wait for each other), whatever M is; zero-bubble about 1.5 S."""
    for S, M in ((4, 16), (8, 32)):
        most = lambda slots: [1 + max(schedule.places(spans).values(), default=-1) for spans in schedule.lifetimes(slots)[0]]
        assert most(schedule.table("gpipe", S, M))[1:] == [M] * (S - 1)
        held = most(schedule.table("1f1b", S, M))[1:]
        assert held == [2 * (S - s) for s in range(1, S)], held
        assert max(most(schedule.table("zero_bubble", S, M))) <= 3 * S // 2 + 1


def test_nothing_is_overwritten_before_its_last_use():
    """Played through: each operation finds what its neighbours made for it at the place the plan names."""
    for kind, S, M, V in (("gpipe", 3, 4, 1), ("1f1b", 4, 6, 1), ("1f1b", 2, 5, 3), ("zero_bubble", 4, 9, 1), ("zero_bubble", 2, 4, 2)):
        slots = schedule.table(kind, S, M, V)
        rows, x_places, g_places = plan(slots)
        xs, gs = ([[None] * (n + 1) for _ in range(S)] for n in (x_places, g_places))
        x_in, g_in = [None] * S, [None] * S
        for t in range(len(slots)):
            x_out, g_out = [None] * S, [None] * S
            for s in range(S):
                op, v, m, x_at, g_at, x_put, g_put = rows[t, s]
                xs[s][x_put], gs[s][g_put] = x_in[s], g_in[s]
                p = v * S + s
                if op and p > 0:
                    assert xs[s][x_at] == ("F", p - 1, m)
                if op >= 2 and p < S * V - 1:
                    assert gs[s][g_at] == ("B", p + 1, m)
                x_out[s], g_out[s] = ("F", p, m) if op == 1 else None, ("B", p, m) if op == 2 else None
            x_in, g_in = [x_out[s - 1] for s in range(S)], [g_out[(s + 1) % S] for s in range(S)]


def test_the_picture_of_a_table():
    assert schedule.draw(schedule.table("1f1b", 2, 2)) == "F0 F1 .  .  B0 B1\n.  F0 B0 F1 B1 ."
    assert schedule.draw(schedule.table("gpipe", 2, 2)) == "F0 F1 .  .  B0 B1\n.  F0 F1 B0 B1 ."


def test_layers_are_dealt_out_evenly():
    """126 over 16 stages: the first and the last get one fewer, as in the Llama 3 paper, section 3.3.2."""
    (only,) = deal(build_model("llama", "405b"), 16)
    assert only.count == (7, *[8] * 14, 7) and only.first[:3] == (0, 7, 15) and sum(only.count) == 126
    mixed = Decoder(8, 8, trunk=(Stack((PreNorm(GLU(8)),), 3), PreNorm(GLU(8)), Stack((PreNorm(GLU(8)),), 6)))
    deals = deal(mixed, 4)
    assert np.sum([d.count for d in deals], 0).tolist() == [2, 3, 3, 2]
    tree = jnp.arange(6.0)[:, None]
    np.testing.assert_array_equal(deals[2].back(deals[2].out(tree, 2)), tree)
    with pytest.raises(ValueError, match="cannot fill 16 virtual stages"):
        deal(mixed, 16)


# --- law 6 ----------------------------------------------------------------------------------------------------------------------------

B, T, V = 8, 16, 32
ARGS = dict(D=16, heads=4, kv_heads=2, hidden=24)
PLAIN = SGD(lr=1024.0, momentum=0.0)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    weights = (np.arange(T) < np.arange(4, B + 4)[:, None]).astype(np.float32)
    segments = np.broadcast_to((np.arange(T) >= 6) + 1, (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.where(np.arange(T) < 6, np.arange(T), np.arange(T) - 6), (B, T)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "segments": segments, "positions": positions}


@cache
def gradient(family="llama", layers=4, microbatches=4, mesh=(), schedule="1f1b", virtual=1, compute="float32", args=(), scan=True):
    """(gradients, metrics, corrections of routers) of one step of plain descent."""
    args = {**ARGS, "layers": layers, **dict(args)} | ({"scaling": None} if family == "llama" else {})
    run = Run(
        model=Model(family=family, args=args), batch=B, microbatches=microbatches, steps=1000,
        schedule=Schedule(shape="constant", warmup=0),
        optimizer=PLAIN, mesh=Mesh(**dict(mesh)), clip=None, objective=NextToken(z_loss=1e-3), scan=scan,
        precision=Precision(compute=compute), pipeline=Pipeline(schedule=schedule, virtual=virtual),
    )  # fmt: skip
    built = build(run, V, jax.devices()[: int(np.prod([n for _, n in mesh]))] if mesh else jax.devices()[:1])
    state = built.init(jax.random.key(0))
    before = jax.device_get(state.params)
    host = batch()
    where = built.place((B, T))
    data = jax.device_put(host, where) if where else jax.device_put(host)
    step = jax.jit(make_step(built.model, built.transform, run, built.execution))
    state, metrics = step(state, data)
    return jax.tree.map(lambda a, b: (a - b) / PLAIN.lr, before, jax.device_get(state.params)), jax.device_get(metrics)


def agree(case, base, tolerance=1e-5):
    """Value and every part of the loss, and every leaf's gradient, to 1e-5 of the largest: float32 sums in another order."""
    (grads, metrics), (want, said) = gradient(**case), gradient(**base)
    for name in ("loss", "z_loss", "balance_loss", "router_z_loss", "weight", "grad_norm"):
        assert (name in metrics) == (name in said)
        if name in said:
            np.testing.assert_allclose(metrics[name], said[name], rtol=tolerance)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-2), (spec.path_name(path), np.abs(a - b).max(), np.abs(b).max())


DROPOUT = (("dropout", 0.1),)
STAGE4, CUBE = (("stage", 4),), (("fsdp", 2), ("stage", 2), ("tensor", 2))


def test_law_6_pipeline():
    """1F1B over 4 stages, dropout on: each row drops what it would without a pipeline."""
    agree(dict(mesh=STAGE4, args=DROPOUT), dict(args=DROPOUT))


def test_law_6_pipeline_fsdp_tensor():
    agree(dict(mesh=CUBE), dict())


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble"])
def test_law_6_other_schedules(schedule):
    agree(dict(mesh=(("stage", 2),), schedule=schedule), dict())


@pytest.mark.nightly
def test_law_6_interleaved_with_layers_that_do_not_divide():
    """7 layers over 2 stages of 2 chunks, 4 microbatches."""
    agree(dict(mesh=(("stage", 2),), layers=7, virtual=2), dict(layers=7))


@pytest.mark.nightly
def test_law_6_experts_in_a_pipeline():
    """A mixture's balance and router losses, and experts over an axis of their own."""
    case = dict(family="mixtral", args=(("experts", 4), ("z_loss", 1e-2)))
    agree(dict(**case, mesh=(("stage", 2), ("expert", 2), ("tensor", 2))), case)


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", [STAGE4, CUBE, (("stage", 2), ("context", 2), ("data", 2)), (("stage", 8),)], ids=str)
@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_law_6_every_schedule_and_mesh(schedule, virtual, mesh, microbatches):
    agree(dict(mesh=mesh, layers=17, virtual=virtual, schedule=schedule, microbatches=microbatches, args=DROPOUT),
          dict(layers=17, microbatches=microbatches, args=DROPOUT))  # fmt: skip


# --- what is said and refused ---------------------------------------------------------------------------------------------------------


def test_the_bubble_is_reported():
    run = Run(model=Model(args={**ARGS, "layers": 6, "scaling": None}), batch=B, microbatches=8, mesh=Mesh(data=1, stage=4))
    built = build(run, V, jax.devices()[:4])
    assert "bubble 37.5%, uneven layers 33.3%" in report(built.model, built.execution)
    assert "4 stages x 1 chunks of 1 to 2 repetitions" in report(built.model, built.execution)
