"""Train a model: python -m minllm.train --config FILE [key.sub=value ...]

A run folder holds everything: the resolved config, checkpoints, metrics, the loss curve. The same command continues it.
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minllm.config import ConfigError, Loaded, dump, explain, flatten, schema

# What a resumed run may change: how it runs, what it reports, how long and in which batches; not what it learns from, or how.
FREE = ("out", "steps", "batch", "microbatches", "mesh", "kernels", "remat", "save", "offload", "context", "balance", "zero", "scan",
        "checkpoints", "evaluations", "samples", "metrics", "init_from", "compilation_cache", "watchdog", "topologies",
        "data.cache")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minllm.train", description="Train a model, or continue a run.")
    parser.add_argument("--config", metavar="FILE", help="a YAML file; without one, the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings in place of the file's")
    parser.add_argument("--topology", metavar="NAME", help="take the settings that the file has for this machine, such as v6e-8")
    parser.add_argument("--explain", action="store_true", help="print every setting, its value and where it came from, and stop")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a config file, for editors, and stop")
    parser.add_argument("--dry-run", action="store_true", help="compile one step, print its memory, and stop")
    parser.add_argument("--restart", action="store_true", help="delete what the run folder holds of an earlier run, and begin again")
    parser.add_argument("--profile", metavar="A:B", type=_range, default=range(0), help="trace steps A to B-1 with jax.profiler")
    several = parser.add_argument_group("many processes", "each is started with the same command; on a TPU slice, and where a cluster is "
                                        "asked, nothing need be said")  # fmt: skip
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is; default: $JAX_COORDINATOR_ADDRESS")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are; default: $JAX_NUM_PROCESSES")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0; default: $JAX_PROCESS_ID")
    several.add_argument("--cluster", action="store_true", help="ask the cluster (a TPU slice, Slurm, MPI) for these three")
    args = parser.parse_intermixed_args(argv)  # overrides may stand before and after options

    from minllm.run import Run, for_topology

    keep_freed_memory()
    try:
        if args.schema:
            print(json.dumps(schema(Run), indent=2))
            return 0
        loaded = for_topology(args.config, args.topology, args.overrides)
        if args.explain:
            from rich.console import Console

            Console().print(explain(loaded))
            return 0
        _join(args)
        trainer = Trainer(loaded, args.restart)
        if note := trainer.built.pipeline:
            print(note)
        if args.dry_run:
            print(trainer.memory())
            return 0
        trainer.open()
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from minllm.checkpoint import SaveError

    try:
        trainer.train(args.profile)
    except (SaveError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        trainer.watch.fail(error)
    except Exception as error:
        if trainer.watch.count == 1:
            raise
        traceback.print_exc()
        trainer.watch.accuse(error)
    else:
        return 0
    if trainer.watch.count > 1:
        sys.stderr.flush()
        os._exit(1)  # the end of jax.distributed would wait for the others
    return 1


def _join(args: argparse.Namespace) -> None:
    """Becomes one of several processes, where the arguments, the environment or the machine say so."""
    from minllm.parallel.hosts import join

    number = lambda given, name: int(os.environ[name]) if given is None and name in os.environ else given
    coordinator = args.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    slice_of_tpus = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    join(
        coordinator,
        number(args.processes, "JAX_NUM_PROCESSES"),
        number(args.process, "JAX_PROCESS_ID"),
        automatic=args.cluster or (coordinator is None and slice_of_tpus),
    )


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, in one arena.

    XLA:CPU asks for the temporaries of a step as one block and frees it after the step. A block of that size goes back to the system, which
    hands it out again page by page: 160,000 faults a step for 600 MB.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}.values():
        mallopt(option, value)


class DataError(Exception):
    """A batch could not be read: a shard that was whole when the run began is not any more."""


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B with A < B, such as 10:13")
    return range(int(first), int(last))


class Trainer:
    """A run made ready: everything is checked, nothing compiled and, beside the data cache, nothing written. Raises ValueError for whatever
    the user can mend. `open` then takes the run folder, and `train` trains."""

    def __init__(self, loaded: Loaded, restart: bool = False):
        import jax  # what answers --help, a wrong key or --explain does not wait for it

        from minllm import checkpoint, metrics, pretrained
        from minllm.data import prepare
        from minllm.parallel.hosts import Watch
        from minllm.step import build

        self.goodput = metrics.Goodput()
        self.run, self.out = loaded.value, Path(loaded.value.out)
        self.place = self.run.checkpoints.folder or self.out  # whose subfolder `checkpoints` they are in
        self.watch = Watch(self.restart_point, (sys.executable, "-c", _HEIR, str(self.place)), self.run.watchdog)
        if self.run.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", self.run.compilation_cache)
        self.restart = restart
        self.restored = None if restart else checkpoint.latest(self.place)
        metrics.check(self.run.metrics)
        extra = {} if self.restored is None else checkpoint.read_extra(self.place, self.restored)
        with _progress() as progress:
            self.data = prepare(self.run.data, progress)
        like = self.run.model.like and pretrained.describe(self.run.model.like)
        self.built = build(self.run, self.data.tokenizer.vocab_size, like=like)
        self._same_run(extra)
        self.ramp = self.run.ramp(extra and {"step": self.restored, "stages": extra["stages"]})
        hosts = dict(zip(("host_index", "host_count"), self.built.share()))
        self.loader = self.data.loader(self.ramp, seed=self.run.seed, **hosts)
        batch = self.run.evaluations.batch or self.ramp.size_of(0)
        held_out = self.data.stats["held_out"].tokens > 0
        self.some = self.data.evaluation(batch, rows=self.run.evaluations.rows, **hosts) if held_out else None
        self.whole = self.data.evaluation(batch, **hosts) if held_out else None
        self.built.place((batch, self.run.data.length))  # the rows of an evaluation must divide over the mesh too
        self.start = self._source()
        self.compiled: dict[tuple[int, ...], Any] = {}
        self._compile_time: float | None = None
        self._mark = time.monotonic()
        self._evaluate = None

    def open(self) -> None:
        """Takes the run folder: makes it or, to restart, empties it. Raises SaveError where it cannot be written."""
        from jax.experimental.multihost_utils import sync_global_devices

        from minllm import checkpoint

        first, saves = self.watch.index == 0, self.run.checkpoints
        if self.restart and first:
            checkpoint.clear(self.place)
            for old in (self.out / "metrics.jsonl", self.out / "tensorboard"):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        sync_global_devices("the run folder is empty or what it was")
        self.checkpoints = checkpoint.Checkpointer(self.place, saves.keep, "min" if saves.best else None, saves.save_async)
        if first:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(dump(self.run))
            self.data.tokenizer.save(self.out / "tokenizer")

    def restart_point(self) -> str:
        return restart_point(self.place)

    def _same_run(self, extra: dict[str, Any]) -> None:
        """A run folder goes on as what it is."""
        if not extra:
            return
        mine, way = flatten(self.run), f"give another `out` than {self.out}, or --restart to begin again"
        if extra["tokenizer"] != self.data.tokenizer.hash:
            raise ValueError(f"the tokenizer is not the one this run began with (hash {extra['tokenizer'][:12]}); {way}")
        changed = [key for key in {**extra["config"], **mine} if extra["config"].get(key) != mine.get(key)
                   and not any(key == free or key.startswith(free + ".") for free in FREE)]  # fmt: skip
        if changed:
            key = changed[0]
            raise ValueError(
                f"the run in {self.out} has {key} = {extra['config'].get(key)!r}, now it is {mine.get(key)!r}"
                f"{f' (and {len(changed) - 1} more settings differ)' if len(changed) > 1 else ''}; {way}"
            )
        if extra["data"] != self.data.identity:
            raise ValueError(f"the data is not what this run began with: its text or order has changed; {way}")

    def _source(self) -> Any:
        """Where the first state comes from: this run's checkpoint, another's parameters, or a fresh start. Checked, not yet read."""
        from minllm import checkpoint, pretrained

        if self.restored is not None:
            checkpoint.check(self.place, self.built.state, self.restored)
        if self.restored is not None or self.run.init_from is None:
            return None
        folder = Path(self.run.init_from)
        if pretrained.kind(folder) != "run":
            self._same_model(folder)
            return folder, None
        step = int(folder.name) if folder.name.isdecimal() and folder.parent.name == "checkpoints" else None
        folder = folder.parent.parent if step is not None else folder
        self._same_tokenizer(folder, checkpoint.read_extra(folder, step)["tokenizer"], f"data.tokenizer of {folder / 'config.yaml'}")
        checkpoint.check(folder, self._plain(), step, under="params")
        return folder, step

    def _same_model(self, folder: Path) -> None:
        """Parameters of another program are those of this run's model and tokenizer."""
        from minllm import pretrained
        from minllm.models.family import difference

        if parts := difference(pretrained.describe(folder), self._unadapted()):
            raise ValueError(f"init_from {folder} is another model than this run's: {parts}; set model.like to the folder")
        tokenizer = pretrained.tokenizer_of(folder)
        if tokenizer is not None:
            self._same_tokenizer(folder, tokenizer.hash, f"data.tokenizer: {{kind: huggingface, path: {folder}}}")

    def _same_tokenizer(self, folder: Path, theirs: str, way: str) -> None:
        mine = self.data.tokenizer.hash
        if theirs != mine:
            raise ValueError(
                f"init_from {folder} was trained with another tokenizer (hash {theirs[:12]}, this run's is {mine[:12]}); use {way}"
            )

    def _unadapted(self) -> Any:
        return self.built.model if self.run.lora is None else self.built.model.model

    def _plain(self) -> Any:
        """The abstract parameters that another run is read into."""
        return self.built.state.params if self.run.lora is None else _placed(self.built.model.model, self.built)

    # --- state ------------------------------------------------------------------------------------------------------------

    def state(self) -> Any:
        """The state to go on from, every leaf checked."""
        import jax
        import jax.numpy as jnp

        from minllm import checkpoint, pretrained, spec

        if self.restored is not None:
            return checkpoint.restore(self.place, self.built.state, self.restored)[0]
        state = self.built.init(jax.random.key(self.run.seed))
        if self.start is None:
            return state
        folder, step = self.start
        model = self._unadapted()
        if pretrained.kind(folder) == "run":
            params = checkpoint.restore(folder, self._plain(), step, under="params")[0]
        else:
            params = pretrained.load(folder, self.built.execution, jnp.dtype(self.run.precision.params)).params
        if self.run.lora is None:
            return state.replace(params=params)
        adapted = self.run.lora.wrap(model.params(), params, jax.random.key(self.run.seed))
        trained, frozen = spec.part(self.built.model.params(), adapted)
        return state.replace(params=trained, frozen=frozen)

    def save(self, step: int, state: Any) -> None:
        extra = {
            "config": flatten(self.run), "tokenizer": self.data.tokenizer.hash, "data": self.data.identity,
            "stages": [list(stage) for stage in self.ramp.stages], "samples": self.ramp.start_of(step), "seed": self.run.seed,
        }  # fmt: skip
        with self.goodput.during("checkpoint"):
            self.checkpoints.save(step, state, extra)

    # --- programs ---------------------------------------------------------------------------------------------------------

    def step_of(self, shape: tuple[int, ...]) -> Any:
        """The compiled step for batches of a shape: once for each shape, of which there are as many as stages of the ramp."""
        if shape not in self.compiled:
            began = time.monotonic()
            with self.goodput.during("compile"):
                self.compiled[shape] = self.built.compile(*shape)
                self.watch.meet(f"compiled {shape}")
            self._mark, self._compile_time = time.monotonic(), time.monotonic() - began
        return self.compiled[shape]

    def memory(self) -> str:
        """One compiled step and what it holds, and what every device holds a copy of."""
        from minllm.sharding import replicated

        rows = self.ramp.size_of(self.restored or 0)
        began = time.monotonic()
        m = self.step_of((rows, self.run.data.length)).memory_analysis()
        size = lambda n: f"{n / 2**20:,.1f} MiB"
        return (f"one step of {rows} x {self.run.data.length} tokens, compiled in {time.monotonic() - began:.1f} s, on each device: "
                f"arguments {size(m.argument_size_in_bytes)} (of which {size(m.alias_size_in_bytes)} become the new state), "
                f"temporaries {size(m.temp_size_in_bytes)}, outputs {size(m.output_size_in_bytes - m.alias_size_in_bytes)}"
                + "".join(f"\nreplicated: {line}" for line in replicated(self.built.state)))  # fmt: skip

    def evaluate(self, state: Any, windows: Any) -> dict[str, float]:
        """Loss over held-out windows: of the averaged parameters where there is an average."""
        import jax

        from minllm.step import make_evaluation

        if self._evaluate is None:
            self._evaluate = jax.jit(make_evaluation(self.built.model, self.run, self.built.execution))
        params = state.params if state.average is None else state.average
        total, weight = 0.0, 0.0
        with self.goodput.during("evaluation"):
            for batch in windows:
                s, w = self._evaluate(params, state.frozen, self.built.put(batch))["loss"]
                total, weight = total + float(s), weight + float(w)
        loss = total / weight
        per_byte = loss * windows.tokens / max(windows.bytes, 1)
        return {"eval/loss": loss, "eval/nats_per_byte": per_byte, "eval/bits_per_byte": per_byte / 0.6931471805599453}

    def texts(self, state: Any) -> Iterator[str]:
        """A sample for each prompt."""
        from minllm import spec
        from minllm.sample import sample

        ask, tokenizer = self.run.samples, self.data.tokenizer
        if not ask.prompts:
            return
        params = spec.join(state.params if state.average is None else state.average, state.frozen)
        prompts = [_ids(tokenizer, prompt) for prompt in ask.prompts]
        stop = () if tokenizer.eos is None else (tokenizer.eos,)
        with self.goodput.during("evaluation"):
            drawn = sample(self.built.model, params, prompts, ask.tokens, sampler=ask.sampler, stop=stop, run=self.built.execution)
        for prompt, tokens in zip(ask.prompts, drawn):
            yield prompt + tokenizer.decode(tokens)

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def train(self, profile: range = range(0)) -> dict[str, float]:
        """To the last step, or to a signal: SIGTERM and SIGINT finish the step, save and return. The last evaluation."""
        import jax

        from minllm import metrics

        run, found = self.run, {}
        log = metrics.Metrics.open(self.out, run.metrics, total=run.steps, restored=self.restored, settings=flatten(run))
        begin = self.restored or 0
        log.note(self.banner())
        with _signals() as stopped, self.watch as watch, log, self.checkpoints, self.loader.batches(begin) as batches:
            state, step, pending = self.state(), begin, None
            ready = time.monotonic()  # since when this process had nothing to wait for
            while step < run.steps and not watch.stops(step, bool(stopped)):
                if step in profile[:1]:
                    jax.profiler.start_trace(str(self.out / "profile"))
                with self.goodput.during("data"):
                    try:
                        batch = self.built.put(next(batches))
                    except ValueError as error:
                        raise DataError(error) from None
                own = time.monotonic() - ready
                watch.note(step, "step" if batch["tokens"].shape in self.compiled else "compile")
                program = self.step_of(batch["tokens"].shape)
                watch.note(step, "step", own)
                with self.goodput.during("step"):
                    state, values = program(state, batch)
                    step += 1
                    if pending:  # the step before is read while this one runs: devices never wait for the host
                        self._report(log, *pending)
                    pending = step, values, batch["tokens"].shape
                ready = time.monotonic()
                if step - 1 in profile[-1:]:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    log.note(f"trace of steps {profile[0]} to {profile[-1]} written to {self.out / 'profile'}")
                if step == run.steps:
                    break
                evaluates = self.some is not None and step % run.evaluations.every == 0
                if evaluates or step % run.checkpoints.every == 0:
                    watch.note(step, "checkpoint")
                    self.save(step, state)  # before the evaluation: if that fails, nothing is lost
                if evaluates:
                    watch.note(step, "evaluation")
                    found = self.evaluate(state, self.some)
                    log.write(step, found)
                    self.checkpoints.rate(step, found["eval/loss"])
                if step % run.samples.every == 0:
                    for text in self.texts(state):
                        log.note(text)
                if evaluates or step % run.checkpoints.every == 0 or step % run.samples.every == 0:
                    ready = time.monotonic()
            if pending:
                with self.goodput.during("step"):
                    self._report(log, *pending)
            watch.note(step, "checkpoint")
            self.save(step, state)
            if step < run.steps or (stopped and watch.count == 1):
                self.checkpoints.wait()
                by = stopped[0] if stopped else "a signal to another process"
                log.note(f"stopped by {by} after step {step}; the same command continues from there")
                return found
            if self.whole and step > begin:
                if self.some and run.checkpoints.best:  # by the windows that the others were rated by
                    self.checkpoints.rate(step, self.evaluate(state, self.some)["eval/loss"])
                found = self.evaluate(state, self.whole)
                log.write(step, found)
            for text in self.texts(state):
                log.note(text)
            log.note(self.summary(step, found))
        if "jsonl" in run.metrics and watch.index == 0:
            metrics.draw(self.out / "metrics.jsonl", self.out / "loss.png", self.out.name)
        return found

    def _report(self, log: Any, step: int, values: dict[str, Any], shape: tuple[int, int]) -> None:
        """One step's line. Waits until the step is done."""
        import jax

        from minllm import metrics

        values = jax.device_get(values)
        now, tokens = time.monotonic(), shape[0] * shape[1]
        took, self._mark = now - self._mark, now
        shares = self.goodput.shares()
        line = {name: float(value) for name, value in values.items() if name not in ("layer_grad_norms", "skipped")}
        line |= {
            "tokens": tokens, "samples": self.ramp.start_of(step), "step_time": took, "tokens_per_second": tokens / took,
            "data_wait": shares.get("data", 0.0), "goodput": shares["goodput"],
            "layer_grad_norms": {name: norms.tolist() for name, norms in values["layer_grad_norms"].items()},
            "mfu": metrics.mfu(self.built.model.flops(shape[1]), tokens / took, jax.devices()),
        }  # fmt: skip
        if self._compile_time is not None:
            line["compile_time"], self._compile_time = self._compile_time, None
        if values["skipped"]:
            line["skipped"] = True
            rows = range(self.ramp.start_of(step - 1), self.ramp.start_of(step))
            why = f"gradient norm {line['grad_norm']:.3g}, loss {line['loss']:.3g}"
            log.note(f"step {step} was skipped ({why}): nothing was learned from samples {rows[0]} to {rows[-1]}")
        if slow := self.watch.slow(took):
            log.note(slow)
            line["slow"] = slow
        log.write(step, line)

    def banner(self) -> str:
        """What is about to happen, in a few lines."""
        import jax

        from minllm import spec
        from minllm_kernels import native

        specs = self.built.model.params()
        trained, whole = spec.count(specs), sum(s.size for s in jax.tree.leaves(specs, is_leaf=spec.is_spec))
        stats, mesh = self.data.stats, self.built.execution.mesh
        sizes = {a: n for a, n in mesh.shape.items() if n > 1} if mesh else {}
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}" + (f", mesh {sizes}" if sizes else "")
        begin = "continued after" if self.restored else "from"
        frozen = f" of {whole:,}" if whole != trained else ""
        return (
            f"{self.out}: {self.run.model.family}, {trained:,}{frozen} trained parameters, on {where}\n"
            f"{stats['train'].tokens:,} training tokens in {stats['train'].documents:,} documents, {stats['held_out'].tokens:,} held out; "
            f"{self.run.steps:,} steps, {begin} step {self.restored or 0}"
            + (f"\nslower than need be: {why}" if jax.default_backend() == "cpu" and (why := native.missing()) else "")
        )

    def summary(self, step: int, found: dict[str, float]) -> str:
        shares = self.goodput.shares()
        where = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda kv: -kv[1]) if share >= 0.005)
        loss = f"held-out loss {found['eval/loss']:.4f} nats/token, {found['eval/nats_per_byte']:.4f} nats/byte; " if found else ""
        return f"step {step}: {loss}time went to {where}; checkpoint, metrics and loss.png are in {self.out}"


