"""Attention over a sequence that is spread over devices (the mesh axes of `seq`, which is `context` in the usual rules).

Each device holds T / C tokens. Its queries must meet the keys of all others, by one of three ways (`Execution.context`):

    gather    all-gather k and v, attend, reduce-scatter their gradients:    Llama 3, arXiv 2407.21783, section 3.3.2
              the compiler's work, once k and v are asked for whole
    ring      C steps; at each, k and v move on to the next device           Liu et al. 2023, arXiv 2310.01889, algorithm 1
              while the device attends to those it has:
              o = sum_i exp(lse_i - lse) o_i,  lse = log sum_i exp(lse_i)
    ulysses   exchange heads for tokens (all-to-all), attend to whole        Jacobs et al. 2023, arXiv 2309.14509, section 3
              sequences with N / C heads, exchange back

Bytes that a device receives a layer, forward, with k and v of s bytes a device: gather and ring s (C - 1), ring hidden behind the products
and holding 2 s instead of C s; ulysses (2 |q| + s) (C - 1) / C, as long as the heads divide. Under a causal mask the last device would have
the most to do: `head_tail` gives each an early and a late piece of the sequence (Llama 3, same section).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from minllm.layer import Execution
from minllm.sharding import local, shards_of
from minllm_kernels import attention
from minllm_kernels.mask import Causal, Mask
from minllm_kernels.ops.attention import Settings, attention_part, attention_part_gradient, merge_parts


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K h"],
    *,
    q_pos: Int[Array, "B T"],
    kv_pos: Int[Array, "B S"],
    q_seg: Int[Array, "B T"] | None = None,
    kv_seg: Int[Array, "B S"] | None = None,
    mask: Mask = Causal(),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    keep: Float[Array, "B N T S"] | None = None,
    run: Execution,
) -> Float[Array, "B T N h"]:
    """`minllm_kernels.attention` of global arrays, each device with its rows, heads and tokens; the same value whatever `run.context` is.

    Raises ValueError for ulysses where the heads of a device do not divide over the context axis, and for a bias with ring or ulysses.
    """
    axes = shards_of("seq", run)
    spread = bool(axes) and run.context != "gather"
    if bias is not None and spread:
        raise ValueError(f"context: {run.context} cannot share out a bias of the scores, a [T, S] array; use context: gather")
    static = dict(mask=mask, scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap, impl=run.kernels, chip=run.chip)
    rows, keys = "batch seq act_heads _", f"batch {'seq' if spread else 'kv_seq'} act_kv_heads _"
    there, scores = keys.rsplit(" ", 2)[0], "batch act_heads seq kv_seq"
    some = scores if bias is None else " ".join("_" if n == 1 else word for n, word in zip(bias.shape, scores.split()))
    ins = (rows, keys, keys, "batch seq", there, "batch seq", there, "act_heads", some, scores)
    op = {"ring": ring, "ulysses": _exchange}[run.context] if spread else _whole
    return local(partial(op, Settings(**static), axes), ins, rows, run)(q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep)


def _whole(settings, axes, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep):
    where = dict(q_pos=q_pos, kv_pos=kv_pos, q_seg=q_seg, kv_seg=kv_seg)
    return attention(q, k, v, **where, sinks=sinks, bias=bias, keep=keep, **settings._asdict())


def _all(x, axes):
    """An array "B T ..." with the tokens of all devices."""
    return None if x is None else lax.all_gather(x, axes, axis=1, tiled=True)


def _exchange(settings, axes, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep):
    C, N = lax.axis_size(axes), q.shape[2]
    if N % C:
        raise ValueError(f"context: ulysses gives each of {C} devices a share of the {N} query heads that it has; use a context that "
                         f"divides {N}, or context: ring")  # fmt: skip
    # fewer key/value heads than devices: each is sent to all that have a query head of its group
    k, v = (jnp.repeat(x, np.lcm(x.shape[2], C) // x.shape[2], axis=2) for x in (k, v))
    share = partial(lax.all_to_all, axis_name=axes, tiled=True)
    q, k, v = (share(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    q_pos, kv_pos, q_seg, kv_seg = (_all(x, axes) for x in (q_pos, kv_pos, q_seg, kv_seg))
    if sinks is not None:
        sinks = lax.dynamic_slice_in_dim(sinks, lax.axis_index(axes) * (N // C), N // C)
    keep = None if keep is None else share(keep, split_axis=1, concat_axis=2)
    y = _whole(settings, axes, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep)
    return share(y, split_axis=1, concat_axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring(settings: Settings, axes: tuple[str, ...], q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep):
    """The body of a shard_map: attention of this device's queries over the keys of all devices of `axes`."""
    return _ring_forward(settings, axes, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep)[0]


