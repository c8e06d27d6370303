"""Mixing experts that other devices hold.

    y_t = sum_k gates_tk f(p_e, x_t),  e = ids_tk

Dropless: the rows are sorted by expert and every expert multiplies as many as it got (MegaBlocks, Gale et al. 2022, arXiv 2211.15841).
With capacity an expert has room for C tokens of each group of rows of the batch, and what comes later is dropped (GShard, Lepikhin et al.
2020, arXiv 2006.16668, section 3.2; there the second choices queue behind all first ones, here tokens queue by time, so that a causal
model stays causal).

Over the mesh axis of `experts` (`expert` in the usual rules) each of n devices holds E / n experts and its own tokens. Rows travel to the
devices of their experts and back by two all-to-alls. A device sends (n - 1) / n of its M k rows of D each way, whatever the loads: dropless
by `lax.ragged_all_to_all`, into a buffer that holds the worst case (all tokens of all n devices); with capacity by a dense all-to-all of
E C rows. XLA has no ragged all-to-all for CPUs: there the rows go in a dense one, padded.
"""

from dataclasses import replace
from functools import partial
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minllm.layer import Context, Execution, Layer
from minllm.sharding import local, shards_of
from minllm.spec import Tree, is_spec, tree_map
from minllm.weights import Mixed, PerGroup, as_array, gathered


