"""The forward pass on a TPU: flash attention (Dao 2023, arXiv 2307.08691) with keys down the sublanes and queries along the lanes.

    s^T = k q^T        m = max_k s        p^T = 2^(s^T log2(e) - m)        o^T = sum_k v^T p^T / sum_k p

Lying so, the maximum and the sum of a query are plain vector operations and one number a lane, where the usual way round they are
reductions across lanes and 128 copies a row; and a matrix unit 256 wide is filled by the second product at any head size, because p^T is
what it holds still (256 x 256) while the H rows of v^T stream through. The usual way round half of it idles at H = 128.

One step of the grid takes one tile of the work list (tiles.py). Its queries go in groups of granules: while group r turns its scores into
probabilities and multiplies them with v, the products of group r + 1 with k run and are put down in the other of two buffers. Addresses
of the running values carry a zero that the compiler cannot see (`hidden`): it would else keep what was just stored in registers, of which
there are 64, and spill them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels.ops.attention import tiles

LOG2E = 1.4426950408889634
LOWEST = -1e30  # the maximum of a row before it has seen anything: finite, so that differences are
HIDDEN = -2e38  # a score that the mask hides: below LOWEST, so that its probability is 0 even then
NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


def base(dtype):
    """(power, logarithm, what turns a score into an exponent of it). The unit computes powers of two; in float32 a score times log2(e) is
    rounded by more than all the rest."""
    return (jnp.exp, jnp.log, 1.0) if dtype == jnp.float32 else (jnp.exp2, jnp.log2, LOG2E)


def dot(a, b, dims):
    """float32 products of float32 operands need all their bits; the matrix unit takes bfloat16 else."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def by_sublane(x, reduce):
    """ "8n m" -> "8 m": reduced down to one register a lane block."""
    return reduce(x.reshape(-1, 8, x.shape[1]), axis=0)


def column(row):
    """[1, n] -> [n, 128], every lane the same."""
    parts = [jnp.broadcast_to(row[:, i : i + 128], (128, 128)).T for i in range(0, row.shape[1], 128)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)


def sees(mask, ref, keys, rows):
    """[keys, rows]: who may look at whom, from the positions and segments of the tile."""
    k_pos, k_seg = column(ref["kv_pos"][0, :, keys]), None
    if "q_seg" in ref:
        k_seg = column(ref["kv_seg"][0, :, keys])
    parts = []
    for lanes in range(rows.start, rows.start + rows.size, 128):
        lanes = pl.ds(lanes, 128)
        see = mask.allows(ref["q_pos"][0, :, lanes], k_pos) & (k_pos >= 0)
        if k_seg is not None:
            see &= ref["q_seg"][0, :, lanes] == k_seg
        parts.append(see)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def runs(kinds, size, longest):
    """Granules of one kind that lie side by side, as (kind, slice) of at most `longest` keys."""
    out = []
    for c, kind in enumerate(kinds):
        if out and out[-1][0] == kind and out[-1][1].start + out[-1][1].size == c * size and out[-1][1].size + size <= longest:
            out[-1] = kind, pl.ds(out[-1][1].start, out[-1][1].size + size)
        elif kind != tiles.SKIP:
            out.append((kind, pl.ds(c * size, size)))
    return out


