"""One training step as a pure function: state' = step(state, batch).

    cast the parameters (still sharded) -> gradients of each microbatch, added in float32 -> clip -> guard -> optimizer -> average

`build` makes model, optimizer and step of a run; the trainer and the planner call the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from minllm import models, spec, xla_flags
from minllm.layer import Context, Execution, layers_in
from minllm.lora import Adapted
from minllm.parallel.pipeline import deal, report, value_and_grad
from minllm.parallel.ring import head_tail
from minllm.run import Run
from minllm.sharding import ALL, MESH_AXES, constrain, make_mesh, sharding, shardings
from minllm.spec import Tree
from minllm.weights import Mixed, prepare

Batch = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """All that a run is, beside its config and data.

    step: how many batches were seen. params: what is trained, in float32 or as `precision.params` says; frozen: the other leaves of
    the model. average: the moving average of the parameters, None without one. key: never changes; each step folds its number into it.
    norm: the moving average of the gradient norm that spikes are measured against, 0 before the first step. Each leaf is an array, or what
    stands for it: its shape, its sharding.
    """

    step: Tree
    params: Tree
    frozen: Tree
    opt_state: Tree
    average: Tree
    key: Tree
    norm: Tree


def init_state(model: Any, transform: optax.GradientTransformation, run: Run, key: Key[Array, ""]) -> TrainState:
    specs = model.params()
    params, frozen = spec.part(specs, spec.init(specs, key, jnp.dtype(run.precision.params)))
    average = jax.tree.map(lambda a: a.astype(jnp.float32), params) if run.average else None
    return TrainState(jnp.int32(0), params, frozen, transform.init(params), average, jax.random.fold_in(key, 1), jnp.float32(0.0))


def abstract_state(model: Any, transform: optax.GradientTransformation, run: Run, execution: Execution) -> TrainState:
    """Shapes, dtypes and, with a mesh, shardings of the whole state. Optimizer leaves shaped like a parameter are sharded like it."""
    state = jax.eval_shape(lambda: init_state(model, transform, run, jax.random.key(0)))
    if execution.mesh is None:
        return state
    mesh, specs = execution.mesh, model.params()
    trained, frozen = spec.part(specs, shardings(specs, mesh, execution.rules))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # a parameter of another group of the optimizer
    moments = optax.tree_utils.tree_map_params(
        transform, lambda leaf, param, place: leaf if masked(leaf) else place if leaf.shape == param.shape else whole,
        state.opt_state, state.params, trained, transform_non_params=lambda leaf: whole, is_leaf=masked,
    )  # fmt: skip
    places = TrainState(whole, trained, frozen, moments, trained if run.average else None, whole, whole)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)


def make_step(model: Any, transform: optax.GradientTransformation, run: Run, execution: Execution) -> Callable:
    """step(state, batch) -> (state, metrics): pure, to be jitted with the state donated."""
    compute, reduce = jnp.dtype(execution.precision.compute), jnp.dtype(execution.precision.reduce)
    whole = replace(execution, rules=replace(execution.rules, embed="stage", expert_embed="stage"))
    inside = execution if execution.zero == 3 else whole  # where weights live while the model runs
    after = whole if execution.zero == 1 else execution  # and where their gradients do

    def total(params, low, batch, weight, key):
        """The objective of one microbatch: each sum over the weight of the whole batch, so that microbatches add up."""
        ctx = Context(key=key, rows=batch["rows"], run=inside)
        params = prepare(learned(params, low), model.params(), execution)
        losses, stats = run.objective.losses(model, params, batch, ctx)
        parts = shares(losses, weight)
        return sum(parts.values()), (parts, stats)

    def shares(losses, weight):
        M = execution.microbatches
        return {name: s / (weight if name in ("loss", "z_loss") else jnp.maximum(w, 1e-9) * M) for name, (s, w) in losses.items()}

    def learned(params, low):
        """The weights in the compute dtype, as functions of the parameters; their gradients arrive in `precision.reduce` where it is the
        parameters' own dtype."""

        def leaf(s, p, q):
            if p is None:  # frozen
                return q
            mixed = s.role in ("weight", "embedding") and (p.dtype == reduce != compute or execution.zero < 3)
            return Mixed(q, p) if mixed else p.astype(q.dtype)

        return spec.tree_map(leaf, model.params(), params, low)

    def gradients(params, low, batch, key):
        weight = jnp.maximum(run.objective.weight(batch), 1e-9)
        batch = batch | {"rows": jnp.arange(batch["tokens"].shape[0], dtype=jnp.int32)}
        specs = spec.part(model.params(), model.params())[0]
        if execution.mesh is not None and execution.mesh.shape["stage"] > 1:
            pipeline = value_and_grad(model, run.objective, inside, learned, shares)
            grads, parts, stats = pipeline(params, low, split(batch, execution), weight, key)
            return spec.tree_map(lambda s, g: constrain(g, s.axes, after), specs, grads), parts, stats

        def grad(piece):
            grads, aux = jax.grad(total, has_aux=True)(params, low, piece, weight, key)
            return spec.tree_map(lambda s, g: constrain(g.astype(reduce), s.axes, after), specs, grads), aux

        if execution.microbatches == 1:
            grads, (parts, stats) = grad(batch)
            return grads, parts, stats

        def one(sums, piece):
            grads, aux = grad(piece)
            return jax.tree.map(jnp.add, sums, grads), aux

        zeros = spec.tree_map(lambda s: constrain(jnp.zeros(s.shape, reduce), s.axes, after), specs)
        grads, (parts, stats) = jax.lax.scan(one, zeros, split(batch, execution))
        return grads, jax.tree.map(lambda a: a.sum(0), parts), jax.tree.map(lambda a: a.mean(0), stats)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        # cast while still sharded: the gathers of FSDP then move the compute dtype
        specs = model.params()
        params = spec.join(state.params, state.frozen)
        low = spec.tree_map(lambda s, p: constrain(p.astype(s.dtype or compute), s.axes, execution), specs, params)
        if execution.zero < 3:  # the barrier keeps the cast before the gather
            low = spec.tree_map(lambda s, p: constrain(p, s.axes, whole), specs, jax.lax.optimization_barrier(low))
        grads, parts, stats = gradients(state.params, low, batch, jax.random.fold_in(state.key, state.step))
        norm = optax.tree.norm(grads)
        if run.clip is not None:
            shrink = jnp.minimum(1.0, run.clip / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        spike = (state.norm > 0) & (norm > run.spike * state.norm) if run.spike else jnp.bool_(False)
        skip = ~jnp.isfinite(norm) | ~jnp.isfinite(sum(parts.values())) | spike

        lr = run.optimizer.lr * run.schedule(state.step, run.steps)
        directions, opt_state = transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, directions)
        params = spec.part(model.params(), model.update(spec.join(params, state.frozen), stats))[0]
        average = state.average
        if run.average:  # Polyak: decay min(d, (1 + t) / (10 + t)), so that the first values do not linger
            decay = jnp.minimum(run.average, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p.astype(a.dtype), average, params)
        keep = jnp.where(state.norm > 0, 0.98 * state.norm + 0.02 * norm, norm)
        new = TrainState(state.step, params, state.frozen, opt_state, average, state.key, keep)
        # a skipped step changes nothing but its number: the next batch is another one
        new = jax.tree.map(lambda a, b: jnp.where(skip, b, a) if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else b, new, state)
        metrics = {**parts, "grad_norm": norm, "lr": lr, "skipped": skip, "weight": run.objective.weight(batch)}
        metrics["layer_grad_norms"] = layer_norms(grads)
        return new.replace(step=state.step + 1), metrics

    return step