def mix(
    expert: Layer,
    specs: Tree,
    p: Tree,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T k"],
    gates: Float[Array, "B T k"],
    *,
    capacity: float | None = None,
    group: int = 1,
    run: Execution,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T k"] | None]:
    """(y, which choices found room; None when nothing is ever dropped).

    expert: the layer that one expert is. specs, p: its Specs and weights, each with a leading `experts` dim of E.
    ids: the experts of each token, k different ones; E stands for none. gates: what their outputs are multiplied by.
    capacity: room of an expert for each `group` rows of the batch, as a multiple of the even share group T k / E; None: dropless.

    Raises ValueError where the rows of a device do not divide into groups.
    """
    (axis,), tensor, columns = shards_of("experts", run) or (None,), shards_of("mlp", run), shards_of("expert_embed", run)
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    weights = tree.flatten_up_to(p)
    E, T = leaves[0].shape[0], x.shape[1]
    # the tensor group adds up its parts of the hidden width; where the residual stream is sharded by token, each keeps its own tokens
    scatter = bool(tensor) and set(tensor) <= set(shards_of("residual_seq", run)) - set(shards_of("seq", run))

    def apply(x, ids, gates, *own):
        own = jax.tree.unflatten(tree, own)
        b, t, k = ids.shape
        if tensor:  # an output bias is whole on every device of the group, and counts once
            first = lax.axis_index(tensor) == 0
            own = tree_map(lambda s, w: w if s.role != "bias" or "mlp" in s.names else jnp.where(first, w, 0), specs, own)
        if capacity is None:
            y, kept = dropless(partial(per_group, expert, specs, own, run), x, ids, E, axis), None
        else:
            if b % group:
                raise ValueError(f"{b} rows of a device do not divide into capacity groups of {group} rows; use a multiple of {group}")
            room = ceil(group * T * k / E * capacity)
            y, kept = limited(partial(per_expert, expert, own, run), x, ids, E, group, room, axis, shards_of("seq", run))
        y = (y * gates[..., None]).sum(2).astype(x.dtype)  # in float32
        if scatter:
            y = lax.psum_scatter(y, tensor, scatter_dimension=1, tiled=True)
        elif tensor:
            y = lax.psum(y, tensor)
        return y, kept

    def body(x, ids, gates, *arrays):
        def whole(s, low, full):
            cut = "expert_embed" in s.names
            return gathered(low, full, columns if cut else (), s.names.index("expert_embed") if cut else 0)

        return apply(x, ids, gates, *map(whole, leaves, arrays[: len(leaves)], arrays[len(leaves) :]))

    if run.mesh is None or run.mesh.size == 1:
        return apply(x, ids, gates, *weights)
    lows, fulls = zip(*((w.low, w.full) if isinstance(w, Mixed) else (as_array(w), None) for w in weights))
    tokens, axes = "batch seq _", [" ".join(s.names) for s in leaves]
    outs = (f"batch {'residual_seq' if scatter else 'seq'} _", None if capacity is None else tokens)
    return local(body, (tokens, tokens, tokens, *axes, *axes), outs, run)(x, ids, gates, *lows, *fulls)


def per_group(expert: Layer, specs: Tree, p: Tree, run: Execution, rows: Float[Array, "R D"], sizes: Int[Array, " E"]) -> Array:
    """The layer's output where each row has the weights of its group."""

    def leaf(s, w):
        if "->" in s.axes:
            return PerGroup(w, sizes, run.kernels, run.chip)
        return jnp.repeat(w, sizes, axis=0, total_repeat_length=len(rows))

    return expert.apply(tree_map(leaf, specs, p), rows[None], Context(run=replace(run, mesh=None))).x[0]


def per_expert(expert: Layer, p: Tree, run: Execution, rows: Float[Array, "E C D"]) -> Array:
    """The same where every expert has equally many rows."""
    return jax.vmap(lambda p, rows: expert.apply(p, rows[None], Context(run=replace(run, mesh=None))).x[0])(p, rows)


def dropless(f, x: Float[Array, "b t D"], ids: Int[Array, "b t k"], E: int, axis: str | None) -> Float[Array, "b t k D"]:
    """f's output for every choice, not yet weighted. With an axis, the body of a shard_map."""
    b, t, k = ids.shape
    order = jnp.argsort(ids.reshape(-1), stable=True)
    back = jnp.argsort(order).reshape(-1, k)
    sizes = _counts(ids.reshape(-1), E)
    y = pick(x.reshape(b * t, -1), order // k, back)
    y = _elsewhere(f, y, sizes, axis) if axis else f(y, sizes)
    return pick(y, back.reshape(-1), order[:, None]).reshape(b, t, k, -1)


def _elsewhere(f, rows, sizes, axis):
    """f on the devices that hold the experts."""
    n, me, M = lax.axis_size(axis), lax.axis_index(axis), len(rows)
    own = len(sizes) // n
    table = lax.all_gather(sizes, axis).reshape(n, n, own)  # rows from device i for expert e of device j
    sent, here = table.sum(2), table[:, me]  # sent[i, j]
    before = lambda a, dim: jnp.cumsum(a, dim) - a
    there = Route(before(sent[me], 0), sent[me], before(sent, 0)[me], sent[:, me])
    home = Route(before(sent[:, me], 0), sent[:, me], before(sent, 1)[:, me], sent[me])
    rows = travel(axis, n * M, M, there, home, rows)
    # they arrive by sender, and within a sender by expert
    label = jnp.repeat(jnp.tile(jnp.arange(own), n), here.reshape(-1), total_repeat_length=n * M)
    label = jnp.where(jnp.arange(n * M) < here.sum(), label, own)
    order = jnp.argsort(label, stable=True)
    back = jnp.argsort(order)
    y = f(pick(rows, order, back[:, None]), here.sum(0))
    return travel(axis, M, n * M, home, there, pick(y, back, order[:, None]))


def limited(f, x, ids, E: int, group: int, room: int, axis: str | None, seq: tuple[str, ...]) -> tuple[Array, Array]:
    """(f's output for every choice, zeros where it found no room; which did). The tokens of a group of rows queue by time, then by row."""
    b, t, k = ids.shape
    G = b // group
    queue = ids.reshape(G, group, t, k).swapaxes(1, 2).reshape(G, -1)
    hot = (queue[..., None] == jnp.arange(E)).astype(jnp.int32)
    expert = jnp.minimum(queue, E - 1)
    turn = jnp.take_along_axis(jnp.cumsum(hot, 1) - hot, expert[..., None], 2)[..., 0]
    place = turn
    if seq:  # those who stand in line on devices with earlier tokens
        counts = lax.all_gather(hot.sum(1), seq).reshape(-1, G, E)
        ahead = (jnp.cumsum(counts, 0) - counts)[lax.axis_index(seq)]
        place = turn + jnp.take_along_axis(ahead, expert, 1)
    # an expert's buffer: room for each group, filled in order
    slot = jnp.where((place < room) & (queue < E), (queue * G + jnp.arange(G)[:, None]) * room + turn, E * G * room)
    slot = slot.reshape(G, t, group, k).swapaxes(1, 2).reshape(-1)
    source = jnp.full(E * G * room, b * t * k).at[slot].set(jnp.arange(b * t * k), mode="drop")
    y = pick(x.reshape(b * t, -1), source // k, slot.reshape(-1, k)).reshape(E, G * room, -1)
    share = partial(lax.all_to_all, axis_name=axis, tiled=True)
    y = share(f(share(y, split_axis=0, concat_axis=1)), split_axis=1, concat_axis=0) if axis else f(y)
    y = pick(y.reshape(E * G * room, -1), slot, source[:, None])
    return y.reshape(b, t, k, -1), (slot < E * G * room).reshape(b, t, k)


def _counts(ids: Int[Array, "... n"], E: int) -> Int[Array, "... E"]:
    return (ids[..., None] == jnp.arange(E)).sum(-2, dtype=jnp.int32)


@jax.custom_vjp
def pick(x: Float[Array, "M D"], rows: Int[Array, " R"], places: Int[Array, "M k"]) -> Float[Array, "R D"]:
    """The given rows of x, zeros for M and beyond. `places` says where each row of x went, so that the gradient is a gather too."""
    return _take(x, rows)


def _take(x, rows):
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


def _pick_backward(saved, dy):
    dx = _take(dy, saved.reshape(-1)).reshape(*saved.shape, -1)
    return dx.sum(1, dtype=jnp.promote_types(dy.dtype, jnp.float32)).astype(dy.dtype), None, None


pick.defvjp(lambda x, rows, places: (_take(x, rows), places), _pick_backward)


class Route(NamedTuple):
    """What `lax.ragged_all_to_all` asks of each device: the first row for it, how many, where they go there; how many come from it."""

    start: Int[Array, " n"]
    count: Int[Array, " n"]
    where: Int[Array, " n"]
    incoming: Int[Array, " n"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def travel(axis, R, M, there, home, rows):
    """The M rows of this device to others; R rows come. Its gradient travels home."""
    return lax.platform_dependent(
        rows, *there, tpu=partial(_ragged, axis, R), cuda=partial(_ragged, axis, R), default=partial(_padded, axis, R)
    )


def _ragged(axis, R, rows, start, count, where, incoming):
    out = jnp.zeros((R, rows.shape[1]), rows.dtype)
    return lax.ragged_all_to_all(rows, out, start, count, where, incoming, axis_name=axis)


def _padded(axis, R, rows, start, count, where, incoming):
    most = min(len(rows), R)  # that one device can send to another
    index = jnp.arange(most)
    out = _take(rows, jnp.where(index < count[:, None], start[:, None] + index, len(rows)).reshape(-1))
    out = lax.all_to_all(out, axis, split_axis=0, concat_axis=0, tiled=True)
    first = (jnp.cumsum(incoming) - incoming)[:, None]
    goal = jnp.where(index < incoming[:, None], first + index, R)
    return jnp.zeros((R, rows.shape[1]), rows.dtype).at[goal.reshape(-1)].set(out, mode="drop")


travel.defvjp(
    lambda axis, R, M, there, home, rows: (travel(axis, R, M, there, home, rows), (there, home)),
    lambda axis, R, M, saved, dy: (None, None, travel(axis, M, R, saved[1], saved[0], dy)),
)
