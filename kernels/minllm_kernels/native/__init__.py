"""Kernels in C++ for the CPU, called through jax.ffi. They are optional: without a compiler everything runs as plain JAX, slower.

    python -m minllm_kernels.native         # builds the library for this machine, in a few seconds

The library lies in a cache folder, under a name made of the sources, the processor and the version of jaxlib, so that one made for
another machine is never loaded.
"""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

HERE = Path(__file__).parent
UNITS = ("attention.cc",)
TARGETS = ("minllm_attention_forward", "minllm_attention_backward")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")


def path() -> Path:
    """Where the library of these sources for this machine is, or would be."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    parts = [f.read_bytes() for f in sorted(HERE.glob("*.[ch]*"))] + [" ".join([jaxlib.__version__, processor, *FLAGS]).encode()]
    return Path.home() / ".cache/minllm" / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library unless it is there. Raises RuntimeError with the compiler's words, or when there is none."""
    if (there := path()).exists():
        return there
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("the native CPU kernels need a C++ compiler; install g++ or clang")
    there.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=there.parent) as folder:
        made = Path(folder) / there.name
        command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), *(str(HERE / unit) for unit in UNITS), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not build the native CPU kernels: {done.stderr.strip()[-2000:]}")
        made.replace(there)
    library.cache_clear()
    return there


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, its targets registered with jax; None when it has not been built."""
    if not path().exists():
        return None
    loaded = ctypes.CDLL(str(path()))
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu")
    return loaded


def missing() -> str | None:
    """Why the native kernels cannot be used, None if they can."""
    return None if library() else "the native library is not built; run python -m minllm_kernels.native"
