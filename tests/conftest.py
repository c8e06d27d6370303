"""What every test stands on: eight CPU devices, shape-checked signatures, one compilation cache, and the list of stale results.

Everything here is a default: a variable that is already set wins, e.g. `JAX_PLATFORMS=cuda pytest tests/kernels` on a GPU box, or
`JAX_DISABLE_MOST_OPTIMIZATIONS=0` for compiled programs as a user gets them.
"""

import collections
import datetime
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _environment() -> dict[str, str]:
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",                  # and every worker has its own
        "TPU_SKIP_MDS_QUERY": "1",                          # libtpu compiles for TPUs here, and must not look for one
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",              # most of the suite's time is compilation
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax"),
        # Keep small programs too: they are most of a test's time, and the second run takes a fraction of the first. No size limit: with
        # one, JAX looks through the whole cache at every write. A torn entry is a warning and a compilation.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",                              # the oracles are built from configs, never downloaded
        "MPLBACKEND": "agg",
    }
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        defaults["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))      # torch
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        defaults["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
        os.environ.pop("XLA_FLAGS", None)
    return {name: value for name, value in defaults.items() if name not in os.environ}


assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could set its platform"
os.environ.update(_environment())

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["minllm", "minllm_kernels"], "beartype.beartype")


def stale_results(root: Path) -> list[str]:
    """One line for each stored result whose covered sources are not those it was measured with.

    A result is a JSON object {"sources": {"path from the repository root": "sha256 of its bytes", ...}, ...}.
    """
    lines = []
    for folder in ("tests/results", "kernels/bench/results"):
        for file in sorted((root / folder).glob("*.json")):
            name = file.relative_to(root)
            try:
                result = json.loads(file.read_text())
            except ValueError as error:
                lines.append(f"{name}: not JSON ({error})")
                continue
            sources = result.get("sources") if isinstance(result, dict) else None
            if not sources:
                lines.append(f"{name}: names no sources, so nobody can tell whether it still holds")
                continue
            gone = [path for path in sources if not (root / path).is_file()]
            changed = [
                path for path, digest in sources.items()
                if path not in gone and hashlib.sha256((root / path).read_bytes()).hexdigest() != digest
            ]
            if changed or gone:
                lines.append(f"{name}: " + ", ".join([f"{path} changed" for path in changed] + [f"{path} is gone" for path in gone]))
    return lines


def pytest_addoption(parser):
    parser.addoption("--stale", action="store_true", help="list stored results whose sources have changed since; run no test")


def pytest_cmdline_main(config):
    if not config.option.stale:
        return None
    lines = stale_results(ROOT)
    print("\n".join([*lines, f"{len(lines)} stale results"]))
    return 1 if lines else 0


def pytest_sessionfinish(session, exitstatus):
    """A whole nightly tier that passed, nothing skipped, is a result: tests/results/nightly.json, for as long as no source changes."""
    config, option = session.config, session.config.option
    whole = option.markexpr == "nightly" and not option.keyword and not option.collectonly and config.args == config.getini("testpaths")
    if hasattr(config, "workerinput") or exitstatus or not whole:
        return
    import jax

    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    if stats.get("skipped"):
        return
    files = [p for root in ("minllm", "kernels/minllm_kernels") for p in (ROOT / root).rglob("*")]
    sources = sorted(p for p in files if p.suffix in (".py", ".cc", ".h"))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "figures": {name: {"measured": count, "bar": "all pass"} for name, count in
                    sorted(collections.Counter(report.nodeid.split("[")[0] for report in stats.get("passed", [])).items())},
        "sources": {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources},
    }  # fmt: skip
    (ROOT / "tests/results/nightly.json").write_text(json.dumps(result, indent=1) + "\n")
