"""The trainer's figures: python scripts/bench_train.py [speed] [quickstart] [shakespeare] [resume] [data]

Without a name, all of them. Each figure is printed with its bar and written to tests/results/train_NAME.json, beside the date, the
machine, the versions and the hash of the sources that it covers.
"""

import argparse
import datetime
import hashlib
import io
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, "-u", "-m", "minllm.train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHES))
    parser.add_argument("--seeds", type=int, default=3, help="shakespeare: how many")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"{min(unknown)!r} is none of {', '.join(BENCHES)}")
    for name in args.names or BENCHES:
        figures = BENCHES[name](args)
        for what, row in figures.items():
            print(f"{name:12} {what:56} {row['measured']!s:>12}   bar {row['bar']}", flush=True)
        sources = covered("data" if name == "data" else "train, minllm.step, minllm.data, minllm.checkpoint, minllm.metrics")
        sources += [config] if (config := ROOT / f"configs/{name}.yaml").exists() else []
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": {p: version(p) for p in ("jax", "jaxlib", "optax", "torch")} | {"python": platform.python_version()},
            "figures": figures,
            "sources": {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources},
        }
        (ROOT / "tests/results").mkdir(exist_ok=True)
        (ROOT / f"tests/results/train_{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def covered(units: str) -> list[Path]:
    """The files of this repository that a figure stands on: what `import minllm.UNITS` brings in."""
    code = f"import minllm.{units}, sys; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return sorted(p for line in out.splitlines() if (p := Path(line)).is_relative_to(ROOT / "minllm") or p.is_relative_to(ROOT / "kernels"))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def figure(measured, bar):
    return {"measured": measured, "bar": bar}


# --- speed against PyTorch ----------------------------------------------------------------------------------------------------------

V, D, L, N, F, B, T = 256, 256, 6, 8, 704, 16, 256


def torch_step():
    """One AdamW step of the same Llama in PyTorch: fused projections, `scaled_dot_product_attention`, two threads."""
    import torch
    from torch import nn
    from torch.nn import functional as fn

    torch.set_num_threads(2)
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
            self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.gate_up, self.down = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D, bias=False)

        def forward(self, x, cos, sin):
            def turn(x):
                a, b = x.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            q, k, v = self.qkv(self.n1(x)).view(B, T, 3, N, D // N).permute(2, 0, 3, 1, 4)
            y = fn.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
            gate, up = self.gate_up(self.n2(x)).chunk(2, -1)
            return x + self.down(fn.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(V, D), nn.RMSNorm(D, eps=1e-5)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            angle = torch.arange(T)[:, None] * 10_000 ** -(torch.arange(0, D // N, 2) / (D // N))
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

        def forward(self, tokens, targets):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return fn.cross_entropy(fn.linear(self.norm(x), self.embed.weight).view(-1, V), targets.reshape(-1))

    model = Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, V, (B, T + 1))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def our_step(**changes):
    """The step that `minllm.train` runs, for the same model; `changes` to its Execution."""
    from dataclasses import replace

    import jax
    import numpy as np

    from minllm import spec, step
    from minllm.run import Run

    run = Run(batch=B, model={"preset": "mini", "args": {"kv_heads": N}}, data={"length": T}, optimizer={"kind": "adamw"})
    built = step.build(run, V)
    built = replace(built, execution=replace(built.execution, **changes))
    program, state = built.compile(B, T), built.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    ones, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=ones.astype(np.float32), segments=ones, positions=positions)

    def one():
        nonlocal state
        state, values = program(state, batch)
        return float(values["loss"])

    return one, spec.count(built.model.params())


def speed(args) -> dict:
    from minllm.train import keep_freed_memory
    from minllm_kernels import native

    theirs, parameters = torch_step()
    figures = {}
    ways = {
        "scanned layers, plain layout, reference attention": dict(scan=True, layout="plain", kernels="reference"),
        "+ unrolled layers": dict(scan=False, layout="plain", kernels="reference"),
        "+ matrix layout": dict(scan=False, layout="matrix", kernels="reference"),
        "+ attention by row and block": dict(native=False),
        "+ attention in C++ (what train runs)": {},
    }
    native.build()
    there = native.missing
    keep_freed_memory()  # as the trainer does; for both sides, being one process
    for way, changes in ways.items():
        native.missing = there if changes.pop("native", True) else lambda: "left out for comparison"
        ours, same = our_step(**changes)
        assert same == parameters, (same, parameters)
        theirs(), ours(), theirs(), ours()
        times = []
        for i in range(10 if changes else 30):
            pair = [0.0, 0.0]
            for which, step in ((0, theirs), (1, ours))[:: -1 if i % 2 else 1]:  # each goes first in every other round
                began = time.perf_counter()
                step()
                pair[which] = time.perf_counter() - began
            times.append(pair)
        torch, jax = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(a / b for a, b in times)
        figures[f"tokens/s over PyTorch's: {way}"] = figure(round(ratio, 3), ">= 1.0" if "what train runs" in way else "-")
        figures[f"tokens/s, PyTorch and ours: {way}"] = figure(f"{B * T / torch:.0f}, {B * T / jax:.0f}", "-")
    return figures


# --- the two configs ----------------------------------------------------------------------------------------------------------------


def run(command, folder, **kwargs):
    """(seconds to the first progress line, seconds in all, what was printed)."""
    began, first, text = time.monotonic(), None, []
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **kwargs)
    for line in process.stdout:
        if first is None and line.startswith("step "):
            first = time.monotonic() - began
        text.append(line)
        print("   ", line, end="", flush=True)
    assert process.wait() == 0, "".join(text[-5:])
    return first, time.monotonic() - began, "".join(text)


def last_evaluation(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "eval/loss" in line)


def quickstart(args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = ROOT / "configs/quickstart.yaml"
        first, total, _ = run([*TRAIN, "--config", str(config)], folder)
        out = Path(folder) / "runs/quickstart"
        found = last_evaluation(out)
        shutil.copy(out / "loss.png", ROOT / "docs/quickstart.png")
        share, longest, texts = samples(out, Path(folder))
        print("\n".join(f"--- {text!r}" for text in texts[:3]))
    return {
        "seconds to the first progress line": figure(round(first, 1), "<= 60"),
        "seconds in all": figure(round(total), "<= 360"),
        "held-out nats/byte": figure(round(found["eval/nats_per_byte"], 4), "<= 1.75, goal 1.5"),
        "share of complete sampled lines that tokenize": figure(round(share, 3), ">= 0.6"),
        "longest run of training text in 50 samples, bytes": figure(longest, "< 64"),
    }


def samples(out: Path, folder: Path, count: int = 50, size: int = 300):
    """(share of complete lines that pass `tokenize`, longest stretch of training text in bytes, the samples) of a finished run."""
    from minllm import checkpoint, data, sample
    from minllm.config import load
    from minllm.run import Run
    from minllm.sample import Sampler
    from minllm.step import build

    os.chdir(folder)
    settings = load(Run, out / "config.yaml").value
    tokenizer = data.load(out / "tokenizer")
    built = build(settings, tokenizer.vocab_size)
    params, _ = checkpoint.restore(out, built.state.params, under="params")
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    drawn = sample(built.model, params, [[first]] * count, size, sampler=Sampler(temperature=0.7), seeds=0, stop=(tokenizer.eos,))
    texts = [tokenizer.decode(tokens).encode()[:size].decode(errors="ignore") for tokens in drawn]
    split = settings.data.split
    found = sum(len(d.text) for d in settings.data.source.documents())
    corpus = "\0".join(d.text for held, d in split(settings.data.source.documents(), found) if not held)
    lines = [line for text in texts for line in text.split("\n")[:-1]]
    good = sum(passes(line) for line in lines)
    return good / max(len(lines), 1), max(longest_copy(text, corpus) for text in texts), texts


def passes(line: str) -> bool:
    """Whether a line by itself is Python tokens: brackets and strings may go on in the next one."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline):
            if token.type == tokenize.ERRORTOKEN:
                return False
    except (tokenize.TokenError, SyntaxError, IndentationError) as error:
        return "EOF in multi-line statement" in str(error)
    return True


def longest_copy(text: str, corpus: str) -> int:
    """Bytes of the longest stretch of text that stands in the corpus."""
    best, start = 0, 0
    for end in range(1, len(text) + 1):
        while start < end and text[start:end] not in corpus:
            start += 1
        best = max(best, len(text[start:end].encode()))
    return best


def shakespeare(args) -> dict:
    losses, seconds = [], []
    text = ROOT.parent / "shared/data/tiny_shakespeare/input.txt"
    source = [f"data.source={{kind: text, globs: [{text}]}}"] if text.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            config = ROOT / "configs/shakespeare.yaml"
            _, total, _ = run([*TRAIN, "--config", str(config), f"seed={seed}", f"out=runs/{seed}", *source], folder)
            losses.append(last_evaluation(Path(folder) / f"runs/{seed}")["eval/loss"])
            seconds.append(total)
    return {
        f"nats/character, median of {args.seeds} seeds": figure(round(statistics.median(losses), 4), "<= 1.60"),
        "nats/character, each seed": figure(", ".join(f"{x:.4f}" for x in losses), "-"),
        "minutes, slowest seed": figure(round(max(seconds) / 60, 1), "<= 30"),
    }


# --- promises -----------------------------------------------------------------------------------------------------------------------

TINY = """
out: run
batch: 8
schedule: {shape: constant, warmup: 10}
model: {args: {D: 32, layers: 2, heads: 4, kv_heads: 2, hidden: 64, dropout: 0.1}}
data: {source: {kind: text, globs: [corpus/*.txt]}, length: 64}
evaluations: {every: 100000}
checkpoints: {every: 7}
compilation_cache: cache
metrics: [jsonl]
"""


def corpus(folder: Path, megabytes: float) -> None:
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    folder.mkdir(parents=True)
    pick = random.Random(0)
    files = max(4, round(megabytes * 4))
    for i in range(files):  # words of three letters and a space
        (folder / f"{i:04}.txt").write_text(" ".join(pick.choices(words, k=round(megabytes * 2**18 / files))))


def losses_of(folder: Path) -> list:
    file = folder / "run/metrics.jsonl"
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")] if file.exists() else []
    return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]


def resume(args) -> dict:
    """kill -9 at 20 random moments of a run, the same command each time; then the losses against those of a run that nobody touched."""
    pick, command, env = random.Random(0), [*TRAIN, "--config", "config.yaml"], os.environ | {"JAX_PLATFORMS": "cpu"}
    quiet = dict(env=env, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        for folder in (whole, broken):
            corpus(folder / "corpus", 0.5)
            (folder / "config.yaml").write_text(TINY)
        reached, ready = [], None
        for _ in range(20):
            began, process = time.monotonic(), subprocess.Popen([*command, "steps=1000000"], cwd=broken, **quiet)
            while ready is None and not losses_of(broken):  # how long this machine takes to the first step
                assert process.poll() is None, f"the run ended before its first step, with exit status {process.returncode}"
                time.sleep(0.1)
            ready = ready or time.monotonic() - began
            time.sleep(ready * pick.uniform(0.5, 2.0))  # some kills come before the first step, some into a save
            process.kill()
            process.wait()
            reached.append(max((step for step, _ in losses_of(broken)), default=0))
        steps = [f"steps={reached[-1] + 10}"]
        subprocess.run([*command, *steps], cwd=broken, check=True, **quiet)
        subprocess.run([*command, *steps], cwd=whole, check=True, **quiet)
        print("    steps reached at each kill:", reached)
        same = losses_of(whole) == losses_of(broken)
    return {
        "restarts after kill -9 that continued": figure(sum(b >= a - 7 for a, b in zip(reached, reached[1:])) + 1, "20"),
        f"loss sequence of {reached[-1] + 10} steps equal, bitwise": figure(same, "True"),
    }


def data(args) -> dict:
    import numpy as np

    from minllm.data import Data, prepare

    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus(folder / "corpus", 2)
        ready = prepare(Data(source={"kind": "text", "globs": (str(folder / "corpus/*.txt"),)}, length=128, cache=str(folder / "cache")))

        def order(hosts, stages, steps):
            loaders = [ready.loader(stages, host_index=h, host_count=hosts) for h in range(hosts)]
            return np.concatenate([loader.batch(step)["tokens"] for step in range(steps) for loader in loaders])

        one = order(1, 16, 40)
        figures["order equal for 1, 2, 4, 8 hosts"] = figure(all((order(h, 16, 40) == one).all() for h in (2, 4, 8)), "True")
        split = order(2, [(0, 16), (10, 32), (20, 8)], 40)
        figures["order equal after restarts with other batch sizes"] = figure(bool((split[: len(one)] == one[: len(split)]).all()), "True")
        loader = ready.loader(16)
        with loader.batches() as batches:
            next(batches)
            began = time.perf_counter()
            for _ in range(500):
                next(batches)
            figures["loader, tokens/s (16 x 128)"] = figure(round(500 * 16 * 128 / (time.perf_counter() - began)), ">= 5 x the step's")
    for megabytes in (16, 64):
        code = f"from scripts.bench_train import peak; print(peak({megabytes}))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        figures[f"peak memory, {megabytes} MB corpus, MiB"] = figure(round(float(out.split()[-1])), "does not grow")
    return figures


def peak(megabytes: int) -> float:
    """MiB at the peak of preparing and reading a corpus in this process."""
    from minllm.data import Data, prepare

    with tempfile.TemporaryDirectory() as name:
        corpus(Path(name) / "corpus", megabytes)
        ready = prepare(Data(source={"kind": "text", "globs": (f"{name}/corpus/*.txt",)}, cache=f"{name}/cache"))
        with ready.loader(16).batches() as batches:
            for _ in range(2000):
                next(batches)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


BENCHES = {"speed": speed, "quickstart": quickstart, "shakespeare": shakespeare, "resume": resume, "data": data}

if __name__ == "__main__":
    main()
