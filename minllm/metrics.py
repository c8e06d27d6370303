"""What a training run tells: one `Metrics` that hands each step's numbers to small sinks.

    with Metrics.open(folder, ("console", "jsonl", "tensorboard"), total=5000) as metrics:
        metrics.write(step, {"loss": 1.84, "lr": 3e-4, "tokens_per_second": 18300.0, "step_time": 0.22, "data_wait": 0.004})

A sink has `write(step, values)` and `close()`; the console also shows `note(text)`. Values are numbers, arrays (per-layer norms) or
text, under any name; the console and the curve know loss, lr, tokens_per_second, step_time (seconds), data_wait (share of the
step), mfu (share of the peak), compile_time (seconds, once) and eval/loss. `Goodput` keeps the account of the wall time.
"""

import importlib
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Values = Mapping[str, Any]

# Dense bfloat16 FLOP/s of one jax device: (how its device_kind begins or, for GPUs, what it holds, peak), the first that fits.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip has two TensorCores, and jax calls each a device
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
MFU_CONVENTION = "causal matmul FLOPs over the dense bf16 peak"


def peak_flops(device_kind: str) -> float | None:
    """The dense bfloat16 peak of one jax device of this kind, in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def mfu(flops_per_token: float | int, tokens_per_second: float | int, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation: the share of the devices' dense bf16 peak that the model's own matmuls use, without recomputation.

    `flops_per_token` counts forward and backward matmuls, attention as causal (half the square). Of the jax `devices` only
    `device_kind` is read; None if the peak of any is unknown.
    """
    peaks = [peak_flops(device.device_kind) for device in devices]
    return None if None in peaks else flops_per_token * tokens_per_second / sum(peaks)  # type: ignore[arg-type]


@runtime_checkable
class Sink(Protocol):
    """One place that metrics go to."""

    def write(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Hands every write to all sinks, as plain Python numbers, lists and text. On processes other than the first it is silent."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = tuple(sinks) if jax.process_index() == 0 else ()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        sinks: Sequence[Literal["console", "jsonl", "tensorboard", "wandb"]] = ("console", "jsonl", "tensorboard"),
        total: int = 0,
        restored: int | None = None,
        settings: Values | None = None,
    ) -> "Metrics":
        """The named sinks of a run folder. `total` is the last step; `restored` the step of the checkpoint that the run goes on
        from: what was written after it is dropped, so that each step is there once. W&B gets `settings`."""
        folder = Path(folder)
        make: dict[str, Callable[[], Sink]] = {
            "console": lambda: Console(total),
            "jsonl": lambda: Jsonl(folder / "metrics.jsonl", restored),
            "tensorboard": lambda: TensorBoard(folder / "tensorboard", restored),
            "wandb": lambda: Wandb(folder, settings),
        }
        if jax.process_index() != 0:
            return cls(())
        folder.mkdir(parents=True, exist_ok=True)
        return cls([make[name]() for name in sinks])

    def write(self, step: int, values: Values) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        for sink in self.sinks:
            sink.write(step, plain)

    def note(self, text: str) -> None:
        """Prints a line (a sample, a checkpoint, a warning) above the progress line."""
        for sink in self.sinks:
            if isinstance(sink, Console):
                sink.note(text)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(sinks: Sequence[str]) -> None:
    """Raises ValueError for a sink that cannot be opened on this machine."""
    if "wandb" in sinks and importlib.util.find_spec("wandb") is None:
        raise ValueError(_NO_WANDB)


_NO_WANDB = 'metrics ask for "wandb", which is not installed: pip install wandb, or take it off the list'


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, jax.Array | np.ndarray | np.generic) else value


