"""Whole runs, by the command line: what a run folder holds, resuming (law 11), signals and kills, tuning, and every bad input."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from minllm import checkpoint, metrics, pretrained, train
from minllm.config import undecorated
from minllm.interop import hf
from minllm.run import Run

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"{i} is {'even' if i % 2 == 0 else 'odd'}, and {i} squared is {i * i}.\n" for i in range(600))
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
CONFIG = """
steps: 8
batch: 8
mesh: {{data: 1, fsdp: 1}}
out: {out}
metrics: [jsonl]
model: {{args: {{D: 16, layers: 2, heads: 2, kv_heads: 1, hidden: 24, scaling: null}}}}
data: {{source: {{kind: text, globs: [{corpus}]}}, tokenizer: {{kind: bytes}}, length: 16, holdout_tail: 0.1, cache: {cache}}}
optimizer: {{kind: adamw, lr: 1e-2}}
schedule: {{shape: constant, warmup: 0}}
checkpoints: {{every: 4}}
evaluations: {{every: 4, rows: 8}}
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A user's CPU is one device; meshes have their own tests."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def write(tmp_path, cache):
    """write(text) -> the path of a config over a corpus of that text; `run` is the run folder."""
    (tmp_path / "corpus.txt").write_text(TEXT)

    def to(**places):
        file = tmp_path / "config.yaml"
        file.write_text(CONFIG.format(**{"out": tmp_path / "run", "corpus": tmp_path / "corpus.txt", "cache": cache} | places))
        return str(file)

    return to


@pytest.fixture
def run(write, tmp_path):
    """run(*overrides) -> exit code of a run in the folder `out` ("run")."""
    file = write()

    def go(*overrides, out="run"):
        return train.main(["--config", file, f"out={tmp_path / out}", *overrides])

    return go


def losses(folder):
    return {line["step"]: line["loss"] for line in metrics.read(folder / "metrics.jsonl") if "loss" in line}


def stored(folder, step):
    """Every array of a checkpoint, by path."""
    import orbax.checkpoint as ocp

    place = Path(folder).absolute() / "checkpoints" / str(step) / "state"
    return {name: np.asarray(a) for name, a in ocp.PyTreeCheckpointHandler().restore(place).items()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Eight steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus.txt").write_text(TEXT)
    (folder / "config.yaml").write_text(CONFIG.format(out=folder / "run", corpus=folder / "corpus.txt", cache=cache))
    kept, jax.devices = jax.devices, lambda *_, first=jax.devices()[:1]: first
    try:
        assert train.main(["--config", str(folder / "config.yaml"), "metrics=[jsonl, tensorboard, console]", "samples.every=4",
                           'samples.prompts=["7 is"]', "samples.tokens=5"]) == 0  # fmt: skip
    finally:
        jax.devices = kept
    return folder


# --- a run ----------------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_folder(whole):
    """G23, G28."""
    out = whole / "run"
    assert {p.name for p in out.iterdir()} == {"checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "tensorboard", "tokenizer"}
    assert checkpoint.steps(out) == [4, 8]
    lines = metrics.read(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9)) and [line["samples"] for line in steps] == [8 * i for i in range(1, 9)]
    needed = {"lr", "grad_norm", "tokens", "step_time", "tokens_per_second", "data_wait", "goodput", "layer_grad_norms", "weight"}
    assert all(needed <= line.keys() for line in steps) and [("compile_time" in line) for line in steps] == [True] + 7 * [False]
    assert all(len(line["layer_grad_norms"]["trunk/0/pattern/0/inner/q"]) == 2 for line in steps)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    # bytes: a token is a byte (G02), but for the end of the document, which has none
    for line in evaluations:
        assert line["eval/bits_per_byte"] == pytest.approx(line["eval/nats_per_byte"] / np.log(2), rel=1e-12)
        assert line["eval/nats_per_byte"] == pytest.approx(line["eval/loss"], rel=1e-2)
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert losses(out)[8] < losses(out)[1] - 0.3


def test_the_saved_config_is_the_run(whole, tmp_path, capsys):
    """The resolved config begins the same run again."""
    saved = whole / "run" / "config.yaml"
    assert train.main(["--config", str(saved), f"out={tmp_path / 'again'}"]) == 0
    assert losses(tmp_path / "again") == losses(whole / "run")


def test_nothing_is_compiled_after_the_first_step_and_evaluation(run, caplog):
    """Jit once: of the step one program; after the first evaluation none at all."""
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING):
            assert run("steps=12", "evaluations.every=3", "checkpoints.every=3") == 0
    finally:
        jax.config.update("jax_log_compiles", False)
    names = [record.getMessage().split()[1] for record in caplog.records if record.getMessage().startswith("Compiling ")]
    assert [name for name in names if "step" in name] == ["jit(step)"] or names.count("step") == 1, names
    assert sum("evaluate" in name for name in names) == 1, names


