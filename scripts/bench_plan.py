"""The planner's figures: python scripts/bench_plan.py calibrate|configs|compare|depth|scaling [name ...] [--work DIR]

    calibrate  the estimator on MaxText's own compiled steps against published step times, each row, with leave-one-out errors
    compare    the same model, batch and remat in MaxText and here, both compiled on this machine
    configs    every topology of every config: compiles, fits, predicted speed
    depth      instructions and compile time of 16 and of 126 layers
    scaling    8b, 70b and 405b from 8 to 4,096 chips

The HLO that the compilers write is kept in DIR and not compiled again. MaxText lives in an environment of its own:

    python -m venv DIR && DIR/bin/pip install maxtext==0.2.5 jax libtpu flax optax orbax-checkpoint grain aqtp qwix tokamax transformers \\
        sentencepiece tiktoken datasets ml_collections omegaconf pydantic tensorboardx google-cloud-storage google-cloud-monitoring \\
        google-cloud-aiplatform google-cloud-mldiagnostics ml-goodput-measurement cloud-accelerator-diagnostics pathwaysutils drjax \\
        jsonlines tabulate humanize jinja2 sympy tensorboard-plugin-profile
    export MINLLM_MAXTEXT=DIR/bin/python
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from minllm import chips, hlo  # noqa: E402
from minllm.estimate import CLASSES, Estimator  # noqa: E402

# --- MaxText's published rows -----------------------------------------------------------------------------------------------

_DATA_PARALLEL = "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
_FUSED_GATHERS = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
# Of the recipes' options for v6e and v5p those are left out that the compiler of today refuses there (fused gathers): gathers and
# reductions go over the sparse cores, as the newest recipe has them.
_V5E = f"{_DATA_PARALLEL} {_FUSED_GATHERS}"
_V6E = (
    f"--xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_use_minor_sharding_for_major_trivial_input=true {_DATA_PARALLEL} "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 --xla_tpu_assign_all_reduce_scatter_layout=true "
    "--xla_tpu_enable_async_collective_fusion=false --xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true --xla_tpu_enable_all_reduce_offload_tracing=true "
    "--xla_tpu_use_tc_device_shape_on_sc=true --xla_sc_enable_instruction_fusion=false --xla_sc_disjoint_spmem=false "
    "--xla_sc_disable_megacore_partitioning=true --xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true --xla_tpu_host_transfer_overlap_limit=24 "
    "--xla_tpu_aggressive_opt_barrier_removal=ENABLED --xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED --xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_latency_hiding_scheduler_rerun=2 "
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
)
_V5P = (
    f"{_DATA_PARALLEL} --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_enable_async_all_gather=true"
)
_BLOCKS = (
    "sa_block_q=2048 sa_block_kv=2048 sa_block_kv_compute=2048 sa_block_q_dkv=2048 sa_block_kv_dkv=2048 sa_block_kv_dkv_compute=2048 "
    "sa_block_q_dq=2048 sa_block_kv_dq=2048"
)
_TRILLIUM = (
    "max_target_length=8192 attention=flash use_iota_embed=true ici_fsdp_parallelism=-1 remat_policy=custom decoder_layer_input=offload "
    f"query_proj=offload key_proj=offload value_proj=offload {_BLOCKS} sa_use_fused_bwd_kernel=true"
)


def _dense(scale: int, rows: int, more: str) -> str:
    short = "max_target_length=2048 use_iota_embed=true reuse_example_batch=1 attention=flash"
    return f"global_parameter_scale={scale} per_device_batch_size={rows} {short} {more}"


# name: (topology, settings, LIBTPU_INIT_ARGS, published: seconds a step, or TFLOP/s/chip with the whole square of attention counted).
# Published: AI-Hypercomputer/tpu-recipes training/trillium and training/v5p; maxtext configs/tpu/v5e and v5p README; docs tiering page.
ROWS = {
    "8b v6e-8": ("v6e-8", f"model_name=llama3.1-8b {_TRILLIUM} per_device_batch_size=3 out_proj=offload", _V6E, ("s", 3.443)),
    "8b v6e-16": ("v6e-16", f"model_name=llama3.1-8b {_TRILLIUM} per_device_batch_size=3 out_proj=offload", _V6E, ("s", 3.393)),
    "8b v6e-256": ("v6e-256", f"model_name=llama3.1-8b {_TRILLIUM} per_device_batch_size=4 out_proj=offload", _V6E, ("s", 4.546)),
    "mistral 7b v6e-8": ("v6e-8", f"model_name=mistral-7b {_TRILLIUM} per_device_batch_size=6 out_proj=offload", _V6E, ("s", 6.320)),
    "70b v6e-32": ("v6e-32", f"model_name=llama3.1-70b {_TRILLIUM} per_device_batch_size=2 weight_dtype=bfloat16", _V6E, ("s", 17.79)),
    "70b v6e-128": ("v6e-128", f"model_name=llama3.1-70b {_TRILLIUM} per_device_batch_size=4 out_proj=offload", _V6E, ("s", 34.79)),
    "70b v6e-256": ("v6e-256", f"model_name=llama3.1-70b {_TRILLIUM} per_device_batch_size=5 out_proj=offload", _V6E, ("s", 42.66)),
    "405b v5p-1024": ("v5p-1024", "model_name=llama3.1-405b per_device_batch_size=2 ici_fsdp_parallelism=-1 max_target_length=8192 "
                      f"attention=flash use_iota_embed=true remat_policy=custom context=offload mlpwo=offload num_vocab_tiling=4 {_BLOCKS}",
                      "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_enable_async_collective_fusion=false "
                      "--xla_tpu_host_transfer_overlap_limit=24 --xla_max_concurrent_host_send_recv=100", ("s", 131.5)),
    "llama 2 70b v5p-1024": ("v5p-1024", "model_name=llama2-70b remat_policy=save_dot_except_mlpwi per_device_batch_size=4 "
                             "use_iota_embed=true max_target_length=4096 reuse_example_batch=1", _V5P, ("s", 4 * 4096 / 692)),
    "16b v5e-256": ("v5e-256", _dense(16, 6, "remat_policy=full"), _V5E, ("tflops", 120)),
    "32b v5e-256": ("v5e-256", _dense(32, 4, "remat_policy=full"), _V5E, ("tflops", 132)),
    "64b v5e-256": ("v5e-256", _dense(64, 2, "remat_policy=full"), _V5E, ("tflops", 118)),
    "128b v5e-256": ("v5e-256", _dense(128, 1, "remat_policy=qkv_proj_offloaded ici_fsdp_parallelism=16 ici_tensor_parallelism=16 "
                                       "fused_qkv=true fused_mlp=true"), _V5E, ("tflops", 110)),
    "32b v5p-128": ("v5p-128", _dense(32, 6, "remat_policy=minimal ici_fsdp_parallelism=-1 ici_tensor_parallelism=4"),
                    _V5P,
                    ("tflops", 328)),
}  # fmt: skip

# The same step twice: (name, topology, MaxText's settings, our overrides)
PAIRS = {
    "8b v5e-16, 2k x 1": ("v5e-16", "model_name=llama3-8b per_device_batch_size=1 max_target_length=2048 remat_policy=full", ["batch=16"]),
    "8b v6e-16, 8k x 3": ("v6e-16", "model_name=llama3-8b per_device_batch_size=3 max_target_length=8192 remat_policy=full", ["batch=48"]),
    "8b v6e-16, 8k x 1": ("v6e-16", "model_name=llama3-8b per_device_batch_size=1 max_target_length=8192 remat_policy=full", ["batch=16"]),
}

# Runs in MaxText's environment: its own train_compile, with what the compiler writes caught on the way out.
_CATCH = """
import json, os, sys, time
began = time.time()
import jax
from jax._src import stages
out, plain = sys.argv[1], stages.Lowered.compile
def compile(self, *args, **kwargs):
    at = time.time()
    compiled = plain(self, *args, **kwargs)
    seconds, text = time.time() - at, compiled.as_text()
    if len(text) > 200_000:
        memory = compiled.memory_analysis()
        places = next(s for s in jax.tree.leaves(compiled.input_shardings) if hasattr(s, "mesh")).mesh.devices.flat
        open(out, "w").write(text)
        json.dump({"compile": seconds, "temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
                   "coords": [[getattr(d, "slice_index", 0) or 0, *d.coords] for d in places]}, open(out + ".json", "w"))
    return compiled
