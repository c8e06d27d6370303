"""Optimizers and schedules: optax chains whose parameter groups are read off the Specs.

A transform here turns gradients into directions of unit learning rate; the step multiplies by the schedule, so that the learning rate
is a function of the step alone and never a hidden counter.
"""

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
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = False

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.float32)
        return optax.chain(adam, optax.add_decayed_weights(self.decay, decays(specs, self.decay_embeddings)))


@config
class SGD:
    """Gradient descent with (Nesterov) momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    decay: float = Field(0.0, ge=0)

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(self.decay, decays(specs, False))
        return optax.chain(decay, optax.trace(self.momentum, self.nesterov, accumulator_dtype=jnp.float32))


@config
class Adafactor:
    """Shazeer & Stern 2018, arXiv 1804.04235: a factored second moment, O(rows + columns) memory."""

    kind: Literal["adafactor"] = "adafactor"
    lr: float = Field(1e-2, gt=0)
    decay_rate: float = Field(0.8, gt=0, lt=1)
    clipping: float = Field(1.0, gt=0)
    least_dim: int = Field(128, ge=1, description="dims smaller than this are not factored")
    decay: float = Field(0.0, ge=0)

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
    lr: float = Field(1e-4, gt=0)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.99, ge=0, lt=1)
    decay: float = Field(1.0, ge=0)
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
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    steps: int = Field(5, ge=1)
    match_rms: bool = False
    decay: float = Field(0.0, ge=0)
    adam: AdamW = AdamW(lr=3e-3, decay=0.0)

    def transform(self, specs: Tree) -> optax.GradientTransformation:
        def dims(spec: Spec):
            matrix = spec.role == "weight" and "->" in spec.axes and "vocab" not in spec.names
            return contrib.MuonDimensionNumbers(spec.matrix[1], spec.matrix[2]) if matrix else None

        muon = contrib.muon(
            1.0, ns_steps=self.steps, beta=self.momentum, nesterov=self.nesterov, weight_decay=self.decay, mu_dtype=jnp.float32,
            adam_b1=self.adam.b1, adam_b2=self.adam.b2, adam_weight_decay=self.adam.decay, adam_learning_rate=self.adam.lr / self.lr,
            muon_weight_dimension_numbers=tree_map(dims, specs), consistent_rms=0.2 if self.match_rms else None,
        )  # fmt: skip
        return optax.chain(muon, optax.scale(-1.0))  # optax descends by itself; the step does it here


Optimizer = AdamW | SGD | Adafactor | Lion | Muon


@config
class Schedule:
    """The learning rate over a run, as a share of the optimizer's `lr`.

    shape: "cosine" (Loshchilov & Hutter 2016, arXiv 1608.03983), "linear", "constant", "inverse_sqrt", or "wsd" (warm-up, stable,
    decay over the last `decay` share of the steps: Hu et al. 2024, arXiv 2404.06395), each after a linear warm-up.
    """

    shape: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    warmup: int = Field(100, ge=0, description="steps from 0 to the peak")
    floor: float = Field(0.1, ge=0, le=1, description="where the decay ends, as a share of the peak")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: the share of all steps in which the rate falls")
    cooldown: Literal["linear", "sqrt"] = Field("linear", description="wsd: how the rate falls; sqrt is 1 - sqrt(progress)")

    def __call__(self, step: Any, steps: int) -> Any:
        """The share at `step` (from 0) of a run of `steps`."""
        t = jnp.asarray(step, jnp.float32)
        up = jnp.minimum((t + 1) / max(self.warmup, 1), 1.0) if self.warmup else jnp.float32(1.0)
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
