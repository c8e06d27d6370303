"""Weights are array-likes with three consumers: `einsum`, `take`, `grouped`.

A layer multiplies by a weight and never asks what it is. A plain array, a low-rank sum, a quantized block or another storage
layout are leaf types: pytrees with an `einsum`, `take` or `grouped` method. Their metadata never holds the layer dim, so a leaf
can be stacked, scanned over and split like the array that it stands for; their fields hold Specs or shardings as well as arrays.
"""

import re
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minllm.spec import Tree, tree_map
from minllm_kernels import grouped_matmul
from minllm_kernels.dispatch import Impl

if TYPE_CHECKING:
    from minllm.layer import Execution


class Stacked(NamedTuple):
    """The parameters of a `Stack`: for each layer of its pattern a tree whose leaves have a leading `layers` dim.

    A Stack's parameters are one `Stacked`, or a list of them (runs of consecutive repetitions): `unstack` gives runs of one, for
    unrolled decoding; `regroup` gives the longest runs whose leaves are of equal type.
    """

    pattern: tuple[Tree, ...]


def einsum(eq: str, x: Float[Array, "..."], w: Any) -> Float[Array, "..."]:
    """x times a weight, in the dtype of x. The weight's letters that x has and the result lacks are its inputs."""
    if isinstance(w, jax.Array):
        return jnp.einsum(eq, x, w.astype(x.dtype))
    return w.einsum(eq, x)


def as_array(w: Any) -> Array:
    """The plain array that a weight stands for, where an op asks for one."""
    return w if isinstance(w, jax.Array) else w.array()


