"""The planner: what it says of a step is what the compiler says, and what it advises has been compiled."""

import json
from pathlib import Path

import jax
import pytest

from minllm import hlo, plan
from minllm.chips import topology
from minllm.config import ConfigError
from minllm.run import for_topology

ROOT = Path(__file__).resolve().parents[1]
MINI = ["model.preset=mini", "model.args.layers=4", "data.length=256", "batch=8", "mesh.data=1", "mesh.fsdp=-1", "remat=full",
        "precision.compute=bfloat16", "data.tokenizer={kind: bpe, vocab_size: 512}"]  # fmt: skip


@pytest.fixture(scope="module")
def mini():
    return plan.make(for_topology(None, None, MINI).value, topology("v5e-4"))


def test_memory_is_the_compilers(mini):
    """Parameters and moments of a quarter of the model each; nothing that the compiler counts is lost."""
    m = mini.memory
    assert m.optimizer == pytest.approx(2 * m.parameters, rel=1e-3)
    assert m.limit == topology("v5e-4").chip.hbm and 0 < m.total < m.limit
    assert m.gradients < 2 * m.parameters and m.temporaries > 0 and m.code > 0 and m.host == 0 == m.average
    assert mini.replicated == []


def stacking(space, way, update="%dus"):
    """A loop over 12 layers that keeps a bf16[8,128] of each in a memory space."""
    kept = f"bf16[12,8,128]{{2,1,0:S({space})}}"
    state = f"(s32[], {kept})"
    return f"""%body (p: {state}) -> {state} {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %k = {kept} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = bf16[8,128]{{1,0}} constant(0), metadata={{op_name="jit(step)/jvp()/while/body/attention/btd,dnh->btnh"}}
  %dus = {kept} dynamic-update-slice(%k, %y, %i)
  ROOT %t = {state} tuple(%j, {update})
}}
%cond (p: {state}) -> pred[] {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
ENTRY %main (x: bf16[8]) -> s32[] {{
  %zero = s32[] constant(0)
  %x = {kept} parameter(0)
  %init = {state} tuple(%zero, %x)
  %loop = {state} while(%init), condition=%cond, body=%body, metadata={{op_name="jit(step)/{way}/while"}}
  ROOT %out = s32[] get-tuple-element(%loop), index=0
}}"""


def test_what_loops_over_layers_keep():
    size = 12 * 8 * 128 * 2.0
    name = "bf16[12,8,128] attention/btd,dnh->btnh"
    assert plan.kept(hlo.parse(stacking(0, "jvp()")), 12) == ({name: size}, 0.0, 0.0)
    assert plan.kept(hlo.parse(stacking(0, "transpose(jvp())")), 12) == ({}, size, 0.0)
    assert plan.kept(hlo.parse(stacking(5, "jvp()")), 12) == ({}, 0.0, size)
    assert plan.kept(hlo.parse(stacking(1, "jvp()")), 12) == ({}, 0.0, 0.0)  # in the core's own memory
    assert plan.kept(hlo.parse(stacking(0, "jvp()", "%k")), 12) == ({}, 0.0, 0.0)  # carried along, not written
    assert plan.kept(hlo.parse(stacking(0, "jvp()")), 16) == ({}, 0.0, 0.0)  # no loop over layers


def test_time_is_that_of_the_layers(mini):
    layers = plan.layer_loops(mini)
    assert set(layers) == {"forward", "backward"}
    assert 0.1 < 4 * sum(body.seconds for body in layers.values()) / mini.seconds <= 1.0
    assert sum(mini.cost.busy.values()) == pytest.approx(mini.seconds, rel=1e-3)
    assert mini.speed == pytest.approx(8 * 256 / mini.seconds / 4)
    assert 0 < mini.mfu < 0.5
    kinds = {(row["pass"], row["kind"]) for row in plan.per_layer(mini)}
    assert ("forward", "all-gather") in kinds and any(kind in ("reduce-scatter", "all-reduce") for _, kind in kinds)
    assert {row["devices"] for row in plan.per_layer(mini)} == {4}


def test_the_program_does_not_grow_with_depth(mini):
    deep = plan.make(for_topology(None, None, [*MINI, "model.args.layers=24"]).value, topology("v5e-4"))
    assert deep.instructions == pytest.approx(mini.instructions, rel=0.05)
    assert deep.layers == 24 and deep.seconds > 3 * mini.seconds


def test_the_report_names_its_conventions(mini):
    text = plan.report(mini)
    for word in ("parameters", "optimizer", "gradients", "temporaries", "tokens/s/chip", "causal", "fsdp 4"):
        assert word in text, word
    said = json.loads(json.dumps(mini.json()))
    assert said["memory"]["total"] == mini.memory.total and said["seconds"] == mini.seconds and said["mesh"] == {"fsdp": 4}


