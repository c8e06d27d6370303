"""Grouped matmul for the evidence chain: Mixtral's experts (the shape that Tokamax publishes) and many small ones, even and uneven."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from bench.report import Case, Measure
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels.ops.grouped_matmul import reference, tpu

STRICT = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")


@dataclass(frozen=True)
class Groups:
    """`M` rows shared out over `E` matrices [K, N], evenly or at random."""

    M: int
    K: int
    N: int
    E: int
    even: bool = True

    @property
    def sizes(self) -> np.ndarray:
        if self.even:
            return np.full(self.E, self.M // self.E, np.int32)
        return np.random.default_rng(0).multinomial(self.M, np.random.default_rng(1).dirichlet(np.full(self.E, 4.0))).astype(np.int32)

    def shapes(self, which: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        x, w, dy = (self.M, self.K), (self.E, self.K, self.N), (self.M, self.N)
        return {"y": (x, w), "dx": (dy, w), "dw": (x, dy)}[which]


def call(which: str, chip: str | None, seen, a, b):
    if which == "dw":
        return tpu.weights_gradient(seen, a, b, jnp.bfloat16, chip)
    return tpu.multiply(seen, a, b, chip, transposed=which == "dx")


def visits(groups: Groups, which: str) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(a) for a in tpu.table(groups.M, jnp.asarray(groups.sizes), rest=which != "dw"))


def check(small: Groups, which: str) -> tuple[float, float]:
    """(error of the interpreted kernel against the reference in float32, twice that of the reference in bfloat16 and a rounding)."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, small.shapes(which)))
    sizes = jnp.asarray(small.sizes)

    def plain(a, b):
        if which == "y":
            return reference.forward(a, b, sizes)
        if which == "dx":
            return reference.forward(a, b.swapaxes(1, 2), sizes)
        return reference.backward(a, jnp.zeros((small.E, small.K, small.N), a.dtype), sizes, b)[1]

    exact = plain(a.astype(jnp.float32), b.astype(jnp.float32))
    with pltpu.force_tpu_interpret_mode(STRICT):
        ours = call(which, None, visits(small, which), a, b)
    error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).max())
    return error(ours), 2 * error(plain(a, b)) + 2**-8 * float(jnp.abs(exact).max())


def build(groups: Groups, which: str, chip: str, device_kind: str) -> Measure:
    shapes = groups.shapes(which)
    args = (visits(groups, which), *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    moved = 2.0 * (groups.M * groups.K + groups.E * groups.K * groups.N + groups.M * groups.N)
    return Measure(partial(call, which, device_kind), args, flops=2.0 * groups.M * groups.K * groups.N, bytes=moved)


GROUPS = {
    "8 experts 4096 x 14336, 8192 rows": Groups(8192, 4096, 14_336, 8),
    "the same, uneven": Groups(8192, 4096, 14_336, 8, even=False),
    "8 experts 14336 x 4096, 8192 rows": Groups(8192, 14_336, 4096, 8),
    "128 experts 2048 x 768, 16384 rows, uneven": Groups(16_384, 2048, 768, 128, even=False),
}
SMALL = Groups(300, 96, 160, 5, even=False)
SOURCES = ("kernels/minllm_kernels/ops/grouped_matmul",)
CASES = [
    Case(f"{which}: {name}", partial(check, SMALL, which), partial(build, groups, which))
    for name, groups in GROUPS.items() for which in ("y", "dx", "dw")
]  # fmt: skip
