"""Paged attention for the evidence chain: decoding batches whose time is bytes over bandwidth, and a mixed batch with a prefill chunk."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from bench.report import Case, Measure
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels import paged_attention
from minllm_kernels.ops.paged_attention import reference, tpu

STRICT = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", dma_execution_mode="on_wait")


@dataclass(frozen=True)
class Batch:
    """Rows of `lens` tokens in the cache, the last `queries` of which ask."""

    queries: tuple[int, ...]
    lens: tuple[int, ...]
    heads: int
    kv_heads: int
    size: int
    v_size: int
    page: int
    cache: str = "bfloat16"
    shared: bool = False
    window: int | None = None

    def arrays(self, fill) -> dict:
        """fill: makes an array from a shape and a dtype; tables and lengths are always real."""
        S, B, K = self.page, len(self.lens), self.kv_heads
        counts = [-(-n // S) for n in self.lens]
        P, M = sum(counts), max(counts)
        order, table, at = np.random.default_rng(0).permutation(P), np.zeros((B, M), np.int32), 0
        for b, n in enumerate(counts):
            table[b, :n] = order[at : at + n]
            at += n
        return {
            "q": fill((sum(self.queries), self.heads, self.size), jnp.bfloat16),
            "k_pages": fill((P, S, K * self.size), jnp.dtype(self.cache)),
            "v_pages": None if self.shared else fill((P, S, K * self.v_size), jnp.dtype(self.cache)),
            "table": table,
            "q_starts": np.cumsum([0, *self.queries]).astype(np.int32),
            "kv_lens": np.asarray(self.lens, np.int32),
        }

    @property
    def static(self) -> dict:
        return {"max_q": max(self.queries), "v_size": self.v_size if self.shared else None, "window": self.window}

    @property
    def seen(self) -> list[int]:
        """Cached tokens that each row has to read."""
        return [n if self.window is None else min(n, self.window + q - 1) for n, q in zip(self.lens, self.queries)]

    @property
    def bytes(self) -> float:
        """What must move: the cache once, queries in and results out."""
        lanes = self.kv_heads * (self.size + (0 if self.shared else self.v_size))
        return sum(self.seen) * lanes * jnp.dtype(self.cache).itemsize + 2 * sum(self.queries) * self.heads * (self.size + self.v_size)

    @property
    def flops(self) -> float:
        pairs = sum(q * n - q * (q - 1) / 2 for q, n in zip(self.queries, self.seen))
        return 2.0 * pairs * self.heads * (self.size + self.v_size)


def draw(shape, dtype, rng=np.random.default_rng(1)):
    x = rng.normal(size=shape)
    return jnp.asarray(np.round(x * 40) if dtype == jnp.int8 else x, dtype)


def check(small: Batch) -> tuple[float, float]:
    """(error of the interpreted kernel, twice that of the formula in the same precision), against the formula on float32 queries."""
    arrays = small.arrays(draw)
    args = [jnp.asarray(x) if x is not None else None for x in arrays.values()] + [None] * 3
    static = small.static | {"scale": small.size**-0.5, "softcap": None, "v_size": small.v_size}
    exact = reference.forward(args[0].astype(jnp.float32), *args[1:], **static)
    same = reference.forward(*args, **static).astype(jnp.float32)
    ours = tpu.forward(*args, **static, interpret=STRICT).astype(jnp.float32)
    return float(jnp.abs(ours - exact).max()), float(2 * jnp.abs(same - exact).max() + 2**-8 * jnp.abs(exact).max())


def build(batch: Batch, chip: str, device_kind: str) -> Measure:
    arrays = batch.arrays(jax.ShapeDtypeStruct)
    names = [name for name, x in arrays.items() if x is not None]

    def call(*args):
        return paged_attention(**({"v_pages": None} | dict(zip(names, args))), **batch.static, impl="tpu", chip=device_kind)

    return Measure(call, tuple(arrays[name] for name in names), flops=batch.flops, bytes=batch.bytes)


BATCHES = {
    "decode 64 x 2k, 32/8 heads of 128, pages of 64": Batch((1,) * 64, (2048,) * 64, 32, 8, 128, 128, 64),
    "the same, pages of 16": Batch((1,) * 64, (2048,) * 64, 32, 8, 128, 128, 16),
    "the same, lengths 100 to 4k": Batch((1,) * 64, tuple(int(n) for n in np.geomspace(100, 4096, 64)), 32, 8, 128, 128, 64),
    "the same, int8": Batch((1,) * 64, (2048,) * 64, 32, 8, 128, 128, 64, cache="int8"),
    "decode 64 x 2k, 64/8 heads of 64": Batch((1,) * 64, (2048,) * 64, 64, 8, 64, 64, 64),
    "decode 64 x 4k, 128 heads on a latent of 576": Batch((1,) * 64, (4096,) * 64, 128, 1, 576, 512, 64, shared=True),
    "32 decode and a chunk of 512 at 4k, 32/8 heads of 128": Batch((1,) * 32 + (512,), (2048,) * 32 + (4096,), 32, 8, 128, 128, 64),
}
SMALL = {
    "decode": Batch((1, 1, 1), (5, 70, 33), 8, 2, 128, 128, 32),
    "mixed": Batch((1, 17, 1), (5, 70, 33), 8, 2, 64, 64, 32),
    "int8": Batch((1, 1, 1), (5, 70, 33), 8, 2, 128, 128, 32, cache="int8"),
    "latent": Batch((1, 2, 1), (5, 70, 33), 16, 1, 576, 512, 32, shared=True),
}


def small_of(name: str) -> Batch:
    return SMALL["latent" if "latent" in name else "int8" if "int8" in name else "mixed" if "chunk" in name else "decode"]


SOURCES = ("kernels/minllm_kernels/ops/paged_attention",)
CASES = [Case(name, partial(check, small_of(name)), partial(build, batch)) for name, batch in BATCHES.items()]
