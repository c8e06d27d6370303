"""TPU kernels. Rows go in tiles of `tm`; a tile that several groups share is visited once for each of them.

    forward, dx:  grid (columns of y, visits, depth)      y_tile = where(row in group, x_tile w_g, y_tile)
    dw:           grid (rows of dw, columns, visits)      dw_g += (x_tile where in group)^T dy_tile, written when the group ends

The visits (group, tile) are laid out beforehand and prefetched into SMEM: at most M / tm + E of them, whatever the sizes; those left
over do nothing. While the whole depth K fits into VMEM, a group's matrix is loaded once for all its tiles. Of a tile only the blocks of
`sub` rows that hold rows of the group are multiplied. Rows of nobody are a last group without a matrix.

Traffic of the forward pass for elements of s bytes and tiles (tm, tn), against 2 M K N FLOPs: s (M K N / tn + E K N + M N) bytes; where K
goes in pieces, M K N / tm for the second term. Edges: nothing beyond K, M or N is there. Columns and rows of y out there are never stored;
where it would enter a sum (beyond K; rows of another group in dw) both factors are masked, because memory past the end may hold NaNs.

Products are looped over in pieces of CHUNK, since Mosaic unrolls each one: code and compile time do not grow with tiles.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 512  # of the depth, and of dw's columns
ROOM = {"TPU v5 lite": 96, "TPU v6 lite": 96}  # MiB that tiles may take together; 48 where a core has 64

def supports(x, w, sizes, *_, chip) -> str | None:
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of {x.dtype}; the kernel multiplies bfloat16 and float32"
    return "x has no rows" if len(x) == 0 else None


def _budget(chip: str | None) -> int:
    return ROOM.get(chip or "", 48) * 2**20


def _row_tile(M: int, E: int) -> tuple[int, int]:
    """(rows of a tile, of a block in it): 512 and 256, fewer where a group has fewer on average; all rows where they are few."""
    if M <= 128:
        return M, M
    tm = min(512, max(128, 1 << (M // E).bit_length() - 1), -(-M // 128) * 128)
    return tm, min(256 if tm % 256 == 0 else 128, tm)


def _piece(n: int) -> int:
    """The largest loop step that divides n, or all of it."""
    return next((c for c in (CHUNK, CHUNK // 2, CHUNK // 4) if n % c == 0), n)


def visits(sizes, M: int, tm: int, rest: bool):
    """(group of each visit, tile of each, first row of each group and the end, how many visits).

    rest: the rows past the last group are visited as group E; else every empty group is visited once.
    """
    E = len(sizes)
    sizes = jnp.concatenate([sizes, (M - sizes.sum())[None]]) if rest else sizes
    ends = jnp.cumsum(sizes)
    first = jnp.minimum((ends - sizes) // tm, -(-M // tm) - 1)
    count = jnp.where(sizes > 0, (ends - 1) // tm - first + 1, 0 if rest else 1)
    upto = jnp.cumsum(count)
    i = jnp.minimum(jnp.arange(-(-M // tm) + E), upto[-1] - 1)  # what is left over stays at the last visit
    group = jnp.searchsorted(upto, i, side="right").astype(jnp.int32)
    tile = (first[group] + i - (upto - count)[group]).astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends]).astype(jnp.int32)
    return group, tile, starts, upto[-1:].astype(jnp.int32)


def table(M: int, sizes, rest: bool):
    return visits(sizes, M, _row_tile(M, len(sizes))[0], rest)


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(a, b, dims):
    return lax.dot_general(a, b, (dims, ((), ())), precision=_precision(a.dtype), preferred_element_type=jnp.float32)


def _multiply_kernel(group, tile, starts, total, x_ref, w_ref, y_ref, *scratch, tm, sub, depth, transposed, E):
    i, k = pl.program_id(1), pl.program_id(2)
    tk, nk = x_ref.shape[1], pl.num_programs(2)
    g = group[i]
    lo, hi = starts[g] - tile[i] * tm, starts[g + 1] - tile[i] * tm
    fresh = (i == 0) | (tile[jnp.maximum(i - 1, 0)] != tile[i])

    @pl.when((i < total[0]) & fresh & (k == nk - 1))
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    def product(rows):
        if depth % tk:  # the last piece of the depth reaches past its end
            left = jnp.where(k == nk - 1, depth % tk, tk)
            cut = lambda a, dim: jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, dim) < left, a, jnp.zeros_like(a))
            return _dot(cut(x_ref[rows, :], 1), cut(w_ref[...], int(transposed)), ((1,), (int(transposed),)))
        step = _piece(tk)

        def add(c, sums):
            at = pl.ds(pl.multiple_of(c * step, step), step)
            return sums + _dot(x_ref[rows, at], w_ref[:, at] if transposed else w_ref[at, :], ((1,), (int(transposed),)))

        return lax.fori_loop(0, tk // step, add, jnp.zeros((sub, y_ref.shape[1]), jnp.float32))

    def block(b, _):
        rows = pl.ds(pl.multiple_of(b * sub, sub), sub)
        y = product(rows)
        if scratch:
            (sums,) = scratch
            y = jnp.where(k == 0, 0.0, sums[rows, :]) + y
            sums[rows, :] = y

        @pl.when(k == nk - 1)
        def _():
            row = lax.broadcasted_iota(jnp.int32, y.shape, 0) + b * sub
            y_ref[rows, :] = jnp.where((row >= lo) & (row < hi), y.astype(y_ref.dtype), y_ref[rows, :])

    @pl.when((i < total[0]) & (g < E))
    def _():
        # lax.div: the floor of jnp asks for the sign, and lowering that for the TPU in use
        lax.fori_loop(lax.div(jnp.maximum(lo, 0), sub), lax.div(jnp.minimum(hi, tm) + sub - 1, sub), block, None)


def multiply(seen, x, w, chip, transposed):
    """x_m w_e, or x_m w_e^T, by a table of visits."""
    M, K = x.shape
    E, N = len(w), w.shape[1 if transposed else 2]
    (tm, sub), tn = _row_tile(M, E), min(N, 1024)
    size = x.dtype.itemsize
    # two buffers of each operand and of the result, and its float32 form
    fits = lambda tk: 2 * size * (tk * (tm + tn) + tm * tn) + 8 * tm * tn <= _budget(chip)
    tk = K if fits(K) else next((t for t in range(4096, 511, -128) if K % t == 0 and fits(t)), 1024)
    nk = pl.cdiv(K, tk)
    live = lambda i, k, total: jnp.where(i < total[0], k, nk - 1)
    own = lambda group, i: jnp.minimum(group[i], E - 1)
    if transposed:
        matrix = pl.BlockSpec((None, tn, tk), lambda n, i, k, group, tile, starts, total: (own(group, i), n, live(i, k, total)))
    else:
        matrix = pl.BlockSpec((None, tk, tn), lambda n, i, k, group, tile, starts, total: (own(group, i), live(i, k, total), n))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(pl.cdiv(N, tn), len(seen[0]), nk),
        in_specs=[pl.BlockSpec((tm, tk), lambda n, i, k, group, tile, starts, total: (tile[i], live(i, k, total))), matrix],
        out_specs=pl.BlockSpec((tm, tn), lambda n, i, k, group, tile, starts, total: (tile[i], n)),
        scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)] if nk > 1 else [],
    )
    return pl.pallas_call(
        partial(_multiply_kernel, tm=tm, sub=sub, depth=K, transposed=transposed, E=E),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((M, N), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_budget(chip) + 2**23
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * K * N, transcendentals=0, bytes_accessed=size * (M * K * pl.cdiv(N, tn) + E * K * N + M * N)
        ),
        name="grouped_matmul_dx" if transposed else "grouped_matmul",
    )(*seen, x, w.astype(x.dtype))


def _weights_kernel(group, tile, starts, total, x_ref, dy_ref, dw_ref, sums, *, tm):
    i = pl.program_id(2)
    g = group[i]
    lo, hi = starts[g] - tile[i] * tm, starts[g + 1] - tile[i] * tm
    live = i < total[0]

    @pl.when(live & ((i == 0) | (group[jnp.maximum(i - 1, 0)] != g)))
    def _():
        sums[...] = jnp.zeros_like(sums)

    def inside(a):
        row = lax.broadcasted_iota(jnp.int32, a.shape, 0)
        return jnp.where((row >= lo) & (row < hi), a, jnp.zeros_like(a))

    @pl.when(live & (hi > lo))
    def _():
        x, step = inside(x_ref[...]), _piece(dy_ref.shape[1])

        def columns(c, _):
            at = pl.ds(pl.multiple_of(c * step, step), step)
            sums[:, at] += _dot(x, inside(dy_ref[:, at]), ((0,), (0,)))

        lax.fori_loop(0, dy_ref.shape[1] // step, columns, None)

    @pl.when(live & ((i == total[0] - 1) | (group[jnp.minimum(i + 1, pl.num_programs(2) - 1)] != g)))
    def _():
        dw_ref[...] = sums[...].astype(dw_ref.dtype)


def weights_gradient(seen, x, dy, dtype, chip):
    """The sum of x_m dy_m^T over the rows of each group, by a table of visits."""
    (M, K), N, E = x.shape, dy.shape[1], len(seen[2]) - 1
    (tm, _), tk, tn = _row_tile(M, E), min(K, 1024), min(N, 1024)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(pl.cdiv(K, tk), pl.cdiv(N, tn), len(seen[0])),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda k, n, i, group, tile, starts, total: (tile[i], k)),
            pl.BlockSpec((tm, tn), lambda k, n, i, group, tile, starts, total: (tile[i], n)),
        ],
        out_specs=pl.BlockSpec((None, tk, tn), lambda k, n, i, group, tile, starts, total: (group[i], k, n)),
        scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
    )
    size = x.dtype.itemsize
    return pl.pallas_call(
        partial(_weights_kernel, tm=tm),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((E, K, N), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_budget(chip) + 2**23
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * K * N,
            transcendentals=0,
            bytes_accessed=size * M * (K * pl.cdiv(N, tn) + N * pl.cdiv(K, tk)) + E * K * N * jnp.dtype(dtype).itemsize,
        ),
        name="grouped_matmul_dw",
    )(*seen, x, dy)


def forward(x, w, sizes, *, chip):
    return multiply(table(len(x), sizes, rest=True), x, w, chip, transposed=False)


def backward(x, w, sizes, dy, *, chip):
    """(dx, dw)."""
    dx = multiply(table(len(x), sizes, rest=True), dy, w, chip, transposed=True)
    return dx, weights_gradient(table(len(x), sizes, rest=False), x, dy, w.dtype, chip)
