"""How a request's next token is drawn: a chain of functions, logits -> logits, each with one setting a row.

    penalize      seen tokens: l / r where l > 0, else l r (Keskar et al. 2019, arXiv 1909.05858, section 4.1); minus presence once, minus
                  frequency for each time a token has been drawn
    bias, mask    l + b of some tokens; -inf where a bit of the mask is 0
    temperature   l / t
    top-k         the k likeliest                                                    Fan et al. 2018, arXiv 1805.04833
    top-p         the least set of the likeliest whose probability reaches p         Holtzman et al. 2019, arXiv 1904.09751
    min-p         those at least p times as likely as the likeliest                  Nguyen et al. 2024, arXiv 2407.01082
    typical       the least set of those nearest to the entropy that reaches p       Meister et al. 2022, arXiv 2202.00666

The three that keep "the least set that reaches a goal" are one function, `reaching`: it finds the threshold bit by bit, 32 sums over the
vocabulary and no sort. Ties are kept. Each stage runs only when a row asks for it, and leaves the other rows' bits alone, so what a row
gets does not depend on its neighbours. A token is drawn with the key fold_in(key(seed), how many have been drawn): the same request gives
the same text in any batch, after a preemption, and with guesses verified ahead.

What depends on whole sequences (n-grams, bad words, a least length) is found on the host, by `banned`, and comes in with the mask.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from minllm.config import config

TOP = 20            # logprobs of so many of the likeliest tokens can be asked for
ALL = np.uint32(2**32 - 1)
BIASED = 320        # tokens of one request may have a bias; the OpenAI API allows 300


@config
class Sampling:
    """temperature 0 takes the likeliest. None, 1.0 for `repetition_penalty` and 0 switch a setting off.

    repetition_penalty counts the prompt's tokens as well, presence_penalty and frequency_penalty those drawn only. no_repeat_ngram: no run
    of so many tokens occurs twice. bad_words: runs of tokens that never occur in what is drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 100), ("repetition_penalty", 1e-3, 1e3),
                                ("presence_penalty", -100, 100), ("frequency_penalty", -100, 100)):  # fmt: skip
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {value}; it must lie in [{low}, {high}]")
        if 0 < self.temperature < 1e-5:
            raise ValueError(f"temperature is {self.temperature}; below 1e-5 logits overflow: take 0 for the likeliest token")
        for name in ("top_p", "min_p", "typical_p"):
            if (p := getattr(self, name)) is not None and not 0 < p <= 1:
                raise ValueError(f"{name} is {p}; it must lie in (0, 1], or be None for no limit")
        for name in ("top_k", "no_repeat_ngram"):
            if (n := getattr(self, name)) is not None and n < 1:
                raise ValueError(f"{name} is {n}; it must be at least 1, or None for no limit")
        if len(self.logit_bias) > BIASED:
            raise ValueError(f"logit_bias names {len(self.logit_bias)} tokens; at most {BIASED} may have one")
        if wrong := [b for _, b in self.logit_bias if not -1e4 <= b <= 1e4]:
            raise ValueError(f"logit_bias adds {wrong[0]}; it must lie in [-10000, 10000]")
        if () in self.bad_words:
            raise ValueError("a bad word has no tokens; leave it out")