stages.Lowered.compile = compile
import maxtext
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train_compile
from maxtext.utils import maxtext_utils
argv = ["train_compile", os.path.join(os.path.dirname(maxtext.__file__), "configs/base.yml"), *sys.argv[2:]]
train_compile.main(argv)
found = json.load(open(out + ".json"))
config = pyconfig.initialize(argv)
total, weights, attention = maxtext_utils.calculate_tflops_training_per_device(config)[:3]
found |= {"wall": time.time() - began, "tflop": float(weights + 2 * attention)}
json.dump(found, open(out + ".json", "w"))
"""


def maxtext(name: str, topology: str, settings: str, flags: str, work: Path) -> tuple[dict, str]:
    """What MaxText's compile of a step gave, and its HLO; compiled once."""
    text = work / f"maxtext_{name.replace(' ', '_').replace(',', '')}.txt"
    if not text.with_suffix(".txt.json").exists():
        python = os.environ.get("MINLLM_MAXTEXT")
        if not python:
            sys.exit(f"MINLLM_MAXTEXT is not set: give the python of an environment with maxtext 0.2.5, as {__file__} says at its top")
        common = "enable_checkpointing=false dataset_type=synthetic run_name=x steps=10 compile_topology_num_slices=1"
        said = [f"compile_topology={topology}", f"base_output_directory={work}", *common.split(), *settings.split()]
        command = [python, "-c", _CATCH, str(text), *said]
        env = os.environ | {"LIBTPU_INIT_ARGS": flags}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(text.with_suffix(".txt.json").read_text()), text.read_text()


