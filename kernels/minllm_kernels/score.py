"""What is added to the scores as a function of head and positions: the hook of relative attention.

A `Score` is static, like a mask, and says for each pair of positions which number of a table counts and by what it is multiplied:

    bias[b, n, t, s] = table[b, n, t, index(q_t, k_s)] value(q_t, k_s)

The table, "#B N #T R", is an array with a gradient: slopes (ALiBi), the buckets of T5, or the products of each query with Shaw's
relative keys. A new scheme is a new subclass of two lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


class Score:
    """index(q, k): which of the R numbers of the table; value(q, k): its factor. Both broadcast over integer arrays of positions."""

    def index(self, q: Any, k: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say which number of its table counts")

    def value(self, q: Any, k: Any) -> Any:
        return 1

    def bias(self, table: Any, q_pos: Any, kv_pos: Any) -> Any:
        """ "#B N #T R", positions "B T" and "B S" -> "B N T S" in float32."""
        q, k = q_pos[:, None, :, None], kv_pos[:, None, None, :]
        index, value = jnp.broadcast_arrays(self.index(q, k), self.value(q, k))
        B, _, T, S = index.shape
        table = jnp.broadcast_to(table.astype(jnp.float32), (B, table.shape[1], T, table.shape[3]))
        return jnp.take_along_axis(table, jnp.broadcast_to(index, (B, table.shape[1], T, S)), axis=3) * value


@dataclass(frozen=True)
class Alibi(Score):
    """slope (k - q): Press et al. 2022, arXiv 2108.12409. The table holds one slope a head: `Alibi.slopes(heads)[None, :, None, None]`."""

    def index(self, q, k):
        return (q - k) * 0

    def value(self, q, k):
        return (k - q).astype(jnp.float32)

    @staticmethod
    def slopes(heads: int) -> Any:
        """Geometric from 2^(-8/n), n the power of two at or below `heads`; the rest between them (section 3)."""
        n = 2 ** (heads.bit_length() - 1)
        first = [2 ** (-8 * (i + 1) / n) for i in range(n)]
        return jnp.array(first + [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)], jnp.float32)


@dataclass(frozen=True)
class Buckets(Score):
    """T5's buckets of distance: half of them one each, the rest logarithmic up to `farthest` (Raffel et al. 2020, arXiv 1910.10683,
    section 2.1). The table: "1 N 1 buckets". both: an encoder, half of the buckets for keys after the query."""

    buckets: int = 32
    farthest: int = 128
    both: bool = True

    def index(self, q, k):
        n = self.buckets // 2 if self.both else self.buckets
        after = jnp.where(k > q, n, 0) if self.both else 0
        distance = jnp.abs(k - q) if self.both else jnp.maximum(q - k, 0)
        exact = n // 2
        # the edges of the logarithmic buckets as whole numbers: no logarithm whose rounding depends on the machine
        edges = [math.ceil(exact * (self.farthest / exact) ** (i / (n - exact)) - 1e-9) for i in range(1, n - exact)]
        far = exact + sum((distance >= edge).astype(jnp.int32) for edge in edges)
        return after + jnp.where(distance < exact, distance, far)


@dataclass(frozen=True)
class Clipped(Score):
    """Shaw's relative keys: distances beyond `most` count as `most` (Shaw et al. 2018, arXiv 1803.02155, equation 5). The table is
    q a^T scale for the 2 most + 1 relative keys a: "B N T R"."""

    most: int

    def index(self, q, k):
        return jnp.clip(k - q, -self.most, self.most) + self.most
