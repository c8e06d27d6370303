"""Loading a Hugging Face folder of 1.2 billion bfloat16 parameters (the shape of Llama 3.2 1B, random weights), beside transformers.

    python scripts/bench_load.py [--folder DIR]         writes tests/results/load_hf.json

Each reader runs in a process of its own, three times, the files in the page cache. Two times are taken: until the call returns, and until
every page of every weight has been touched: `transformers` maps the files and reads what is first used. Memory is the peak of the
process (VmHWM), mapped pages included, and what that is above the imports.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY = """
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
"""
READERS = {
    "minllm": MEMORY + """
import sys, time, json, jax, numpy as np
from minllm.interop import hf
jax.numpy.zeros(1).block_until_ready()
before = memory("VmRSS")
began = time.perf_counter()
model, params = hf.load(sys.argv[1])
jax.block_until_ready(params)
returned = time.perf_counter() - began
[np.asarray(a).reshape(-1).view(np.uint16)[::2048].sum() for a in jax.tree.leaves(params)]
print(json.dumps([returned, time.perf_counter() - began, memory("VmHWM"), before]))
""",
    "transformers": MEMORY + """
import sys, time, json, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
transformers.logging.disable_progress_bar()
before = memory("VmRSS")
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
returned = time.perf_counter() - began
[p.detach().view(-1).view(torch.int16)[::2048].sum() for p in model.parameters()]
print(json.dumps([returned, time.perf_counter() - began, memory("VmHWM"), before]))
""",
}


def write(folder: Path) -> None:
    """Three files, one layer's random weights again and again: what the numbers are does not matter here."""
    import jax
    import jax.numpy as jnp

    from minllm import models, spec
    from minllm.interop import hf

    model = models.build("llama", "1b")
    hf.save(folder, model, spec.init(model.params(), jax.random.key(0), jnp.bfloat16), shard=2**30)


def measure(name: str, folder: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", READERS[name], str(folder)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    returned, touched, peak, before = (sorted(column)[1] for column in zip(*runs))
    return {"returns_s": round(returned, 2), "all_read_s": round(touched, 2), "peak_bytes": peak, "above_imports_bytes": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the model is, or is to be written; default: a temporary folder")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "config.json").exists():
            write(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for file in folder.glob("*.safetensors"):
            file.read_bytes()                                   # into the page cache
        figures = {name: measure(name, folder) for name in READERS}
    for name, figure in figures.items():
        figure["peak_over_folder"] = round(figure["peak_bytes"] / size, 3)
        print(name, figure, flush=True)
    covered = [ROOT / "minllm/interop/hf.py", ROOT / "minllm/interop/safetensors.py", ROOT / "minllm/interop/table.py", Path(__file__)]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers", "safetensors")},
        "folder_bytes": size,
        "bars": {"peak_over_folder": 1.3, "all_read_s": "less than that of transformers"},
        "figures": figures,
        "sources": {str(p.resolve().relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in covered},
    }
    (ROOT / "tests/results/load_hf.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