def estimate(text: str, topology: str, coords: list) -> Estimator:
    return Estimator(hlo.parse(text), chips.topology(topology), [tuple(c) for c in coords])


def calibrate(args) -> dict:
    rows = {}
    for name in args.names or ROWS:
        topology, settings, flags, (unit, value) = ROWS[name]
        try:
            found, text = maxtext(name, topology, settings, flags, args.work)
        except RuntimeError as error:
            rows[name] = {"failed": str(error).strip().splitlines()[-1][:300]}
            continue
        cost = estimate(text, topology, found["coords"]).step()
        published = value if unit == "s" else found["tflop"] / value
        busy = {k: round(cost.busy[k], 4) for k in CLASSES if cost.busy.get(k)}
        error = round(cost.seconds / published - 1, 4)
        rows[name] = {"published": round(published, 3), "estimated": round(cost.seconds, 3), "error": error, "busy": busy}
    good = {n: r for n, r in rows.items() if "error" in r}
    for name, row in good.items():  # with one factor on all estimates, taken from the other rows: is the error a common one?
        others = [r["published"] / r["estimated"] for n, r in good.items() if n != name]
        if others:
            row["left_out"] = round(row["estimated"] * statistics.geometric_mean(others) / row["published"] - 1, 4)
    for name, row in rows.items():
        print(name, row, flush=True)
    errors = [abs(r["error"]) for r in good.values()]
    left = [abs(r["left_out"]) for r in good.values() if "left_out" in r]
    figures = {"median absolute error": figure(f"{statistics.median(errors):.1%}", "<= 15 %"), "rows": figure(len(errors), ">= 8")}
    if left:
        figures["median absolute error, leave one out"] = figure(f"{statistics.median(left):.1%}", "-")
    return {"figures": figures, "rows": rows}


def ours(config: str, topology: str, overrides: list[str], work: Path, tag: str) -> tuple[dict, str]:
    """Our command's JSON for a config, and its HLO; compiled once."""
    text = work / f"ours_{tag.replace(' ', '_').replace(',', '')}.txt"
    kept = text.with_suffix(".txt.json")
    if not kept.exists():
        asked = ["--config", config, "--topology", topology, "--json", "--hlo", str(text)]
        command = [sys.executable, "-m", "minllm.plan", *asked, *overrides]
        began = time.time()
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{tag}: {done.stderr[-1500:]}")
        kept.write_text(json.dumps(json.loads(done.stdout) | {"wall": time.time() - began}))
    return json.loads(kept.read_text()), text.read_text()


def compare(args) -> dict:
    figures, rows = {}, {}
    for name in args.names or PAIRS:
        topology, settings, overrides = PAIRS[name]
        theirs, text = maxtext(name, topology, settings, "", args.work)
        cost = estimate(text, topology, theirs["coords"]).step()
        mine, _ = ours("configs/llama3_8b.yaml", topology, overrides, args.work, name)
        memory = mine["memory"]
        temporaries = sum(memory["activations"].values()) + memory["gradients"] + memory["temporaries"]
        figures[f"{name}: temporaries over MaxText's"] = figure(round(temporaries / theirs["temporaries"], 3), "<= 0.8")
        figures[f"{name}: whole command over MaxText's"] = figure(round(mine["wall"] / theirs["wall"], 3), "<= 0.5")
        figures[f"{name}: predicted step over MaxText's"] = figure(round(mine["seconds"] / cost.seconds, 3), "< 1")
        rows[name] = {"temporaries GiB": [round(x / 2**30, 2) for x in (temporaries, theirs["temporaries"])],
                      "wall s": [round(mine["wall"]), round(theirs["wall"])], "step s": [round(mine["seconds"], 3), round(cost.seconds, 3)],
                      "busy": [mine["busy_seconds"], dict(cost.busy)]}  # fmt: skip
    return {"figures": figures, "rows": rows}


