"""V11, K20, K21: one run over several processes, which meet over gloo on this machine: the same losses, one stop, a lost one, a slow one, a
stuck one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from minllm import checkpoint, metrics, train
from minllm.parallel.hosts import Told, Watch, join

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4
CONFIG = """
steps: 6
batch: 8
mesh: {{data: -1, fsdp: 2}}
out: {out}
metrics: [jsonl, console]
model: {{args: {{D: 16, layers: 1, heads: 2, kv_heads: 1, hidden: 24, scaling: null}}}}
data: {{source: {{kind: text, globs: [{corpus}]}}, tokenizer: {{kind: bytes}}, length: 16, holdout_tail: 0.1, cache: {cache}}}
optimizer: {{kind: adamw, lr: 1e-2}}
schedule: {{shape: constant, warmup: 0}}
checkpoints: {{every: 3}}
evaluations: {{every: 3, rows: 8}}
"""
TEXT = "".join(f"{i} is {'even' if i % 2 == 0 else 'odd'}, and {i} squared is {i * i}.\n" for i in range(600))


@pytest.fixture
def start(tmp_path):
    """start(n, *overrides, out=...) -> n processes of one run over four devices."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    alive = []

    def go(n, *overrides, out="run", wrap=()):
        file = tmp_path / f"{out}.yaml"
        file.write_text(CONFIG.format(out=tmp_path / out, corpus=tmp_path / "corpus.txt", cache=tmp_path / "cache"))
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONUNBUFFERED": "1", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(n), "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // n}",
        }  # fmt: skip
        command = [sys.executable, *(wrap or ("-m", "minllm.train")), "--config", str(file), *overrides]
        these = [
            subprocess.Popen(
                [*command, "--process", str(i)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
            )
            for i in range(n)
        ]
        alive.extend(these)
        return these

    yield go
    for process in alive:
        process.kill()


def finish(processes, code=0, seconds=120):
    """What each wrote, after all ended with this exit code."""
    texts = [process.communicate(timeout=seconds)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n---\n".join(texts)
    return texts


def losses(folder):
    """Loss by step, evaluations included."""
    return {(line["step"], name): line[name] for line in metrics.read(folder / "metrics.jsonl") for name in ("loss", "eval/loss")
            if name in line}  # fmt: skip


def same(a, b):
    """Float32 sums over processes come in another order than over the devices of one: 1e-6."""
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[k] for k in b], list(b.values()), rtol=1e-6)


def wait_for(process, text, seconds=60):
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


def test_two_processes_are_one(start, tmp_path, monkeypatch):
    """The losses of two processes with two devices each are those of one with four."""
    two = start(2, out="two")
    (tmp_path / "one.yaml").write_text((tmp_path / "two.yaml").read_text())
    four = jax.devices()[:DEVICES]
    monkeypatch.setattr(jax, "devices", lambda *_: four)
    assert train.main(["--config", str(tmp_path / "one.yaml"), f"out={tmp_path / 'one'}"]) == 0
    first, second = finish(two)
    assert "step 6" in first and "step" not in second  # only the first speaks
    same(losses(tmp_path / "two"), losses(tmp_path / "one"))


@pytest.mark.nightly
def test_another_number_of_processes_goes_on(start, tmp_path):
    """Four steps of two processes, then two of one, then two of four: the losses of one process, in its order of the data."""
    finish(start(1, "steps=8", "evaluations.every=100", out="one"))
    for n, steps in ((2, 4), (1, 6), (4, 8)):
        finish(start(n, f"steps={steps}", "evaluations.every=100", out="many"))
    train_only = lambda folder: {k: v for k, v in losses(tmp_path / folder).items() if k[1] == "loss"}
    same(train_only("many"), train_only("one"))


