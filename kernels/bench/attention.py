"""Our attention kernels on TPUs through the static profiler, beside the best tiles of JAX's own (baselines.py).

    python kernels/bench/attention.py                               # fills in what results/attention.json lacks
    python kernels/bench/attention.py --only "v6e fwd 128 causal"   # rows whose name holds these words, printed, not stored
    python kernels/bench/attention.py --table                       # prints the stored table

Only the kernel is counted, as for splash and flash, which take their operands heads first too. What stands around ours, the padding and
the transposes between "B T N H" and heads first, is counted apart in rows called "whole": there the operands are parameters in the
layout that JAX gives them, while in a model the products that make q, k and v write them as the kernel reads them.
FLOPs are 4 B N T^2 H (H the mean of both head sizes), halved where causal, times 2.5 backward.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

from bench.tpu_static import CHIPS, profile  # noqa: E402

from minllm_kernels.mask import Causal, Full  # noqa: E402
from minllm_kernels.ops.attention import tiles, tpu, tpu_backward, tpu_forward  # noqa: E402

RESULT = ROOT / "kernels/bench/results/attention.json"
BASELINES = ROOT / "kernels/bench/results/attention_baselines.json"
SOURCES = ["kernels/bench/tpu_static.py", "kernels/bench/attention.py", "kernels/minllm_kernels/mask.py",
           *(f"kernels/minllm_kernels/ops/attention/{name}.py" for name in ("tiles", "tpu", "tpu_forward", "tpu_backward"))]  # fmt: skip
KIND = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
# (head size of q and k, of v, causal, length); B T = 16384 and N H = 2048, bf16, as the published rows
SHAPES = [(128, 128, True, 4096), (256, 256, True, 4096), (64, 64, True, 4096), (128, 128, False, 16384), (192, 128, True, 4096)]


def case(chip: str, passed: str, H: int, h: int, causal: bool, T: int):
    """(fn, args, flops): the kernel with the work list of plain positions, which the profiler reads."""
    B, N, dtype = 16384 // T, 2048 // H, jnp.bfloat16
    mask, shape, facts = Causal() if causal else Full(), tpu.tile_shape(T, T, dtype), tpu.facts(KIND[chip])
    pos = jnp.tile(jnp.arange(T), (B, 1))
    steps, places, words, place = tiles.work(tiles.kinds(mask, pos, pos, None, None, shape), "row" if passed == "fwd" else "column")
    steps, plan = int(steps), [np.asarray(x) for x in (places, words)]  # the profiler does not follow the bound of a grid
    static = dict(shape=shape, varying={}, vmem=tpu.room(facts), mask=mask, scale=H**-0.5, softcap=None,
                  patterns=(shape.full, *tiles.patterns(mask, T, T, shape)))  # fmt: skip
    array = lambda *size, dtype=dtype: jax.ShapeDtypeStruct(size, dtype)
    line = array(B, 1, T, dtype=jnp.int32)
    work = 2.0 * B * N * T * T * (H + h) * (0.5 if causal else 1)
    if passed == "fwd":
        fn = lambda q, k, v, pos, *plan: tpu_forward.forward(q, k, v, pos, pos, None, None, None, None, (steps, *plan, place), **static)
        return fn, (array(B, N, T, H), array(B, N, T, H), array(B, N, h, T), line, *plan), work
    row = array(B, N, 1, T, dtype=jnp.float32)
    fn = lambda q, k, v, do, row, pos, *plan: tpu_backward.backward(
        q, k, v, pos, pos, None, None, None, row, row, do, (steps, *plan, place), **static)  # fmt: skip
    return fn, (array(B, N, T, H), array(B, N, T, H), array(B, N, T, h), array(B, N, T, h), row, line, *plan), work * 2.5


def name(row) -> str:
    return f"{row['chip']} {row['passed']} {row['H']}{'' if row['H'] == row['h'] else '/' + str(row['h'])} {row['mask']} {row['T']}"


def rows():
    for H, h, causal, T in SHAPES:
        for passed in ("fwd", "bwd"):
            for chip in CHIPS:
                yield dict(chip=chip, passed=passed, H=H, h=h, mask="causal" if causal else "full", T=T)


def measure(row: dict[str, Any]):
    fn, args, flops = case(row["chip"], row["passed"], row["H"], row["h"], row["mask"] == "causal", row["T"])
    return profile(fn, args, chip=row["chip"], flops=flops, only="attention")


def baselines() -> dict[str, tuple[str, float]]:
    """The faster of splash and flash of each row, by name."""
    best: dict[str, tuple[str, float]] = {}
    for row in json.loads(BASELINES.read_text())["rows"] if BASELINES.exists() else []:
        key = name(row | {"h": row["H"], "mask": "causal" if row["causal"] else "full"})
        if row["tflops"] > best.get(key, ("", 0.0))[1]:
            best[key] = row["library"], row["tflops"]
    return best


def table(done: list[dict[str, Any]]) -> str:
    theirs = baselines()
    lines = ["| row | TFLOP/s | best of JAX's | ratio | waits ms | ms | MXU | push | VALU | EUP | spills of stores |", "|---" * 11 + "|"]
    ratios = []
    for row in done:
        (p,) = row["programs"].values()
        library, other = theirs.get(name(row), ("", None))
        ratios += [row["tflops"] / other] if other else []
        ratio = f"{library} {other:.0f} | {row['tflops'] / other:.2f}" if other else "- | -"
        lines.append(f"| {name(row)} | {row['tflops']:.0f} | {ratio} | {row['stalled_ms']:.3f} | {row['ms']:.3f} | "
                     + " | ".join(f"{p.get(slot, 0.0):.0%}" for slot in ("mxu", "push", "valu", "eup", "spill")) + " |")  # fmt: skip
    if ratios:
        lines.append(f"\nagainst the best of JAX's: {np.exp(np.mean(np.log(ratios))):.2f} geometric mean, least {min(ratios):.2f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that a row's name must hold")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    digest = {path: hashlib.sha256((ROOT / path).read_bytes()).hexdigest() for path in SOURCES}
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    done = stored.get("rows", []) if stored.get("sources") == digest else []
    if given.table:
        return print(table(stored.get("rows", [])))
    for row in rows():
        if not all(word in name(row).split() for word in given.only.split()) or any(name(row) == name(r) for r in done):
            continue
        p = measure(row)
        print(name(row), p, sep="\n", flush=True)
        if not given.only:
            done.append(row | p.figures())
            versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")}
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(dict(date=datetime.date.today().isoformat(), hardware="none: static profile", versions=versions,
                                              sources=digest, rows=done), indent=1) + "\n")  # fmt: skip
    print(table(done))


if __name__ == "__main__":
    main()
