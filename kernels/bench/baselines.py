"""The attention kernels that JAX users can install today, through the static profiler: what ours are held against.

Splash attention and flash attention of `jax.experimental.pallas.ops.tpu`, forward and backward, for the shapes whose measured times
Tokamax publishes, on four chips, each with the best of a handful of tile sizes.

    python kernels/bench/baselines.py           # fills in what results/attention_baselines.json lacks
    python kernels/bench/baselines.py --table   # prints it

FLOPs are 4 B N T^2 H, halved where causal, times 2.5 backward: masked tiles that run cost time and count no FLOPs. The backward pass is
every program of the gradient but the forward kernel.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash_library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

from bench.tpu_static import CHIPS, profile  # noqa: E402

RESULT = ROOT / "kernels/bench/results/attention_baselines.json"
SPLASH_FLAGS = "--xla_tpu_scoped_vmem_limit_kib=65536"      # splash does not ask for the memory that large tiles take

# (head size, causal, length): TFLOP/s that Tokamax measured with its own tuned splash attention (openxla/tokamax, data/autotuning; H D =
# 2048, B T = 16384, bf16), by chip and pass. None: not published.
PUBLISHED = {
    (128, True, 4096): {"v5p fwd": 222, "v6e fwd": 174, "tpu7x fwd": 203, "tpu7x bwd": 225},
    (256, True, 4096): {"v5p fwd": 244, "v6e fwd": 264, "tpu7x fwd": 306, "tpu7x bwd": 349},
    (64, True, 4096): {"v5p fwd": 124, "v6e fwd": 105, "tpu7x fwd": 113, "tpu7x bwd": 118},
    (128, False, 16384): {"v5p fwd": 410, "v6e fwd": 330, "tpu7x fwd": 391, "tpu7x bwd": 453},
}
TILES = {
    ("splash", "fwd"): [(1024, 1024, 512), (2048, 2048, 512), (1024, 1024, 1024)],
    ("splash", "bwd"): [(1024, 1024, 512), (512, 512, 512)],
    ("flash", "fwd"): [(1024, 1024, 512), (512, 512, 512)],
    ("flash", "bwd"): [(1024, 1024, 512), (512, 512, 512)],
}


def flops(B: int, T: int, N: int, H: int, causal: bool, backward: bool) -> float:
    return 4.0 * B * N * T * T * H * (0.5 if causal else 1) * (2.5 if backward else 1)


def splash(T: int, N: int, H: int, *, causal: bool, block: tuple[int, int, int], B: int = 1, backward: bool = False, fused: bool = True):
    """(fn, args, flops) for the profiler."""
    bq, bkv, compute = block
    mask = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((T, T))
    sizes = dict(block_q=bq, block_kv=bkv, block_kv_compute=compute)
    if backward:
        sizes |= dict(block_q_dkv=bq, block_kv_dkv=bkv, block_kv_dkv_compute=compute,
                     use_fused_bwd_kernel=fused) | ({} if fused else dict(block_q_dq=bq, block_kv_dq=bkv))  # fmt: skip
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
    )
    x = jax.ShapeDtypeStruct((B, N, T, H) if B > 1 else (N, T, H), jnp.bfloat16)
    forward = lambda q, k, v: (jax.vmap(kernel) if B > 1 else kernel)(q, k, v)
    return case(forward, x, flops(B, T, N, H, causal, backward), backward)


def flash(T: int, N: int, H: int, *, causal: bool, block: tuple[int, int, int], B: int = 1, backward: bool = False):
    bq, major, k = block
    sizes = flash_library.BlockSizes(
        block_q=bq, block_k_major=major, block_k=k, block_b=1, block_q_major_dkv=bq, block_k_major_dkv=major, block_k_dkv=k, block_q_dkv=bq,
        block_k_major_dq=major, block_k_dq=k, block_q_dq=bq)  # fmt: skip
    forward = lambda q, k, v: flash_library.flash_attention(q, k, v, causal=causal, sm_scale=H**-0.5, block_sizes=sizes)
    return case(forward, jax.ShapeDtypeStruct((B, N, T, H), jnp.bfloat16), flops(B, T, N, H, causal, backward), backward)


def case(forward: Callable, x: jax.ShapeDtypeStruct, work: float, backward: bool) -> tuple[Callable, tuple, float]:
    if not backward:
        return forward, (x, x, x), work
    return (lambda q, k, v, do: jax.vjp(forward, q, k, v)[1](do)), (x, x, x, x), work


def rows() -> Iterator[dict[str, Any]]:
    for library in ("splash", "flash"):
        for (H, causal, T), published in PUBLISHED.items():
            for passed in ("fwd", "bwd"):
                for chip in CHIPS:
                    yield dict(library=library, chip=chip, passed=passed, H=H, N=2048 // H, B=16384 // T, T=T, causal=causal,
                               published_tflops=published.get(f"{chip} {passed}"))  # fmt: skip


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the best of its tile sizes; what the compiler refuses is named."""
    backward, tried = row["passed"] == "bwd", {}
    best = None
    for block in TILES[row["library"], row["passed"]]:
        if max(block) > row["T"]:
            continue
        make = {"splash": splash, "flash": flash}[row["library"]]
        fn, args, work = make(row["T"], row["N"], row["H"], causal=row["causal"], block=block, B=row["B"], backward=backward)
        name = "x".join(map(str, block))
        try:
            p = profile(fn, args, chip=row["chip"], flops=work, flags=SPLASH_FLAGS, only=NOT_FORWARD if backward else None)
        except ValueError as error:
            tried[name] = "vmem" if "vmem" in str(error) else str(error)[-200:]
            continue
        tried[name] = round(p.tflops, 1)
        if best is None or p.ms < best[1].ms:
            best = name, p
    assert best is not None, (row, tried)
    return row | {"tiles": best[0], "tried_tflops": tried} | best[1].figures()


