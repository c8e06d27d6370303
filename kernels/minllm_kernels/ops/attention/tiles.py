"""Which tiles of the score matrix hold anything: the work list of the TPU kernels.

The scores of one head are cut into tiles (one step of a kernel's grid each), and a tile into at most 4 x 4 granules. From the extremes
of positions and segments in each granule, and from the mask's `span` and `covers`, follows what a granule needs:

    0  nothing: nobody sees anybody        1  the mask        2  no mask: everybody sees everybody

Tiles of zeros alone are left out of the list. All of this is a handful of small array operations outside the kernel; a kernel reads
two numbers a step. Positions and segments are arrays, so packed rows, late chunks and caches in any order are lists like any other.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from minllm_kernels.mask import FAR, Mask

SKIP, MASKED, FULL = 0, 1, 2
LONGEST = 2**16  # steps in a list: two words each, half of a core's scalar memory


@dataclass(frozen=True)
class Shape:
    """q, k: queries and keys of a tile; rows, keys: of a granule."""

    q: int
    k: int
    rows: int
    keys: int

    @property
    def granules(self) -> tuple[int, int]:
        return self.q // self.rows, self.k // self.keys

    @property
    def full(self) -> int:
        n, m = self.granules
        return word([[FULL] * m] * n)

    def pattern(self, word: int) -> list[list[int]]:
        n, m = self.granules
        return [[word >> 2 * (r * m + c) & 3 for c in range(m)] for r in range(n)]


def word(pattern) -> int:
    """A tile's granules as one int32, two bits each."""
    bits = sum(kind << 2 * i for i, kind in enumerate(kind for row in pattern for kind in row))
    return bits - 2**32 if bits >= 2**31 else bits


def tile(length: int, longest: int) -> tuple[int, int]:
    """(tile, granule) for a length: a multiple of the granule of 256 (the wider MXUs) or 128, so that little of the last is padding."""
    if length <= 128:
        return 128, 128
    tiles = -(-length // longest)
    return -(-length // tiles // 256) * 256, 256


def kinds(mask: Mask, q_pos, kv_pos, q_seg, kv_seg, shape: Shape):
    """What each granule needs, "B i j" as words of its tiles. Lengths are multiples of the tile."""

    def extremes(x, size, where=None):
        x = x.reshape(x.shape[0], -1, size)
        if where is None:
            return x.min(-1), x.max(-1)
        where = where.reshape(x.shape)
        return jnp.where(where, x, FAR).min(-1), jnp.where(where, x, -FAR).max(-1)

    there = kv_pos >= 0
    qlo, qhi = (x[:, :, None] for x in extremes(q_pos, shape.rows))
    klo, khi = (x[:, None, :] for x in extremes(kv_pos, shape.keys, there))
    some, every = (f(there.reshape(there.shape[0], 1, -1, shape.keys), -1) for f in (jnp.any, jnp.all))
    lo, hi = mask.span(qlo, qhi)
    meet = some & (khi >= lo) & (klo <= hi)
    cover = every & mask.covers(qlo, qhi, klo, khi)
    if q_seg is not None:
        qs, qe = (x[:, :, None] for x in extremes(q_seg, shape.rows))
        ks, ke = (x[:, None, :] for x in extremes(kv_seg, shape.keys))
        meet &= (qe >= ks) & (qs <= ke)
        cover &= (qs == qe) & (ks == ke) & (qs == ks)
    kind = jnp.where(meet, jnp.where(cover, FULL, MASKED), SKIP).astype(jnp.uint32)
    n, m = shape.granules
    B, N, M = kind.shape
    kind = kind.reshape(B, N // n, n, M // m, m).transpose(0, 1, 3, 2, 4).reshape(B, N // n, M // m, n * m)
    return jax.lax.bitcast_convert_type((kind << (2 * jnp.arange(n * m, dtype=jnp.uint32))).sum(-1, dtype=jnp.uint32), jnp.int32)


_kinds = jax.jit(kinds, static_argnums=(0, 5))  # one program where it runs at once, not one for each operation


@dataclass(frozen=True)
class Place:
    """How a step's tile (b, i, j) and its flags are packed into an int32: first and last of its run (the tiles of one accumulator),
    first and last of its row of the batch. The sign is never set."""

    i: int
    j: int

    FLAGS = 4

    def pack(self, b, i, j, flags):
        return ((b << self.i | i) << self.j | j) << self.FLAGS | flags

    def b(self, place):
        return place >> self.FLAGS + self.j + self.i

    def row(self, place):
        return place >> self.FLAGS + self.j & 2**self.i - 1

    def column(self, place):
        return place >> self.FLAGS & 2**self.j - 1


FIRST, LAST, START, END = 1, 2, 4, 8


def work(words, by: str, every: bool = False):
    """(steps, places, words, Place): the tiles that hold anything, in the order of their accumulators (by "row" or "column"). Each
    accumulator has at least one step, so that an output that nobody sees is written too. every: tiles of zeros too."""
    B, I, J = words.shape
    if by == "column":
        words = words.swapaxes(1, 2)
    needed = (words != 0) | every
    needed = (needed | (~needed.any(-1, keepdims=True) & (jnp.arange(words.shape[-1]) == 0))).reshape(-1)
    steps = needed.sum(dtype=jnp.int32)
    at = jnp.nonzero(needed, size=needed.size, fill_value=needed.size)[0].astype(jnp.int32)
    outer, inner = at // words.shape[-1], at % words.shape[-1]
    b = outer // words.shape[1]

    def edges(x):
        changes = x[1:] != x[:-1]
        yes = jnp.ones(1, bool)
        return jnp.concatenate([yes, changes]), jnp.concatenate([changes, yes])

    first, last = edges(outer)
    start, end = edges(b)
    flags = sum(jnp.where(flag, bit, 0) for flag, bit in ((first, FIRST), (last, LAST), (start, START), (end, END)))
    place = Place((I - 1).bit_length(), (J - 1).bit_length())
    outer = outer % words.shape[1]
    i, j = (outer, inner) if by == "row" else (inner, outer)
    return steps, place.pack(b, i, j, flags).astype(jnp.int32), words.reshape(-1)[jnp.minimum(at, needed.size - 1)], place


@functools.cache
def patterns(mask: Mask, T: int, S: int, shape: Shape, most: int = 2) -> tuple[int, ...]:
    """The words of the commonest tiles that have granules to skip, where the queries are the last T of S plain positions. Kernels unroll
    a body for each; other tiles mask all their granules. Counted in the last two rows of tiles, which see most."""
    rows, columns = -(-T // shape.q), -(-S // shape.k)
    with jax.ensure_compile_time_eval():
        q = np.minimum(np.arange(max(rows - 2, 0) * shape.q, rows * shape.q, dtype=np.int32), T - 1)[None] + S - T
        k = np.arange(columns * shape.k, dtype=np.int32)[None]
        found = np.asarray(_kinds(mask, q, np.where(k < S, k, -1), None, None, shape)).reshape(-1)
    words, counts = np.unique(found, return_counts=True)
    common = [int(w) for _, w in sorted(zip(-counts, words))]
    return tuple([w for w in common if w != 0 and any(kind == SKIP for row in shape.pattern(w) for kind in row)][:most])
