"""Cross-entropy of a linear head, without its logits."""

from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from minllm_kernels.dispatch import Branch, Impl, choose
from minllm_kernels.ops.cross_entropy import chunked, reference

FORWARD = {"xla": Branch(chunked.forward, chunked.supports)}
BACKWARD = {"xla": Branch(chunked.backward, chunked.supports)}


def cross_entropy(
    x: Float[Array, "B T D"],
    w: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    softcap: float | None = None,
    smoothing: float = 0.0,
    vocab: int | None = None,
    impl: Impl = "auto",
    chip: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(loss, log-sum-exp) of each token in nats, float32, for the logits x w.

    loss = (1 - smoothing) (lse - logit of the target) + smoothing (lse - mean logit): label smoothing as in Szegedy et al. 2015,
    arXiv 1512.00567, section 7, with the uniform share on all V, or on `vocab` where w is a part of so many columns. The log-sum-exp is
    what a z-loss squares (PaLM, section 5).
    softcap: logits become softcap * tanh(logit / softcap).
    Differentiable in x and w through both results; the logits are computed again in the backward pass, one chunk of tokens at a time.
    Raises ValueError when smoothing lies outside [0, 1). A target outside 0 to V-1 has no logit, which counts as 0: mask it.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"label smoothing is {smoothing}; it must lie in [0, 1)")
    return _cross_entropy(Settings(softcap, smoothing, vocab or w.shape[1], impl, chip), x, w, targets)


class Settings(NamedTuple):
    """What is known when the call is traced."""

    softcap: float | None
    smoothing: float
    vocab: int
    impl: Impl
    chip: str | None

    def choose(self, name, reference, branches, *args):
        static = dict(softcap=self.softcap, smoothing=self.smoothing, vocab=self.vocab)
        return choose(name, self.impl, reference, branches, *args, chip=self.chip, **static)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(settings, x, w, targets):
    return _forward(settings, x, w, targets)[0]


def _forward(settings, x, w, targets):
    loss, lse = settings.choose("cross_entropy", reference.forward, FORWARD, x, w, targets)
    return (loss, lse), (x, w, targets, lse)


def _backward(settings, saved, grads):
    dx, dw = settings.choose("cross_entropy backward", reference.backward, BACKWARD, *saved, *grads)
    return dx, dw, None


_cross_entropy.defvjp(_forward, _backward)