def take(table: Any, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of a table. The caller gathers a sharded table first: a lookup in a sharded table is a surprise of communication."""
    return jnp.take(table, ids, axis=0) if isinstance(table, jax.Array) else table.take(ids)


def grouped(x: Float[Array, "M D"], w: Any, sizes: Int[Array, " E"], impl: Impl = "auto", chip: str | None = None) -> Float[Array, "M F"]:
    """Rows of x, sorted by group, times the matrix of their group: w is (E, D, F). Rows past the last group give zeros."""
    return grouped_matmul(x, w, sizes, impl=impl, chip=chip) if isinstance(w, jax.Array) else w.grouped(x, sizes, impl, chip)


def letters(eq: str) -> tuple[str, str, str]:
    """The terms of 'x,w->y'."""
    x, w, y = re.fullmatch(r"(\w+),(\w+)->(\w+)", eq).groups()  # type: ignore[union-attr]
    return x, w, y


class LowRank(flax.struct.PyTreeNode):
    """w + scale * a b: LoRA (Hu et al. 2021, arXiv 2106.09685). a is (*inputs, R), b is (R, *outputs), in the weight's own dims."""

    base: Any
    a: Any
    b: Any
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    def einsum(self, eq: str, x: Array) -> Array:
        xs, ws, ys = letters(eq)
        inputs = "".join(c for c in ws if c in xs and c not in ys)
        outputs = "".join(c for c in ws if c not in inputs)
        low = "".join(c for c in xs if c not in inputs) + "R"
        down = einsum(f"{xs},{inputs}R->{low}", x, self.a)
        return einsum(eq, x, self.base) + self.scale * einsum(f"{low},R{outputs}->{ys}", down, self.b)

    def grouped(self, x: Array, sizes: Array, impl: Impl, chip: str | None) -> Array:
        low = grouped(grouped(x, self.a, sizes, impl, chip), self.b, sizes, impl, chip)
        return grouped(x, self.base, sizes, impl, chip) + self.scale * low

    def array(self) -> Array:
        base = as_array(self.base)
        dims, batch = "abcdefgh"[: base.ndim], self.a.ndim + self.b.ndim - 2 - base.ndim  # a layers dim is in both factors
        loose, inputs, outputs = dims[:batch], dims[batch : self.a.ndim - 1], dims[self.a.ndim - 1 :]
        update = jnp.einsum(f"{loose}{inputs}R,{loose}R{outputs}->{dims}", self.a, self.b)
        return (base + self.scale * update).astype(base.dtype)


class PerGroup(flax.struct.PyTreeNode):
    """One matrix a group, (E, inputs, outputs), standing for a single one: the rows of x, in order, are shared out by `sizes`. So a layer
    written for one matrix computes a mixture of experts."""

    w: Any
    sizes: Array
    impl: Impl = flax.struct.field(pytree_node=False, default="auto")
    chip: str | None = flax.struct.field(pytree_node=False, default=None)

    def einsum(self, eq: str, x: Array) -> Array:
        xs, ws, ys = letters(eq)
        assert (xs[-1], ys) == (ws[0], xs[:-1] + ws[1:]) and len(ws) == 2, eq
        y = grouped(x.reshape(-1, x.shape[-1]), self.w, self.sizes, self.impl, self.chip)
        return y.reshape(*x.shape[:-1], -1)


class OutFirst(flax.struct.PyTreeNode):
    """The same matrix stored with its output dims first: what XLA:CPU multiplies by fastest at small batch."""

    w: Any
    inputs: int = flax.struct.field(pytree_node=False)  # how many dims of the plain weight come before its outputs

    def array(self) -> Array:
        first = self.w.ndim - self.inputs
        return jnp.moveaxis(self.w, range(first), range(self.inputs, self.w.ndim))

    def einsum(self, eq: str, x: Array) -> Array:
        xs, ws, ys = letters(eq)
        return jnp.einsum(f"{xs},{ws[self.inputs :]}{ws[: self.inputs]}->{ys}", x, self.w.astype(x.dtype))


class Mixed(flax.struct.PyTreeNode):
    """A weight that is multiplied in one dtype (`low`, a constant) and learned in another (`full`, which takes the gradient and is never
    read). Its gradient leaves the product in full's dtype, so that devices add it up in float32 while they gather bfloat16."""

    low: Any
    full: Any

    def array(self) -> Array:
        """The values of low in the dtype of full: an op rounds them back to what they were, and gives full's gradient."""
        return _wide(self.low, self.full)

    def einsum(self, eq: str, x: Array) -> Array:
        return _mixed_einsum(eq, x, self.low, self.full)

    def take(self, ids: Array) -> Array:
        return _mixed_take(self.low, self.full, ids)

    def grouped(self, x: Array, sizes: Array, impl: Impl, chip: str | None) -> Array:
        return grouped(x, self.array(), sizes, impl, chip)


def gathered(w: Array, full: Array | None, axes: tuple[str, ...], dim: int) -> Array:
    """A weight whole along a dim that lies over mesh axes, inside a `shard_map`. Where it is learned in another array (`full`), the bytes
    of w travel and the gradients add up in full's dtype."""
    if full is not None:
        return _gathered_mixed(axes, dim, w, full)
    return jax.lax.all_gather(w, axes, axis=dim, tiled=True) if axes else w


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered_mixed(axes, dim, low, full):
    return gathered(low, None, axes, dim).astype(full.dtype)


def _scattered_mixed(axes, dim, _, g):
    return None, jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True) if axes else g


_gathered_mixed.defvjp(lambda axes, dim, low, full: (_gathered_mixed(axes, dim, low, full), None), _scattered_mixed)


@jax.custom_vjp
def _wide(low, full):
    return low.astype(full.dtype)


_wide.defvjp(lambda low, full: (low.astype(full.dtype), None), lambda _, g: (None, g))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_einsum(eq, x, low, full):
    return jnp.einsum(eq, x, low)


def _mixed_einsum_backward(eq, saved, dy):
    x, low, full = saved
    xs, ws, ys = letters(eq)
    return jnp.einsum(f"{ys},{ws}->{xs}", dy, low), None, jnp.einsum(f"{xs},{ys}->{ws}", x, dy, preferred_element_type=full.dtype)


_mixed_einsum.defvjp(lambda eq, x, low, full: (jnp.einsum(eq, x, low), (x, low, full)), _mixed_einsum_backward)