class Knobs(NamedTuple):
    """The settings of R rows as arrays, neutral where a row draws nothing."""

    seed: Int[np.ndarray, " R"]
    index: Int[np.ndarray, " R"]                # how many tokens have been drawn
    temperature: Float[np.ndarray, " R"]
    top_k: Int[np.ndarray, " R"]                # 0: no limit
    top_p: Float[np.ndarray, " R"]              # 0: no limit, and below
    min_p: Float[np.ndarray, " R"]
    typical_p: Float[np.ndarray, " R"]
    repetition: Float[np.ndarray, " R"]
    presence: Float[np.ndarray, " R"]
    frequency: Float[np.ndarray, " R"]
    prompt: Int[np.ndarray, " R"]               # the first tokens of the history that were given, not drawn
    top: Int[np.ndarray, " R"]                  # logprobs of the likeliest are wanted
    bias_ids: Int[np.ndarray, "R J"]            # V: none
    bias: Float[np.ndarray, "R J"]
    mask: UInt32[np.ndarray, "R W"]             # token v is allowed by bit v % 32 of word v // 32

    @classmethod
    def neutral(cls, R: int, V: int) -> "Knobs":
        one = lambda kind, value=0: np.full(R, value, kind)
        return cls(
            one(np.uint32), one(np.int32), one(np.float32), one(np.int32), one(np.float32), one(np.float32), one(np.float32),
            one(np.float32, 1), one(np.float32), one(np.float32), one(np.int32), one(np.int32), np.full((R, BIASED), V, np.int32),
            np.zeros((R, BIASED), np.float32), np.full((R, -(-V // 32)), ALL, np.uint32))  # fmt: skip

    def set(self, r: int, sampling: Sampling, seed: int, index: int, prompt: int, top: int) -> None:
        s = sampling
        self.seed[r], self.index[r], self.prompt[r], self.top[r] = seed % 2**32, index, prompt, top
        self.temperature[r], self.top_k[r], self.top_p[r] = s.temperature, min(s.top_k or 0, 2**31 - 1), s.top_p or 0
        self.min_p[r], self.typical_p[r] = s.min_p or 0, s.typical_p or 0
        self.repetition[r], self.presence[r], self.frequency[r] = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
        for j, (token, add) in enumerate(s.logit_bias):
            self.bias_ids[r, j], self.bias[r, j] = token, add

    def allow(self, r: int, mask: UInt32[np.ndarray, " W"]) -> None:
        self.mask[r] &= mask

    def ban(self, r: int, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.mask[r, token // 32] &= ~np.uint32(1 << token % 32)


class Drawn(NamedTuple):
    """token: of each row; logprob: the logarithm of its probability under the model, before any setting; top: the TOP likeliest; stuck: no
    token is allowed."""

    token: Int[Array, " R"]
    logprob: Float[Array, " R"]
    top: Int[Array, "R TOP"]
    top_logprob: Float[Array, "R TOP"]
    stuck: Bool[Array, " R"]


def draw(logits: Float[Array, "R V"], history: Int[Array, "R L"], k: Knobs) -> Drawn:
    """The next token of each row. history: a row's tokens, -1 after the last; it is read where a penalty asks for it only."""
    logits = logits.astype(jnp.float32)
    plain = jax.nn.log_softmax(logits)
    penalties = k.repetition, k.presence, k.frequency
    x = _where((k.repetition != 1) | (k.presence != 0) | (k.frequency != 0), penalize, logits, history, k.prompt, *penalties)
    x = _where((k.bias_ids < x.shape[1]).any(1), biased, x, k.bias_ids, k.bias)
    x = _where((k.mask != ALL).any(1), masked, x, k.mask)
    stuck = jnp.isneginf(x).all(1)
    greedy = jnp.argmax(x, 1).astype(jnp.int32)
    random = k.temperature > 0
    x = jnp.where(random[:, None], x / jnp.where(random, k.temperature, 1)[:, None], x)
    x = _where(random & (k.top_k > 0), top_k, x, k.top_k)
    x = _where(random & (k.top_p > 0) & (k.top_p < 1), top_p, x, k.top_p)
    x = _where(random & (k.min_p > 0), min_p, x, k.min_p)
    x = _where(random & (k.typical_p > 0) & (k.typical_p < 1), typical, x, k.typical_p)
    token = jax.lax.cond(random.any(), lambda: jnp.where(random, _categorical(x, k.seed, k.index), greedy), lambda: greedy)
    best = lambda: tuple(jax.lax.top_k(plain, min(TOP, plain.shape[1])))
    none = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(best))
    top_logprob, top = jax.lax.cond((k.top > 0).any(), best, none)
    return Drawn(token, jnp.take_along_axis(plain, token[:, None], 1)[:, 0], top.astype(jnp.int32), top_logprob, stuck)


def penalize(
    x: Float[Array, "R V"], history: Int[Array, "R L"], prompt: Int[Array, " R"], repetition: Float[Array, " R"],
    presence: Float[Array, " R"], frequency: Float[Array, " R"],
) -> Float[Array, "R V"]:  # fmt: skip
    V = x.shape[1]
    count = lambda ids: jax.vmap(lambda ids: jnp.zeros(V, jnp.int32).at[ids].add(1, mode="drop"))(ids)
    all_ids = jnp.where(history < 0, V, history)
    drawn = count(jnp.where(jnp.arange(history.shape[1]) < prompt[:, None], V, all_ids))
    x = jnp.where(count(all_ids) > 0, jnp.where(x > 0, x / repetition[:, None], x * repetition[:, None]), x)
    return x - presence[:, None] * (drawn > 0) - frequency[:, None] * drawn


def biased(x: Float[Array, "R V"], ids: Int[Array, "R J"], bias: Float[Array, "R J"]) -> Float[Array, "R V"]:
    return jax.vmap(lambda x, ids, bias: x.at[ids].add(bias, mode="drop"))(x, ids, bias)


def masked(x: Float[Array, "R V"], mask: UInt32[Array, "R W"]) -> Float[Array, "R V"]:
    v = jnp.arange(x.shape[1], dtype=jnp.uint32)
    return jnp.where((mask[:, v // 32] >> (v % 32)) & 1 > 0, x, -jnp.inf)


def top_k(x: Float[Array, "R V"], k: Int[Array, " R"]) -> Float[Array, "R V"]:
    return reaching(x, x, jnp.ones_like(x), k.astype(jnp.float32))


def top_p(x: Float[Array, "R V"], p: Float[Array, " R"]) -> Float[Array, "R V"]:
    return reaching(x, x, jax.nn.softmax(x), p)


def min_p(x: Float[Array, "R V"], p: Float[Array, " R"]) -> Float[Array, "R V"]:
    return jnp.where(x < x.max(1, keepdims=True) + jnp.log(p)[:, None], -jnp.inf, x)


def typical(x: Float[Array, "R V"], p: Float[Array, " R"]) -> Float[Array, "R V"]:
    log = jax.nn.log_softmax(x)
    entropy = -jnp.where(jnp.isneginf(log), 0, jnp.exp(log) * log).sum(1, keepdims=True)
    return reaching(x, -jnp.abs(-log - entropy), jnp.exp(log), p)


def reaching(
    x: Float[Array, "R V"], score: Float[Array, "R V"], weight: Float[Array, "R V"], goal: Float[Array, " R"]
) -> Float[Array, "R V"]:
    """x where the score is among the highest that together weigh at least `goal` (all, if they never do), else -inf."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.uint32)      # -0.0 is 0.0
    order = jnp.where(bits >> 31 > 0, ~bits, bits | np.uint32(2**31))                  # unsigned integers in the order of the scores

    def bit(i, least):
        higher = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.where(order >= higher[:, None], weight, 0).sum(1) >= goal
        return jnp.where(enough, higher, least)

    least = jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(x), jnp.uint32))
    return jnp.where(order >= least[:, None], x, -jnp.inf)


def banned(sampling: Sampling, tokens: Sequence[int], prompt: int) -> list[int]:
    """What must not come next after `tokens`, of which the first `prompt` were given."""
    out = []
    if (n := sampling.no_repeat_ngram) is not None and len(tokens) + 1 >= n:
        row = np.asarray(tokens)
        runs = np.lib.stride_tricks.sliding_window_view(row, n) if len(row) >= n else np.zeros((0, n), int)
        out += runs[(runs[:, : n - 1] == row[len(row) - n + 1 :]).all(1), -1].tolist()
    for word in sampling.bad_words:
        last = len(word) - 1
        if len(tokens) - prompt >= last and tuple(tokens[len(tokens) - last :]) == tuple(word[:last]):
            out.append(word[-1])
    return out


def _where(rows, f, x, *args):
    """f(x, *args) in these rows; not computed when there are none."""
    return jax.lax.cond(rows.any(), lambda: jnp.where(rows[:, None], f(x, *args), x), lambda: x)


def _categorical(x, seed, index):
    key = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed, index)
    return jax.vmap(jax.random.categorical)(key, x).astype(jnp.int32)
