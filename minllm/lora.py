"""Low-rank adaptation: frozen weights with trained factors beside them (Hu et al. 2021, arXiv 2106.09685).

A transform of a Spec tree and of its arrays together: each chosen matrix becomes a `LowRank` leaf. The factor b starts at zero, so
that an adapted model starts as the model that it adapts.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from pydantic import Field

from minllm import spec
from minllm.config import config
from minllm.spec import Constant, Normal, Spec, Tree
from minllm.weights import LowRank


@config
class LoRA:
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0, description="the update is scaled by alpha / rank")
    targets: str = Field(r"/(q|k|v|o|gate|up|down)$", description="a regular expression on the paths of weights")

    def specs(self, specs: Tree) -> Tree:
        """The chosen matrices as LowRank trees of Specs; every other leaf, and every base, frozen (role "buffer")."""
        found = []

        def leaf(path, s: Spec):
            frozen = Spec(s.shape, s.axes, s.init, "buffer", s.dtype)
            if not (re.search(self.targets, "/" + spec.path_name(path)) and s.role == "weight" and "->" in s.axes):
                return frozen
            found.append(path)
            loose, inputs, outputs = s.matrix
            take = lambda dims: (tuple(s.shape[i] for i in dims), " ".join(s.names[i] for i in dims))
            (l, lw), (i, iw), (o, ow) = take(loose), take(inputs), take(outputs)
            down = Spec((*l, *i, self.rank), f"{lw} {iw} -> _", Normal(prod(i) ** -0.5))
            up = Spec((*l, self.rank, *o), f"{lw} _ -> {ow}", Constant(0.0))
            return LowRank(frozen, down, up, self.alpha / self.rank)

        adapted = jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=spec.is_spec)
        if not found:
            paths = [spec.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(specs, is_leaf=spec.is_spec)]
            raise ValueError(f"lora.targets {self.targets!r} matches no weight; paths look like {', '.join(paths[:4])}")
        return adapted

    def wrap(self, specs: Tree, params: Tree, key: Any) -> Tree:
        """Parameters of the adapted model: the given ones as bases, fresh factors."""
        fresh = spec.init(jax.tree.map(lambda x: x.replace(base=None) if _is_low(x) else None, self.specs(specs), is_leaf=_is_any), key)
        return jax.tree.map(
            lambda f, base: base if f is None else f.replace(base=base), fresh, params, is_leaf=lambda x: x is None or _is_low(x)
        )


@dataclass(frozen=True)
class Adapted:
    """A model with low-rank factors beside its weights; everything else is the model's."""

    model: Any
    lora: LoRA

    def params(self) -> Tree:
        return self.lora.specs(self.model.params())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def merge(params: Tree) -> Tree:
    """Every LowRank leaf as the plain weight that it stands for."""

    return jax.tree.map(lambda x: x.array() if _is_low(x) else x, params, is_leaf=_is_low)


def _is_low(x):
    return isinstance(x, LowRank)


def _is_any(x):
    return _is_low(x) or spec.is_spec(x)