def split(batch: Batch, execution: Execution) -> Batch:
    """A batch as (microbatches, rows, ...), each microbatch spread over all devices that hold rows."""
    M = execution.microbatches

    def one(a):  # row i goes to microbatch i mod M: no device has to give rows away
        rows = a.reshape(a.shape[0] // M, M, *a.shape[1:]).swapaxes(0, 1)
        return constrain(rows, "_ batch seq" if a.ndim == 2 else "_ batch", execution)

    return jax.tree.map(one, batch)


def layer_norms(grads: Tree) -> dict[str, Array]:
    """The norm of the gradient of each parameter; of a stacked one, of each layer."""
    out = {}
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = spec.path_name(path)
        axes = tuple(range(1, g.ndim)) if "/pattern/" in name else None
        out[name] = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)), axes))
    return out


def make_evaluation(model: Any, run: Run, execution: Execution) -> Callable:
    """evaluate(params, frozen, batch) -> {"loss": (sum, weight)}: the plain objective, without dropout or what is added to aim."""
    compute = jnp.dtype(execution.precision.compute)

    def evaluate(params: Tree, frozen: Tree, batch: Batch) -> dict[str, Any]:
        params = spec.tree_map(lambda s, p: p.astype(s.dtype or compute), model.params(), spec.join(params, frozen))
        params = prepare(params, model.params(), execution)
        return run.objective.losses(model, params, batch, Context(run=execution), aim=False)[0]

    return evaluate