@pytest.mark.nightly
def test_four_processes_over_context_and_tensor(start, tmp_path):
    """Processes that share rows read the same ones: a context axis over processes, in the balanced order, and a tensor axis."""
    settings = "mesh.data=1", "mesh.fsdp=1", "mesh.context=2", "mesh.tensor=2", "context=ring", "balance=true"
    finish(start(1, *settings, out="one"))
    finish(start(4, *settings, out="four"))
    finish(start(4, out="rows"))
    finish(start(1, out="plain"))
    same(losses(tmp_path / "four"), losses(tmp_path / "one"))
    same(losses(tmp_path / "rows"), losses(tmp_path / "plain"))
    # another order of tokens and sums: the first step is the same to float32's rounding, and later ones follow
    np.testing.assert_allclose(losses(tmp_path / "four")[1, "loss"], losses(tmp_path / "plain")[1, "loss"], rtol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_with_the_restart_point(victim, start, tmp_path):
    processes = start(2, "steps=100000", "checkpoints.every=20", "evaluations.every=100000")
    while not (checkpoint.latest(tmp_path / "run") or 0) >= 20:
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.2)
    began = time.monotonic()
    processes[victim].kill()
    # without the first, where all meet, the runtime aborts the others, and their heirs speak
    (text,) = finish([processes[1 - victim]], code=75 if victim else -signal.SIGABRT, seconds=60)
    assert time.monotonic() - began < 60
    last = checkpoint.latest(tmp_path / "run")
    assert re.search(rf"error: .*; the newest checkpoint in \S+ is step {last}: the same command", text), text
    assert victim == 0 or "process 1 of 2" in text
    finish(start(4, f"steps={last + 2}"))  # and it does, with another number


@pytest.mark.nightly
def test_a_signal_to_one_stops_all_after_the_same_step(start, tmp_path):
    processes = start(2, "steps=100000", "checkpoints.every=100000", "evaluations.every=100000")
    wait_for(processes[0], "step 1")
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes)
    assert "stopped by a signal to another process after step" in first
    last = checkpoint.latest(tmp_path / "run")
    assert last and list(losses(tmp_path / "run"))[-1] == (last, "loss")


@pytest.mark.nightly
def test_a_slow_process_is_named_and_a_stuck_one_shows_its_stacks(start, tmp_path):
    """The second process sleeps before each of its batches: named within three steps. Then it sleeps for ever."""
    (tmp_path / "slow.py").write_text("""
import jax, sys, time
from minllm import train
from minllm.data.loader import Loader
batch = Loader.batch
def slow(self, step):
    if jax.process_index() == 1:
        time.sleep(10**6 if step == 12 else 0.5)
    return batch(self, step)
Loader.batch = slow
sys.exit(train.main(sys.argv[1:]))
""")
    settings = "steps=100", "watchdog=15", "checkpoints.every=1000", "evaluations.every=1000"
    processes = start(2, *settings, wrap=(str(tmp_path / "slow.py"),))
    text = wait_for(processes[0], "is slow: it works")
    assert "process 1" in text
    step = next(line["step"] for line in metrics.read(tmp_path / "run/metrics.jsonl") if "slow" in line)
    assert step <= 5  # steps 1 and 2 compile and are read late
    wait_for(processes[1], "in slow")
    assert "in train" in wait_for(processes[0], "in train")


def test_who_is_slow():
    watch = Watch(lambda: "")
    tell = lambda *own: watch._told.update({i: Told(f"host{i}", own=x) for i, x in enumerate(own)})
    tell(0.1)
    assert watch.slow(1.0) is None
    tell(0.1, 0.12, 0.11, 0.15)
    assert watch.slow(1.0) is None  # no more than others
    tell(0.01, 0.01, 0.04, 0.01)
    assert watch.slow(1.0) is None  # too little to matter
    tell(0.1, 0.1, 0.7, 0.1)
    assert re.match(r"process 2 \(host2\) is slow: it works 0.70 s of a step by itself .* the others 0.10 s", watch.slow(1.0))
    assert watch.slow(1.0) is None  # once


def test_joining_needs_all_three():
    join(None, None, None)
    with pytest.raises(ValueError, match="coordinator a:1 is given, but not how many processes there are"):
        join("a:1", None, 0)
    with pytest.raises(ValueError, match="process 2 of 2 does not exist; they are numbered 0 to 1"):
        join("a:1", 2, 2)
