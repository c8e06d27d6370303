"""Attention on a TPU: what surrounds the two kernels of tpu_forward.py and tpu_backward.py.

Pads to whole tiles, puts heads before tokens, cuts queries into slabs that the scalar memory and the vector memory of a core hold, and
makes the work list.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels.ops.attention import reference, tiles, tpu_backward, tpu_forward

FEW = 8  # below one sublane of queries the formula itself is bound by memory: a kernel would only add copies of the cache
KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "7x"}
STATIC = ("mask", "scale", "softcap", "chip")


def facts(chip: str | None) -> pltpu.TpuInfo:
    """Of one core of a device kind; where none is named, of the TPU at hand, and of the smallest where there is none."""
    if chip is None:
        chip = next((d.device_kind for d in jax.devices() if d.platform == "tpu"), "TPU v5e")
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(KINDS.get(chip, "v5e")), 1)


def room(chip: pltpu.TpuInfo) -> int:
    """Vector memory that a kernel may take, in bytes; the rest is the compiler's."""
    return chip.vmem_capacity_bytes * 3 // 4


def supports(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *_, chip=None, **__) -> str | None:
    if keep is not None:
        return "a dropout mask is a [T, S] array of every head"
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; made for float32 or bfloat16"
    if max(q.shape[-1], v.shape[-1]) > 512:
        return f"head sizes of {q.shape[-1]} and {v.shape[-1]}; made for up to 512"
    if (lists := q.shape[0] * -(-k.shape[1] // tile_shape(q.shape[1], k.shape[1], q.dtype).k)) > tiles.LONGEST:
        return f"B={q.shape[0]}, S={k.shape[1]} make {lists} tiles of keys; the scalar memory lists {tiles.LONGEST}"
    if chip is not None and chip.startswith("TPU") and chip not in KINDS:
        return f"nothing is known of a {chip}; made for {', '.join(KINDS)}"
    return None


def tile_shape(T, S, dtype) -> tiles.Shape:
    """A tile's work, 4 T S H operations, must hide the 4 S H bytes of its keys and values: T of 1024 is twice the balance of 560
    operations a byte of the chip that has the most. float32 takes six products and twice the bytes."""
    longest = 1024 if dtype == jnp.bfloat16 else 512
    (bq, rows), (bk, keys) = tiles.tile(T, longest), tiles.tile(S, longest)
    return tiles.Shape(bq, bk, rows, keys)


def pad(x, axis, size, **how):
    if x is None or x.shape[axis] % size == 0:
        return x
    return jnp.pad(x, [(0, -x.shape[a] % size if a == axis else 0) for a in range(x.ndim)], **how)


def where(shape, q_pos, kv_pos, q_seg, kv_seg):
    """Positions and segments padded to whole tiles: queries like the last one, keys that are not there."""
    edge = dict(mode="edge")
    rows = [pad(x, 1, shape.q, **edge) for x in (q_pos, q_seg)]
    return rows[0], pad(kv_pos, 1, shape.k, constant_values=-1), rows[1], pad(kv_seg, 1, shape.k, **edge)


def slabs(T, rows):
    return [slice(t, min(t + rows, T)) for t in range(0, T, rows)]


def part(x, t, axis=1):
    return None if x is None else jax.lax.slice_in_dim(x, t.start, t.stop, axis=axis)


def varying(*args):
    """The mesh axes that any of the arrays varies over, as arguments of the ShapeDtypeStruct of a kernel's output inside a shard_map."""
    axes = frozenset().union(*(reference.varies(x) for x in args if x is not None))
    if hasattr(jax.sharding, "ManualAxisType"):  # jax 0.12
        return {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}
    return {"vma": axes}


def lines(*arrays):
    """ "B T" as "B 1 T": a row of lanes."""
    return [None if x is None else x[:, None].astype(jnp.int32) for x in arrays]


def even(x, axis):
    """Head sizes are whole sublane tiles of bfloat16."""
    return pad(x, axis, 16)


@partial(jax.jit, static_argnames=STATIC)
def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, *, mask, scale, softcap, chip):
    """(o "B T N h", lse "B K G T"), as reference.forward."""
    (B, T, N, _), (S, K, h) = q.shape, (k.shape[1], k.shape[2], v.shape[-1])
    if T < FEW:
        return reference.forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, mask=mask, scale=scale, softcap=softcap)
    chip, shape = facts(chip), tile_shape(T, S, q.dtype)
    static = dict(shape=shape, varying=varying(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias), vmem=room(chip),
                  mask=mask, scale=scale, softcap=softcap, patterns=(shape.full, *tiles.patterns(mask, T, S, shape)))  # fmt: skip
    q_pos, kv_pos, q_seg, kv_seg = where(shape, q_pos, kv_pos, q_seg, kv_seg)
    q = even(pad(q.transpose(0, 2, 1, 3), 2, shape.q), 3)
    k = even(pad(k.transpose(0, 2, 1, 3), 2, shape.k), 3)
    v = even(pad(v.transpose(0, 2, 3, 1), 3, shape.k), 2)
    bias = None if bias is None else pad(pad(bias.swapaxes(2, 3), 2, shape.k), 3, shape.q)
    outs = []
    for t in slabs(q.shape[2], max(tiles.LONGEST // (B * k.shape[2] // shape.k), 1) * shape.q):
        seen = part(q_pos, t), kv_pos, part(q_seg, t), kv_seg
        plan = tiles.work(tiles.kinds(mask, *seen, shape), "row")
        outs.append(tpu_forward.forward(part(q, t, 2), k, v, *lines(*seen), sinks=sinks, bias=part(bias, t, 3), plan=plan, **static))
    o, lse = (x[0] if len(x) == 1 else jnp.concatenate(x, 3) for x in zip(*outs))
    return o[:, :, :h, :T].transpose(0, 3, 1, 2), lse[:, :, 0, :T].reshape(B, K, N // K, T)


@partial(jax.jit, static_argnames=STATIC)
def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, lse, delta, do, *, mask, scale, softcap, chip):
    """(dq, dk, dv, dbias), as reference.backward."""
    args = (q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep, lse, delta, do)
    (B, T, N, H), (S, K, h) = q.shape, (k.shape[1], k.shape[2], v.shape[-1])
    if T < FEW:
        return reference.backward(*args, mask=mask, scale=scale, softcap=softcap)
    chip, shape = facts(chip), tile_shape(T, S, q.dtype)
    static = dict(shape=shape, varying=varying(*args), vmem=room(chip), mask=mask, scale=scale, softcap=softcap,
                  patterns=(shape.full, *tiles.patterns(mask, T, S, shape)))  # fmt: skip
    q_pos, kv_pos, q_seg, kv_seg = where(shape, q_pos, kv_pos, q_seg, kv_seg)
    kinds = k.dtype, v.dtype, None if bias is None else bias.dtype
    of_q, of_k = (lambda x, size=size: even(pad(x.transpose(0, 2, 1, 3), 2, size), 3) for size in (shape.q, shape.k))
    q, k, v, do = of_q(q), of_k(k), of_k(v), of_q(do)
    lse = pad(lse.reshape(B, N, 1, T), 3, shape.q, constant_values=jnp.inf)
    delta = pad(delta.reshape(B, N, 1, T).astype(jnp.float32), 3, shape.q)
    biases = None if bias is None else pad(pad(bias.swapaxes(2, 3), 2, shape.k), 3, shape.q)
    # dq of a slab stays in vector memory, in float32 and twice as an output: a quarter of it
    most = chip.vmem_capacity_bytes // 4 // ((4 + 2 * q.dtype.itemsize) * q.shape[-1])
    most = max(min(most // shape.q, tiles.LONGEST // (B * k.shape[2] // shape.k)), 1) * shape.q
    outs = []
    for t in slabs(q.shape[2], most):
        seen = part(q_pos, t), kv_pos, part(q_seg, t), kv_seg
        plan = tiles.work(tiles.kinds(mask, *seen, shape), "column", every=bias is not None)
        outs.append(tpu_backward.backward(part(q, t, 2), k, v, *lines(*seen), bias=part(biases, t, 3), lse=part(lse, t, 3),
                                          delta=part(delta, t, 3), do=part(do, t, 2), plan=plan, **static))  # fmt: skip
    dq, dk, dv, *dbias = zip(*outs)
    dq = jnp.concatenate(dq, 3)[:, :, :H, :T].transpose(0, 3, 1, 2)

    def grouped(parts, size, kind):
        x = jnp.stack(parts).sum(0).reshape(B, K, N // K, -1, parts[0].shape[-1]).sum(2)
        return x[:, :, :size, :S].transpose(0, 3, 1, 2).astype(kind)

    if bias is not None:
        full = jnp.concatenate(dbias[0], 3)[:, :, :S, :T].swapaxes(2, 3)
        dbias = full.sum([i for i in (0, 1) if bias.shape[i] == 1], keepdims=True).astype(kinds[2])
    return dq, grouped(dk, H, kinds[0]), grouped(dv, h, kinds[1]), None if bias is None else dbias
