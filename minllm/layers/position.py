"""How a model knows where a token is.

    Learned     x + table[pos]                                          Radford et al. 2019 (GPT-2), section 2.3
    Sinusoidal  x + (sin, cos)(pos * 10000^(-2i/D))                     Vaswani et al. 2017, section 3.5
    Rope        the pair (x_i, x_{i+H/2}) of queries and keys turns by the angle pos * theta^(-2i/H), so that q . k depends on the
                distance of their positions only                        Su et al. 2021, arXiv 2104.09864, eq. 34
    Alibi       score - m_n |i - j|                                     Press et al. 2022, arXiv 2108.12409, section 3
    Buckets     score + table[bucket(j - i), n]                         Raffel et al. 2020 (T5), arXiv 1910.10683, section 2.1

The first two are added to the embeddings, the last two to the scores of each head n. A scaling of Rope changes the frequencies, and
sometimes the magnitude, to reach beyond the trained length. Angles are computed in float32 from integer positions.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minllm.spec import Normal, Spec, Tree
from minllm.weights import take

Frequencies = Float[np.ndarray, " half"] | Float[Array, " half"]


@runtime_checkable
class Scaling(Protocol):
    """frequencies: from the unscaled ones (H/2, in float64) and the largest position of the call plus one. magnitude: of cos and sin."""

    def frequencies(self, base: Frequencies, theta: float, length: Int[Array, ""]) -> Frequencies: ...

    def magnitude(self, length: Int[Array, ""]) -> float | Float[Array, ""]: ...


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every position divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def frequencies(self, base, theta, length):
        return base / self.factor

    def magnitude(self, length):
        return 1.0


@dataclass(frozen=True)
class DynamicNTKScaling:
    """theta grows with the length once it passes the trained one: theta ((s L / L0) - (s - 1))^(H / (H - 2))."""

    factor: float
    original: int

    def frequencies(self, base, theta, length):
        H = 2 * len(base)
        stretch = self.factor * jnp.maximum(length, self.original) / self.original - (self.factor - 1)
        return jnp.asarray(base, jnp.float32) * stretch ** (-2 * jnp.arange(len(base)) / (H - 2))

    def magnitude(self, length):
        return 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """The frequency bands of Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, a ramp between."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def frequencies(self, base, theta, length):
        turns = self.original * base / (2 * math.pi)  # full turns within the trained length
        keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return base * (keep + (1 - keep) / self.factor)

    def magnitude(self, length):
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """NTK by parts, with a temperature (Peng et al. 2023, arXiv 2309.00071, section 3.2 and 3.3): dims that turn more than `fast` times
    within the trained length are kept, those that turn less than `slow` times are interpolated, a ramp over the dims between."""

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    temperature: float | None = None  # magnitude of cos and sin; None: 0.1 ln(factor) + 1
    round_dims: bool = True  # the ramp begins and ends at whole dims

    def frequencies(self, base, theta, length):
        H = 2 * len(base)
        dim = [H * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (self.fast, self.slow)]
        first, last = (math.floor(dim[0]), math.ceil(dim[1])) if self.round_dims else dim
        first, last = max(first, 0), min(last, H - 1)
        ramp = np.clip((np.arange(len(base)) - first) / max(last - first, 1e-3), 0, 1)
        return base * (1 - ramp) + base / self.factor * ramp

    def magnitude(self, length):
        return 0.1 * math.log(self.factor) + 1 if self.temperature is None else self.temperature


