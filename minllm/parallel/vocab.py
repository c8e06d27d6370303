"""A vocabulary that is spread over devices: its embedding and its cross-entropy.

A table [V, D] lies in pieces [V / t, D / f]: V over the axes of `vocab` (tensor), D over those of `embed` (fsdp).

Embedding: a device looks up the rows of all devices that share its columns, and they exchange what they found: with n tokens a device it
receives n D numbers, where gathering the table would cost V D. Tokens of another piece of the vocabulary give zeros, and a reduce-scatter
over tensor adds the pieces up (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Cross-entropy: each device has the logits of its piece of the vocabulary, for all tokens of its tensor group:

    lse = log sum_i exp(lse_i)        loss = lse - sum_i (logit of the target, on the one device that has it)

so that two numbers a token travel in place of V / t. Over fsdp the head is gathered like every weight, and its gradient, a reduce-scatter,
adds up in the dtype that it is learned in.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minllm.layer import Execution
from minllm.sharding import local, shards_of
from minllm.weights import Mixed, as_array, take
from minllm_kernels import cross_entropy as part_of_cross_entropy


def embed(table: Any, ids: Int[Array, "B T"], run: Execution) -> Float[Array, "B T D"]:
    """The rows of a table [V, D] with axes "vocab embed" for global token numbers. An id outside the table gives zeros or its last row."""
    if not isinstance(table, jax.Array | Mixed):
        return take(table, ids)
    columns, pieces, rows = (shards_of(word, run) for word in ("embed", "vocab", "batch"))
    exchange = bool(columns) and set(columns) <= set(rows)
    spread = _more_than_seq(run) == pieces

    def look_up(low, full, ids):
        table = low if full is None else Mixed(low, full)
        if exchange:
            ids = lax.all_gather(ids, columns, axis=0, tiled=True)
        if pieces:
            at = ids - lax.axis_index(pieces) * low.shape[0]
            here = (at >= 0) & (at < low.shape[0])
            x = jnp.where(here[..., None], take(table, jnp.clip(at, 0, low.shape[0] - 1)), 0)
            x = lax.psum_scatter(x, pieces, scatter_dimension=1, tiled=True) if spread else lax.psum(x, pieces)
        else:
            x = take(table, ids)
        if exchange:
            return lax.all_to_all(x, columns, split_axis=0, concat_axis=2, tiled=True)
        return lax.all_gather(x, columns, axis=2, tiled=True) if columns else x

    low, full = (table.low, table.full) if isinstance(table, Mixed) else (table, None)
    out = "batch residual_seq _" if spread else "batch seq _"
    return local(look_up, ("vocab embed", "vocab embed", "batch seq"), out, run)(low, full, ids)


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Any,
    targets: Int[Array, "B T"],
    *,
    softcap: float | None = None,
    smoothing: float = 0.0,
    run: Execution,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(loss, log-sum-exp) of `minllm_kernels.cross_entropy` for a weight [D, V] with axes "embed vocab"."""
    columns, pieces, extra = shards_of("embed", run), shards_of("vocab", run), _more_than_seq(run)
    spread = extra == pieces
    low, full = (head.low, head.full) if isinstance(head, Mixed) else (as_array(head), None)
    V = low.shape[1]

    def piece(x, low, full, targets):
        w = _gather(columns, low) if full is None else _gather_mixed(columns, low, full)
        x = lax.all_gather(x, extra, axis=1, tiled=True) if spread and extra else x
        first = lax.axis_index(pieces) * w.shape[1] if pieces else 0
        settings = dict(softcap=softcap, smoothing=smoothing, vocab=V, impl=run.kernels, chip=run.chip)
        loss, lse = part_of_cross_entropy(x, w, targets - first, **settings)
        if not pieces:
            return loss, lse
        top = lax.pmax(lax.stop_gradient(lse), pieces)
        whole = top + jnp.log(lax.psum(jnp.exp(lse - top), pieces))
        return whole - lax.psum(lse - loss, pieces), whole

    ins = (f"batch {'residual_seq' if spread else 'seq'} _", "embed vocab", "embed vocab", "batch seq")
    return local(piece, ins, ("batch seq", "batch seq"), run)(x, low, full, targets)


def _more_than_seq(run: Execution) -> tuple[str, ...]:
    """The mesh axes that split the residual stream's tokens beyond those of `seq`."""
    return tuple(axis for axis in shards_of("residual_seq", run) if axis not in shards_of("seq", run))


def _gather(axes: tuple[str, ...], w: Array) -> Array:
    return lax.all_gather(w, axes, axis=0, tiled=True) if axes else w


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_mixed(axes, low, full):
    """What `low` is on all devices, in the dtype of `full`, which takes the gradient: low's bytes travel, and full's add up."""
    return _gather(axes, low).astype(full.dtype)


def _scatter_mixed(axes, _, g):
    return None, lax.psum_scatter(g, axes, scatter_dimension=0, tiled=True) if axes else g


_gather_mixed.defvjp(lambda axes, low, full: (_gather_mixed(axes, low, full), None), _scatter_mixed)
