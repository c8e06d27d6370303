"""Metrics: each step once in the file, one line on the screen, an account of the time that adds up, a curve one can read."""

import io
import json
import struct
import sys
import types

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console as Terminal

from minllm import metrics
from minllm.metrics import Console, Goodput, Jsonl, Metrics, TensorBoard, Wandb, draw, mfu, peak_flops, read


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("cpu", None), ("TPU v9", None), ("TPU v2", None),
    ],
)  # fmt: skip
def test_peaks(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_mfu_is_the_share_of_all_peaks():
    # Published: Llama 3 405B on 16,384 H100 at 400 TFLOP/s each is 40 % (Grattafiori et al. 2024, table 4).
    assert mfu(6 * 405e9, 400e12 * 16384 / (6 * 405e9), [device("NVIDIA H100 80GB HBM3")] * 16384) == pytest.approx(400 / 989)
    assert mfu(1e9, 1e3, [device("TPU v4"), device("cpu")]) is None


def test_jsonl_has_each_step_once_after_a_kill_and_a_restore(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Jsonl(path)
    for step in range(1, 8):
        first.write(step, {"loss": 10.0 - step})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the kill
    again = Jsonl(path, restored=5)
    for step in range(6, 10):
        again.write(step, {"loss": 10.0 - step})
    again.close()
    expected = [{"step": step, "loss": 10.0 - step} for step in range(1, 10)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected == read(path)
    Jsonl(path).close()
    assert read(path) == []  # a new run begins a new file


def test_a_line_is_on_disk_at_once_and_is_strict_json(tmp_path):
    sink = Metrics([Jsonl(tmp_path / "m.jsonl")])
    numbers = {"loss": jnp.float32("nan"), "norms": jnp.array([1.0, np.inf]), "n": np.int64(3), "flag": jnp.bool_(True)}
    sink.write(1, numbers | {"text": "ü", "deep": {"a": -np.inf}})
    line = (tmp_path / "m.jsonl").read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 1, "loss": "nan", "norms": [1.0, "inf"], "n": 3, "text": "ü", "flag": True, "deep": {"a": "-inf"},
    }  # fmt: skip
    assert read(tmp_path / "m.jsonl")[0]["n"] == 3
    sink.close()


def events(folder):
    """(step, name, value) of every scalar, read from the record format itself: length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
            at += size + 16


def test_tensorboard(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.write(3, {"loss": 1.5, "eval/loss": 2.0, "norms": [0.25, 0.5], "note": "text"})
    sink.write(4, {"loss": float("nan")})
    sink.close()
    *found, (step, name, value) = events(tmp_path)
    assert found == [(3, "loss", 1.5), (3, "eval/loss", 2.0), (3, "norms/0", 0.25), (3, "norms/1", 0.5)]
    assert (step, name) == (4, "loss") and np.isnan(value)


def test_wandb_only_when_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match='metrics ask for "wandb", which is not installed: pip install wandb'):
        Wandb(tmp_path)
    logged, started = [], []

    def init(**options):
        started.append(options)
        return types.SimpleNamespace(id="abc", log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):  # the second goes on with the first one's run
        with Metrics([Wandb(tmp_path, {"lr": 1.0})]) as sinks:
            sinks.write(2, {"loss": jnp.float32(1.5)})
    assert logged == [(2, {"loss": 1.5}), "end"] * 2
    assert [options["id"] for options in started] == [None, "abc"] and started[0]["config"] == {"lr": 1.0}


def screen(**options):
    return Terminal(file=io.StringIO(), highlight=False, **options)


STEP = {"loss": 1.84231, "tokens_per_second": 18312.0, "step_time": 0.2237, "data_wait": 0.004}


def test_plain_lines_come_at_once_and_then_every_few_seconds():
    clock, terminal = Clock(), screen()
    console = Console(total=100, every=5.0, terminal=terminal, clock=clock)
    for step in range(1, 13):
        clock.now = float(step)
        console.write(step, STEP | ({"compile_time": 8.12, "mfu": 0.412} if step == 1 else {}))
    console.close()
    assert terminal.file.getvalue().splitlines() == [
        "compiled in 8.1 s; MFU counts causal matmul FLOPs over the dense bf16 peak",
        "step 1/100  loss 1.8423  18.3k tokens/s  224 ms/step  data wait 0.4%  MFU 41.2% (causal)  0:22 left",
        "step 6/100  loss 1.8423  18.3k tokens/s  224 ms/step  data wait 0.4%  1:34 left",
        "step 11/100  loss 1.8423  18.3k tokens/s  224 ms/step  data wait 0.4%  1:29 left",
        "step 12/100  loss 1.8423  18.3k tokens/s  224 ms/step  data wait 0.4%  1:28 left",
    ]


def test_evaluations_and_notes_are_lines_of_their_own():
    terminal = screen()
    with Metrics([Console(terminal=terminal)]) as sinks:
        sinks.write(1200, {"eval/loss": jnp.float32(1.5), "eval/accuracy": 0.25})
        sinks.note("sample: [bold]x[/bold]")
        sinks.write(1200, {"loss": jnp.float32(2.0), "mfu": None})
    assert terminal.file.getvalue().splitlines() == [
        "step 1,200  evaluation  loss 1.5000  accuracy 0.2500",
        "sample: [bold]x[/bold]",
        "step 1,200  loss 2.0000",
    ]


def test_a_terminal_has_one_live_line():
    terminal = screen(force_terminal=True, width=110, color_system=None)
    console = Console(total=100, terminal=terminal)
    for step in range(1, 60):
        console.write(step, STEP)
    console.note("saved step 59")
    console.close()
    shown = terminal.file.getvalue()
    assert shown.count("\n") == 2 and "saved step 59\n" in shown  # the note and the final line; the rest was drawn over
    assert shown.rstrip("\x1b[?25h\n").splitlines()[-1].count("step 59/100  loss 1.8423") == 1


@pytest.mark.parametrize(
    "value, text", [(0.4, "0"), (950.0, "950"), (1e3, "1k"), (18312.0, "18.3k"), (999_900.0, "1000k"), (1.84e6, "1.84M"), (2e9, "2G")]
)
def test_short(value, text):
    assert metrics._short(value) == text


@pytest.mark.parametrize("seconds, text", [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3600.0, "1:00:00"), (90061.0, "1d 01h")])
def test_duration(seconds, text):
    assert metrics._duration(seconds) == text


def test_goodput_adds_up():
    clock = Clock()
    clock.now = 100.0
    goodput = Goodput(clock)

    def passes(seconds):
        clock.now += seconds

    passes(1)  # other
    with goodput.during("compile"):
        passes(4)
    for _ in range(2):
        with goodput.during("step"):
            passes(2)
            with goodput.during("data"):
                passes(1)
            passes(2)
    with pytest.raises(KeyError), goodput.during("checkpoint"):
        passes(5)
        raise KeyError
    shares = goodput.shares()
    assert shares == {"goodput": 8 / 20, "compile": 4 / 20, "data": 2 / 20, "checkpoint": 5 / 20, "other": 1 / 20}
    assert sum(shares.values()) == pytest.approx(1)


def run_of(path, steps, **more):
    sink = Jsonl(path)
    for step in range(1, steps + 1):
        values = {"loss": 1.3 + 3 * np.exp(-step / 60) + 0.05 * np.sin(step * 7.0), "lr": 1e-3 * min(1, step / 50)}
        values |= {"eval/loss": 1.4 + 3 * np.exp(-step / 60)} if step % 100 == 0 else {}
        sink.write(step, values | more.get(f"at_{step}", {}))
    sink.close()
    return path


def colours(png):
    image = matplotlib.image.imread(png)[..., :3]
    near = lambda rgb: int((np.abs(image - np.array(rgb) / 255).max(-1) < 0.06).sum())
    return {"blue": near((33, 102, 172)), "orange": near((214, 96, 77)), "grey": near((85, 85, 85)), "shape": image.shape}


def test_the_curve_shows_training_evaluation_and_rate(tmp_path):
    draw(run_of(tmp_path / "m.jsonl", 600, at_300={"loss": float("nan")}), tmp_path / "loss.png", title="a run")
    seen = colours(tmp_path / "loss.png")
    assert seen["shape"][:2] == (810, 1350) and min(seen["blue"], seen["orange"], seen["grey"]) > 300


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_curve_of_a_short_run(tmp_path, steps):
    draw(run_of(tmp_path / "m.jsonl", steps), tmp_path / "loss.png")
    assert colours(tmp_path / "loss.png")["orange"] == 0
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": "nan"}\n')
    draw(tmp_path / "m.jsonl", tmp_path / "loss.png")


def test_smoothing_does_not_lag():
    line = np.linspace(5, 1, 500)
    assert np.abs(metrics._smoothed(line) - line).max() < 0.05  # only the last half window leans back
    noise = np.random.default_rng(0).normal(size=5000)
    assert metrics._smoothed(noise)[1000:4900].std() < 1.5 / np.sqrt(200)


def test_open_makes_the_named_sinks_and_resumes_them(tmp_path):
    for restored in (None, 2):
        with Metrics.open(tmp_path / "run", ("jsonl", "tensorboard"), restored=restored) as sinks:
            assert [type(sink) for sink in sinks.sinks] == [Jsonl, TensorBoard]
            for step in range((restored or 0) + 1, 5):
                sinks.write(step, {"loss": 1.0})
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Metrics.open(tmp_path / "run") as sinks:
        sinks.write(1, {"loss": 1.0})
        sinks.note("hello")
    assert not (tmp_path / "run").exists()