def test_undecorated():
    assert undecorated(Run) == []


# --- resuming -------------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_bitwise(whole, run, tmp_path):
    """Law 11, G24: 3 + 5 steps, at a step that no checkpoint interval falls on: losses and the whole final state."""
    assert run("steps=3") == 0 and run("steps=8") == 0
    assert losses(tmp_path / "run") == losses(whole / "run")
    equal(stored(tmp_path / "run", 8), stored(whole / "run", 8))


def test_a_finished_run_is_finished(run, tmp_path, whole):
    assert run() == 0
    before = stored(tmp_path / "run", 8)
    assert run() == 0
    equal(stored(tmp_path / "run", 8), before)
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_another_batch_split_goes_on_with_the_next_sample(run, tmp_path):
    """Samples are counted, not batches: 3 steps of 8, then of 4 and of 16, see 0, 1, 2, ... without gap or repeat."""
    from minllm.data.loader import Loader

    seen = []
    batch = Loader.batch

    def spy(self, step):
        seen.append((step, list(self.samples(step))))
        return batch(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "batch", spy)
        for steps, size in ((3, 8), (5, 4), (7, 16)):
            assert run(f"steps={steps}", f"batch={size}", f"microbatches={2 if size == 4 else 1}") == 0
    used = dict(seen)  # read-ahead past the end of a run is read again by the next
    assert [s for step in range(7) for s in used[step]] == list(range(3 * 8 + 2 * 4 + 2 * 16))
    lines = {line["step"]: line["samples"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line}
    assert lines == {1: 8, 2: 16, 3: 24, 4: 28, 5: 32, 6: 48, 7: 64}


def test_a_batch_ramp(run, tmp_path):
    """L02, G14: sizes by step, the rate untouched, tokens accounted for; resumed in the middle it is the same ramp."""
    ramp = "batch={stages: [[0, 4], [2, 8], [4, 16]]}"
    assert run(ramp, "steps=6", out="a") == 0
    assert run(ramp, "steps=3", out="b") == 0 and run(ramp, "steps=6", out="b") == 0
    lines = [line for line in metrics.read(tmp_path / "a" / "metrics.jsonl") if "loss" in line]
    assert [line["tokens"] for line in lines] == [n * 16 for n in (4, 4, 8, 8, 16, 16)]
    assert [line["samples"] for line in lines] == [4, 8, 16, 24, 40, 56] and len({line["lr"] for line in lines}) == 1
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_best_are_rated_by_the_same_windows(run, tmp_path):
    """The last evaluation is of the whole split; its checkpoint is compared by the windows that the earlier ones were rated by."""
    assert run("checkpoints.best=true", "evaluations.rows=8", "evaluations.every=4") == 0
    rated = {step: json.loads((tmp_path / f"run/checkpoints/{step}/metric").read_text()) for step in (4, 8)}
    found = {line["step"]: line["eval/loss"] for line in metrics.read(tmp_path / "run/metrics.jsonl") if "eval/loss" in line}
    assert rated[4] == found[4] and rated[8] != found[8]
    assert run("checkpoints.best=true", "evaluations.rows=null", "evaluations.every=4", out="all") == 0
    all_rows = {line["step"]: line["eval/loss"] for line in metrics.read(tmp_path / "all/metrics.jsonl") if "eval/loss" in line}
    assert found[8] == all_rows[8] == json.loads((tmp_path / "all/checkpoints/8/metric").read_text())


def test_restart_begins_again(run, tmp_path, whole):
    assert run("steps=3", "optimizer.lr=1e-3") == 0
    assert run("--restart") == 0
    assert losses(tmp_path / "run") == losses(whole / "run")


def start(config, *more):
    return subprocess.Popen([sys.executable, "-m", "minllm.train", "--config", config, *more], cwd=ROOT, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def wait_for(folder, step, seconds=120):
    """Until metrics.jsonl has that step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        file = folder / "metrics.jsonl"
        if file.exists() and any(line["step"] >= step for line in metrics.read(file)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come within {seconds} s")


def test_sigterm_saves_and_a_kill_loses_no_more_than_since_the_last_save(write, run, tmp_path):
    """G25: SIGTERM: the step is finished, saved, exit 0 in seconds. kill -9: the next start goes on, and the losses are those of a run that
    nobody touched."""
    longer = ("steps=400", "checkpoints.every=10", "evaluations.every=1000")
    process = start(write(), *longer)
    wait_for(tmp_path / "run", 15)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert time.monotonic() - began < 10
    last = checkpoint.latest(tmp_path / "run")
    assert last == max(losses(tmp_path / "run")) and 15 <= last < 400

    process = start(write(), *longer)
    wait_for(tmp_path / "run", last + 15)
    process.kill()
    process.communicate()
    kept = checkpoint.latest(tmp_path / "run")
    assert last <= kept < 400
    assert run(*longer[1:], f"steps={kept + 5}") == 0
    assert run(*longer[1:], f"steps={kept + 5}", out="untouched") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "untouched")


@pytest.mark.nightly
def test_twenty_kills_at_random_moments(write, run, tmp_path):
    rng, longer = np.random.default_rng(0), ("steps=2000", "checkpoints.every=20", "evaluations.every=100000")
    for _ in range(20):
        process = start(write(), *longer)
        time.sleep(rng.uniform(0.5, 12))
        process.kill()
        process.communicate()
    assert run(*longer) == 0 and run(*longer, out="untouched") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "untouched")


# --- starting from another run --------------------------------------------------------------------------------------------------------


def test_init_from_takes_the_parameters_alone(whole, run, tmp_path):
    """From a run, or one of its checkpoints: step 1 begins with their parameters, a fresh optimizer and the first batch."""
    for place, step in (("", 8), ("/checkpoints/4", 4)):
        assert run(f"init_from={whole / 'run'}{place}", "steps=1", "optimizer.lr=1e-12", out=f"from{step}") == 0
        theirs, mine = stored(whole / "run", step), stored(tmp_path / f"from{step}", 1)
        for name, a in theirs.items():
            if name.startswith("params/"):
                np.testing.assert_allclose(mine[name], a, rtol=0, atol=1e-9, err_msg=name)
        assert losses(tmp_path / f"from{step}")[1] < losses(whole / "run")[1] - 0.1


def test_init_from_a_hugging_face_folder(whole, run, write, tmp_path, capsys):
    """The model and its parameters come from the folder; what is trained from them knows where its model is."""
    model, params, _ = pretrained.load(whole / "run")
    folder = tmp_path / "hf"
    hf.save(folder, model, params)
    assert run(f"init_from={folder}", f"model={{like: {folder}}}", "steps=1", "optimizer.lr=1e-12", out="tuned") == 0
    theirs, mine = stored(whole / "run", 8), stored(tmp_path / "tuned", 1)
    for name, a in theirs.items():
        if name.startswith("params/"):
            np.testing.assert_allclose(mine[name], a, rtol=0, atol=1e-9, err_msg=name)
    again = pretrained.load(tmp_path / "tuned")
    assert again.model.vocab == 258 and again.tokenizer.vocab_size == 258
    text = refused(capsys, ["--config", write(), f"init_from={folder}", "model.args.layers=3"], tmp_path / "run")
    assert "another model than this run's" in text and "trunk/0/times is 2 there and 3 here" in text and "model.like" in text, text
    text = refused(capsys, ["--config", write(), f"model.like={folder}"], tmp_path / "run")
    assert "leave out model.preset and model.args" in text, text


# --- the other things that the command does -------------------------------------------------------------------------------------------


def test_explain_schema_and_dry_run(write, tmp_path, capsys):
    assert train.main(["--config", write(), "seed=7", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "command line" in text and "optimizer.lr" in text and "default" in text
    assert train.main(["--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() == set(Run.__dataclass_fields__)
    assert not (tmp_path / "run").exists()
    assert train.main(["--config", write(), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "one step of 8 x 16 tokens" in text and "MiB" in text
    assert checkpoint.latest(tmp_path / "run") is None and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_profile_writes_a_trace(run, tmp_path):
    assert run("--profile", "1:2", "steps=3", "evaluations.every=100") == 0
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_batch_that_is_not_finite_is_named(run, tmp_path, monkeypatch, capsys):
    """G27: the run goes on without it, and says which samples it was."""
    from minllm.data.loader import Loader

    batch = Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda self, step: poisoned(batch(self, step)) if step == 2 else batch(self, step))
    assert run("steps=5", "metrics=[jsonl, console]") == 0
    assert "step 3 was skipped" in (text := capsys.readouterr().out) and "samples 16 to 23" in text
    lines = {line["step"]: line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line}
    assert lines[3]["skipped"] is True and lines[3]["loss"] == "nan" and np.isfinite(lines[5]["loss"])


def poisoned(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


# --- bad input ------------------------------------------------------------------------------------------------------------------------


def refused(capsys, argv, out, code=2):
    """The message of a run that must not start: one, without a traceback, before anything is compiled, and no folder left behind."""
    there, compiled = out.exists(), []
    listen = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert train.main(argv) == code
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and "Traceback" not in told.err + told.out
    assert not compiled, compiled
    assert out.exists() == there, "a failed start left a run folder behind"
    return told.err


WRONG = {  # overrides -> what the message must say: the value, the limit or place, and what to do
    "key": (["optimizer.learning_rate=1"], ["optimizer.learning_rate", "no such setting"]),
    "near key": (["optimizer.dekay=1"], ["did you mean decay?"]),
    "type": (["steps=many"], ["steps", "many", "whole number"]),
    "limit": (["steps=0"], ["steps", "0", ">= 1"]),
    "kind": (["optimizer.kind=adamv"], ["adamv", "did you mean adamw?"]),
    "family": (["model.family=lama"], ["'lama'", "did you mean 'llama'?"]),
    "preset": (["model.preset=9b"], ["'9b'", "8b"]),
    "argument": (["model.args.layer=3"], ["'layer'", "did you mean 'layers'?"]),
    "argument type": (["model.args.layers=three"], ["layers", "three", "int"]),
    "vocabulary": (["model.args.vocab=100"], ["100", "tokenizer has", "raise it"]),
    "corpus": (["data.source.globs=[/nowhere/at/all.txt]"], ["/nowhere/at/all.txt"]),
    "batch": (["batch=6", "microbatches=4"], ["6", "4 microbatches", "such as 8"]),
    "mesh": (["mesh.fsdp=3", "mesh.tensor=2"], ["6", "1 devices", "multiply to 1"]),
    "heads": (["model.args.heads=3"], ["3", "heads"]),
    "lora targets": (["lora={targets: nothing}"], ["nothing", "matches no weight", "paths look like"]),
    "init_from": (["init_from=/nowhere"], ["/nowhere", "is no model", "run folder"]),
    "no config": (["=3"], ["key.sub=value"]),
    "held out": (["data.holdout=0.2"], ["holdout", "holdout_tail", "keep one"]),
    "wandb": (["metrics=[jsonl, wandb]"], ["wandb", "pip install wandb"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_one_message(name, write, tmp_path, capsys):
    overrides, told = WRONG[name]
    text = refused(capsys, ["--config", write(), *overrides], tmp_path / "run")
    assert all(word in text for word in told), text


@pytest.mark.parametrize("yaml, told", [
    ("steps: 1e-3\n", ["steps", "0.001", "whole number"]),  # a number, not text
    ("steps: 5\nmodel:\n\tfamily: llama\n", ["tab", "use spaces"]),
    ("steps: 5\nseed: 1\nsteps: 6\n", ["steps", "duplicate key", "line 1"]),
], ids=["1e-3", "tab", "duplicate"])  # fmt: skip
def test_a_wrong_file_is_one_message(yaml, told, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml)
    text = refused(capsys, ["--config", str(tmp_path / "config.yaml"), f"out={tmp_path / 'run'}"], tmp_path / "run")
    assert all(word in text for word in told), text
    assert "no such file" in refused(capsys, ["--config", str(tmp_path / "confg.yaml")], tmp_path / "run")


@pytest.mark.parametrize("content, told", [
    (b"", ["empty"]), (b"short", ["tokens", "lower data.length"]), (b"fine until here \xff\xfe and on\n" * 50, ["UTF-8", "corpus.txt"]),
], ids=["empty", "short", "not utf-8"])  # fmt: skip
def test_a_corpus_that_cannot_be_used(content, told, write, tmp_path, capsys):
    file = write()
    (tmp_path / "corpus.txt").write_bytes(content)
    text = refused(capsys, ["--config", file], tmp_path / "run")
    assert all(word in text for word in told), text


def test_a_flipped_byte_in_a_shard_is_found(write, run, tmp_path, capsys):
    """The checksum error names the shard; whether it is found at the start or when the row is read, it is one message."""
    file = write(cache=tmp_path / "own_cache")
    assert train.main(["--config", file, "steps=1"]) == 0
    shard = max((tmp_path / "own_cache" / "tokens").rglob("train/*"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert train.main(["--config", file, "steps=300", f"out={tmp_path / 'other'}"]) in (1, 2)
    told = capsys.readouterr()
    assert "Traceback" not in told.err and shard.name in told.err, told.err


def test_a_run_folder_of_another_run(whole, run, capsys, tmp_path):
    """The setting, both values, and the two ways out; a tokenizer and a corpus that changed; and what may change does."""
    assert run("steps=1") == 0
    capsys.readouterr()
    out = tmp_path / "run"
    base = ["--config", str(tmp_path / "config.yaml")]
    text = refused(capsys, [*base, "model.args.layers=3"], out)
    assert all(word in text for word in ("model.args.layers", "2", "3", "--restart", "another `out`")), text
    text = refused(capsys, [*base, "data.tokenizer.kind=characters"], out)
    assert "tokenizer" in text and "--restart" in text
    (tmp_path / "corpus.txt").write_text(TEXT + "and more\n")
    text = refused(capsys, base, out)
    assert "data" in text and "--restart" in text
    (tmp_path / "corpus.txt").write_text(TEXT)
    assert run("steps=2", "remat=full", "microbatches=2") == 0


def test_a_checkpoint_of_another_model_is_told_by_its_leaves(whole, write, tmp_path, capsys):
    other = [f"init_from={whole / 'run'}", "model.args.layers=3", "model.args.hidden=32"]
    text = refused(capsys, ["--config", write(), *other], tmp_path / "run")
    assert "of another shape" in text and "trunk/0/pattern/1/inner/down (2, 24, 16)" in text and "(3, 32, 16)" in text, text


def test_another_tokenizer_than_that_of_init_from(whole, write, tmp_path, capsys):
    text = refused(capsys, ["--config", write(), f"init_from={whole / 'run'}", "data.tokenizer.kind=characters"], tmp_path / "run")
    assert "another tokenizer" in text and "config.yaml" in text


def test_a_folder_that_cannot_be_written(write, tmp_path, capsys):
    """A file stands where the folder should be: refused to root as well."""
    (tmp_path / "file").write_text("")
    text = refused(capsys, ["--config", write(), f"out={tmp_path / 'file' / 'run'}"], tmp_path / "run")
    assert "cannot be written" in text and str(tmp_path / "file") in text
    text = refused(capsys, ["--config", write(), "data.cache=/proc/cache"], tmp_path / "run")
    assert "/proc/cache" in text and "data.cache" in text


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(write, tmp_path):
    """A file may grow no further (RLIMIT_FSIZE, as a full disk does): one message, exit code 1, and what was saved before is whole."""
    file = write()
    assert train.main(["--config", file, "steps=2", "checkpoints.save_async=false"]) == 0
    script = (
        "import resource as r, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); r.setrlimit(r.RLIMIT_FSIZE, (3000, 3000));"
        "from minllm.train import main; sys.exit(main(sys.argv[1:]))"
    )
    # nor may the limit cut off what Python and JAX would write beside the run
    environment = ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script, "--config", file, "steps=4", "metrics=[]"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the last good checkpoint is step 2" in done.stderr, done.stderr
    assert checkpoint.steps(tmp_path / "run") == [2]
    assert train.main(["--config", file, "steps=4"]) == 0


def test_a_wrong_range_to_profile(write, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", write(), "--profile", "5:3"])
    assert stop.value.code == 2 and "A < B" in capsys.readouterr().err and not (tmp_path / "run").exists()