@dataclass(frozen=True)
class Built:
    """A run made ready to compile: what the trainer and the planner share."""

    run: Run
    model: Any
    execution: Execution
    transform: optax.GradientTransformation
    state: TrainState  # abstract, with shardings
    kind: str  # of the devices

    @property
    def pipeline(self) -> str | None:
        """What a pipeline costs, in words; None without one."""
        mesh = self.execution.mesh
        return None if mesh is None or mesh.shape["stage"] == 1 else report(self.model, self.execution)

    def compile(self, rows: int, T: int) -> jax.stages.Compiled:
        return self.lower(rows, T).compile(compiler_options=xla_flags.options(self.kind))

    def lower(self, rows: int, T: int) -> jax.stages.Lowered:
        """The step for batches of `rows` rows of `T` tokens, with the state donated. Its metrics are whole on every device."""
        mesh = self.execution.mesh
        out = None if mesh is None else (self.shardings(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        step = jax.jit(make_step(self.model, self.transform, self.run, self.execution), donate_argnums=0, out_shardings=out)
        return step.lower(self.state, self.batch(rows, T))

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The initial state, made where it belongs."""
        where = self.shardings() if self.execution.mesh is not None else None
        return jax.jit(lambda key: init_state(self.model, self.transform, self.run, key), out_shardings=where)(key)

    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def batch(self, rows: int, T: int) -> Batch:
        """The abstract batch of a step."""
        kinds = dict(tokens=jnp.int32, targets=jnp.int32, segments=jnp.int32, positions=jnp.int32, weights=jnp.float32)
        where = self.place((rows, T))
        return {name: jax.ShapeDtypeStruct((rows, T), kind, sharding=where) for name, kind in kinds.items()}

    def place(self, shape: tuple[int, int]) -> jax.sharding.NamedSharding | None:
        mesh = self.execution.mesh
        return None if mesh is None else sharding(mesh, self.execution.rules, "batch seq", shape)

    def share(self) -> tuple[tuple[int, ...], int]:
        """(parts, n): which of n equal parts of the rows of a batch this process reads: those that its devices hold. Processes that share
        out the tokens or heads of the same rows read the same parts."""
        mesh = self.execution.mesh
        if mesh is None:
            return (0,), 1
        n = math.prod(mesh.shape[axis] for axis in self.execution.rules.mesh_axes("batch"))
        where = sharding(mesh, self.execution.rules, "batch", (n,))
        return tuple(sorted({index[0].indices(n)[0] for index in where.addressable_devices_indices_map((n,)).values()})), n

    def put(self, batch: dict[str, Any]) -> Batch:
        """This process's rows as part of the global batch, their tokens in the order that the mesh wants."""
        parts, n = self.share()
        size, T = len(batch["tokens"]) // len(parts), batch["tokens"].shape[1]  # of a part
        where = self.place((n * size, T))
        if where is None:
            return jax.device_put(batch)
        if (C := self.execution.mesh.shape["context"]) > 1 and self.run.balance:
            batch = {name: a[:, head_tail(T, C)] for name, a in batch.items()}

        def of_device(a, rows, tokens):
            first = parts.index(rows.indices(n * size)[0] // size) * size
            return a[first : first + size, tokens]

        return {name: jax.make_array_from_callback((n * size, T), where, lambda at: of_device(a, *at)) for name, a in batch.items()}


def build(run: Run, vocab: int, devices: list[jax.Device] | None = None, like: Any = None) -> Built:
    """Model, execution and optimizer of a run, checked against each other. like: the model of run.model.like.
    Raises ValueError before anything is compiled."""
    devices = jax.devices() if devices is None else devices
    args = {"vocab": vocab if like is None else like.vocab, **run.model.args}
    if args["vocab"] < vocab:
        said = f"the model of model.like {run.model.like} has {args['vocab']} tokens, the tokenizer {vocab}; use that folder's tokenizer"
        if like is None:
            said = f"model.args.vocab is {args['vocab']}, but the tokenizer has {vocab} tokens; leave it out or raise it to {vocab}"
        raise ValueError(said)
    model = models.build(run.model.family, run.model.preset, **args) if like is None else like
    model = model if run.lora is None else Adapted(model, run.lora)
    sizes = {axis: getattr(run.mesh, axis) for axis in MESH_AXES}
    mesh = make_mesh(devices, **sizes)
    cpu = devices[0].platform == "cpu"
    execution = Execution(
        mesh=None if mesh.size == 1 else mesh,
        rules=ALL,
        kernels=run.kernels,
        remat=run.remat,
        save=run.save,
        offload=run.offload,
        context=run.context,
        zero=run.zero,
        scan=not cpu if run.scan is None else run.scan,
        layout="matrix" if cpu and mesh.size == 1 else "plain",
        microbatches=run.microbatches,
        precision=run.precision,
        pipeline=run.pipeline,
    )
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    for step, rows in run.ramp().stages:
        if rows % (run.microbatches * shards):
            least = run.microbatches * shards
            raise ValueError(
                f"batch of {rows} rows (from step {step}) does not divide into {run.microbatches} microbatches over {shards} devices "
                f"(mesh data x fsdp x expert); use a multiple of {least}, such as {-(-rows // least) * least}"
            )
    if run.data.length % (mesh.shape["context"] * mesh.shape["tensor"]):
        raise ValueError(
            f"data.length {run.data.length} does not divide over mesh context={mesh.shape['context']} x tensor={mesh.shape['tensor']}; "
            f"use a multiple of {mesh.shape['context'] * mesh.shape['tensor']}"
        )
    if run.balance and mesh.shape["context"] > 1:
        head_tail(run.data.length, mesh.shape["context"])
        if fixed := [layer for layer in layers_in(model) if not layer.any_order]:
            raise ValueError(f"balance: true moves tokens, and {type(fixed[0]).__name__} reads a token's neighbours; set balance: false")
    if mesh.shape["stage"] > 1:
        deal(model, mesh.shape["stage"] * run.pipeline.virtual)
    transform = run.optimizer.transform(spec.part(model.params(), model.params())[0])
    return Built(run, model, execution, transform, abstract_state(model, transform, run, execution), devices[0].device_kind)
