"""What a layer is.

A `Layer` is a frozen dataclass of hyperparameters with pure methods. It holds no arrays, is hashable, and so is static under
`jit`. Everything else that it needs beside its input comes in a `Context`; everything that it gives comes out as an `Out`.

    B batch             N query heads              D model width           R low rank
    T query length      K key/value heads          F feed-forward width    C chunk
    S key/value length  G query heads per kv head  V vocabulary            P page
    L layers            H head size                E experts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from minllm.config import config
from minllm.sharding import ALL, Rules
from minllm.spec import Tree

Remat = Literal["none", "full", "layer", "dots"]
ContextKind = Literal["gather", "ring", "ulysses"]
Zero = Literal[1, 2, 3]
# What layers name for the backward pass: the residual stream that enters a layer; queries, keys and values as attention takes them; what
# attention gives; the products that a feed-forward layer's activation takes.
Named = Literal["input", "qkv", "attention", "mlp"]


DType = Literal["float32", "bfloat16", "float16"]


@config
class Precision:
    """Who holds which dtype: `params` are stored and updated, `compute` is what matmuls see, `reduce` is what gradients add up in.

    Softmax, norms, losses and optimizer state are float32 whatever stands here.
    """

    params: DType = "float32"
    compute: DType = "float32"
    reduce: DType = "float32"


@config
class Pipeline:
    """How microbatches go through the stages of a pipeline (mesh.stage > 1): `parallel/schedule.py`."""

    schedule: Literal["gpipe", "1f1b", "zero_bubble"] = "1f1b"
    virtual: int = Field(default=1, ge=1, description="chunks of layers a stage holds; more than one is interleaved")
    consecutive: int | None = Field(default=None, ge=1, description="microbatches through a chunk before the next one; null: mesh.stage")


@dataclass(frozen=True)
class Execution:
    """How a model runs. Nothing here changes a value beyond rounding, and a law tests that.

    kernels: which implementation of each op; "auto" takes the best that the platform has.
    remat: what the backward pass recomputes: nothing ("none"), every repetition of a stack's pattern from its input ("full"), every layer
        from its own input ("layer"), all but the results of matmuls with weights ("dots").
    save, offload: what remat "full" and "layer" keep all the same, on the device or in the host's memory (`Named`).
    scan: one `lax.scan` over stacked layers, or unrolled.
    layout: how weights lie for matmuls: as declared, or as matrices (`weights.Matrix`), which a CPU multiplies by faster.
    microbatches: pieces that a batch is split into; gradients add up in `precision.reduce`.
    context: how queries meet keys that other devices hold: `parallel/ring.py`.
    pipeline: the schedule of a mesh with more than one stage.
    zero: what the mesh axes of `embed` shard besides the optimizer's state and the parameters that it updates (Rajbhandari et al. 2019,
        arXiv 1910.02054, section 5): 3, everything: weights are gathered where they are used, forward and backward; 2, gradients, but
        the weights in the compute dtype are gathered once a step and kept (Llama 3's FSDP, section 3.3); 1, not even gradients.
    """

    mesh: Mesh | AbstractMesh | None = None
    rules: Rules = ALL
    kernels: Literal["auto", "reference", "tpu", "gpu"] = "auto"
    remat: Remat = "none"
    save: tuple[Named, ...] = ()
    offload: tuple[Named, ...] = ()
    scan: bool = True
    layout: Literal["plain", "matrix"] = "plain"
    microbatches: int = 1
    context: ContextKind = "gather"
    zero: Zero = 3
    precision: Precision = field(default_factory=Precision)
    pipeline: Pipeline = field(default_factory=Pipeline)

    def __post_init__(self):
        if (self.save or self.offload) and self.remat not in ("full", "layer"):
            raise ValueError(f"save and offload say what remat keeps, and remat is {self.remat!r}; set remat: full or layer")
        if both := set(self.save) & set(self.offload):
            raise ValueError(f"{min(both)!r} cannot be both saved and offloaded; take it off one of the lists")

    @property
    def chip(self) -> str | None:
        """The device kind, known for compile-only meshes too; kernels choose their tiles by it. None: ask the platform."""
        device = self.mesh and self.mesh.abstract_mesh.abstract_device
        return device.device_kind if device else None


@dataclass(frozen=True)
class Pool:
    """What a cache is made of where rows share it: pages of `size` tokens each. length: the most tokens of one row."""

    pages: int
    size: int
    length: int


class Context(flax.struct.PyTreeNode):
    """What a layer needs beside its input. Only its arrays cross into a `shard_map`; the Context never does.

    positions: of each token in its document; negative: no token, never attended to and never written to a cache.
    segments: the document of each token in a packed row; 0 is padding.
    prefix: tokens at positions below it see each other both ways (prefix LM); one number a row, or one a token.
    memory: what attention over another sequence sees; memory_positions: -1 where it is padding, None for no padding.
    shared: parameters that all layers read (T5's table of distances).
    pages: of each row, the pages of the `Pool` that hold its tokens, in order.
    rows: the number of each row in the global batch, so that a microbatch drops what the whole batch would; None: 0 to B-1.
    layer: the global index of the next layer of a stack.
    key: of this layer's randomness, fold_in(key of the model, global layer index); None switches dropout off.
    """

    positions: Int[Array, "B T"] | None = None
    segments: Int[Array, "B T"] | None = None
    prefix: Int[Array, "B T"] | Int[Array, "B 1"] | None = None
    memory: Float[Array, "B S D"] | None = None
    memory_positions: Int[Array, "B S"] | None = None
    shared: Any = None
    pages: Int[Array, "B M"] | None = None
    rows: Int[Array, " B"] | None = None
    layer: int | Int[Array, ""] = 0
    key: Key[Array, ""] | None = None
    run: Execution = flax.struct.field(pytree_node=False, default=Execution())


Losses = dict[str, tuple[Array, Array]]


class Out(NamedTuple):
    """x: the layer's output. cache: what decoding must remember. losses: name -> (sum, weight), added over layers, microbatches and
    shards. stats: stacked by layer (router load, norms)."""

    x: Array
    cache: Any = None
    losses: Losses | None = None
    stats: Any = None


def add_losses(a: Losses | None, b: Losses | None) -> Losses | None:
    if not a or not b:
        return a or b
    return {name: tuple(x + y for x, y in zip(a.get(name, (0.0, 0.0)), b.get(name, (0.0, 0.0)))) for name in {**a, **b}}


@runtime_checkable
class Layer(Protocol):
    """D is the model width, B the batch, S the number of tokens that a cache must be able to hold for each row, or
    the `Pool` that rows share.

    any_order: whether tokens may stand in any order, because the layer knows them by `ctx.positions` and `ctx.segments` alone; False for
    a layer that reads a token's neighbours (a convolution, a recurrence).
    """

    any_order = True

    def params(self, D: int) -> Tree:
        """The Specs of the weights."""
        return {}

    def cache(self, D: int, B: int, S: int | Pool, dtype: Any) -> Tree:
        """The Specs of what decoding must remember; None if nothing. What cannot lie in pages (the state of a recurrence) has rows."""
        return None

    def apply(self, p: Tree, x: Float[Array, "B T D"], ctx: Context, cache: Tree = None) -> Out: ...

    def update(self, p: Tree, stats: Any) -> Tree:
        """The only update of parameters that is not by gradient (a router's bias), run by the step."""
        return p


def layers_in(x: Any) -> Iterator[Layer]:
    """Every layer inside a layer or model, itself included."""
    if isinstance(x, tuple):
        for part in x:
            yield from layers_in(part)
    elif is_dataclass(x) and not isinstance(x, type):
        if hasattr(x, "any_order"):
            yield x
        for f in fields(x):
            yield from layers_in(getattr(x, f.name))


def positions_of(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at each document of a packed row: the distance to the last change of segment."""
    T = segments.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    last = jnp.where(starts, index, 0)
    return index - jax.lax.cummax(last, axis=1)
