"""A minllm model as a Flax NNX module, and back.

    module = Module(model, params)      module(tokens).x: logits; nnx.grad, nnx.Optimizer, nnx.jit and nnx.split take it as any other
    params = module.params()            the tree that minllm.apply, checkpoints and exports take

The module owns its arrays: an NNX optimizer writes to them. Each is a variable under the name of its path: an nnx.Param, or a Buffer, which
no optimizer touches.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from minllm.layer import Context, Out
from minllm.spec import Tree, is_spec, path_name


class Buffer(nnx.Variable):
    """A parameter that is not learned by gradient (a router's bias)."""


class Module(nnx.Module):
    """model: whatever has `params` and `apply`; it is static. The arrays are in `weights`."""

    def __init__(self, model: Any, params: Tree):
        self.model = model
        specs = jax.tree.leaves_with_path(model.params(), is_leaf=is_spec)
        arrays = jax.tree.structure(model.params(), is_leaf=is_spec).flatten_up_to(params)
        kind = lambda spec: Buffer if spec.role == "buffer" else nnx.Param
        self.weights = nnx.Dict({path_name(path): kind(spec)(a) for (path, spec), a in zip(specs, arrays)})

    def __call__(self, tokens: Int[Array, "B T"], ctx: Context = Context(), cache: Tree = None, rngs: nnx.Rngs | None = None) -> Out:
        """The model's apply. Dropout draws from the stream `dropout` of rngs; without them there is none."""
        return self.model.apply(self.params(), tokens, ctx if rngs is None else ctx.replace(key=rngs.dropout()), cache)

    def params(self) -> Tree:
        """The arrays in the model's own structure."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(self.model.params(), is_leaf=is_spec)
        return jax.tree.unflatten(structure, [self.weights[path_name(path)][...] for path, _ in leaves])
