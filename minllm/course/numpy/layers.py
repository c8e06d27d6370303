"""The pieces of a Transformer, each with its backward pass.

    y, back = f(p, x)        dx, dp = back(dy)

A function gives its result, and a function that takes dy, the gradient of a loss by that result, to the gradients by input and parameters.
`back` closes over what the forward pass has computed and the derivative needs: this is why training takes more memory than inference.
Parameters are nested dicts and lists of arrays; gradients have the same structure.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Tree = Any  # nested dicts and lists of arrays
Back = Callable[..., Any]


def tree_map(f: Callable, *trees: Tree) -> Tree:
    """f on the arrays in the same place of each tree."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: tree_map(f, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, list):
        return [tree_map(f, *parts) for parts in zip(*trees, strict=True)]
    return f(*trees)


def linear_init(rng: np.random.Generator, D: int, F: int, std: float | None = None) -> Tree:
    return {"w": rng.normal(0, D**-0.5 if std is None else std, (D, F)), "b": np.zeros(F)}


def linear(p: Tree, x: Float[np.ndarray, "*dims D"]) -> tuple[Float[np.ndarray, "*dims F"], Back]:
    """y = x W + b. Of a product, each factor's gradient is dy times the other factor, transposed into shape."""

    def back(dy):
        rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return dy @ p["w"].T, {"w": rows.T @ drows, "b": drows.sum(0)}

    return x @ p["w"] + p["b"], back


def layer_norm_init(D: int) -> Tree:
    return {"scale": np.ones(D), "bias": np.zeros(D)}


def layer_norm(p: Tree, x: Float[np.ndarray, "*dims D"], eps: float = 1e-5) -> tuple[Float[np.ndarray, "*dims D"], Back]:
    """y = n * scale + bias with n = (x - mean) / sqrt(var + eps) (Ba et al. 2016, arXiv 1607.06450).

    n does not change when x is shifted, and hardly when x is stretched: dx is what remains of dn without its mean and its part along n.
    """
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    n = centred / deviation

    def back(dy):
        dn = dy * p["scale"]
        dx = (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / deviation
        dims = tuple(range(x.ndim - 1))
        return dx, {"scale": (dy * n).sum(dims), "bias": dy.sum(dims)}

    return n * p["scale"] + p["bias"], back


def relu(x: Float[np.ndarray, "*dims"]) -> tuple[Float[np.ndarray, "*dims"], Back]:
    return np.maximum(x, 0), lambda dy: dy * (x > 0)


def gelu(x: Float[np.ndarray, "*dims"]) -> tuple[Float[np.ndarray, "*dims"], Back]:
    """0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the form of GPT-2 (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x * x * x))

    def back(dy):
        du = c * (1 + 3 * 0.044715 * x * x)
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du)

    return 0.5 * x * (1 + t), back


def mlp_init(rng: np.random.Generator, D: int, F: int, out_std: float | None = None) -> Tree:
    return {"up": linear_init(rng, D, F), "down": linear_init(rng, F, D, out_std)}


def mlp(p: Tree, x: Float[np.ndarray, "*dims D"], act: Callable) -> tuple[Float[np.ndarray, "*dims D"], Back]:
    """Linear, activation, linear. The backward pass walks the same way back: this is the chain rule."""
    h, up_back = linear(p["up"], x)
    a, act_back = act(h)
    y, down_back = linear(p["down"], a)

    def back(dy):
        da, down = down_back(dy)
        dx, up = up_back(act_back(da))
        return dx, {"up": up, "down": down}

    return y, back


def embedding(table: Float[np.ndarray, "V D"], ids: Int[np.ndarray, "*dims"]) -> tuple[Float[np.ndarray, "*dims D"], Back]:
    """Rows of the table. A row that was taken twice gets both gradients."""

    def back(dx):
        dtable = np.zeros_like(table)
        np.add.at(dtable, ids, dx)
        return dtable

    return table[ids], back


def cross_entropy(
    logits: Float[np.ndarray, "*dims V"],
    targets: Int[np.ndarray, "*dims"],
    smoothing: float = 0.0,
    weight: Float[np.ndarray, "*dims"] | None = None,
) -> tuple[float, Float[np.ndarray, "*dims V"]]:
    """The mean loss in nats, and its gradient by the logits: softmax minus the wanted distribution.

    smoothing: this much of the wanted probability is spread evenly over the vocabulary (Szegedy et al. 2015, arXiv 1512.00567, section 7).
    weight: of each place in the mean; 0 leaves padding out.
    """
    V = logits.shape[-1]
    log_p = logits - logits.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    wanted = np.full(logits.shape, smoothing / V)
    np.put_along_axis(wanted, targets[..., None], 1 - smoothing + smoothing / V, -1)
    share = np.ones(targets.shape) if weight is None else weight
    share = share / share.sum()
    return float(-(share[..., None] * wanted * log_p).sum()), share[..., None] * (np.exp(log_p) - wanted)
