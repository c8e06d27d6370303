"""One op from several implementations, chosen when it is lowered.

Each op is one function with one `custom_vjp`; `choose` stands inside its forward and inside its backward, never around them, and
all implementations save the same residuals. So a CPU can trace, lower and compile what a TPU or a GPU will run. Because every
offered branch is traced everywhere, `supports` is asked first.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

Impl = Literal["auto", "reference", "xla", "cpu", "native", "tpu", "gpu"]
PLATFORM = {"native": "cpu", "cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


@dataclass(frozen=True)
class Branch:
    """One implementation. supports: called with the op's shapes, dtypes and chip; None if it can serve them, else the reason why not, in
    words that name the shape and the limit."""

    run: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **kwargs: None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def meant(chip: str | None) -> str:
    """The platform of a device kind ("TPU v6 lite", "NVIDIA H200"); without one, of the default backend."""
    if chip is None:
        return jax.default_backend()
    return "tpu" if chip.startswith("TPU") else "gpu" if "NVIDIA" in chip else "cpu"


def choose(name: str, impl: Impl, reference: Callable, branches: dict[str, Branch], *args: Any, chip: str | None = None, **static: Any):
    """Run the op `name` on `args` (arrays or None) with `static` settings.

    impl "auto" takes, at lowering, the first branch of the platform that can serve the call ("native": C++ for the CPU, where it is built;
    "cpu": plain JAX arranged for it); where there is none, the "xla" branch (plain JAX that compiles well
    everywhere), and else the reference. Tracing a kernel takes seconds, so that of a TPU or a GPU is offered where one is meant: by `chip`,
    or by the default backend. A kernel that cannot serve the call is left out with one warning. Any other impl takes exactly that one and
    raises ValueError when it cannot serve the call.
    """
    if impl == "reference":
        return reference(*args, **static)
    if impl != "auto":
        if impl not in branches:
            raise ValueError(f"{name} has no {impl!r} implementation; choose from {', '.join(['auto', 'reference', *branches])}")
        if reason := branches[impl].supports(*args, chip=chip, **static):
            raise ValueError(f"{name}(impl={impl!r}) cannot serve this call: {reason}; use impl='auto' or 'reference'")
        return branches[impl].run(*args, **static, **({"chip": chip} if impl in ("tpu", "gpu") else {}))
    offered, plain = {}, functools.partial(reference, **static)
    for platform, branch in branches.items():
        if platform in ("tpu", "gpu") and platform != meant(chip):
            continue
        reason = branch.supports(*args, chip=chip, **static)
        run = functools.partial(branch.run, **static, **({"chip": chip} if platform in ("tpu", "gpu") else {}))
        if reason and platform in ("tpu", "gpu"):
            _say_once(f"{name}: no {platform} kernel for this call ({reason}); the plain-JAX form runs instead")
        elif not reason and platform == "xla":
            plain = run
        elif not reason:
            offered.setdefault(PLATFORM[platform], run)
    return jax.lax.platform_dependent(*args, default=plain, **offered) if offered else plain(*args)