class Jsonl:
    """One JSON object a write, on disk at once. Numbers that JSON has not are text: "nan", "inf", "-inf".

    Opened again, it drops the lines after step `restored` (None: all) and a last line that a kill cut off.
    """

    def __init__(self, path: str | Path, restored: int | None = None):
        path = Path(path)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and restored is not None else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= restored]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        self._file.write(json.dumps({"step": step, **_json(values)}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without a last line that a kill cut off."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


class TensorBoard:
    """Scalars under their names; an array's entries under name/0, name/1, ..."""

    def __init__(self, folder: str | Path, restored: int | None = None):
        from tensorboardX import SummaryWriter  # half a second that a run without it need not spend

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a NaN belongs into the curve, not onto the screen
        purge = None if restored is None else restored + 1
        # Files are named by the second: a run that is resumed within one would overwrite what it goes on from.
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{time.time_ns()}")

    def write(self, step: int, values: Values) -> None:
        for name, value in _scalars(values):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _scalars(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    for name, value in pairs:
        if isinstance(value, Mapping | list | tuple):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


class Wandb:
    """Weights & Biases. The run's id is kept in the folder, so that a resumed run goes on in the same place."""

    def __init__(self, folder: str | Path, settings: Values | None = None):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ValueError(_NO_WANDB) from None
        folder = Path(folder)
        known = folder / "wandb_id"
        name = known.read_text() if known.exists() else None
        self._run = wandb.init(project="minllm", name=folder.name, dir=str(folder), id=name, resume="allow", config=dict(settings or {}))
        known.write_text(self._run.id)

    def write(self, step: int, values: Values) -> None:
        self._run.log(dict(_scalars(values)), step=step)

    def close(self) -> None:
        self._run.finish()


class Console:
    """One live line on a terminal; elsewhere a printed line every `every` seconds, the first and the last at once."""

    def __init__(self, total: int = 0, every: float = 5.0, terminal: Terminal | None = None, clock: Callable[[], float] = time.monotonic):
        self.total, self.every, self.clock = total, every, clock
        self.terminal = terminal or Terminal(highlight=False)
        self._first: tuple[int, float] | None = None  # step and time of the first write: the speed so far, evaluations included
        self._printed = -math.inf
        self._last: tuple[int, Values] | None = None
        self._unprinted = False
        self._live = Live(console=self.terminal, refresh_per_second=4) if self.terminal.is_terminal else None

    def write(self, step: int, values: Values) -> None:
        now = self.clock()
        if "compile_time" in values:
            named = f"; MFU counts {MFU_CONVENTION}" if values.get("mfu") is not None else ""
            self.note(f"compiled in {values['compile_time']:.1f} s{named}")
        if "eval/loss" in values:
            self.note(f"step {step:,}  evaluation  " + "  ".join(f"{n[5:]} {v:.4f}" for n, v in _scalars(values) if n.startswith("eval/")))
        if "loss" not in values:
            return
        self._first = self._first or (step, now)
        self._last, self._unprinted = (step, values), True
        if self._live:
            if not self._live.is_started:
                self._live.start()
            self._live.update(self._line(bar=True))
        elif now - self._printed >= self.every:
            self._print(now)

    def note(self, text: str) -> None:
        if self._unprinted and not self._live:  # what a note speaks of comes before it
            self._print(self.clock())
        self.terminal.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._live and self._live.is_started:
            self._live.stop()
        elif self._unprinted:
            self._print(self.clock())

    def _print(self, now: float) -> None:
        self._printed, self._unprinted = now, False
        self.terminal.print(self._line(), soft_wrap=True)

    def _line(self, bar: bool = False) -> Any:
        step, values = self._last  # type: ignore[misc]
        parts = [f"step {step:,}/{self.total:,}" if self.total else f"step {step:,}", f"loss {values['loss']:.4f}"]
        shown: dict[str, Callable[[float], str]] = {
            "tokens_per_second": lambda v: f"{_short(v)} tokens/s",
            "step_time": lambda v: f"{v * 1e3:.0f} ms/step" if v < 10 else f"{v:.1f} s/step",
            "data_wait": lambda v: f"data wait {v:.1%}",
            "mfu": lambda v: f"MFU {v:.1%} (causal)",
        }
        parts += [show(values[name]) for name, show in shown.items() if values.get(name) is not None]
        left = self._seconds_left(step, values)
        if left is not None:
            parts.append(f"{_duration(left)} left")
        line = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        if not (bar and self.total):
            return line
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(self.total, step, width=16), line)
        return grid

    def _seconds_left(self, step: int, values: Values) -> float | None:
        if not self.total or not self._first:
            return None
        steps, seconds = step - self._first[0], self.clock() - self._first[1]
        each = seconds / steps if steps else values.get("step_time")
        return None if each is None else (self.total - step) * each


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02}h" if days else f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


class Goodput:
    """Where the wall time went: goodput is the share in which steps ran.

        with goodput.during("step"): ...          # also "compile", "checkpoint", "evaluation", "data", or any other word

    Time in an inner `during` belongs to the inner word alone; time outside all of them is "other".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._begin, self._seconds, self._stack = clock, clock(), {}, []
        self._mark = self._begin

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        self._charge()
        self._stack.append(what)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now, what = self._clock(), self._stack[-1] if self._stack else "other"
        self._seconds[what] = self._seconds.get(what, 0.0) + now - self._mark
        self._mark = now

    def shares(self) -> dict[str, float]:
        """{"goodput": ..., "compile": ..., ..., "other": ...}: shares of the wall time since the beginning, which add up to 1."""
        self._charge()
        wall = self._mark - self._begin
        shares = {what: seconds / wall if wall else 0.0 for what, seconds in self._seconds.items()}
        return {"goodput": shares.pop("step", 0.0), **shares}


def draw(metrics: str | Path, png: str | Path, title: str = "") -> None:
    """The loss curve of a JSONL file as a PNG: every step's loss, its smoothed course, the evaluations, and the learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # matplotlib takes a second to import; no pyplot: no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    def series(name: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
        steps, values = np.array(pairs).T if pairs else np.zeros((2, 0))
        return steps, values

    rows = read(metrics)
    (steps, losses), (eval_steps, evals), (lr_steps, lrs) = series("loss"), series("eval/loss"), series("lr")
    finite = np.isfinite(losses)
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1)) if lrs.size else [figure.subplots()]
    top, bottom = panels[0], panels[-1]
    blue, orange, grey = "#2166ac", "#d6604d", "#555555"

    if finite.any():
        steps_ok, smooth = steps[finite], _smoothed(losses[finite])
        top.plot(steps_ok, losses[finite], color=blue, alpha=0.25, linewidth=0.8)
        top.plot(steps_ok, smooth, color=blue, linewidth=1.8, label=f"training, smoothed: {smooth[-1]:.3f}")
        seen = np.concatenate([smooth, evals[np.isfinite(evals)]])
        low, high = min(seen.min(), np.quantile(losses[finite], 0.01)), seen.max()
        if low > 0 and high / low > 2:  # the first steps fall far: a log axis leaves room for the rest
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            top.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            top.yaxis.set_minor_formatter(NullFormatter())
            top.set_ylim(low * 0.96, high * 1.05)
        else:
            top.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
    if evals.size:
        label = f"evaluation: {evals[-1]:.3f} (best {np.nanmin(evals):.3f})"
        top.plot(eval_steps, evals, "o-", color=orange, linewidth=1.2, markersize=4.5, markeredgecolor="white", label=label)
    for n, step in enumerate(steps[~finite]):
        top.axvline(step, color="black", linewidth=0.8, linestyle=":", label="not finite: step skipped" if n == 0 else None)
    top.set_ylabel("loss (nats per token)")
    top.set_title(title or Path(metrics).resolve().parent.name, loc="left", fontsize=11)
    if top.get_legend_handles_labels()[0]:
        top.legend(frameon=False, loc="upper right")

    if lrs.size:
        bottom.plot(lr_steps, lrs, color=grey, linewidth=1.4)
        bottom.fill_between(lr_steps, lrs, color=grey, alpha=0.12, linewidth=0)
        bottom.set_ylabel("learning rate")
        bottom.set_ylim(bottom=0)
        bottom.yaxis.set_major_locator(MaxNLocator(3))
        bottom.yaxis.set_major_formatter(FuncFormatter(_power))
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels(panels)
    figure.savefig(png)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of the neighbours on both sides (so that it does not lag), few at the steep beginning, later a 25th of the run."""
    n = len(values)
    at, sums = np.arange(n), np.concatenate([[0.0], np.cumsum(values)])
    half = np.minimum(at // 10, n // 50)
    first, last = at - half, np.minimum(at + half + 1, n)
    return (sums[last] - sums[first]) / (last - first)


def _power(y: float, _: Any = None) -> str:
    mantissa, exponent = f"{y:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if y else "0"
