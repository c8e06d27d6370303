"""Layers in depth: a pattern of layers, repeated.

A heterogeneous trunk (5 local : 1 global, 3 linear : 1 full, 3 dense then 58 experts) is a pattern or a tuple of stacks, not a flag.
Training scans over stacked parameters, so that the program does not grow with depth. Decoding is unrolled: each layer has a cache of
its own, because a scan would copy the whole cache at every step.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from minllm import spec
from minllm.layer import Context, Execution, Layer, Out, add_losses
from minllm.weights import Stacked, as_runs, repetitions


@dataclass(frozen=True)
class Stack(Layer):
    """`pattern`, one after the other, `times` times. Layer i * len(pattern) + j of the stack is pattern[j] in its i-th repetition."""

    pattern: tuple[Layer, ...]
    times: int

    def params(self, D):
        return Stacked(tuple(spec.stack(layer.params(D), self.times) for layer in self.pattern))

    def cache(self, D, B, S, dtype):
        return tuple(layer.cache(D, B, S, dtype) for layer in self.pattern * self.times)

    def apply(self, p, x: Float[Array, "B T D"], ctx: Context, cache=None) -> Out:
        losses, stats, caches, done = None, [], [], 0
        for run in as_runs(p):
            times = repetitions(run, self.times)
            index = ctx.layer + (done + jnp.arange(times)) * len(self.pattern)
            # parameters beside their layer index: the key of a layer is the same scanned, unrolled or in a pipeline stage
            body = _remat(self._repetition, ctx.run, ("full", "dots"), ctx.run.scan and cache is None)
            if ctx.run.scan and cache is None and times > 1:
                x, out = jax.lax.scan(lambda x, each: body(x, *each, ctx, None), x, (run, index))
            else:
                outs = []
                for i in range(times):
                    own = cache and cache[(done + i) * len(self.pattern) : (done + i + 1) * len(self.pattern)]
                    x, out = body(x, jax.tree.map(lambda a: a[i], run), index[i], ctx, own)
                    caches.extend(out.pop("cache"))
                    outs.append(out)
                out = jax.tree.map(lambda *a: jnp.stack(a), *outs)
            out.pop("cache", None)
            losses = add_losses(losses, jax.tree.map(lambda a: a.sum(0), out["losses"]))
            stats.append(out["stats"])
            done += times
        stats = jax.tree.map(lambda *a: jnp.concatenate(a), *stats)
        return Out(x, tuple(caches) if cache is not None else None, losses, stats)

    def _repetition(self, x, p: Stacked, index, ctx: Context, cache):
        losses, stats, caches = None, [], []
        for j, layer in enumerate(self.pattern):
            own = ctx.replace(layer=index + j, key=None if ctx.key is None else jax.random.fold_in(ctx.key, index + j))
            apply = _remat(partial(_named, layer), ctx.run, ("layer",), ctx.run.scan and cache is None)
            out = apply(p.pattern[j], x, own, cache and cache[j])
            x, losses = out.x, add_losses(losses, out.losses)
            stats.append(out.stats)
            caches.append(out.cache)
        return x, {"losses": losses, "stats": tuple(stats), "cache": caches}

    def update(self, p, stats):
        runs, done = [], 0
        for run in as_runs(p):
            part = jax.tree.map(lambda a: a[done : done + repetitions(run)], stats)
            new = (jax.vmap(f.update)(q, s) if jax.tree.leaves(s) else q for f, q, s in zip(self.pattern, run.pattern, part))
            runs.append(Stacked(tuple(new)))
            done += repetitions(run)
        return runs if isinstance(p, list) else runs[0]

    def at(self, times: int) -> "Stack":
        """The same pattern with another depth."""
        return replace(self, times=times)


def _named(layer, p, x, ctx, cache):
    return layer.apply(p, checkpoint_name(x, "input"), ctx, cache)


def _remat(f, run: Execution, kinds: tuple[str, ...], scanned: bool):
    """f, recomputed in the backward pass if that is one of the kinds. Inside a scan nothing can be shared with the forward pass, so the
    barrier against it is saved."""
    if run.remat not in kinds:
        return f
    if run.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    elif run.offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=run.save, names_which_can_be_offloaded=run.offload, offload_src="device", offload_dst="pinned_host"
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*run.save)
    return jax.checkpoint(f, policy=policy, prevent_cse=not scanned)
