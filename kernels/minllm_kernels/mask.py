"""Who may look at whom.

A `Mask` is a static predicate on the positions of a query and a key, closed under & and |. Documents, padding and prefixes that
differ from row to row are arrays (segment ids, positions) and no part of it. `span` bounds the keys that a block of queries can
see; kernels skip blocks by it, so it may be too wide but never too narrow. `covers` names blocks that need no mask at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

# Farther than any position; sums of two still fit into an int32.
FAR = 2**30


class Mask:
    """allows(q, k): broadcast over integer arrays of positions. span(lo, hi): the least interval of key positions that holds all
    those which queries at positions lo to hi (inclusive) may see; lo > hi when there are none. covers(qlo, qhi, klo, khi): whether each
    of these queries may see each of these keys; it may miss a yes, but never a no. All work traced or plain."""

    def allows(self, q: Any, k: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say what it allows")

    def span(self, lo: Any, hi: Any) -> tuple[Any, Any]:
        return -FAR, FAR

    def covers(self, qlo: Any, qhi: Any, klo: Any, khi: Any) -> Any:
        return (qlo != qlo) | (klo != klo)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


@dataclass(frozen=True)
class Full(Mask):
    """Every key."""

    def allows(self, q, k):
        return (q == q) & (k == k)

    def covers(self, qlo, qhi, klo, khi):
        return (qlo == qlo) & (klo == klo)


@dataclass(frozen=True)
class Causal(Mask):
    """k <= q."""

    def allows(self, q, k):
        return k <= q

    def span(self, lo, hi):
        return -FAR, hi

    def covers(self, qlo, qhi, klo, khi):
        return khi <= qlo


@dataclass(frozen=True)
class Window(Mask):
    """q - left < k < q + right: `left` and `right` count the token itself; None is no limit on that side. Mistral's sliding window
    of w is Window(w, 1)."""

    left: int | None
    right: int | None = 1

    def __post_init__(self):
        if any(n is not None and n < 1 for n in (self.left, self.right)):
            raise ValueError(f"a window counts its own token, so its sides are at least 1; got {self.left} and {self.right}")

    def allows(self, q, k):
        keep = (q == q) & (k == k)
        if self.left is not None:
            keep &= k > q - self.left
        if self.right is not None:
            keep &= k < q + self.right
        return keep

    def span(self, lo, hi):
        return -FAR if self.left is None else lo - self.left + 1, FAR if self.right is None else hi + self.right - 1

    def covers(self, qlo, qhi, klo, khi):
        return self.allows(qhi, klo) & self.allows(qlo, khi)


@dataclass(frozen=True)
class Dilated(Mask):
    """Every step-th key, counted back from the query: (q - k) mod step = 0 (Longformer's dilated window, with & Window;
    the strided head of the Sparse Transformer, Child et al. 2019, arXiv 1904.10509)."""

    step: int

    def __post_init__(self):
        _positive(step=self.step)

    def allows(self, q, k):
        return _modulo(q - k, self.step) == 0

    def covers(self, qlo, qhi, klo, khi):
        return (qlo == qhi) & (klo == khi) & self.allows(qlo, klo)


@dataclass(frozen=True)
class Strided(Mask):
    """The last `columns` positions of each block of `block`, and the query's own block: the fixed pattern of the Sparse
    Transformer (section 4.2); & Causal for a decoder."""

    block: int
    columns: int = 1

    def __post_init__(self):
        _positive(block=self.block)

    def allows(self, q, k):
        return (_modulo(k, self.block) >= self.block - self.columns) | (_floor(q, self.block) == _floor(k, self.block))


@dataclass(frozen=True)
class Chunk(Mask):
    """Only the query's own chunk of the sequence (Llama 4's local layers)."""

    size: int

    def __post_init__(self):
        _positive(size=self.size)

    def allows(self, q, k):
        return _floor(q, self.size) == _floor(k, self.size)

    def span(self, lo, hi):
        return lo // self.size * self.size, hi // self.size * self.size + self.size - 1

    def covers(self, qlo, qhi, klo, khi):
        return self.allows(qlo, klo) & self.allows(qhi, khi) & self.allows(qlo, khi)


@dataclass(frozen=True)
class Global(Mask):
    """The first `tokens` see and are seen by everybody (Longformer, Beltagy et al. 2020, arXiv 2004.05150)."""

    tokens: int

    def allows(self, q, k):
        return (q < self.tokens) | (k < self.tokens)

    def span(self, lo, hi):
        return 0, jnp.where(lo < self.tokens, FAR, self.tokens - 1)

    def covers(self, qlo, qhi, klo, khi):
        return self.allows(qhi, khi)


@dataclass(frozen=True)
class Prefix(Mask):
    """The first `tokens` are seen by everybody: Causal() | Prefix(n) is a prefix LM whose prefix has the same length in every row."""

    tokens: int

    def allows(self, q, k):
        return (q == q) & (k < self.tokens)

    def span(self, lo, hi):
        return -FAR, self.tokens - 1

    def covers(self, qlo, qhi, klo, khi):
        return self.allows(qlo, khi)


@dataclass(frozen=True)
class And(Mask):
    a: Mask
    b: Mask

    def allows(self, q, k):
        return self.a.allows(q, k) & self.b.allows(q, k)

    def span(self, lo, hi):
        (al, ah), (bl, bh) = self.a.span(lo, hi), self.b.span(lo, hi)
        if all(isinstance(edge, int) for edge in (al, ah, bl, bh)):
            return max(al, bl), min(ah, bh)
        return jnp.maximum(al, bl), jnp.minimum(ah, bh)

    def covers(self, *box):
        return self.a.covers(*box) & self.b.covers(*box)


@dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    def allows(self, q, k):
        return self.a.allows(q, k) | self.b.allows(q, k)

    def span(self, lo, hi):
        (al, ah), (bl, bh) = self.a.span(lo, hi), self.b.span(lo, hi)
        # an empty span must not widen the other
        al, ah = jnp.where(al > ah, FAR, al), jnp.where(al > ah, -FAR, ah)
        bl, bh = jnp.where(bl > bh, FAR, bl), jnp.where(bl > bh, -FAR, bh)
        return jnp.minimum(al, bl), jnp.maximum(ah, bh)

    def covers(self, *box):
        return self.a.covers(*box) | self.b.covers(*box)


def _floor(x: Any, n: int) -> Any:
    """x // n. Of JAX arrays by an operation that kernels have."""
    return lax.div(jnp.where(x < 0, x - (n - 1), x), jnp.full_like(x, n)) if isinstance(x, Array) else x // n


def _modulo(x: Any, n: int) -> Any:
    return x - _floor(x, n) * n


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"a mask's {name} is at least 1; got {size}")