CONFIGS = {
    "llama3_8b": ("v5e-16", "v5e-256", "v6e-8", "v6e-16", "v6e-256", "v5p-8", "v5p-128"),
    "llama3_8b_128k": ("v5p-64",),
    "llama3_70b": ("v6e-256", "v5p-256"),
    "llama3_405b": ("v5p-1024", "v6e-256x2"),
    "quickstart_tpu": ("v5e-1", "v5e-4", "v5e-8"),
}


def configs(args) -> dict:
    rows, figures = {}, {}
    for config, topologies in CONFIGS.items():
        for topology in topologies:
            name = f"{config} {topology}"
            if args.names and name not in args.names and config not in args.names:
                continue
            try:
                plan, _ = ours(f"configs/{config}.yaml", topology, [], args.work, name)
            except RuntimeError as error:
                rows[name] = {"failed": str(error).strip()[-600:]}
                figures[name] = figure("does not fit", "fits")
                continue
            memory = plan["memory"]
            kept = ("batch", "length", "remat", "mesh", "seconds", "tokens_per_second_per_chip", "mfu", "compile_seconds", "instructions")
            rows[name] = {k: plan[k] for k in kept} | {"GiB": round(memory["total"] / 2**30, 2)}
            speed = f"{plan['tokens_per_second_per_chip']:,.0f} tokens/s/chip"
            fits = f"{memory['total'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f} GiB, {speed}"
            figures[name] = figure(fits, "fits")
            print(name, fits, flush=True)
    return {"figures": figures, "rows": rows}


def depth(args) -> dict:
    found = {}
    for layers in (16, 126):
        change = ["batch=16", f"model.args.layers={layers}"]
        found[layers], _ = ours("configs/llama3_8b.yaml", "v6e-256", change, args.work, f"depth {layers}")
    few, many = found[16], found[126]
    return {"figures": {
        "instructions, 126 layers over 16": figure(round(many["instructions"] / few["instructions"], 4), "within 5 %"),
        "compile seconds, 126 layers over 16": figure(round(many["compile_seconds"] / few["compile_seconds"], 3), "<= 1.5"),
    }}  # fmt: skip


def scaling(args) -> dict:
    """Weak scaling: the rows a chip of the smallest topology, on larger ones."""
    rows = {}
    for preset, config, per_chip, topologies in (
        ("8b", "llama3_8b", 2, ("v6e-8", "v6e-64", "v6e-256", "v6e-256x4", "v6e-256x16")),
        ("70b", "llama3_70b", 2, ("v6e-64", "v6e-256", "v6e-256x4", "v6e-256x16")),
        ("405b", "llama3_405b", 1, ("v6e-256x2", "v6e-256x4", "v6e-256x16")),
    ):
        for topology in topologies:
            name = f"{preset} {topology}"
            if args.names and preset not in args.names and name not in args.names:
                continue
            machine = chips.topology(topology)
            change = [f"batch={per_chip * machine.chips}", f"mesh.data={machine.slices}", "topologies={}"]
            try:
                plan, _ = ours(f"configs/{config}.yaml", topology, change, args.work, name)
            except RuntimeError as error:
                rows[name] = {"failed": str(error).strip()[-300:]}
                continue
            busy = plan["busy_seconds"]
            talk = busy.get("collective", 0) + busy.get("network", 0) + busy.get("wait", 0)
            speed = plan["tokens_per_second_per_chip"]
            rows[name] = {"chips": machine.chips, "tokens_per_second_per_chip": speed, "waiting": talk / plan["seconds"]}
            print(name, rows[name], flush=True)
    return {"figures": {n: figure(round(r["tokens_per_second_per_chip"]), "-") for n, r in rows.items() if "chips" in r}, "rows": rows}


def figure(measured, bar) -> dict:
    return {"measured": measured, "bar": bar}


BENCHES = {"calibrate": calibrate, "compare": compare, "configs": configs, "depth": depth, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("names", nargs="*", help="these rows only")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/plan", help="where HLO texts are kept")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = BENCHES[args.bench](args)
    for what, row in found["figures"].items():
        print(f"{what:56} {row['measured']!s:>36}   bar {row['bar']}")
    covered = [ROOT / f"minllm/{name}.py" for name in ("hlo", "chips", "estimate", "plan", "step", "xla_flags")]
    covered += sorted((ROOT / "configs").glob("*.yaml"))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu}, {os.cpu_count()} cores; compile-only TPUs",
        "versions": {p: version(p) for p in ("jax", "libtpu")} | {"python": platform.python_version(), "maxtext": "0.2.5"},
        **found,
        "sources": {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in covered},
    }
    (ROOT / f"tests/results/plan_{args.bench}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
