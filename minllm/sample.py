"""Continue a batch of prompts: one prefill, then one token a step inside one compiled loop.

Each row draws with its own seed, so that a prompt gives the same text in any batch; a filter is a pure function of logits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minllm import spec
from minllm.config import config
from minllm.layer import Context, Execution
from minllm.weights import unstack


@config
class Sampler:
    """How the next token is drawn: temperature 0 takes the likeliest; the filters apply in the order of the fields.

    top_k: only the k likeliest. top_p: the least set of the likeliest whose probability reaches p (Holtzman et al. 2019,
    arXiv 1904.09751). min_p: only those at least p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for no limit")
        for name in ("top_p", "min_p"):
            if (p := getattr(self, name)) is not None and not 0 < p <= 1:
                raise ValueError(f"{name} is {p}; it must lie in (0, 1], or be None for no limit")

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits over the temperature, -inf for tokens that may not be drawn. At least one token stays."""
        logits = logits.astype(jnp.float32) / (self.temperature or 1.0)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            p = jax.nn.softmax(ranked, -1)
            before = jnp.cumsum(p, -1) - p  # the mass of all likelier tokens
            least = jnp.min(jnp.where(before < self.top_p, ranked, jnp.inf), -1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.min_p is not None:
            logits = jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(self.min_p), -jnp.inf, logits)
        return logits

    def draw(self, logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
        if self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)


def sample(
    model: Any,
    params: spec.Tree,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    sampler: Sampler = Sampler(),
    seeds: Sequence[int] | int = 0,
    stop: Sequence[int] = (),
    run: Execution = Execution(),
    cache_dtype: Any = None,
) -> list[list[int]]:
    """The tokens that follow each prompt: at most `max_tokens`, ending before the first of `stop`.

    seeds: one a prompt, or one for all, from which row i draws with seed + i. Raises ValueError for an empty prompt, a token outside the
    vocabulary or another number of seeds than of prompts.
    """
    _check(model, prompts, max_tokens)
    longest = max(len(p) for p in prompts)
    T = 1 << (longest - 1).bit_length()  # few prompt lengths, few compilations
    tokens, positions = np.zeros((len(prompts), T), np.int32), np.full((len(prompts), T), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], positions[row, : len(prompt)] = prompt, np.arange(len(prompt))
    if isinstance(seeds, int):
        seeds = range(seeds, seeds + len(prompts))
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one a prompt, or one number for all")
    # a mesh cannot share out one token at a time, nor always a few prompts: each device then decodes all rows
    rules = replace(run.rules, seq=None, residual_seq=None)
    if run.mesh is not None and len(prompts) % math.prod(run.mesh.shape[axis] for axis in rules.mesh_axes("batch")):
        rules = replace(rules, batch=None)
    run = replace(run, rules=rules)
    out, lengths = _generate(model, unstack(params), jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(list(seeds)),
                             max_tokens, sampler, tuple(stop), run, cache_dtype)  # fmt: skip
    return [row[:n].tolist() for row, n in zip(np.asarray(out), np.asarray(lengths))]


def stream(
    model: Any,
    params: spec.Tree,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    sampler: Sampler = Sampler(),
    seed: int = 0,
    stop: Sequence[int] = (),
    run: Execution = Execution(),
    cache_dtype: Any = None,
) -> Iterator[int]:
    """The tokens that `sample` gives for one prompt, each as soon as it is drawn; same arguments, same errors.

    The prompt is read in pieces of `CHUNK` tokens and the cache grows by doubling, so that two programs serve every prompt of a length.
    """
    _check(model, [prompt], max_tokens)
    params, key = unstack(params), jax.random.key(seed)
    slots = max(256, 1 << (len(prompt) + max_tokens - 1).bit_length())
    dtype = cache_dtype or jax.tree.leaves(params)[0].dtype
    cache, logits = spec.init(model.cache(1, slots, dtype), jax.random.key(0)), None
    for start in range(0, len(prompt), CHUNK):
        piece = prompt[start : start + CHUNK]
        tokens, positions = np.zeros((1, CHUNK), np.int32), np.full((1, CHUNK), -1, np.int32)
        tokens[0, : len(piece)], positions[0, : len(piece)] = piece, np.arange(start, start + len(piece))
        logits, cache = _read(model, params, tokens, positions, cache, run)
    for i in range(max_tokens):
        token = int(_draw(sampler, logits, key, i)[0])
        if token in stop:
            return
        yield token
        if i + 1 < max_tokens:
            logits, cache = _read(model, params, np.array([[token]], np.int32), np.array([[len(prompt) + i]], np.int32), cache, run)


CHUNK = 64  # tokens of a prompt that `stream` reads at once


@partial(jax.jit, static_argnames=("model", "run"), donate_argnames="cache")
def _read(model, params, tokens, positions, cache, run):
    """(logits of the last token, the cache) of one row."""
    out = model.hidden(params, tokens, Context(positions=positions, run=run), cache)
    last = jnp.take_along_axis(out.x, positions.argmax(1)[:, None, None], 1)
    return model.logits(params, last, Context(run=run))[:, 0], out.cache


@partial(jax.jit, static_argnames="sampler")
def _draw(sampler, logits, key, i):
    return sampler.draw(logits, jax.random.fold_in(key, i)[None])


def _check(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token; begin an empty one with the tokenizer's bos or eos token")
    if foreign := [token for p in prompts for token in p if not 0 <= token < model.vocab]:
        raise ValueError(f"prompts hold token {foreign[0]}, the vocabulary has {model.vocab}; was another tokenizer used?")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")


@partial(jax.jit, static_argnames=("model", "max_tokens", "sampler", "stop", "run", "cache_dtype"))
def _generate(model, params, tokens, positions, seeds, max_tokens, sampler, stop, run, cache_dtype):
    B, T = tokens.shape
    dtype = cache_dtype or jax.tree.leaves(params)[0].dtype
    cache = spec.init(model.cache(B, T + max_tokens, dtype), jax.random.key(0))
    keys = jax.vmap(jax.random.key)(seeds)
    length = positions.max(1) + 1

    out = model.hidden(params, tokens, Context(positions=positions, run=run), cache)
    last = jnp.take_along_axis(out.x, (length - 1)[:, None, None], 1)
    logits = model.logits(params, last, Context(run=run))[:, 0]

    def step(state):
        i, logits, cache, drawn, alive = state
        token = sampler.draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        alive &= ~jnp.isin(token, jnp.asarray(stop, jnp.int32))
        drawn = drawn.at[:, i].set(jnp.where(alive, token, -1))
        ctx = Context(positions=jnp.where(alive, length + i, -1)[:, None], run=run)
        out = model.apply(params, token[:, None], ctx, cache)
        return i + 1, out.x[:, 0], out.cache, drawn, alive

    drawn = jnp.full((B, max_tokens), -1, jnp.int32)
    start = (0, logits, out.cache, drawn, jnp.ones(B, bool))
    *_, drawn, _ = jax.lax.while_loop(lambda s: (s[0] < max_tokens) & s[4].any(), step, start)
    return drawn, (drawn >= 0).sum(1)