def tile(ref, pattern, shape, hidden, *, mask, scale, softcap, longest=512):
    """One tile, unrolled for a pattern of granules."""
    shift = lambda rows: pl.ds(pl.multiple_of(rows.start + hidden, 128), rows.size)
    power, _, unit = base(ref["q"].dtype)
    local = shift(pl.ds(0, shape.rows))
    groups = [(pl.ds(r * shape.rows, shape.rows), runs(kinds, shape.keys, longest)) for r, kinds in enumerate(pattern) if any(kinds)]

    def score(g, kind, keys):
        """Scores of group g, put down in its buffer; their maximum by sublane."""
        rows = groups[g][0]
        s = dot(ref["k"][0, 0, keys], ref["q"][0, 0, rows], NT)
        if softcap is None:
            s = s * (scale * unit)
        else:
            s = jnp.tanh(s * (scale / softcap)) * (softcap * unit)
        if "bias" in ref:
            s = s + ref["bias"][0, 0, keys, rows].astype(jnp.float32) * unit
        if kind == tiles.MASKED:
            s = jnp.where(sees(mask, ref, keys, rows), s, HIDDEN)
        ref[f"s{g % 2}"][keys, local] = s
        return by_sublane(s, jnp.max)

    def raise_max(g, tops):
        """A new maximum, and what was summed under the old one shrunk to it."""
        rows = shift(groups[g][0])
        old = ref["m"][:, rows]
        new = jnp.maximum(old, jnp.max(functools.reduce(jnp.maximum, tops), axis=0, keepdims=True))
        shrink = power(old - new)
        ref["m"][:, rows] = new
        ref["l"][:, rows] = ref["l"][:, rows] * shrink
        acc = ref["acc"][:, rows]
        ref["acc"][:, rows] = (acc.reshape(-1, 8, shape.rows) * shrink[None]).reshape(acc.shape)

    def probability(g, keys):
        rows = shift(groups[g][0])
        s = ref[f"s{g % 2}"][keys, local]
        p = power(s.reshape(-1, 8, shape.rows) - ref["m"][:, rows][None]).reshape(s.shape)
        ref["l"][:, rows] = ref["l"][:, rows] + by_sublane(p, jnp.sum)
        return p.astype(ref["v"].dtype)

    raise_max(0, [score(0, *run) for run in groups[0][1]])
    for g, (rows, mine) in enumerate(groups):
        ahead = groups[g + 1][1] if g + 1 < len(groups) else []
        tops, ps = [], []
        for i in range(max(len(mine), len(ahead))):
            if i < len(ahead):
                tops.append(score(g + 1, *ahead[i]))
            if i < len(mine):
                ps.append(probability(g, mine[i][1]))
        start, rows = mine[0][1].start, shift(rows)
        seen = pl.ds(start, mine[-1][1].start + mine[-1][1].size - start)
        if sum(keys.size for _, keys in mine) == seen.size:
            ov = dot(ref["v"][0, 0, :, seen], ps[0] if len(ps) == 1 else jnp.concatenate(ps, 0), NN)
        else:  # granules to skip in between
            ov = sum(dot(ref["v"][0, 0, :, keys], p, NN) for (_, keys), p in zip(mine, ps))
        ref["acc"][:, rows] = ref["acc"][:, rows] + ov
        if tops:
            raise_max(g + 1, tops)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, plan, *, shape, patterns, varying, vmem, mask, scale, softcap):
    """q "B N T H", k "B K S H", v "B K h S", positions and segments "B 1 T", bias "b n S T" (all multiples of the tile)
    -> (o "B N h T", lse "B N 1 T")."""
    (B, N, T, H), (K, h) = q.shape, v.shape[1:3]
    steps, places, words, place = plan
    names = ["q", "k", "v", "q_pos", "kv_pos"]
    arrays = [q, k, v, q_pos, kv_pos]
    specs = [
        pl.BlockSpec((1, 1, shape.q, H), lambda n, t, at, *_: (place.b(at[t]), n, place.row(at[t]), 0)),
        pl.BlockSpec((1, 1, shape.k, H), lambda n, t, at, *_: (place.b(at[t]), lax.div(n * K, N), place.column(at[t]), 0)),
        pl.BlockSpec((1, 1, h, shape.k), lambda n, t, at, *_: (place.b(at[t]), lax.div(n * K, N), 0, place.column(at[t]))),
    ]
    of_q = pl.BlockSpec((1, 1, shape.q), lambda n, t, at, *_: (place.b(at[t]), 0, place.row(at[t])))
    of_kv = pl.BlockSpec((1, 1, shape.k), lambda n, t, at, *_: (place.b(at[t]), 0, place.column(at[t])))
    specs += [of_q, of_kv]
    if q_seg is not None:
        names, arrays, specs = names + ["q_seg", "kv_seg"], arrays + [q_seg, kv_seg], specs + [of_q, of_kv]
    if bias is not None:
        many_b, many_n = (size > 1 for size in bias.shape[:2])
        names, arrays = names + ["bias"], arrays + [bias]
        specs.append(pl.BlockSpec((1, 1, shape.k, shape.q), lambda n, t, at, *_: (
            place.b(at[t]) if many_b else 0, n if many_n else 0, place.column(at[t]), place.row(at[t]))))  # fmt: skip
    scalars = [places, words] + ([] if sinks is None else [sinks.astype(jnp.float32)])

    def kernel(at, words, *refs):
        if sinks is not None:
            sink, *refs = refs
        ref = dict(zip([*names, "o", "lse", "acc", "m", "l", "s0", "s1"], refs))
        t = pl.program_id(1)
        here, word = at[t], words[t]
        hidden = (here >> 31) * 128

        @pl.when(here & tiles.FIRST != 0)
        def _():
            ref["acc"][...] = jnp.zeros_like(ref["acc"])
            if sinks is None:
                ref["m"][...] = jnp.full_like(ref["m"], LOWEST)
                ref["l"][...] = jnp.zeros_like(ref["l"])
            else:  # a key of value zero; the eight sublanes sum to one
                ref["m"][...] = jnp.full_like(ref["m"], sink[pl.program_id(0)] * base(q.dtype)[2])
                ref["l"][...] = jnp.full_like(ref["l"], 1 / 8)

        run = functools.partial(tile, ref, shape=shape, hidden=hidden, mask=mask, scale=scale, softcap=softcap)
        for known in patterns:
            pl.when(word == known)(functools.partial(run, shape.pattern(known)))
        n, m = shape.granules
        pl.when(functools.reduce(jnp.logical_and, [word != known for known in (0, *patterns)]))(
            functools.partial(run, [[tiles.MASKED] * m] * n)
        )

        @pl.when(here & tiles.LAST != 0)
        def _():
            total = ref["l"][...].sum(0, keepdims=True)
            some = total > 0
            whole = jnp.where(some, total, 1)
            ref["o"][0, 0] = (ref["acc"][...] * jnp.where(some, 1 / whole, 0)).astype(ref["o"].dtype)
            _, log, unit = base(q.dtype)
            lse = (ref["m"][0:1] + log(whole)) / unit
            ref["lse"][0, 0] = jnp.where(some, lse, jnp.inf)

    out = lambda size, dtype: (
        pl.BlockSpec((1, 1, size, shape.q), lambda n, t, at, *_: (place.b(at[t]), n, 0, place.row(at[t]))),
        jax.ShapeDtypeStruct((B, N, size, T), dtype, **varying),
    )
    (o_spec, o_shape), (lse_spec, lse_shape) = out(h, q.dtype), out(1, jnp.float32)
    vector = lambda *size: pltpu.VMEM(size, jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(N, steps),
            in_specs=specs,
            out_specs=[o_spec, lse_spec],
            scratch_shapes=[vector(h, shape.q)] + [vector(8, shape.q)] * 2 + [vector(shape.k, shape.rows)] * 2,
        ),
        out_shape=[o_shape, lse_shape],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        name="attention_forward",
    )(*scalars, *arrays)
