"""Adam (Kingma & Ba 2014, arXiv 1412.6980, algorithm 1).

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      p = p - rate * m^ / (sqrt(v^) + eps)

m^ and v^ are m and v over 1 - b^t: both start at zero, and would else be too small at first.
"""

from dataclasses import dataclass

import numpy as np

from minllm.course.numpy.layers import Tree, tree_map


@dataclass(frozen=True)
class Adam:
    """b2 = 0.98 and eps = 1e-9 are those of the first Transformer."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def init(self, params: Tree) -> Tree:
        return {"m": tree_map(np.zeros_like, params), "v": tree_map(np.zeros_like, params), "t": np.zeros(())}

    def update(self, params: Tree, grads: Tree, state: Tree, rate: float) -> tuple[Tree, Tree]:
        """The new parameters and the new state."""
        t = state["t"] + 1
        m = tree_map(lambda m, g: self.b1 * m + (1 - self.b1) * g, state["m"], grads)
        v = tree_map(lambda v, g: self.b2 * v + (1 - self.b2) * g * g, state["v"], grads)

        def step(p, m, v):
            return p - rate * (m / (1 - self.b1**t)) / (np.sqrt(v / (1 - self.b2**t)) + self.eps)

        return tree_map(step, params, m, v), {"m": m, "v": v, "t": t}
