"""Feature maps: queries and keys to features whose inner products stand in for e^{q k / sqrt(H)}.

    Elu       elu(x) + 1                           Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7
    Relu      max(0, x)                            Kasai et al. 2021, arXiv 2103.13076, without its learned map
    Exp       e^{x H^-1/4}
    Taylor    1 + s + s^2/2 with s = q k / sqrt(H) Based: Arora et al. 2024, arXiv 2402.18668, section 3
    Favor     random features, right on average    Performer: Choromanski et al. 2020, arXiv 2009.14794, lemma 1
    Hedgehog  learned, softmax(W x), softmax(-W x) Zhang et al. 2024, arXiv 2402.04347, section 4.2
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minllm.spec import Spec, Tree
from minllm.weights import einsum


class Feature:
    """phi of every head, for queries and keys alike unless a map says otherwise."""

    def params(self, N: int, H: int) -> Tree:
        return {}

    def size(self, H: int) -> int:
        """The number of features of a head of H dims."""
        return H

    def apply(
        self, p: Tree, q: Float[Array, "B T N H"], k: Float[Array, "B T N H"]
    ) -> tuple[Float[Array, "B T N M"], Float[Array, "B T N M"]]:
        return self.phi(p, q), self.phi(p, k)

    def phi(self, p: Tree, x: Float[Array, "B T N H"]) -> Float[Array, "B T N M"]:
        raise NotImplementedError(f"{type(self).__name__} does not say what its features are: give it a phi")


@dataclass(frozen=True)
class Elu(Feature):
    def phi(self, p, x):
        return jax.nn.elu(x) + 1


@dataclass(frozen=True)
class Relu(Feature):
    def phi(self, p, x):
        return jax.nn.relu(x)


@dataclass(frozen=True)
class Exp(Feature):
    def phi(self, p, x):
        return jnp.exp(x * x.shape[-1] ** -0.25)


@dataclass(frozen=True)
class Taylor(Feature):
    def size(self, H):
        return 1 + H + H * H

    def phi(self, p, x):
        x = x * x.shape[-1] ** -0.25
        squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) * 0.5**0.5
        return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], -1)


@dataclass(frozen=True)
class Orthogonal:
    """Rows that are orthogonal in blocks of H, each as long as a normal vector (Choromanski et al. 2020, section 3): less variance."""

    def __call__(self, key, spec, dtype):
        *heads, M, H = spec.shape
        turn, length = jax.random.split(key)
        blocks = jax.random.normal(turn, (*heads, -(-M // H), H, H), jnp.float32)
        Q, R = jnp.linalg.qr(blocks)
        # the signs of R make Q uniform over all rotations (Mezzadri 2007, arXiv math-ph/0609050); as QR leaves it, it leans to one side
        rows = (Q * jnp.sign(jnp.diagonal(R, axis1=-2, axis2=-1))[..., None, :]).reshape(*heads, -1, H)[..., :M, :]
        return (rows * jnp.linalg.norm(jax.random.normal(length, spec.shape, jnp.float32), axis=-1, keepdims=True)).astype(dtype)


@dataclass(frozen=True)
class Favor(Feature):
    """e^{w x - |x|^2/2} / sqrt(M) for M random directions w, which are not trained."""

    features: int = 64

    def params(self, N, H):
        return {"directions": Spec((N, self.features, H), "heads _ _", Orthogonal(), role="buffer")}

    def size(self, H):
        return self.features

    def phi(self, p, x):
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25
        along = jnp.einsum("btnh,nmh->btnm", h, p["directions"].astype(h.dtype))
        return (jnp.exp(along - (h * h).sum(-1, keepdims=True) / 2) * self.features**-0.5).astype(x.dtype)


@dataclass(frozen=True)
class Identity:
    """The identity matrix of each head."""

    def __call__(self, key, spec, dtype):
        return jnp.broadcast_to(jnp.eye(spec.shape[-1], dtype=dtype), spec.shape)


@dataclass(frozen=True)
class Hedgehog(Feature):
    def params(self, N, H):
        own = Spec((N, H, H), "heads _ -> _", Identity())
        return {"q": own, "k": own}

    def size(self, H):
        return 2 * H

    def apply(self, p, q, k):
        return self.phi(p["q"], q), self.phi(p["k"], k)

    def phi(self, p, x):
        h = einsum("btnh,nhm->btnm", x, p).astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.concatenate([jax.nn.softmax(h, -1), jax.nn.softmax(-h, -1)], -1).astype(x.dtype)