@dataclass(frozen=True)
class LongRopeScaling:
    """One factor a dim, one set for sequences up to the trained length and one beyond (Ding et al. 2024, arXiv 2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    factor: float
    original: int
    temperature: float | None = None  # None: sqrt(1 + ln(factor) / ln(original))

    def frequencies(self, base, theta, length):
        base = jnp.asarray(base, jnp.float32)
        return jnp.where(length > self.original, base / jnp.asarray(self.long), base / jnp.asarray(self.short))

    def magnitude(self, length):
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original))


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    fraction: the share of the head's dims that turn, from the front (partial rotary; the rest passes through).
    pairs: "halves" turns (x_i, x_{i+H/2}) as Hugging Face stores weights, "neighbours" (x_2i, x_2i+1) as the Meta release does.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None
    fraction: float = 1.0
    pairs: Literal["halves", "neighbours"] = "halves"

    def apply(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        R = int(x.shape[-1] * self.fraction)
        cos, sin = (t[:, :, None, :] for t in self.table(R, positions))
        turn, rest = x[..., :R], x[..., R:]
        a, b = jnp.split(turn, 2, -1) if self.pairs == "halves" else (turn[..., ::2], turn[..., 1::2])
        a, b = a.astype(cos.dtype), b.astype(cos.dtype)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = jnp.concatenate([a, b], -1) if self.pairs == "halves" else jnp.stack([a, b], -1).reshape(turn.shape)
        return jnp.concatenate([turned.astype(x.dtype), rest], -1)

    def table(self, R: int, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """(cos, sin) of the angles of R dims."""
        base = self.theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
        length = positions.max() + 1
        frequencies = self.scaling.frequencies(base, self.theta, length) if self.scaling else base
        angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        magnitude = self.scaling.magnitude(length) if self.scaling else 1.0
        # behind a barrier, or every fusion that reads them, forward and backward, computes them again for every head
        return jax.lax.optimization_barrier((jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude))


@dataclass(frozen=True)
class AxialRope:
    """Rotary positions of a picture's patches, numbered row by row: the first half of the pairs turns by the row, the second by the
    column, with every other frequency each (Pixtral, Agrawal et al. 2024, arXiv 2410.07073, section 2.1).

    width: patches a row.
    """

    width: int
    theta: float = 10_000.0

    def apply(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        H = x.shape[-1]
        if H % 4:
            raise ValueError(f"a head of {H} dims does not divide into pairs for rows and columns; take a multiple of 4")
        w = jnp.asarray(self.theta ** -(np.arange(0, H, 2, dtype=np.float64) / H), jnp.float32)
        row, column = (n[..., None].astype(jnp.float32) for n in (positions // self.width, positions % self.width))
        angle = jnp.concatenate([row * w[::2], column * w[1::2]], -1)[:, :, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = x[..., : H // 2].astype(cos.dtype), x[..., H // 2 :].astype(cos.dtype)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


@dataclass(frozen=True)
class Learned:
    """One vector a position, for positions below `length`; a later one gives NaN."""

    length: int

    def params(self, D: int) -> Tree:
        return {"table": Spec((self.length, D), "_ embed", Normal(0.01), role="embedding")}

    def apply(self, p: Tree, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if x.shape[1] > self.length:
            raise ValueError(f"the model has learned {self.length} positions, the call has {x.shape[1]} tokens; shorten it")
        return x + take(p["table"], jnp.maximum(positions, 0)).astype(x.dtype)


@dataclass(frozen=True)
class Sinusoidal:
    """Nothing is learned. halves: all sines before all cosines, or each sine before its cosine as in the paper."""

    base: float = 10_000.0
    halves: bool = False

    def params(self, D: int) -> Tree:
        return {}

    def apply(self, p: Tree, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        D = x.shape[-1]
        angle = positions[..., None].astype(jnp.float32) * jnp.asarray(self.base ** -(np.arange(0, D, 2) / D), jnp.float32)
        waves = [jnp.sin(angle), jnp.cos(angle)]
        table = jnp.concatenate(waves, -1) if self.halves else jnp.stack(waves, -1).reshape(*positions.shape, D)
        return x + table.astype(x.dtype)


@dataclass(frozen=True)
class Alibi:
    """A penalty that grows with the distance, in each head with another slope. Nothing is learned.

    The slopes of n heads, n a power of two, are 2^(-8/n), 2^(-16/n), ...; another number of heads takes those of the next lower power,
    then every other one of the next higher.
    """

    def slopes(self, heads: int) -> Float[np.ndarray, " N"]:
        low = 1 << (heads.bit_length() - 1)
        of = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
        return np.concatenate([of(low), of(2 * low)[::2]])[:heads]

    def params(self, N: int) -> Tree:
        return {}

    def bias(self, p: Tree, q_pos: Int[Array, "B T"], kv_pos: Int[Array, "B S"], N: int) -> Float[Array, "B N T S"]:
        distance = jnp.abs(q_pos[:, None, :, None] - kv_pos[:, None, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes(N), jnp.float32)[:, None, None] * distance


@dataclass(frozen=True)
class Buckets:
    """One learned number a head for each bucket of distances: half of the buckets hold one distance each, the others ever more, and the
    last all from `longest` on. both: keys after the query have buckets of their own, half of all; else they share the nearest one.
    shared: the table is the context's, one for all layers."""

    buckets: int = 32
    longest: int = 128
    both: bool = False
    shared: bool = False

    def ids(self, distance: Int[Array, "*dims"]) -> Int[Array, "*dims"]:
        """The bucket of j - i."""
        n = self.buckets // 2 if self.both else self.buckets
        exact = n // 2
        far = np.arange(self.longest + 1, dtype=np.float64)
        log = np.log(np.maximum(far, 1) / exact) / np.log(self.longest / exact) * (n - exact)
        table = np.where(far < exact, far, np.minimum(exact + np.floor(log + 1e-9), n - 1)).astype(np.int32)
        back = jnp.asarray(table)[jnp.minimum(jnp.abs(distance) if self.both else jnp.maximum(-distance, 0), self.longest)]
        return back + jnp.where(distance > 0, n, 0) if self.both else back

    def params(self, N: int) -> Tree:
        return {} if self.shared else {"table": Spec((self.buckets, N), "_ heads", Normal(0.1), role="embedding")}

    def bias(self, p: Tree, q_pos: Int[Array, "B T"], kv_pos: Int[Array, "B S"], N: int) -> Float[Array, "B N T S"]:
        distance = kv_pos[:, None, :] - q_pos[:, :, None]
        return jnp.moveaxis(take(p["table"], self.ids(distance)).astype(jnp.float32), -1, 1)