@jax.custom_vjp
def _mixed_take(low, full, ids):
    return jnp.take(low, ids, axis=0)


def _mixed_take_backward(saved, dy):
    full, ids = saved
    return None, jnp.zeros_like(full).at[ids].add(dy.astype(full.dtype)), None


_mixed_take.defvjp(lambda low, full, ids: (jnp.take(low, ids, axis=0), (full, ids)), _mixed_take_backward)


class Matrix(flax.struct.PyTreeNode):
    """The same weight as (inputs, outputs), multiplied as two dims by two dims forward and backward: XLA:CPU copies an operand of every
    other product, and of the weight's gradient the wider one. `dims` are the plain weight's inputs and outputs."""

    w: Any
    dims: tuple[tuple[int, ...], tuple[int, ...]] = flax.struct.field(pytree_node=False)

    def array(self) -> Array:
        return self.w.reshape(*self.w.shape[:-2], *self.dims[0], *self.dims[1])

    def einsum(self, eq: str, x: Array) -> Array:
        xs, ws, ys = letters(eq)
        inputs, outputs = self.dims
        rows = xs[: len(xs) - len(inputs)]
        if xs != rows + ws[: len(inputs)] or ys != rows + ws[len(inputs) :]:
            return jnp.einsum(eq, x, self.array().astype(x.dtype))
        shape = x.shape[: len(rows)]
        return _matmul(x.reshape(-1, self.w.shape[-2]), self.w.astype(x.dtype)).reshape(*shape, *outputs)


@jax.custom_vjp
def _matmul(x, w):
    return x @ w


def _matmul_backward(saved, dy):
    x, w = saved
    return dy @ w.T, jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)


def prepare(params: Tree, specs: Tree, run: "Execution") -> Tree:
    """The layout that the run multiplies by fastest. Made inside the step, or once before decoding; checkpoints never see it."""
    if run.layout == "plain":
        return params

    def leaf(spec, w):
        if not isinstance(w, jax.Array) or spec.role != "weight" or "->" not in spec.axes or "experts" in spec.names:
            return w
        loose, inputs, outputs = (tuple(w.shape[i] for i in part) for part in spec.matrix)
        return Matrix(w.reshape(*loose, prod(inputs), prod(outputs)), (inputs, outputs))

    return tree_map(leaf, specs, params)


def is_stacked(x: Any) -> bool:
    return isinstance(x, Stacked)


def as_runs(p: Stacked | list[Stacked]) -> list[Stacked]:
    return [p] if is_stacked(p) else list(p)


def repetitions(run: Stacked, without: int = 1) -> int:
    """How many repetitions of the pattern a run holds; `without` parameters nobody can tell."""
    leaves = jax.tree.leaves(run)
    return leaves[0].shape[0] if leaves else without


def unstack(params: Tree) -> Tree:
    """Every `Stacked` as a list of runs of one repetition: what decoding unrolls over, each layer its own arrays."""

    def split(node):
        if not in_runs(node):
            return node
        each = [(run, i) for run in as_runs(node) for i in range(repetitions(run))]
        return [run if repetitions(run) == 1 else jax.tree.map(lambda a: a[i : i + 1], run) for run, i in each]

    in_runs = lambda node: is_stacked(node) or (isinstance(node, list) and all(map(is_stacked, node)))
    return jax.tree.map(split, params, is_leaf=in_runs)


def regroup(runs: list[Stacked]) -> Stacked | list[Stacked]:
    """Join consecutive runs whose leaves agree in type, dtype and shape; nothing is converted. One run comes back bare."""

    def kind(run):
        return jax.tree.structure(run), [(a.shape[1:], a.dtype) for a in jax.tree.leaves(run)]

    groups: list[list[Stacked]] = []
    for run in runs:
        if groups and kind(groups[-1][0]) == kind(run):
            groups[-1].append(run)
        else:
            groups.append([run])
    joined = [group[0] if len(group) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *group) for group in groups]
    return joined[0] if len(joined) == 1 else joined
