"""Optimizers and schedules: optax chains whose parameter groups are read off the Specs.

A transform here turns gradients into directions of unit learning rate; the step multiplies by the schedule, so that the learning rate
is a function of the step alone and never a hidden counter.
"""

from math import prod
from typing import Any, Literal

import jax.numpy as jnp
import optax
from optax import contrib
from pydantic import Field

from minllm.config import config
from minllm.spec import Spec, Tree, tree_map


def decays(specs: Tree, embeddings: bool) -> Tree:
    """Which leaves weight decay pulls to zero: weights, never gains, biases or buffers, embeddings on request."""
    return tree_map(lambda s: s.role == "weight" or (embeddings and s.role == "embedding"), specs)


@config
class AdamW:
    """Loshchilov & Hutter 2017, arXiv 1711.05101: Adam with decay that is not divided by the second moment. decay = 0 is Adam."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    decay: float = Field(default=0.1, ge=0)
    decay_embeddings: bool = False

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.float32)
        return optax.chain(adam, optax.add_decayed_weights(self.decay, decays(specs, self.decay_embeddings)))


@config
class SGD:
    """Gradient descent with (Nesterov) momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    decay: float = Field(default=0.0, ge=0)

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(self.decay, decays(specs, False))
        return optax.chain(decay, optax.trace(self.momentum, self.nesterov, accumulator_dtype=jnp.float32))


@config
class Adafactor:
    """Shazeer & Stern 2018, arXiv 1804.04235: a factored second moment, O(rows + columns) memory."""

    kind: Literal["adafactor"] = "adafactor"
    lr: float = Field(default=1e-2, gt=0)
    decay_rate: float = Field(default=0.8, gt=0, lt=1)
    clipping: float = Field(default=1.0, gt=0)
    least_dim: int = Field(default=128, ge=1, description="dims smaller than this are not factored")
    decay: float = Field(default=0.0, ge=0)

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.least_dim),
            optax.clip_by_block_rms(self.clipping),
            optax.scale_by_param_block_rms(),
            optax.add_decayed_weights(self.decay, decays(specs, False)),
        )


@config
class Lion:
    """Chen et al. 2023, arXiv 2302.06675: the sign of an interpolated momentum."""

    kind: Literal["lion"] = "lion"
    lr: float = Field(default=1e-4, gt=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.99, ge=0, lt=1)
    decay: float = Field(default=1.0, ge=0)
    decay_embeddings: bool = False

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        lion = optax.scale_by_lion(self.b1, self.b2, mu_dtype=jnp.float32)
        return optax.chain(lion, optax.add_decayed_weights(self.decay, decays(specs, self.decay_embeddings)))


@config
class Muon:
    """Momentum made orthogonal by Newton-Schulz iteration (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982, section 2.2).

    Each matrix that a Spec declares (its inputs and outputs; one for every layer and expert) is one matrix here; embeddings, heads to
    the vocabulary, gains and biases go by AdamW with `adam`. Updates are scaled by sqrt(max(1, outputs / inputs)), or with
    `match_rms` by 0.2 sqrt(max(inputs, outputs)), which gives them Adam's usual size so that one learning rate serves both groups.
    """

    kind: Literal["muon"] = "muon"
    lr: float = Field(default=0.02, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    steps: int = Field(default=5, ge=1)
    match_rms: bool = False
    decay: float = Field(default=0.0, ge=0)
    adam: AdamW = AdamW(lr=3e-3, decay=0.0)

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        def direction(spec: Spec, x: Any) -> Any:
            if isinstance(x, optax.MaskedNode):
                return x
            _, inputs, outputs = spec.matrix
            into, out = (prod(spec.shape[i] for i in dims) for dims in (inputs, outputs))
            # optax's Muon without its momentum, which is bias-corrected and so mixes Nesterov's first steps otherwise than the papers
            muon = contrib.scale_by_muon(
                ns_steps=self.steps, beta=0.0, nesterov=False, weight_dimension_numbers=contrib.MuonDimensionNumbers(inputs, outputs)
            )
            return muon.update(x, muon.init(x))[0] * (0.2 * max(into, out) ** 0.5 if self.match_rms else max(1.0, out / into) ** 0.5)

        matrices = optax.chain(
            optax.trace(self.momentum, self.nesterov, accumulator_dtype=jnp.float32),
            optax.stateless(lambda updates, _: tree_map(direction, specs, updates)),
            optax.add_decayed_weights(self.decay),
        )
        adam = optax.chain(self.adam.transform(specs), optax.scale(self.adam.lr / self.lr))
        is_matrix = lambda s: s.role == "weight" and "->" in s.axes and "vocab" not in s.names
        return optax.partition({"muon": matrices, "adam": adam}, tree_map(lambda s: "muon" if is_matrix(s) else "adam", specs))


Optimizer = AdamW | SGD | Adafactor | Lion | Muon


@config
class Schedule:
    """The learning rate over a run, as a share of the optimizer's `lr`.

    shape: "cosine" (Loshchilov & Hutter 2016, arXiv 1608.03983), "linear", "constant", "inverse_sqrt", or "wsd" (warm-up, stable,
    decay over the last `decay` share of the steps: Hu et al. 2024, arXiv 2404.06395), each after a linear warm-up.
    """

    shape: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    warmup: int = Field(default=100, ge=0, description="steps from 0 to the peak")
    floor: float = Field(default=0.1, ge=0, le=1, description="where the decay ends, as a share of the peak")
    decay: float = Field(default=0.2, gt=0, le=1, description="wsd: the share of all steps in which the rate falls")
    cooldown: Literal["linear", "sqrt"] = Field(default="linear", description="wsd: how the rate falls; sqrt is 1 - sqrt(progress)")

    def __call__(self, step: Any, steps: int) -> Any:
        """The share at `step` (from 0) of a run of `steps`."""
        t = jnp.asarray(step, float)
        up = jnp.minimum((t + 1) / max(self.warmup, 1), 1.0)
        after = jnp.clip((t - self.warmup) / max(steps - self.warmup, 1), 0, 1)
        if self.shape == "cosine":
            down = self.floor + (1 - self.floor) * 0.5 * (1 + jnp.cos(jnp.pi * after))
        elif self.shape == "linear":
            down = 1 - (1 - self.floor) * after
        elif self.shape == "inverse_sqrt":
            down = jnp.sqrt(max(self.warmup, 1) / jnp.maximum(t + 1, max(self.warmup, 1)))
        elif self.shape == "wsd":
            last = self.decay * steps
            gone = jnp.clip((t - (steps - last)) / last, 0, 1)
            down = 1 - (1 - self.floor) * (gone if self.cooldown == "linear" else jnp.sqrt(gone))
        else:
            down = 1.0
        return up * down
