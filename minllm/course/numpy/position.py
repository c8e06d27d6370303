"""Where a token stands: sinusoids, rotation, and a penalty for distance.

    sinusoidal   PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i + 1) = cos(same)         Vaswani et al. 2017, arXiv 1706.03762, section 3.5
    rotary       the pair i of q and k turns by the angle p theta^(-2i/H)             Su et al. 2021, arXiv 2104.09864, equation 34
    ALiBi        score -= slope_n * distance, slopes a geometric sequence             Press et al. 2021, arXiv 2108.12409, section 3

Attention itself does not know order. The first is added to the input once; the other two change the scores of every layer, by the distance
alone. Run it: python -m minllm.course.numpy.position
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from minllm.course.numpy.layers import Back

Pairs = Literal["halves", "neighbours"]


def sinusoidal(T: int, D: int) -> Float[np.ndarray, "T D"]:
    angle = np.arange(T)[:, None] / 10_000 ** (np.arange(0, D, 2) / D)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(T, D)


def rotary(
    x: Float[np.ndarray, "B N T H"], positions: Int[np.ndarray, " T"], theta: float = 10_000.0, pairs: Pairs = "halves"
) -> tuple[Float[np.ndarray, "B N T H"], Back]:
    """pairs: of the dims i and i + H/2 (Hugging Face) or of 2i and 2i + 1 (the paper, llama.cpp). The gradient turns the other way."""
    H = x.shape[-1]
    angle = positions[:, None] * theta ** -(np.arange(0, H, 2) / H)
    cos, sin = np.cos(angle), np.sin(angle)

    def turned(x, sin):
        a, b = (x[..., : H // 2], x[..., H // 2 :]) if pairs == "halves" else (x[..., ::2], x[..., 1::2])
        a, b = a * cos - b * sin, b * cos + a * sin
        return np.concatenate([a, b], -1) if pairs == "halves" else np.stack([a, b], -1).reshape(x.shape)

    return turned(x, sin), lambda dy: turned(dy, -sin)


def halves_of_neighbours(H: int) -> Int[np.ndarray, " H"]:
    """The order of dims that makes one layout of the other: rotary(x)[..., order] with neighbours is rotary(x[..., order]) with halves.

    A weight is moved between the two worlds by this order of its output rows, head by head.
    """
    return np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])


def alibi_slopes(heads: int) -> Float[np.ndarray, " N"]:
    """2^(-8n/N) for n = 1..N where N is a power of two; else those of the power below, and every other one of the power above."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, between])


def alibi(heads: int, T: int) -> Float[np.ndarray, "N T T"]:
    """The bias of the scores: slope * (j - i). It is used with a causal mask, which hides the keys to the right."""
    return alibi_slopes(heads)[:, None, None] * (np.arange(T) - np.arange(T)[:, None])


def main() -> None:
    T, rng = 9, np.random.default_rng(0)
    show = lambda row: "  ".join(f"{value:7.3f}" for value in row)
    table = sinusoidal(T + 4, 16)
    print("sinusoidal: PE(p) . PE(p + 4) is the same at every p:")
    print("   ", show((table[:T] * table[4:]).sum(-1)))
    q, k = rng.normal(size=(2, 1, 1, 1, 16))
    ask, answer = (np.broadcast_to(v, (1, 1, T + 4, 16)) for v in (q, k))
    (ask, _), (answer, _) = (rotary(v, np.arange(T + 4)) for v in (ask, answer))
    print("rotary: q at p against k at p + 4, the same at every p:")
    print("   ", show((ask[0, 0, :T] * answer[0, 0, 4:]).sum(-1)))
    print("ALiBi with 4 heads: what the last token takes off the score of each token before it:")
    for slope, bias in zip(alibi_slopes(4), alibi(4, T)):
        print(f"    slope {slope:.4f}:", show(bias[-1]))


if __name__ == "__main__":
    main()
