"""Training through a pipeline of stages: `jax.value_and_grad` where the layers live on different devices.

The mesh axis `stage` is cut off by a `shard_map`; the other axes stay with the compiler. Every stage runs the same loop over the slots of a
table (`schedule.py`): take what the neighbours sent, do what the table says, send on. A forward operation keeps its input alone; a backward
one computes its chunk again from there and differentiates it, so an F costs 1 and a B 3 forward passes (as with full remat, without any),
and what is held is inputs of chunks, not activations. With `zero_bubble` B is the gradient of the input (2 forward passes) and W that of
the weights, which has to go through the chunk again (3): it wins only where the bubble is larger than that.

Embedding, head and loss are inside: on the first and the last stage, under `lax.cond`. What layers add to the loss travels with the
activations, and its gradient back, so that the last stage sees the losses of all.

The state keeps parameters as it always does, spread over the stages along their width. A step deals the layers out to their stages (an
all-to-all of the weights in the compute dtype, and one of their gradients), so checkpoints know nothing of pipelines. Where layers do not
divide, some stages have fewer, and pass the places without a layer by.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from minllm import spec
from minllm.layer import Context, Execution, Out, add_losses
from minllm.layers.stack import Stack
from minllm.models.transformer import Decoder, with_positions
from minllm.parallel import schedule
from minllm.sharding import constrain
from minllm.spec import Tree
from minllm.weights import is_stacked


@dataclass(frozen=True)
class Deal:
    """Which repetitions of one layer of the trunk each virtual stage holds: `count[p]` of them from `first[p]` on."""

    first: tuple[int, ...]
    count: tuple[int, ...]
    stacked: bool

    @property
    def width(self) -> int:
        return max(self.count)

    def index(self) -> np.ndarray:
        """The repetition at each place, (virtual stages, width); what stands where there is none is not used."""
        return np.minimum(np.array(self.first)[:, None] + np.arange(self.width), sum(self.count) - 1)

    def out(self, tree: Tree, V: int) -> Tree:
        """Leaves (repetitions, ...) as (V, S, width, ...)."""
        index = self.index()

        def leaf(a):
            a = a if self.stacked else a[None]
            a = a if np.array_equal(index.ravel(), np.arange(len(a))) else jnp.take(a, index.ravel(), axis=0)
            return a.reshape(V, -1, self.width, *a.shape[1:])

        return jax.tree.map(leaf, tree)

    def back(self, tree: Tree) -> Tree:
        """The leaf of each repetition, in their order."""
        where = np.concatenate([p * self.width + np.arange(n) for p, n in enumerate(self.count)])

        def leaf(a):
            a = a.reshape(-1, *a.shape[3:])
            a = a if len(where) == len(a) else jnp.take(a, where, axis=0)
            return a if self.stacked else a[0]

        return jax.tree.map(leaf, tree)


def deal(model: Decoder, parts: int) -> tuple[Deal, ...]:
    """The trunk in `parts` virtual stages of equal length, in order. Where the repetitions do not divide, the first and the last, which
    have the embedding and the head beside them, get fewer (Llama 3 paper, section 3.3.2). Raises ValueError when there are too few."""
    specs = model.params()["trunk"]
    times = [layer.times if isinstance(layer, Stack) else 1 for layer in model.trunk]
    least, extra = divmod(sum(times), parts)
    if not least:
        raise ValueError(
            f"{sum(times)} repetitions of layers cannot fill {parts} virtual stages (mesh.stage x pipeline.virtual); use fewer"
        )
    skip = (parts - extra) // 2
    ends = np.cumsum([least + (skip <= p < skip + extra) for p in range(parts)])
    deals, begin = [], 0
    for n, p in zip(times, specs):
        low, high = np.clip([ends - np.diff(ends, prepend=0), ends], begin, begin + n) - begin
        deals.append(Deal(tuple(low.tolist()), tuple((high - low).tolist()), is_stacked(p)))
        begin += n
    return tuple(deals)


def report(model: Decoder, run: Execution) -> str:
    """What the pipeline costs, in words: the layers of each stage and the bubble."""
    S, V, pipe = run.mesh.shape["stage"], run.pipeline.virtual, run.pipeline
    slots = schedule.table(pipe.schedule, S, run.microbatches, V, pipe.consecutive)
    counts = np.sum([d.count for d in deal(model, S * V)], 0)
    bubble = schedule.bubble(slots, COSTS[pipe.schedule])
    # a stage with fewer layers waits for the others
    idle = counts.max() * S * V / counts.sum() - 1
    return (
        f"pipeline {pipe.schedule}: {S} stages x {V} chunks of {counts.min()} to {counts.max()} repetitions, "
        f"{run.microbatches} microbatches, {len(slots)} slots; bubble {bubble:.1%}, uneven layers {idle:.1%}"
    )


# Forward passes that an operation costs; a backward one computes its chunk again.
COSTS = {"gpipe": {"F": 1, "B": 3}, "1f1b": {"F": 1, "B": 3}, "zero_bubble": {"F": 1, "B": 2, "W": 3}}


def plan(slots: schedule.Table) -> tuple[np.ndarray, int, int]:
    """(slots, stages, [operation, chunk, microbatch, input place, gradient place, place of the arriving input, of the arriving gradient])
    and the number of places for inputs and for gradients; one more, the last, is for what nobody reads."""
    S = len(slots[0])
    acts, grads = schedule.lifetimes(slots)
    seats = [[schedule.places(spans) for spans in held] for held in (acts, grads)]
    sizes = [max((1 + max(own.values()) for own in held if own), default=0) for held in seats]
    rows = np.zeros((len(slots), S, 7), np.int32)
    rows[..., [3, 5]], rows[..., [4, 6]] = sizes[0], sizes[1]
    for t, slot in enumerate(slots):
        for s, op in enumerate(slot):
            if op:
                here = (op.chunk, op.microbatch)
                rows[t, s, :5] = " FBW".index(op.kind), *here, *(held[s].get(here, size) for held, size in zip(seats, sizes))
    for column, spans, held in zip((5, 6), (acts, grads), seats):
        for s in range(S):
            for here, (arrival, _) in spans[s].items():
                rows[arrival, s, column] = held[s][here]
    return rows, *sizes


class Tail:
    """A model whose trunk has run already: what an objective sees on the last stage."""

    def __init__(self, model: Decoder, state: dict):
        self._model, self._state = model, state

    def hidden(self, p: Tree, tokens: Array, ctx: Context) -> Out:
        x = self._model.norm.apply(p["norm"], self._state["x"], ctx).x
        return Out(x, None, self._state["losses"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def value_and_grad(model: Decoder, objective: Any, run: Execution, weights: Callable, parts: Callable) -> Callable:
    """f(params, low, pieces, whole, key) -> (gradients like params in `precision.reduce`, parts of the loss, statistics of the layers).

    weights(params, low): what layers multiply by. parts(losses, whole): name -> what one microbatch adds to the loss that is minimised.
    pieces: the batch as (microbatches, rows, ...). The gradients, the parts and the statistics are those of the same microbatches without
    a pipeline. Raises ValueError when the trunk cannot fill the stages.
    """
    S, V, M = run.mesh.shape["stage"], run.pipeline.virtual, run.microbatches
    slots = schedule.table(run.pipeline.schedule, S, M, V, run.pipeline.consecutive)
    rows, x_places, g_places = plan(slots)
    deals, specs, reduce = deal(model, S * V), model.params(), jnp.dtype(run.precision.reduce)
    # a stage's own weights and activations are spread over the other axes
    rules = replace(run.rules, **{f.name: tuple(a for a in run.rules.mesh_axes(f.name) if a != "stage") for f in fields(run.rules)})
    depths = np.cumsum([0, *(len(layer.pattern) * layer.times if isinstance(layer, Stack) else 1 for layer in model.trunk)])
    # (layers of the trunk, virtual stages): first repetition, how many
    whose = np.array([[d.first, d.count] for d in deals], np.int32).reshape(len(deals), 2, V, S)

    def placed(tree: Tree, lead: tuple, mesh: Any) -> Tree:
        """Trunk leaves with the dims `lead` in front of those of one layer."""

        def leaf(s, a):
            own = rules.partition(run.mesh, s.axes, s.shape)[s.names[:1] == ("layers",) :]
            return None if a is None else lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*lead, *own)))

        return spec.tree_map(leaf, specs["trunk"], tree)

    def gradients(params: Tree, low: Tree, pieces: dict, whole: Array, key: Array) -> tuple[Tree, Any, Any]:
        kinds = spec.tree_map(lambda _, a: None if a is None else a.dtype, specs, params)
        tokens = jax.eval_shape(lambda pieces: jax.tree.map(lambda a: a[0], pieces), pieces)["tokens"]
        out = jax.eval_shape(lambda p, ids: model.hidden(p, ids, Context()), low, tokens)
        nothing = {
            "x": jnp.zeros(out.x.shape, out.x.dtype),
            "losses": jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out.losses or {}),
        }

        def body(stage, rows, whose, trunk, outer, pieces, whole, key):
            inner = replace(run, mesh=jax.sharding.get_abstract_mesh(), rules=rules)
            here, rows, whose = stage[0], rows[:, 0], whose[..., 0]
            trunk = jax.tree.map(lambda a: a[:, 0], trunk)

            def chunk(v):
                """(parameters, low) of a chunk. Parameters are not read where layers multiply by `low`, and equal it elsewhere."""
                own = {**outer, "trunk": jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, v, 0, False), trunk)}
                return spec.tree_map(lambda _, kind, a: None if kind is None else a.astype(kind), specs, kinds, own), own

            def piece_of(m):
                piece = jax.tree.map(lambda a: a[m], pieces)
                return piece, Context(key=key, rows=piece["rows"], run=inner)

            def forward(w, state, v, m):
                """The chunk's layers; on the first virtual stage the embedding before them."""
                piece, ctx = piece_of(m)
                ctx = with_positions(objective.context(piece, ctx), piece["tokens"], None)
                first = (v == 0) & (here == 0)
                x = lax.cond(first, lambda: model.embedded(w, piece["tokens"], ctx), lambda: state["x"])
                losses, stats = state["losses"], []
                for i, (layer, d) in enumerate(zip(model.trunk, deals)):

                    def repetition(carry, each, i=i, layer=layer, d=d):
                        own, j = each
                        index = whose[i, 0, v] + j

                        def present(x, losses):
                            depth = depths[i] + (index * len(layer.pattern) if isinstance(layer, Stack) else 0)
                            at = ctx.replace(layer=depth)
                            if d.stacked:
                                out = layer.apply(jax.tree.map(lambda a: a[None], own), x, at)
                                out = out._replace(stats=jax.tree.map(lambda a: a[0], out.stats))
                            else:
                                out = layer.apply(own, x, at if key is None else at.replace(key=jax.random.fold_in(key, depth)))
                            return (out.x, add_losses(losses, out.losses) or {}), out.stats

                        if min(d.count) == d.width:
                            return present(*carry)
                        absent = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(present, *carry)[1])
                        return lax.cond(j < whose[i, 1, v], present, lambda x, losses: ((x, losses), absent), *carry)

                    each = w["trunk"][i], jnp.arange(d.width)
                    if run.scan and d.width > 1:
                        (x, losses), out = lax.scan(repetition, (x, losses), each)
                    else:
                        outs = []
                        for j in range(d.width):
                            (x, losses), out = repetition((x, losses), jax.tree.map(lambda a: a[j], each))
                            outs.append(out)
                        out = jax.tree.map(lambda *a: jnp.stack(a), *outs)
                    stats.append(out)
                return {"x": x, "losses": losses}, tuple(stats)

            def backward(v, m, state, dstate, of):
                """The gradients of a chunk, from its input and the gradient of its output, in what `of` names: 0 parameters, 1 input."""
                params, own = chunk(v)
                last = (v == V - 1) & (here == S - 1)

                def head(w, state):
                    piece, ctx = piece_of(m)
                    found = parts(objective.losses(Tail(model, state), w, piece, ctx)[0], whole)
                    return sum(found.values()), found

                def f(params, state):
                    w = weights(params, own)
                    state, stats = forward(w, state, v, m)
                    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(head, w, state))
                    loss, found = lax.cond(last, head, lambda *_: zero, w, state)
                    return (state, loss), (found, stats)

                given = [params, state]
                some = lambda *args: f(*(args[of.index(i)] if i in of else given[i] for i in (0, 1)))
                (_, loss), vjp, aux = jax.vjp(some, *(given[i] for i in of), has_aux=True)
                dstate = jax.tree.map(lambda a: jnp.where(last, jnp.zeros_like(a), a), dstate)
                return dict(zip(of, vjp((dstate, jnp.ones_like(loss))))), aux

            def add(sums, grads, v):
                grads = dict(grads)
                dtrunk = grads.pop("trunk")
                sums = dict(sums)
                strunk = sums.pop("trunk")
                return {"trunk": jax.tree.map(lambda s, g: s.at[v].add(g.astype(reduce)), strunk, dtrunk),
                        **jax.tree.map(lambda s, g: s + g.astype(reduce), sums, grads)}  # fmt: skip

            def idle(v, m, state, dstate, sums, notes):
                return nothing, nothing, sums, notes

            def F(v, m, state, dstate, sums, notes):
                last = (v == V - 1) & (here == S - 1)  # its backward computes it again, and nobody else needs it
                go = lambda: forward(weights(*chunk(v)), state, v, m)[0]
                return lax.cond(last, lambda: nothing, go), nothing, sums, notes

            def noted(notes, aux, v):
                found, stats = aux
                return (jax.tree.map(jnp.add, notes[0], found), jax.tree.map(lambda s, a: s.at[v].add(a / M), notes[1], stats))

            def B(v, m, state, dstate, sums, notes):
                of = (1,) if run.pipeline.schedule == "zero_bubble" else (0, 1)
                grads, aux = backward(v, m, state, dstate, of)
                return nothing, grads[1], add(sums, grads[0], v) if 0 in of else sums, noted(notes, aux, v)

            def W(v, m, state, dstate, sums, notes):
                grads, _ = backward(v, m, state, dstate, (0,))
                return nothing, nothing, add(sums, grads[0], v), notes

            def slot(carry, row):
                (x_in, g_in), (xs, gs), sums, notes = carry
                op, v, m, x_at, g_at, x_put, g_put = row
                xs = jax.tree.map(lambda buffer, a: buffer.at[x_put].set(a), xs, x_in)
                gs = jax.tree.map(lambda buffer, a: buffer.at[g_put].set(a), gs, g_in)
                state, dstate = (jax.tree.map(lambda a: a[at], held) for held, at in ((xs, x_at), (gs, g_at)))
                ops = (idle, F, B, W) if run.pipeline.schedule == "zero_bubble" else (idle, F, B)
                x_out, g_out, sums, notes = lax.switch(op, ops, v, m, state, dstate, sums, notes)
                ring = [(i, (i + 1) % S) for i in range(S)]
                x_in = jax.tree.map(lambda a: lax.ppermute(a, "stage", ring), x_out)
                g_in = jax.tree.map(lambda a: lax.ppermute(a, "stage", [(b, a) for a, b in ring]), g_out)
                return ((x_in, g_in), (xs, gs), sums, notes), None

            params, _ = chunk(0)
            zeros = lambda lead: lambda a: jnp.zeros((*lead, *a.shape), reduce)
            sums = {**jax.tree.map(zeros(()), {k: tree for k, tree in params.items() if k != "trunk"}),
                    "trunk": placed(jax.tree.map(zeros((V,)), params["trunk"]), (None, None), inner.mesh)}  # fmt: skip
            found, stats = jax.eval_shape(lambda: backward(0, 0, nothing, nothing, (1,))[1])
            notes = (jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), found),
                     jax.tree.map(lambda a: jnp.zeros((V, *a.shape), jnp.promote_types(a.dtype, jnp.float32)), stats))  # fmt: skip

            def held(places):
                def leaf(a):
                    buffer = jnp.zeros((places + 1, *a.shape), a.dtype)
                    return constrain(buffer, "_ batch residual_seq act_embed", inner) if a.ndim == 3 else buffer

                return jax.tree.map(leaf, nothing)

            start = ((nothing, nothing), (held(x_places), held(g_places)), sums, notes)
            (_, _, sums, (found, stats)), _ = lax.scan(slot, start, rows)
            dtrunk = sums.pop("trunk")
            across = lambda tree: jax.tree.map(lambda a: lax.psum(a, "stage"), tree)
            apart = lambda tree: jax.tree.map(lambda a: a[:, None], tree)
            return apart(dtrunk), across(sums), across(found), apart(stats)

        trunk = tuple(d.out(p, V) for d, p in zip(deals, low["trunk"]))
        trunk = placed(trunk, (None, "stage", None), run.mesh)
        outer = {name: tree for name, tree in low.items() if name != "trunk"}
        by_stage, all_ = PartitionSpec(None, "stage"), PartitionSpec()
        mapped = jax.shard_map(
            body, mesh=run.mesh, axis_names={"stage"}, check_vma=False, out_specs=(by_stage, all_, all_, by_stage),
            in_specs=(PartitionSpec("stage"), by_stage, PartitionSpec(None, None, None, "stage"), by_stage, all_, all_, all_, all_),
        )  # fmt: skip
        dtrunk, douter, found, stats = mapped(jnp.arange(S), jnp.asarray(rows), jnp.asarray(whose), trunk, outer, pieces, whole, key)
        grads = {**douter, "trunk": tuple(d.back(g) for d, g in zip(deals, dtrunk))}
        return grads, found, tuple(d.back(a) for d, a in zip(deals, stats))

    return gradients