def _onward(axes: tuple[str, ...], tree: Any) -> Any:
    """From each device to the next one of the ring."""
    C = lax.axis_size(axes)
    return jax.tree.map(lambda a: lax.ppermute(a, axes, [(i, (i + 1) % C) for i in range(C)]), tree)


def _columns(keep, step, axes):
    """Of an array over all keys, the part of the keys that are here after so many steps."""
    if keep is None:
        return None
    C = lax.axis_size(axes)
    S = keep.shape[-1] // C
    return lax.dynamic_slice_in_dim(keep, (lax.axis_index(axes) - step) % C * S, S, axis=-1)


def _ring_forward(settings, axes, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, bias, keep):
    C, onward = lax.axis_size(axes), partial(_onward, axes)

    def look(there, step, sinks):
        k, v, kv_pos, kv_seg = there
        return attention_part(settings, q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, None, _columns(keep, step, axes))

    def hop(carry, step):
        there, seen = carry
        return (onward(there), merge_parts(seen, look(there, step, None))), None  # sent while the device multiplies

    there = (k, v, kv_pos, kv_seg)
    o, lse = jax.eval_shape(look, there, 0, None)
    nothing = jnp.zeros(o.shape, lse.dtype), jnp.full(lse.shape, jnp.inf, lse.dtype)
    (there, seen), _ = lax.scan(hop, (there, nothing), jnp.arange(C - 1))
    o, lse = merge_parts(seen, look(there, C - 1, sinks))  # a sink is counted once
    o, lse = checkpoint_name((o.astype(q.dtype), lse), "attention")
    return o, (q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, keep, o, lse)


def _ring_backward(settings, axes, saved, do):
    """Keys carry their gradients with them. Those of step i - 1 travel while step i is computed, and after C hops all are at home."""
    q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, keep, o, lse = saved
    C, onward = lax.axis_size(axes), partial(_onward, axes)

    def look(there, step, sinks):
        k, v, kv_pos, kv_seg = there
        args = (q, k, v, q_pos, kv_pos, q_seg, kv_seg, sinks, None, _columns(keep, step, axes))
        dq, dk, dv, dsinks, _ = attention_part_gradient(settings, *args, o, lse, do)
        return [a.astype(lse.dtype) for a in (dq, dk, dv)], dsinks

    def hop(carry, step):
        there, (dq, dk, dv) = carry
        following, (dk, dv) = onward(there), onward((dk, dv))
        return (following, add((dq, dk, dv), look(there, step, None)[0])), None

    add = lambda a, b: [x + y for x, y in zip(a, b)]
    there = (k, v, kv_pos, kv_seg)
    following = onward(there)
    grads, dsinks = look(there, 0, sinks)
    (there, (dq, dk, dv)), _ = lax.scan(hop, (following, grads), jnp.arange(1, C - 1))
    dq, dk, dv = add((dq, *onward((dk, dv))), look(there, C - 1, None)[0])
    dk, dv = onward((dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None, dsinks, None, None


ring.defvjp(_ring_forward, _ring_backward)


def head_tail(T: int, C: int) -> Int[np.ndarray, " T"]:
    """The order of tokens in which device i of C holds pieces i and 2 C - 1 - i of 2 C: a causal mask then gives all the same work.

    Row x in this order is x[head_tail(T, C)]: positions, segments and targets move with their tokens, and nothing else changes.
    Raises ValueError where T does not divide into 2 C pieces.
    """
    if T % (2 * C):
        raise ValueError(
            f"{T} tokens do not divide into the {2 * C} pieces of a balanced order over context={C}; use a multiple of {2 * C}"
        )
    pieces = np.arange(T).reshape(2 * C, -1)
    return np.concatenate([pieces[[i, 2 * C - 1 - i]].ravel() for i in range(C)])
