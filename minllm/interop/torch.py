"""PyTorch beside JAX: arrays that both see, functions called with gradients, models held against each other. The only file of the library
that imports torch.

    y = as_torch(f)(x)              y.backward() runs f's own backward pass: of a kernel, a layer, a whole model
    cross_check(...)                the table of a port: where, layer by layer, two models first part
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float, Int

from minllm.layer import Context, Layer, Out
from minllm.layers.norm import RMSNorm
from minllm.layers.stack import Stack
from minllm.models.transformer import with_positions
from minllm.spec import Tree
from minllm.weights import as_runs, unstack


def to_jax(t: torch.Tensor) -> Array:
    """The same memory as a JAX array, by DLPack. Copied only where JAX cannot have it: a tensor that is not contiguous, or on a CPU not at
    a multiple of 64 bytes. JAX takes arrays for constant: do not write to the tensor while the array is in use.

    Raises ValueError for 64-bit numbers while jax_enable_x64 is off: they would be rounded.
    """
    if t.dtype in (torch.float64, torch.int64, torch.complex128) and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"a {t.dtype} tensor has no JAX array while jax_enable_x64 is off; convert it, or switch that on")
    return jnp.from_dlpack(t.detach().contiguous())


def to_torch(a: Array) -> torch.Tensor:
    """The same memory as a tensor, by DLPack. Do not write to it: JAX takes the array for constant."""
    return torch.from_dlpack(a)


# --- calling JAX from PyTorch -----------------------------------------------------------------------------------------------------


def as_torch(f: Callable) -> Callable:
    """f, a function of trees of arrays, as a function of trees of tensors that PyTorch can differentiate (once).

    JAX compiles f, forward and backward, once for each set of shapes. Tensors become arrays of the same memory; whatever is no tensor is
    passed to f as it is, and must be hashable. An input that is written to between forward and backward is PyTorch's usual error.
    """

    @partial(jax.jit, static_argnums=0)
    def value(call: _Arguments, arrays: tuple) -> Any:
        return f(*call.filled(arrays))

    @partial(jax.jit, static_argnums=0)
    def value_and_vjp(call: _Arguments, arrays: tuple) -> Any:
        """The result, and the backward pass with all that it needs: a `jax.tree_util.Partial`, which is a pytree."""
        return jax.vjp(lambda *learned: f(*call.filled(call.merged(learned, arrays))), *call.learned(arrays))

    pull = jax.jit(lambda vjp, gradients: vjp(gradients))

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call: _Arguments, shape: list, *tensors: torch.Tensor):  # type: ignore[override]
            arrays = tuple(map(to_jax, tensors))
            call = replace(call, wanted=tuple(n and t.is_floating_point() for n, t in zip(ctx.needs_input_grad[2:], tensors)))
            result, ctx.vjp = value_and_vjp(call, arrays) if any(call.wanted) else (value(call, arrays), None)
            leaves, structure = jax.tree.flatten(result)
            shape.append(structure)
            ctx.wanted, ctx.structure, ctx.leaves = call.wanted, structure, [jax.typeof(a) for a in leaves]
            ctx.save_for_backward(*tensors)  # the vjp has their memory; PyTorch sees here whether somebody wrote to it
            out = tuple(map(to_torch, leaves))
            ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *gradients: torch.Tensor | None):  # type: ignore[override]
            _ = ctx.saved_tensors

            def given(g, a):
                if not jnp.issubdtype(a.dtype, jnp.floating):
                    return np.zeros(a.shape, jax.dtypes.float0)
                return jnp.zeros(a.shape, a.dtype) if g is None else to_jax(g)

            found = iter(pull(ctx.vjp, jax.tree.unflatten(ctx.structure, map(given, gradients, ctx.leaves))))
            return None, None, *(to_torch(next(found)) if wanted else None for wanted in ctx.wanted)

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        others, shape = tuple(_HERE if isinstance(x, torch.Tensor) else x for x in leaves), []
        out = Call.apply(_Arguments(structure, others), shape, *tensors)
        return jax.tree.unflatten(shape[0], out)

    return call


_HERE = "an array"


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a call without their arrays. wanted: which of the arrays get a gradient."""

    structure: Any
    others: tuple
    wanted: tuple[bool, ...] = ()

    def filled(self, arrays: tuple) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(self.structure, [next(given) if x is _HERE else x for x in self.others])

    def learned(self, arrays: tuple) -> tuple:
        return tuple(a for a, wanted in zip(arrays, self.wanted) if wanted)

    def merged(self, learned: tuple, arrays: tuple) -> tuple:
        given = iter(learned)
        return tuple(next(given) if wanted else a for a, wanted in zip(arrays, self.wanted))


