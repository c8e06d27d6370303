"""An array is declared once.

A `Spec` says what an array is: its shape, the logical axis of each dim, how it starts and what role it plays. Everything
else is derived from it: initial values, abstract shapes, shardings, counts, fan-in, decay groups, Muon's matrix view.
Weights and decode caches are declared alike. A tree of Specs is any nesting of dicts, tuples and named tuples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, Protocol, runtime_checkable
from zlib import crc32

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

Role = Literal["weight", "embedding", "gain", "bias", "buffer"]
Tree = Any  # a pytree; `Tree` of Specs, of arrays, of shardings

# A dim with one of these axes numbers independent matrices: it is no part of anybody's fan-in.
INDEPENDENT = ("layers", "experts")


@runtime_checkable
class Init(Protocol):
    """An initialiser is a frozen dataclass: two equal ones compare equal, so a layer that holds one stays hashable."""

    def __call__(self, key: Key[Array, ""], spec: "Spec", dtype: Any) -> Array: ...


@dataclass(frozen=True)
class Constant:
    value: int | float

    def __call__(self, key, spec, dtype):
        return jnp.full(spec.shape, self.value, dtype)


def Zeros() -> Constant:
    return Constant(0.0)


def Ones() -> Constant:
    return Constant(1.0)


@dataclass(frozen=True)
class Normal:
    """Normal with the given standard deviation."""

    std: float = 0.02

    def __call__(self, key, spec, dtype):
        return (self.std * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal cut at two standard deviations, rescaled so that `std` is the standard deviation after the cut."""

    std: float = 0.02

    def __call__(self, key, spec, dtype):
        unit = jax.random.truncated_normal(key, -2.0, 2.0, spec.shape, jnp.float32) / 0.879625662034
        return (self.std * unit).astype(dtype)


@dataclass(frozen=True)
class FanIn:
    """Truncated normal of standard deviation scale / sqrt(fan-in), the fan-in being the product of the dims left of the arrow."""

    scale: float = 1.0

    def __call__(self, key, spec, dtype):
        return TruncatedNormal(self.scale * spec.fan_in**-0.5)(key, spec, dtype)


@dataclass(frozen=True)
class Spec:
    """One array.

    axes: the logical axis of each dim, an arrow from inputs to outputs, "_" for a dim that is never sharded:
        "embed -> heads head", "vocab embed", "layers embed -> mlp".
    role: what decay groups, LoRA and quantization read.
    dtype: None means the caller's dtype.
    """

    shape: tuple[int, ...]
    axes: str
    init: Init = Zeros()
    role: Role = "weight"
    dtype: Any = None

    def __post_init__(self):
        if len(self.names) != len(self.shape):
            raise ValueError(f"Spec axes {self.axes!r} name {len(self.names)} dims, the shape {self.shape} has {len(self.shape)}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The logical axis of each dim."""
        return tuple(word for word in self.axes.split() if word != "->")

    @cached_property
    def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The dims as (independent, inputs, outputs): what fan-in, Muon and LoRA need. Without an arrow there is no matrix."""
        if "->" not in self.axes:
            raise ValueError(f"a Spec with axes {self.axes!r} is no matrix: write an arrow from its inputs to its outputs")
        cut = self.axes.split().index("->")
        loose = tuple(i for i, name in enumerate(self.names) if name in INDEPENDENT)
        inputs = tuple(i for i in range(cut) if i not in loose)
        return loose, inputs, tuple(i for i in range(cut, len(self.shape)) if i not in loose)

    @property
    def fan_in(self) -> int:
        return prod(self.shape[i] for i in self.matrix[1])

    @property
    def size(self) -> int:
        return prod(self.shape)


def is_spec(x: Any) -> bool:
    return isinstance(x, Spec)


def tree_map(f: Callable, specs: Tree, *rest: Tree) -> Tree:
    """Map over the Specs of a tree (and, beside them, the leaves of trees of the same structure)."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def path_name(path) -> str:
    """The name of a leaf, as in checkpoints: 'trunk/0/1/gate'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init(specs: Tree, key: Key[Array, ""], dtype: Any = jnp.float32) -> Tree:
    """Initial arrays. The key of a leaf is fold_in(key, crc32(its path)), and of each layer of a stacked leaf one more fold:
    adding or removing a parameter changes no other, and no initial value depends on depth, mesh or order."""

    def leaf(path, spec: Spec):
        own = jax.random.fold_in(key, crc32(path_name(path).encode()))
        kind = spec.dtype or dtype
        if spec.names[:1] != ("layers",):
            return spec.init(own, spec, kind)
        times, *dims = spec.shape
        one = replace(spec, shape=tuple(dims), axes=spec.axes.removeprefix("layers").strip())
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(times))
        return jax.vmap(lambda k: spec.init(k, one, kind))(keys)

    return jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=is_spec)


def abstract(specs: Tree, dtype: Any = jnp.float32) -> Tree:
    """The shapes and dtypes that `init` gives, without allocating."""
    return tree_map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype), specs)


def stack(specs: Tree, times: int) -> Tree:
    """The same tree with a leading `layers` dim."""
    return tree_map(lambda s: replace(s, shape=(times, *s.shape), axes=f"layers {s.axes}"), specs)


def count(specs: Tree) -> int:
    """The number of parameters (buffers are none)."""
    return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec) if s.role != "buffer")


def part(specs: Tree, tree: Tree) -> tuple[Tree, Tree]:
    """(what is trained, what is not): the tree twice, with None where the leaf is in the other. Buffers are not trained."""
    trained = tree_map(lambda s, x: None if s.role == "buffer" else x, specs, tree)
    return trained, tree_map(lambda s, x: x if s.role == "buffer" else None, specs, tree)


def join(a: Tree, b: Tree) -> Tree:
    """The tree that `part` took apart."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