def restart_point(place: Any) -> str:
    """Where the same command would go on."""
    from minllm import checkpoint

    last = checkpoint.latest(place)
    if last is None:
        return f"there is no checkpoint in {place} yet: the same command begins anew"
    return f"the newest checkpoint in {place} is step {last}: the same command, with any number of processes, goes on from it"


# Runs beside one of several processes, and speaks when that died without a word.
_HEIR = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
if not sys.stdin.read():
    from minllm.train import restart_point
    print("error: this process died, or was ended because another did (see above);", restart_point(sys.argv[1]), file=sys.stderr)
"""


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as a document begins: an empty one is the end of the document before."""
    ids = tokenizer.encode(prompt).tolist()
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    return ids or [0 if first is None else first]


def _placed(model: Any, built: Any) -> Any:
    """The abstract parameters of a model, placed as the run places its own."""
    import jax
    import jax.numpy as jnp

    from minllm import spec
    from minllm.sharding import sharding

    mesh, rules, dtype = built.execution.mesh, built.execution.rules, jnp.dtype(built.run.precision.params)
    return spec.tree_map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype, sharding=mesh and sharding(mesh, rules, s.axes, s.shape)), model.params()
    )


@contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that a first SIGTERM or SIGINT puts its name into; a second SIGINT interrupts as usual."""
    caught: list[str] = []

    def handle(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar for the work that is done once: reading, training a tokenizer, tokenising."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


if __name__ == "__main__":
    sys.exit(main())