# --- comparing models -------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """One row of a cross check: errors relative to the largest value there.

    error: of our whole model. alone: of this layer when it is given what theirs was given; None where there is nothing to give.
    """

    name: str
    error: float
    alone: float | None


@dataclass(frozen=True)
class CrossCheck:
    """What `cross_check` found; it prints as a table. parted: the first place that is wrong by itself. inside: for each sublayer of that
    place, the module of theirs whose result is nearest to ours, and how near."""

    places: tuple[Place, ...]
    bar: float
    parted: Place | None
    inside: tuple[tuple[str, str, float], ...] = ()

    def __str__(self) -> str:
        lines = [f"{'place':<20}{'error':>10}{'alone':>10}"]
        for place in self.places:
            alone = "" if place.alone is None else f"{place.alone:.1e}"
            lines.append(f"{place.name:<20}{place.error:>10.1e}{alone:>10}{'   <- they part here' if place == self.parted else ''}")
        lines += [f"    {ours}: nearest is {theirs}, {error:.1e} apart" for ours, theirs, error in self.inside]
        return "\n".join([*lines, f"{'equal' if self.parted is None else 'not equal'} to {self.bar:.0e}"])


def cross_check(model: Any, params: Tree, theirs: torch.nn.Module, tokens: Int[np.ndarray, "B T"], bar: float = 1e-4) -> CrossCheck:
    """Our decoder and one of Hugging Face's on the same tokens: the stream after the embedding and after each layer, then the logits.

    Each layer runs twice: on our own stream, and alone on theirs, so that a wrong layer is told from those that inherit its error.
    Raises ValueError where theirs has no list of layers, or another number of them.
    """
    ids, steps = jnp.asarray(tokens, jnp.int32), _sublayers(model, params)
    into, out, logits, modules = _watched(theirs, torch.tensor(np.asarray(tokens), dtype=torch.long))
    if len(steps) % len(out):
        raise ValueError(f"theirs has {len(out)} layers, ours {len(steps)} sublayers, which is no multiple: are the configs the same?")
    ctx, width = with_positions(Context(), ids, None), len(steps) // len(out)

    def block(i: int, x: Array) -> Array:
        for j in range(i * width, (i + 1) * width):
            x = steps[j][0].apply(steps[j][1], x, ctx.replace(layer=j)).x
        return x

    def head(x: Array) -> Array:
        return model.logits(params, model.norm.apply(params["norm"], x, ctx).x, ctx)

    x = replace(model, trunk=(), norm=_Same()).hidden(params | {"trunk": (), "norm": {}}, ids, ctx).x
    places = [Place("embedding", _error(x, into[0]), None)]
    for i in range(len(out)):
        x = block(i, x)
        places.append(Place(f"layer {i}", _error(x, out[i]), _error(block(i, jnp.asarray(into[i])), out[i])))
    places.append(Place("logits", _error(head(x), logits), _error(head(jnp.asarray(out[-1])), logits)))

    wrong = [place for place in places if not (place.error if place.alone is None else place.alone) <= bar]
    if not wrong or wrong[0] in (places[0], places[-1]):
        return CrossCheck(tuple(places), bar, wrong[0] if wrong else None)
    i = places.index(wrong[0]) - 1
    inside, x = [], jnp.asarray(into[i])
    for j in range(i * width, (i + 1) * width):
        layer, p = steps[j]
        y = layer.apply(p, x, ctx.replace(layer=j)).x
        # what it adds to the stream, or the new stream itself; of modules inside one another the outermost
        near = [(_error(mine, b), name.count("."), name, before + b) for name, b in modules[i].items() if b.shape == y.shape
                for mine, before in ((y - x, x), (y, 0))]  # fmt: skip
        if near:
            least = min(row[0] for row in near)
            error, _, name, x = min((row for row in near if row[0] <= 1.001 * least), key=lambda row: row[1])  # x: theirs from here on
            inside.append((type(getattr(layer, "inner", layer)).__name__, name, error))
    return CrossCheck(tuple(places), bar, wrong[0], tuple(inside))


class _Same(RMSNorm):
    """In place of the last norm: what goes into the first layer is wanted as it is."""

    def apply(self, p, x: Float[Array, "*dims D"], ctx: Context = Context(), cache=None) -> Out:
        return Out(x)


def _sublayers(model: Any, params: Tree) -> list[tuple[Layer, Tree]]:
    """The layers of a trunk in order, taken out of their stacks, each with its parameters."""
    found = []
    for layer, p in zip(model.trunk, unstack(params)["trunk"]):
        if isinstance(layer, Stack):
            runs = [jax.tree.map(lambda a: a[0], run) for run in as_runs(p)]
            found += [pair for run in runs for pair in zip(layer.pattern, run.pattern)]
        else:
            found.append((layer, p))
    return found


def _watched(theirs: torch.nn.Module, tokens: torch.Tensor) -> tuple[list, list, np.ndarray, list[dict[str, np.ndarray]]]:
    """What goes into each of their layers, what comes out, the logits, and what each module inside a layer gives."""
    lists = [m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(theirs).__name__} has no list of layers (torch.nn.ModuleList); cross_check knows no other models")
    blocks = list(max(lists, key=len))
    into, out, modules = [None] * len(blocks), [None] * len(blocks), [{} for _ in blocks]

    def array(y: Any) -> Any:
        y = y[0] if isinstance(y, tuple) else y
        return y.detach().float().numpy() if isinstance(y, torch.Tensor) else np.zeros(0)

    def whole(module, args, kwargs, y, i):
        into[i], out[i] = array(args[0] if args else kwargs["hidden_states"]), array(y)

    def part(module, args, y, i, name):
        modules[i][name] = array(y)

    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(partial(whole, i=i), with_kwargs=True))
        hooks += [m.register_forward_hook(partial(part, i=i, name=name)) for name, m in block.named_modules() if name]
    try:
        with torch.no_grad():
            return into, out, array(theirs(tokens).logits), modules
    finally:
        for hook in hooks:
            hook.remove()


def _error(a: Any, b: Any) -> float:
    """The largest difference over the largest value; infinite where the shapes differ."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) if a.shape == b.shape else float("inf")