def test_the_picture_is_drawn(mini, tmp_path):
    plan.draw(mini, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").stat().st_size > 10_000


OOM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (48.00G) "
    "exceeds available HBM (15.75G). HLO module: jit_step."
)


def test_a_step_that_does_not_fit_says_by_how_much_and_what_would(monkeypatch, capsys, mini):
    """The compiler refuses everything but full recomputation and half the batch: the second is the cheaper only if it is faster."""
    tried = []

    def make(run, top):
        tried.append((run.remat, run.ramp().size_of(0)))
        if run.remat != "full":
            raise plan._fault(jax.errors.JaxRuntimeError(OOM), top)
        return mini

    monkeypatch.setattr(plan, "make", make)
    assert plan.main(["--topology", "v5e-4", *MINI[:-3], "remat=none"]) == 1
    said = capsys.readouterr().err
    assert "needs 48.00 GiB of the 15.75 GiB of a device of v5e-4: 32.25 GiB too much" in said
    assert "the cheapest change that fits: remat=full" in said
    assert [policy for policy, _ in tried[:4]] == ["none", "dots", "layer", "full"] and ("full", 4) in tried


def test_search_ranks_what_it_compiled(monkeypatch, capsys, mini):
    def make(run, top):
        if run.mesh.tensor > 2:
            raise plan.DoesNotFit("too much")
        return mini

    monkeypatch.setattr(plan, "make", make)
    assert plan.main(["--topology", "v5e-4", *MINI, "--search", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)["search"]
    assert [] in [t["change"] for t in found] and ["mesh.tensor=2"] in [t["change"] for t in found]
    assert "too much" in out.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--topology", "v6e-9"], "there are v6e-1, v6e-4"),
        (["--topology", "v5e-4", "mesh.tensor=3"], "needs a multiple of"),
        (["--topology", "v5e-4", *MINI, "batch=6"], "does not divide into 1 microbatches over 4 devices"),
        (
            [
                "--topology",
                "v5e-4",
                *MINI,
                "mesh.fsdp=1",
                "mesh.tensor=4",
                "model.args.D=192",
                "model.args.heads=6",
                "model.args.kv_heads=2",
            ],
            "does not divide",
        ),
        (["--topology", "v5e-4", "no.such=1"], "no such setting"),
        (["--config", str(ROOT / "configs/llama3_8b.yaml"), "--topology", "v6e-32"], "add it under topologies"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_compiled(args, said, capsys, monkeypatch):
    monkeypatch.setattr("minllm.step.Built.compile", lambda *_: pytest.fail("compiled"))
    assert plan.main(args) == 2
    assert said in capsys.readouterr().err


def test_settings_of_a_machine_lie_between_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("batch: 8\nsteps: 7\ntopologies:\n  v5e-4: {batch: 64, data.length: 512}\n")
    loaded = for_topology(file, "v5e-4", ["data.length=128"])
    assert (loaded.value.batch, loaded.value.steps, loaded.value.data.length) == (64, 7, 128)
    assert (loaded.where["batch"], loaded.where["data.length"]) == ("topologies.v5e-4", "command line")
    assert for_topology(file, None).value.batch == 8
    with pytest.raises(ConfigError, match="settings for v5e-4, not for v5e-8; did you mean v5e-4"):
        for_topology(file, "v5e-8")


def test_replicated_arrays_are_named():
    run = for_topology(None, None, [*MINI, "mesh.data=4", "mesh.fsdp=1", "model.args.D=1024", "model.args.hidden=65536"]).value
    from minllm.step import build

    built = build(run, 512, topology("v5e-4").devices())
    names = [name for name, _ in plan.replicated(built)]
    assert any("params" in name for name in names) and any("opt_state" in name for name in names)


SMALL = [("quickstart_tpu", "v5e-4")]
LARGE = [("quickstart_tpu", "v5e-1"), ("quickstart_tpu", "v5e-8")] + [
    (path.stem, name) for path in sorted((ROOT / "configs").glob("llama3_*.yaml")) for name in for_topology(path, None).value.topologies
]


@pytest.mark.parametrize(("config", "machine"), [*SMALL, *(pytest.param(*c, marks=pytest.mark.nightly) for c in LARGE)])
def test_every_config_compiles_for_its_machines_and_fits(config, machine):
    made = plan.make(for_topology(ROOT / f"configs/{config}.yaml", machine).value, topology(machine))
    assert made.memory.total <= made.memory.limit


def test_the_vocabulary_is_the_models_the_tokenizers_or_the_familys():
    assert plan.vocabulary(for_topology(None, None, [*MINI, "model.args.vocab=700"]).value) == 700
    assert plan.vocabulary(for_topology(None, None, MINI).value) == 512
    assert plan.vocabulary(for_topology(ROOT / "configs/llama3_8b.yaml", None).value) == 128_256
