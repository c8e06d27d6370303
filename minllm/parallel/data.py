"""Data parallelism in three notations, for reading: the same step of gradient descent

    w' = w - lr * mean over devices of grad loss(w, the device's rows)

as jit (say where arrays live, and the compiler finds the all-reduce), as shard_map (write the program of one device, all-reduce
included) and as pmap (the same with a leading device dim on every array; today a wrapper around shard_map). They give equal numbers, and
the trainer uses the first: there every parallelism that the compiler knows is another choice of shardings.

`loss(params, batch)` is a mean over rows; `batch` is a tree of arrays whose first dim divides over the devices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any
Loss = Callable[[Tree, Tree], jax.Array]
Step = Callable[[Tree, Tree], tuple[Tree, jax.Array]]  # (params, batch) -> (new params, loss)


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def _descend(params: Tree, grads: Tree, lr: float) -> Tree:
    return jax.tree.map(lambda w, g: w - lr * g, params, grads)


def by_jit(loss: Loss, lr: float, devices: Sequence[jax.Device]) -> Step:
    mesh = _mesh(devices)
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    @partial(jax.jit, in_shardings=(whole, rows), out_shardings=(whole, whole))
    def step(params, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)  # of the global batch
        return _descend(params, grads, lr), value

    return step


def by_shard_map(loss: Loss, lr: float, devices: Sequence[jax.Device]) -> Step:
    whole, rows = PartitionSpec(), PartitionSpec("data")

    # check_vma=False: with it, jax would itself add up the gradient of what is the same on all devices
    @jax.jit
    @partial(jax.shard_map, mesh=_mesh(devices), in_specs=(whole, rows), out_specs=(whole, whole), check_vma=False)
    def step(params, batch):
        value, grads = jax.lax.pmean(jax.value_and_grad(loss)(params, batch), "data")  # of this device's rows, then of all
        return _descend(params, grads, lr), value

    return step


def by_pmap(loss: Loss, lr: float, devices: Sequence[jax.Device]) -> Step:
    """Arrays go in and come out as everywhere else: the device dim is added and taken away here."""
    n = len(devices)

    @partial(jax.pmap, axis_name="data", devices=devices, in_axes=(None, 0), out_axes=None)
    def one(params, batch):
        value, grads = jax.lax.pmean(jax.value_and_grad(loss)(params, batch), "data")
        return _descend(params, grads, lr), value

    return lambda params, batch: one(params, jax.tree.map(lambda a: a.reshape(n, len(a) // n, *a.shape[1:]), batch))
