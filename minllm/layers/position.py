"""Rotary positions, and what was done to reach beyond the trained length.

    RoPE (Su et al. 2021, arXiv 2104.09864, eq. 34): the pair (x_i, x_{i+H/2}) turns by the angle pos * theta^(-2i/H),
    so that q . k depends on the distance of their positions only.

A scaling changes the frequencies, and sometimes the magnitude. Angles are computed in float32 from integer positions.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
