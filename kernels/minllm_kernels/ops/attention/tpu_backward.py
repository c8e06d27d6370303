"""The backward pass on a TPU: every gradient from one look at each tile (Dao 2023, arXiv 2307.08691, algorithm 2).

    p^T = exp(s^T - lse)     ds^T = p^T (v do^T - delta)
    dv^T += do^T p           dk^T += q^T ds           dq^T += k^T ds^T

Keys lie down the sublanes as in tpu_forward.py, so lse and delta are rows of lanes, and each of the three gradients holds p^T or ds^T
still in the matrix unit while H rows stream through: a unit 256 wide is filled at any head size, and nothing as large as the scores is
transposed. Tiles come column by column: dk and dv of one column and dq of a whole slab of queries stay in vector memory in float32 until
they are written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels.ops.attention import tiles
from minllm_kernels.ops.attention.tpu_forward import HIDDEN, NN, NT, base, dot, runs, sees


def tile(ref, pattern, shape, hidden, place, *, mask, scale, softcap, longest=512):
    """One tile, unrolled for a pattern of granules. While the three sums of one group of keys are formed, the probabilities of the next
    are put down in the other of two buffers."""
    shift = lambda x: pl.ds(pl.multiple_of(x.start + hidden, 128), x.size)
    power, _, unit = base(ref["q"].dtype)
    columns = [(pl.ds(c * shape.keys, shape.keys), runs(kinds, shape.rows, longest)) for c, kinds in enumerate(zip(*pattern)) if any(kinds)]

    def probabilities(g, kind, rows):
        """p^T and ds^T of group g and some queries."""
        keys = columns[g][0]
        s = dot(ref["k"][0, 0, keys], ref["q"][0, 0, rows], NT)
        slope = None
        if softcap is None:
            s = s * (scale * unit)
        else:
            t = jnp.tanh(s * (scale / softcap))
            s, slope = t * (softcap * unit), 1 - t * t
        if "bias" in ref:
            s = s + ref["bias"][0, 0, keys, rows].astype(jnp.float32) * unit
        if kind == tiles.MASKED:
            s = jnp.where(sees(mask, ref, keys, rows), s, HIDDEN)
        p = power(s - ref["lse"][0, 0, :, rows] * unit)
        dp = dot(ref["v"][0, 0, keys], ref["do"][0, 0, rows], NT)
        ds = p * (dp - ref["delta"][0, 0, :, rows])
        if "dbias" in ref:
            ref["dbias"][0, 0, keys, rows] = ds
        if slope is not None:
            ds = ds * slope
        ref[f"p{g % 2}"][:, shift(rows)] = p.astype(ref["do"].dtype)
        ref[f"ds{g % 2}"][:, shift(rows)] = (ds * scale).astype(ref["q"].dtype)

    def sums(g):
        """What group g adds to each gradient, as steps to take in between."""
        keys, seen = columns[g]

        def to_dv(rows):
            ref["dv_sum"][:, shift(keys)] = ref["dv_sum"][:, shift(keys)] + dot(ref["do_t"][:, rows], ref[f"p{g % 2}"][:, shift(rows)], NT)

        def to_dk(rows):
            ref["dk_sum"][:, shift(keys)] = ref["dk_sum"][:, shift(keys)] + dot(ref["q_t"][:, rows], ref[f"ds{g % 2}"][:, shift(rows)], NT)

        def to_dq(rows):
            at = pl.ds(pl.multiple_of(place * shape.q + rows.start, 128), rows.size)
            ref["dq_sum"][:, at] = ref["dq_sum"][:, at] + dot(ref["k_t"][:, keys], ref[f"ds{g % 2}"][:, shift(rows)], NN)

        joined = []  # of whatever kind, as long as they lie side by side
        for _, rows in seen:
            if joined and joined[-1].start + joined[-1].size == rows.start:
                rows = pl.ds(joined[-1].start, joined.pop().size + rows.size)
            joined.append(rows)
        return [functools.partial(to, rows) for to in (to_dv, to_dk, to_dq) for rows in joined]

    waiting = []
    for g, (_, seen) in enumerate(columns):
        for i in range(max(len(seen), len(waiting))):
            if i < len(seen):
                probabilities(g, *seen[i])
            if i < len(waiting):
                waiting[i]()
        waiting = sums(g)
    for add in waiting:
        add()


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, bias, lse, delta, do, plan, *, shape, patterns, varying, vmem, mask, scale, softcap):
    """q, do "B N T H", k, v "B K S H", lse, delta "B N 1 T", positions and segments "B 1 T", bias "b n S T" (all multiples of the tile)
    -> dq "B N H T", dk, dv "B N H S" in float32 (to be added over the query heads of a group), dbias "B N S T" or None."""
    (B, N, T, H), (K, S), h = q.shape, k.shape[1:3], v.shape[-1]
    steps, places, words, place = plan
    of = dict(q=lambda t, at: place.row(at[t]), k=lambda t, at: place.column(at[t]))
    spec = lambda heads, of, *block: pl.BlockSpec((1, 1, *block), lambda n, t, at, *_: (
        place.b(at[t]), lax.div(n * heads, N), *((of(t, at), 0) if block[0] > 1 else (0, of(t, at)))))  # fmt: skip
    line = lambda size, of: pl.BlockSpec((1, 1, size), lambda n, t, at, *_: (place.b(at[t]), 0, of(t, at)))
    names = ["q", "k", "v", "do", "lse", "delta", "q_pos", "kv_pos"]
    arrays = [q, k, v, do, lse, delta, q_pos, kv_pos]
    specs = [spec(N, of["q"], shape.q, H), spec(K, of["k"], shape.k, H), spec(K, of["k"], shape.k, h), spec(N, of["q"], shape.q, h)]
    specs += [spec(N, of["q"], 1, shape.q)] * 2 + [line(shape.q, of["q"]), line(shape.k, of["k"])]
    if q_seg is not None:
        names, arrays = names + ["q_seg", "kv_seg"], arrays + [q_seg, kv_seg]
        specs += [line(shape.q, of["q"]), line(shape.k, of["k"])]
    outs = ["dq", "dk", "dv"]
    columns = lambda size: pl.BlockSpec((1, 1, size, shape.k), lambda n, t, at, *_: (place.b(at[t]), n, 0, place.column(at[t])))
    out_specs = [pl.BlockSpec((1, 1, H, T), lambda n, t, at, *_: (place.b(at[t]), n, 0, 0)), columns(H), columns(h)]
    out_shapes = [((B, N, H, T), q.dtype), ((B, N, H, S), jnp.float32), ((B, N, h, S), jnp.float32)]
    if bias is not None:
        many_b, many_n = (size > 1 for size in bias.shape[:2])
        names, arrays, outs = names + ["bias"], arrays + [bias], outs + ["dbias"]
        specs.append(pl.BlockSpec((1, 1, shape.k, shape.q), lambda n, t, at, *_: (
            place.b(at[t]) if many_b else 0, n if many_n else 0, place.column(at[t]), place.row(at[t]))))  # fmt: skip
        out_specs.append(pl.BlockSpec((1, 1, shape.k, shape.q), lambda n, t, at, *_: (
            place.b(at[t]), n, place.column(at[t]), place.row(at[t]))))  # fmt: skip
        out_shapes.append(((B, N, S, T), jnp.float32))

    def kernel(at, words, *refs):
        ref = dict(zip([*names, *outs, "dq_sum", "dk_sum", "dv_sum", "q_t", "do_t", "k_t", "p0", "p1", "ds0", "ds1"], refs))
        t = pl.program_id(1)
        here, word = at[t], words[t]

        def each_tile_of_dq(do):
            lax.fori_loop(0, T // shape.q, lambda i, _: do(pl.ds(pl.multiple_of(i * shape.q, 128), shape.q)), None)

        @pl.when(here & tiles.START != 0)
        def _():
            def clear(rows):
                ref["dq_sum"][:, rows] = jnp.zeros((H, shape.q), jnp.float32)

            each_tile_of_dq(clear)

        @pl.when(here & tiles.FIRST != 0)
        def _():
            ref["dk_sum"][...] = jnp.zeros_like(ref["dk_sum"])
            ref["dv_sum"][...] = jnp.zeros_like(ref["dv_sum"])
            ref["k_t"][...] = ref["k"][0, 0].T

        @pl.when(word != 0)
        def _():
            ref["q_t"][...] = ref["q"][0, 0].T
            ref["do_t"][...] = ref["do"][0, 0].T

        run = functools.partial(tile, ref, shape=shape, hidden=(here >> 31) * 128, place=place.row(here), mask=mask, scale=scale,
                                softcap=softcap)  # fmt: skip
        if bias is not None:  # its gradient is written tile by tile, so that no tile may be left out

            @pl.when(word != shape.full)
            def _():
                ref["dbias"][...] = jnp.zeros_like(ref["dbias"])

        for known in patterns:
            pl.when(word == known)(functools.partial(run, shape.pattern(known)))
        n, m = shape.granules
        pl.when(functools.reduce(jnp.logical_and, [word != known for known in (0, *patterns)]))(
            functools.partial(run, [[tiles.MASKED] * m] * n)
        )

        @pl.when(here & tiles.LAST != 0)
        def _():
            ref["dk"][0, 0] = ref["dk_sum"][...]
            ref["dv"][0, 0] = ref["dv_sum"][...]

        @pl.when(here & tiles.END != 0)
        def _():

            def write(rows):
                ref["dq"][0, 0, :, rows] = ref["dq_sum"][:, rows].astype(ref["dq"].dtype)

            each_tile_of_dq(write)

    vector = lambda *size: pltpu.VMEM(size, jnp.float32)
    turned = lambda *size: pltpu.VMEM(size, q.dtype)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N, steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=[vector(H, T), vector(H, shape.k), vector(h, shape.k)]
            + [turned(H, shape.q), turned(h, shape.q), turned(H, shape.k)]
            + [turned(shape.keys, shape.q)] * 4,
        ),
        out_shape=[jax.ShapeDtypeStruct(size, dtype, **varying) for size, dtype in out_shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        name="attention_backward",
    )(places, words, *arrays)
