"""What a recurrent layer carries along a sequence: from call to call in a cache, and from shard to shard where the sequence is sharded.

A shard's tokens act on the memory that reaches them as one affine map, S -> P S + F. Each shard finds its own P and F from its own
tokens, and the memory before it is the composition of the maps of all shards before it: an exclusive prefix, in log2(shards) exchanges
(Blelloch 1990, "Prefix sums and their applications"; for state spaces: Dao & Gu 2024, arXiv 2405.21060, section 8.2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Execution, Layer
from minllm.sharding import local
from minllm.spec import Spec, Tree
from minllm_kernels import causal_conv, selective_scan


class Recurrent(Layer):
    """A layer that reads its tokens one after the other."""

    any_order = False


def conv_cache(B: int, width: int, dims: tuple[int, ...], axes: str, dtype: Any) -> Tree:
    """The Spec of the last width - 1 inputs of a convolution."""
    return Spec((B, width - 1, *dims), f"batch _ {axes}", dtype=dtype, role="buffer")


def memory_cache(B: int, N: int, H: int, h: int) -> Tree:
    """The Spec of a matrix memory a head: float32, as thousands of small updates go into it."""
    return Spec((B, N, H, h), "batch act_heads _ _", dtype=jnp.float32, role="buffer")


def documents(ctx: Context) -> Int[Array, "B T"]:
    """The document of each token, 0 where there is none."""
    return jnp.where(ctx.positions >= 0, 1 if ctx.segments is None else ctx.segments, 0)


def resume(cache: Tree, ctx: Context) -> Tree:
    """What was carried, emptied in the rows that begin at position 0: a cache may be used again for another sequence."""
    if cache is None:
        return None
    begins = (ctx.positions == 0).any(1)
    return jax.tree.map(lambda a: jnp.where(begins.reshape(-1, *(1,) * (a.ndim - 1)), 0, a), cache)


def remember(
    op: Callable,
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N h"],
    *gates: Float[Array, "B T N *_"],
    state: Float[Array, "B N H h"] | None,
    ctx: Context,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B N H h"]]:
    """(y, the memory after the last token) of `linear_attention` or `delta_rule`. gates: what the op takes between v and the state."""
    run, axis = ctx.run, _axis(ctx.run)

    def whole(q, k, v, *rest):
        *gates, state, segments = rest
        return op(q, k, v, *gates, state=state, segments=segments, impl=run.kernels, chip=run.chip)

    def shard(q, k, v, *rest):
        *gates, state, segments = rest
        (H, N, h), kind = q.shape[-1:] + v.shape[2:], jnp.promote_types(q.dtype, jnp.float32)
        # more values: asked of a memory that begins as the identity, their answers are what the tokens do to any other memory
        wide = jnp.concatenate([v, jnp.zeros((*v.shape[:3], H), v.dtype)], -1)
        one = jnp.broadcast_to(jnp.eye(H, dtype=kind), (len(q), N, H, H))
        start = jnp.concatenate([jnp.zeros((len(q), N, H, h), kind), one], -1)
        y, after = whole(q, k, wide, *gates, start, segments)

        def then(first, second):
            (P, F), (Q, G) = first, second
            return _mm(Q, P), _mm(Q, F) + G

        joined = _joined(segments, axis)[:, None, None, None]
        own = jnp.where(joined, after[..., h:], 0), after[..., :h]
        before = _before(own, then, state, axis)
        before = jnp.where(joined, before, 0)
        y = y[..., :h] + _mm(y[..., h:].swapaxes(1, 2), before.astype(y.dtype)).swapaxes(1, 2)
        return y, _of_last(_mm(own[0], before) + own[1], axis)

    heads, few, memory = "batch seq act_heads _", "batch seq act_kv_heads _", "batch act_heads _ _"
    ins = (few, few, heads, *(heads if g.ndim == 4 else heads[:-2] for g in gates), memory, "batch seq")
    return local(shard if axis else whole, ins, (heads, memory), run)(q, k, v, *gates, state, documents(ctx))


def scan(
    x: Float[Array, "B T F"],
    step: Float[Array, "B T F"],
    decay: Float[Array, "F S"],
    into: Float[Array, "B T S"],
    out: Float[Array, "B T S"],
    state: Float[Array, "B F S"] | None,
    ctx: Context,
) -> tuple[Float[Array, "B T F"], Float[Array, "B F S"]]:
    """(y, the state after the last token) of `selective_scan`."""
    run, axis = ctx.run, _axis(ctx.run)
    op = partial(selective_scan, impl=run.kernels, chip=run.chip)

    def shard(x, step, decay, into, out, state, segments):
        tokens = x, step, decay, into, out
        nothing = jnp.zeros((len(x), *decay.shape), jnp.promote_types(x.dtype, jnp.float32))
        after = op(*tokens, nothing, segments)[1]
        # the map is elementwise: its factor is what the tokens leave of a state of ones, without their inputs
        factor = op(jnp.zeros_like(x), *tokens[1:], nothing + 1, segments)[1]
        then = lambda first, second: (first[0] * second[0], first[1] * second[0] + second[1])
        joined = _joined(segments, axis)[:, None, None]
        before = _before((jnp.where(joined, factor, 0), after), then, state, axis)
        y, after = op(*tokens, jnp.where(joined, before, 0), segments)
        return y, _of_last(after, axis)

    wide, memory = "batch seq act_mlp", "batch act_mlp _"
    ins = (wide, wide, "act_mlp _", "batch seq _", "batch seq _", memory, "batch seq")
    return local(shard if axis else op, ins, (wide, memory), run)(x, step, decay, into, out, state, documents(ctx))


def convolve(
    x: Float[Array, "B T *F"], w: Float[Array, "W *F"], state: Float[Array, "B Z *F"] | None, axes: str, ctx: Context
) -> tuple[Float[Array, "B T *F"], Float[Array, "B Z *F"]]:
    """(y, the last W - 1 inputs) of `causal_conv` over channels of any number of dims, whose logical axes are `axes`."""
    run, axis = ctx.run, _axis(ctx.run)
    op = partial(causal_conv, impl=run.kernels, chip=run.chip)

    def shard(axis, x, w, state, segments):
        dims, x, w = x.shape[2:], x.reshape(*x.shape[:2], -1), w.reshape(len(w), -1)
        state = None if state is None else state.reshape(*state.shape[:2], -1)
        if axis:
            if x.shape[1] < len(w) - 1:
                raise ValueError(f"a convolution over {len(w)} tokens needs {len(w) - 1} in each shard of the sequence; "
                                 f"they hold {x.shape[1]}: shard it over fewer devices")  # fmt: skip
            end = len(w) - 1
            tail = op(x[:, -end:], w, None, segments[:, -end:])[1] if end else x[:, :0]
            halo = jax.lax.ppermute(tail, axis, [(i, i + 1) for i in range(jax.lax.axis_size(axis) - 1)])
            if state is not None:
                halo = jnp.where(jax.lax.axis_index(axis) == 0, state.astype(halo.dtype), halo)
            state = jnp.where(_joined(segments, axis)[:, None, None], halo, 0)
        y, after = op(x, w, state, segments)
        after = _of_last(after, axis) if axis else after
        return y.reshape(*y.shape[:2], *dims), after.reshape(*after.shape[:2], *dims)

    given, kept = f"batch seq {axes}", f"batch _ {axes}"
    ins = given, f"_ {axes}", kept, "batch seq"
    y, after = local(partial(shard, axis), ins, (given, kept), run)(x, w, state, documents(ctx))
    again = y.shape[2] // x.shape[2]  # `local` repeats heads that are fewer than their shards
    return (y[:, :, ::again], after[:, :, ::again]) if again > 1 else (y, after)


def _axis(run: Execution) -> str | None:
    """The mesh axis that the sequence is sharded over; None where it is whole."""
    axes = [a for a in run.rules.mesh_axes("seq") if run.mesh is not None and run.mesh.shape[a] > 1]
    if len(axes) > 1:
        raise ValueError(f"a recurrent layer's sequence may be sharded over one mesh axis, not over {', '.join(axes)}; change Rules.seq")
    return axes[0] if axes else None


def _joined(segments, axis):
    """Whether a shard's first document began before it, "B"; a shard without tokens only passes on what reaches it."""
    index = jnp.arange(segments.shape[1])
    at = lambda i: jnp.take_along_axis(segments, jnp.clip(i, 0, segments.shape[1] - 1)[:, None], 1)[:, 0]
    real = segments > 0
    first, last = at(jnp.argmax(real, 1)), at(jnp.where(real, index, -1).max(1))
    lasts = jax.lax.all_gather(jnp.where(real.any(1), last, 0), axis)  # (shards, B)
    earlier = (jnp.arange(len(lasts)) < jax.lax.axis_index(axis))[:, None] & (lasts > 0)
    nearest = jnp.where(earlier, jnp.arange(len(lasts))[:, None], -1).max(0)
    before = jnp.take_along_axis(lasts, jnp.maximum(nearest, 0)[None], 0)[0]
    return ~real.any(1) | (nearest < 0) | (before == first)


def _before(own, then, state, axis):
    """The memory that reaches this shard: `state` under the maps of all shards before it."""
    shards, here, total = jax.lax.axis_size(axis), jax.lax.axis_index(axis), own
    shift = lambda tree, n: jax.tree.map(lambda a: jax.lax.ppermute(a, axis, [(i, i + n) for i in range(shards - n)]), tree)
    for n in [1 << i for i in range((shards - 1).bit_length())]:
        total = jax.tree.map(lambda new, old: jnp.where(here >= n, new, old), then(shift(total, n), total), total)
    P, F = shift(total, 1)  # zeros reach the first shard
    return F if state is None else jnp.where(here == 0, state.astype(F.dtype), then((P, state.astype(F.dtype)), (P, F))[1])


def _of_last(x, axis):
    """The last shard's value, on every shard."""
    last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jnp.where(last, x, 0), axis)


def _mm(a, b):
    return jnp.matmul(a, b, precision="highest")