NOT_FORWARD = r"^(?!splash_mha_fwd|flash_attention_fwd|flash_attention\\.)"


def key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("library", "chip", "passed", "H", "causal", "T"))


def table(done: list[dict[str, Any]]) -> str:
    heads = "kernel chip pass H mask T predicted published ms waits mxu spill tiles".split()
    lines = []
    for r in done:
        mxu = max(p["mxu"] for p in r["programs"].values())
        lines.append([
            r["library"], r["chip"], r["passed"], str(r["H"]), "causal" if r["causal"] else "full", str(r["T"]),
            f"{r['tflops']:.1f}", str(r["published_tflops"] or "-"), f"{r['ms']:.3f}", f"{r['stalled_ms']:.3f}",
            f"{mxu:.1%}", f"{r['spill_share']:.1%}", r["tiles"],
        ])  # fmt: skip
    return "\n".join("  ".join(f"{word:>9}" for word in line) for line in [heads, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="JAX's attention kernels through the static profiler.")
    parser.add_argument("--table", action="store_true", help="print what is stored, measure nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this time")
    options = parser.parse_args()
    covered = ("kernels/bench/baselines.py", "kernels/bench/tpu_static.py")
    sources = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in covered}
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    done = {key(r): r for r in stored.get("rows", [])} if stored.get("sources") == sources or options.table else {}
    begun = time.monotonic()
    for row in rows():
        if key(row) in done or options.table or time.monotonic() - begun > options.seconds:
            continue
        done[key(row)] = measure(row)
        print(table([done[key(row)]]).splitlines()[1], flush=True)
        order = {key(row): n for n, row in enumerate(rows())}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({
            "what": "predicted by kernels/bench/tpu_static.py; published: measured by Tokamax on the chip with its own splash kernel",
            "command": "python kernels/bench/baselines.py",
            "date": datetime.date.today().isoformat(), "versions": versions, "sources": sources,
            "rows": sorted(done.values(), key=lambda r: order[key(r)]),
        }, indent=1) + "\n")  # fmt: skip
    print(table(list(done.values())))


if __name__ == "__main__":
    main()
