"""Attention, forward and backward.

    A = softmax(q k^T / sqrt(H) + bias)      y = A v

Vaswani et al. 2017, arXiv 1706.03762, equation 1 and section 3.2.2. Run it, and see who looks at whom:
python -m minllm.course.numpy.attention
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from minllm.course.numpy.layers import Back, Tree, linear, linear_init


def causal(T: int) -> Bool[np.ndarray, "T T"]:
    """Who (rows) sees whom (columns): oneself and what came before."""
    return np.tril(np.ones((T, T), bool))


def probabilities(
    q: Float[np.ndarray, "B N T H"], k: Float[np.ndarray, "B N S H"], mask: Bool[np.ndarray, "*#mask"] | None = None,
    bias: Float[np.ndarray, "N T S"] | None = None,
) -> Float[np.ndarray, "B N T S"]:  # fmt: skip
    """How much each query takes of each key; a row adds up to 1. The largest score is taken off first: exp overflows at 710."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    a = np.exp(scores - scores.max(-1, keepdims=True))
    return a / a.sum(-1, keepdims=True)


def attention(
    q: Float[np.ndarray, "B N T H"], k: Float[np.ndarray, "B N S H"], v: Float[np.ndarray, "B N S h"],
    mask: Bool[np.ndarray, "*#mask"] | None = None, bias: Float[np.ndarray, "N T S"] | None = None,
) -> tuple[Float[np.ndarray, "B N T h"], Back]:  # fmt: skip
    """The values that each query looks at, mixed. back(dy) gives dq, dk, dv.

    The softmax's Jacobian is diag(a) - a a^T, so dscores = a * (da - sum(a * da)): only differences between the da of one row count.
    """
    a = probabilities(q, k, mask, bias)
    scale = 1 / math.sqrt(q.shape[-1])

    def back(dy):
        da = dy @ v.swapaxes(-1, -2)
        dscores = a * (da - (a * da).sum(-1, keepdims=True))
        return scale * dscores @ k, scale * dscores.swapaxes(-1, -2) @ q, a.swapaxes(-1, -2) @ dy

    return a @ v, back


def multi_head_init(rng: np.random.Generator, D: int, out_std: float | None = None) -> Tree:
    return {"q": linear_init(rng, D, D), "k": linear_init(rng, D, D), "v": linear_init(rng, D, D), "o": linear_init(rng, D, D, out_std)}


def multi_head(
    p: Tree, x: Float[np.ndarray, "B T D"], memory: Float[np.ndarray, "B S D"], heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None, bias: Float[np.ndarray, "N T S"] | None = None, turn: Callable | None = None,
) -> tuple[Float[np.ndarray, "B T D"], Back]:  # fmt: skip
    """`heads` attentions side by side, each in a part of the width. x asks, memory answers; self-attention when they are the same.

    turn: y, back = turn(q) for rotary positions. back(dy) gives dx, dmemory and the gradients of the parameters.
    """

    def split(y):
        return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)

    def joined(y):
        return y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)

    (q, q_back), (k, k_back), (v, v_back) = linear(p["q"], x), linear(p["k"], memory), linear(p["v"], memory)
    q, k, v = split(q), split(k), split(v)
    (q, q_turn), (k, k_turn) = (turn(q), turn(k)) if turn else ((q, None), (k, None))
    h, attention_back = attention(q, k, v, mask, bias)
    y, o_back = linear(p["o"], joined(h))

    def back(dy):
        dh, o = o_back(dy)
        dq, dk, dv = attention_back(split(dh))
        dq, dk = (q_turn(dq), k_turn(dk)) if turn else (dq, dk)
        dx, q = q_back(joined(dq))
        dmemory, k = k_back(joined(dk))
        dmemory_v, v = v_back(joined(dv))
        return dx, dmemory + dmemory_v, {"q": q, "k": k, "v": v, "o": o}

    return y, back


def main() -> None:
    words = "the cat saw the dog and it ran".split()
    rng = np.random.default_rng(0)
    vectors = {word: rng.normal(size=16) for word in dict.fromkeys(words)}
    x = np.stack([vectors[word] for word in words])[None, None]
    a = probabilities(x, x, causal(len(words)))[0, 0]
    print("softmax(x x^T / sqrt(H)) under a causal mask: a word looks at itself, and at the same word before it\n")
    print(" " * 6 + "".join(f"{word:>6}" for word in words))
    for word, row in zip(words, a):
        print(f"{word:>6}" + "".join(f"{value:6.2f}" if value else "     ." for value in row))


if __name__ == "__main__":
    main()
