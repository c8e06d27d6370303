"""The engine: requests in, tokens and text out, a step at a time.

Each step the scheduler says which tokens go through the model. They go in tiles of `tile` tokens, each a row of its own with its position
and its request's pages; a step that has fewer pads, one that has more runs the same program again. There is one program, compiled when the
engine is made, so nothing compiles while it serves. And because a token always meets products of the same shape, attention in the same
splits of its keys and a draw keyed by its seed and number, its logits have the same bits alone and in any company: batching, chunked
prefill, preemption, a prefix found in the cache and verified guesses change no token.

What a model remembers is of two kinds, told apart by the axes of its cache's Specs: pages that all rows share, and, for recurrent layers
and attention that pages cannot serve, one row a request. With rows, tile row i is slot i, a prompt is read a token a step, and no prefix is
shared.

Not for threads: one caller at a time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from minllm import spec
from minllm.data.tokenizer import LiveTokenizer
from minllm.layer import Context, Execution, Pool, layers_in
from minllm.layers.attention import Attention
from minllm.layers.moe import MoE
from minllm.layers.position import DynamicNTKScaling, Learned, LongRopeScaling, Rope
from minllm.models.transformer import Decoder
from minllm.serve.pages import Pages
from minllm.serve.sampling import TOP, Drawn, Knobs, Sampling, banned, draw
from minllm.serve.scheduler import Piece, Row, Scheduler
from minllm.serve.text import Text
from minllm.sharding import shardings
from minllm.spec import is_spec
from minllm.weights import prepare, unstack

# stop: an end token, a stop token or a stop string; length: max_tokens; error: the request's own grammar failed, or allowed no token.
Finish = Literal["stop", "length", "cancelled", "error"]


@runtime_checkable
class Matcher(Protocol):
    """What a choice may say next: a grammar's state. An exception that it raises ends its choice with "error", and no other."""

    def mask(self) -> UInt32[np.ndarray, " W"] | None:
        """Token v is allowed by bit v % 32 of word v // 32, W = ceil(V / 32); None: every token is."""

    def accept(self, token: int) -> None:
        """This token was drawn. An end token is told too."""


@dataclass(frozen=True)
class Request:
    """
    prompt: at least one token. n: choices; choice i draws with seed + i. stop: strings that end the text, left out of it unless
    `include_stop`. stop_tokens: beside the engine's own ends, which `ignore_ends` switches off. min_tokens: before so many nothing ends
    it. logprobs: of so many of the likeliest tokens, beside that of the drawn one. matcher: makes the grammar's state of a choice.
    """

    prompt: Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_tokens: tuple[int, ...] = ()
    ignore_ends: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    matcher: Callable[[], Matcher] | None = None


@dataclass(frozen=True)
class Token:
    """logprob: of the model, before the settings of the request. top: (token, logprob) of the likeliest."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What is new of a choice: tokens, the text that they end (which may belong to earlier ones), and how it ended, if it has."""

    request: int
    choice: int
    tokens: tuple[Token, ...] = ()
    text: str = ""
    finish: Finish | None = None
    message: str | None = None
    cached: int = 0             # tokens of the prompt that were found in the cache


@dataclass
class Completion:
    """One choice as a whole."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    message: str | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclass
class _Choice:
    """What a scheduler's row keeps of its request."""

    id: int
    number: int
    request: Request
    stops: frozenset[int]
    text: Text | None
    matcher: Matcher | None = None
    new: list[Token] = field(default_factory=list)
    shown: str = ""
    finish: Finish | None = None
    message: str | None = None


class Engine:
    """
    tokenizer: makes text of tokens; without one there is none, and no stop strings. ends: tokens that end a text; default: its `eos`.
    length: the most tokens of a request, its prompt included. slots: requests that run at once. tile: tokens that go through the model
    together, whatever there is to do; it fixes the bits of every logit. page: tokens a page; pages: how many, by default enough for every
    slot at full length. budget: tokens a step, by default two tiles or a token a slot. guess: `speculative.Lookup`, or anything that takes
    a row's tokens and room for guesses. progress: a bar while the programs are compiled.

    Raises ValueError for a model that cannot be served with the promise that a request gets what it would get alone.
    """

    def __init__(
        self,
        model: Any,
        params: spec.Tree,
        tokenizer: LiveTokenizer | None = None,
        *,
        ends: Sequence[int] | None = None,
        length: int = 2048,
        slots: int = 16,
        tile: int = 16,
        page: int = 16,
        pages: int | None = None,
        budget: int | None = None,
        guess: Callable[[Sequence[int], int], Sequence[int]] | None = None,
        run: Execution = Execution(),
        cache_dtype: Any = None,
        progress: bool = False,
    ):
        _servable(model, length)
        if tile < 2:
            raise ValueError(f"a tile has at least 2 tokens, because products with one row are computed in another order; got {tile}")
        # tokens of a tile are no batch to share out, nor a sequence: each device computes all of them
        run = replace(run, rules=replace(run.rules, batch=None, seq=None, residual_seq=None))
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.ends = frozenset(ends if ends is not None else () if tokenizer is None or tokenizer.eos is None else (tokenizer.eos,))
        most = -(-length // page)
        pool = Pool(slots * most if pages is None else pages, page, length)
        dtype = cache_dtype or jax.tree.leaves(params)[0].dtype
        specs = model.cache(slots, pool, dtype)
        self.rows = any("pages" not in s.names for s in jax.tree.leaves(specs, is_leaf=is_spec))
        if self.rows and guess is not None:
            raise ValueError("guesses cannot be taken back from a recurrent state; serve this model without them")
        self.tile = slots if self.rows else tile
        if self.tile < 2:
            raise ValueError("a model with recurrent layers is served with at least 2 slots: its tile has a row for each")
        table = Pages(pool.pages, page, remember=not self.rows)
        asks = guess and (lambda row, room: [] if row.own.matcher else guess(row.tokens, room))
        if self.rows:
            self.scheduler = Scheduler(table, slots, slots, chunk=1)
        else:
            self.scheduler = Scheduler(table, slots, budget or max(2 * tile, slots), guess=asks)
        self._most, self._slots, self._orders, self._ids = most, slots, 0, 0
        self._choices: dict[int, list[Row]] = {}            # of requests that have not ended
        self._inbox: dict[int, deque[Event]] = {}           # of requests that somebody iterates over
        self._events: list[Event] = []
        self.counts = dict(prompt=0, cached=0, drawn=0, guessed=0, right=0, steps=0, tiles=0)
        params = unstack(prepare(params, model.params(), run))
        make = partial(spec.init, specs, jax.random.key(0))
        where = None if run.mesh is None else shardings(specs, run.mesh, run.rules)
        self._cache = jax.jit(make, out_shardings=where)()
        self._params, self._no_history = params, np.full((self.tile, length), -1, np.int32)
        self._compile(run, where, progress)

    def _compile(self, run: Execution, where: Any, progress: bool) -> None:
        """Every program that serving will need."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        ints, pairs = np.zeros(self.tile, np.int32), np.zeros(self._slots, np.int32)
        knobs = Knobs.neutral(self.tile, self.model.vocab)
        table = np.zeros((self.tile, self._most), np.int32)
        step = jax.jit(partial(_step, self.model, run), donate_argnums=1, out_shardings=None if where is None else (where, None))
        copy = jax.jit(_copy, donate_argnums=0, out_shardings=where)
        programs = {"step": (step, (self._params, self._cache, ints, ints, ints > 0, table, self._no_history, knobs))}
        if not self.rows:
            programs["copy"] = copy, (self._cache, pairs, pairs)
        compiled = {}
        with Progress(SpinnerColumn(), TextColumn("compiling {task.description}"), TimeElapsedColumn(), disable=not progress) as bar:
            for name, (program, args) in programs.items():
                task = bar.add_task(f"{name}: {self.tile} tokens, {self._most} pages a row", total=1)
                compiled[name] = program.lower(*args).compile()
                bar.update(task, completed=1)
        self._step, self._copy = compiled["step"], compiled.get("copy")

    def submit(self, request: Request) -> int:
        """The request's number. Raises ValueError for one that cannot be served, before anything has been done for it."""
        self.check(request)
        prompt = [int(token) for token in request.prompt]
        matchers = [request.matcher() if request.matcher else None for _ in range(request.n)]
        stops = frozenset(request.stop_tokens) | (frozenset() if request.ignore_ends else self.ends)
        rows: list[Row] = []
        for i, matcher in enumerate(matchers):
            text = Text(self.tokenizer, prompt, request.stop, request.include_stop) if self.tokenizer else None
            own = _Choice(self._ids, i, replace(request, seed=request.seed + i), stops, text, matcher)
            leader = rows[0] if rows and not self.rows else None
            rows.append(Row(self._orders + i, list(prompt), len(prompt) + request.max_tokens, own, leader))
        for row in rows:
            self.scheduler.add(row)
        self._choices[self._ids] = list(rows)
        self._orders += len(rows)
        self._ids += 1
        self.counts["prompt"] += len(prompt)
        return self._ids - 1

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that cannot be served."""
        r, V = request, self.model.vocab
        if not len(r.prompt):
            raise ValueError("a prompt has at least one token; begin an empty one with the tokenizer's bos or eos token")
        named = [*r.prompt, *r.stop_tokens, *(t for t, _ in r.sampling.logit_bias), *(t for word in r.sampling.bad_words for t in word)]
        if foreign := [token for token in named if not 0 <= token < V]:
            raise ValueError(f"the request names token {foreign[0]}, the vocabulary has {V}; was another tokenizer used?")
        for name, low, high in (("max_tokens", 1, self.length), ("n", 1, 128), ("min_tokens", 0, r.max_tokens),
                                ("logprobs", 0, TOP), ("seed", 0, 2**63)):  # fmt: skip
            if (value := getattr(r, name)) is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie in [{low}, {high}]")
        if len(r.prompt) + r.max_tokens > self.length:
            raise ValueError(f"the prompt's {len(r.prompt)} tokens and max_tokens={r.max_tokens} make more than the {self.length} tokens "
                             "that a request may have; shorten one of them")  # fmt: skip
        if r.stop and self.tokenizer is None:
            raise ValueError("stop strings need text, and the engine has no tokenizer; use stop_tokens")
        if "" in r.stop:
            raise ValueError("an empty stop string would end every text at once; leave it out")
        self.scheduler.check(len(r.prompt) + r.max_tokens)

    def cancel(self, id: int) -> None:
        """The request is not wanted any more: its pages are free at once. One that has ended is left as it is."""
        for row in self._choices.get(id, ()):
            self.scheduler.remove(row)
            row.own.finish = "cancelled"
            self._tell(row)
        self._choices.pop(id, None)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._choices)

    def step(self) -> list[Event]:
        """One step of the model, and what came of it; nothing if there is nothing to do. Events of a request that `stream` iterates over
        go there."""
        plan = self.scheduler.plan()
        if plan.copies:
            assert len(plan.copies) <= self._slots
            pairs = np.full((2, self._slots), self.scheduler.pages.count, np.int32)      # out of bounds: dropped
            pairs[:, : len(plan.copies)] = list(plan.copies.values()), list(plan.copies)
            self._cache = self._copy(self._cache, *pairs)
        places = [(piece, at) for piece in plan.pieces for at in range(piece.start, piece.stop)]
        drawn: dict[tuple[int, int], tuple[Drawn, int]] = {}
        for start in range(0, len(places), self.tile):
            drawn |= self._forward(places[start : start + self.tile])
        self.counts["steps"] += bool(places)
        for piece in plan.pieces:
            self._take(piece, drawn)
        events, self._events = self._events, []
        return events

    def _forward(self, places: list[tuple[Piece, int]]) -> dict[tuple[int, int], tuple[Drawn, int]]:
        """A tile of tokens through the model. Of each that is the last known of its row, or a guess: (what was drawn, in which row)."""
        R, V = self.tile, self.model.vocab
        tokens, positions, want = np.zeros(R, np.int32), np.full(R, -1, np.int32), np.zeros(R, bool)
        table, history, knobs = np.zeros((R, self._most), np.int32), self._no_history, Knobs.neutral(R, V)
        found = {}
        for i, (piece, at) in enumerate(places):
            row, own = piece.row, piece.row.own
            r = row.slot if self.rows else i
            known = row.tokens if not row.guesses else row.tokens + row.guesses
            tokens[r], positions[r], table[r, : len(row.pages)] = known[at], at, row.pages
            if at < len(row.tokens) - 1:
                continue
            want[r], found[row.order, at] = True, r
            request, s, index = own.request, own.request.sampling, at + 1 - row.prompt
            knobs.set(r, s, request.seed, index, row.prompt, request.logprobs or 0)
            if s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty:
                history = history.copy() if history is self._no_history else history
                history[r, : at + 1] = known[: at + 1]
            if s.no_repeat_ngram or s.bad_words:
                knobs.ban(r, banned(s, known[: at + 1], row.prompt))
            if index < request.min_tokens:
                knobs.ban(r, own.stops)
            if own.matcher and not own.finish:
                try:
                    mask = own.matcher.mask()
                    if mask is not None:
                        knobs.allow(r, mask)
                except Exception as error:                  # the request's own: it must not take others with it
                    own.finish, own.message = "error", f"the grammar failed: {error}"
        args = tokens, positions, want, table, history, knobs
        self._cache, out = self._step(self._params, self._cache, *args)
        self.counts["tiles"] += 1
        if not found:
            return {}
        out = jax.tree.map(np.asarray, out)
        return {place: (out, r) for place, r in found.items()}

    def _take(self, piece: Piece, drawn: dict[tuple[int, int], tuple[Drawn, int]]) -> None:
        """What was drawn after a piece: tokens up to the first that ends the request or that was not guessed."""
        row, own, taken = piece.row, piece.row.own, []
        first = len(row.tokens) - 1
        for at in range(max(piece.start, first), piece.stop):
            if own.finish:
                break
            out, r = drawn[row.order, at]
            if out.stuck[r]:
                own.finish, own.message = "error", "no token is allowed here"
                break
            token = int(out.token[r])
            taken.append(token)
            self._accept(row, token, out, r, index=at - row.prompt + 1)
            if at - first < len(row.guesses) and row.guesses[at - first] != token:
                break
        self.counts["drawn"] += len(taken)
        self.counts["guessed"] += len(row.guesses)
        self.counts["right"] += max(len(taken) - 1, 0)
        self.scheduler.advance(piece, taken)
        if own.finish is None and len(row.tokens) == row.limit:
            own.finish = "length"
        if own.finish:
            if own.text and not own.text.stopped:
                own.shown += own.text.end()
            self.scheduler.remove(row)
            self._choices[own.id].remove(row)
            self.counts["cached"] += row.cached
            if not self._choices[own.id]:
                del self._choices[own.id]
        if taken or own.finish:
            self._tell(row)

    def _accept(self, row: Row, token: int, out: Drawn, r: int, index: int) -> None:
        own = row.own
        request, early = own.request, index < own.request.min_tokens
        top = zip(out.top[r, : request.logprobs or 0].tolist(), out.top_logprob[r].tolist())
        own.new.append(Token(token, float(out.logprob[r]), tuple(top)))
        if own.matcher:
            try:
                own.matcher.accept(token)
            except Exception as error:                      # as above
                own.finish, own.message = "error", f"the grammar failed: {error}"
                return
        if token in own.stops and not early:
            own.finish = "stop"
        elif own.text:
            own.shown += own.text.add(token, watch=not early)
            if own.text.stopped:
                own.finish = "stop"

    def _tell(self, row: Row) -> None:
        own = row.own
        event = Event(own.id, own.number, tuple(own.new), own.shown, own.finish, own.message, row.cached)
        own.new, own.shown = [], ""
        (self._inbox[own.id] if own.id in self._inbox else self._events).append(event)

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request as they come; others are served by the same steps. Leaving the loop early cancels it."""
        id = self.submit(request)
        inbox = self._inbox[id] = deque()
        try:
            while id in self._choices or inbox:
                while inbox:
                    yield inbox.popleft()
                if id in self._choices:
                    self._events.extend(self.step())
        finally:
            self.cancel(id)
            del self._inbox[id]

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """All requests to their end; the choices of each, in order. Nothing else may be under way."""
        assert not self.busy
        ids = {self.submit(request): i for i, request in enumerate(requests)}
        out = [[Completion() for _ in range(request.n)] for request in requests]
        while self.busy:
            for event in self.step():
                one = out[ids[event.request]][event.choice]
                one.tokens.extend(event.tokens)
                one.text += event.text
                one.finish, one.message = event.finish, event.message
        return out

    def stats(self) -> dict[str, int]:
        """Gauges and counters: what runs and waits, pages in use, tokens read, found, drawn, guessed, computed again."""
        s = self.scheduler
        return {"running": len(s.running), "waiting": len(s.waiting), "pages": s.pages.count, "pages_held": s.pages.held(),
                "pages_remembered": len(s.pages.at), "preempted": s.preempted, "recomputed": s.recomputed, **self.counts}  # fmt: skip


def _step(model, run, params, cache, tokens, positions, want, table, history, knobs):
    """(the cache, what was drawn in the rows that want it)."""
    ctx = Context(positions=positions[:, None], pages=table, run=run)
    out = model.hidden(params, tokens[:, None], ctx, cache)
    drawn = lambda: draw(model.logits(params, out.x, ctx)[:, 0], history, knobs)
    none = jax.eval_shape(drawn)
    return out.cache, jax.lax.cond(want.any(), drawn, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), none))


def _copy(cache, sources, targets):
    return jax.tree.map(lambda pool: pool.at[targets].set(pool[jnp.minimum(sources, len(pool) - 1)], mode="drop"), cache)


def _servable(model: Any, length: int) -> None:
    if not isinstance(model, Decoder):
        raise ValueError(f"the engine serves decoders, not {type(model).__name__}")
    if isinstance(model.position, Learned) and length > model.position.length:
        raise ValueError(f"the model has learned {model.position.length} positions; length is {length}: lower it")
    near = np.arange(64)
    for layer in layers_in(model.trunk):
        if isinstance(layer, MoE) and layer.capacity is not None:
            raise ValueError("experts with capacity drop tokens by what else is in the batch; serve the model with capacity=None")
        mask = getattr(layer, "mask", None)
        if mask is not None and np.triu(np.broadcast_to(np.asarray(mask.allows(near[:, None], near)), (64, 64)), 1).any():
            raise ValueError(f"{type(layer).__name__} with {mask} looks ahead, so it cannot draw token after token")
        if isinstance(layer, Attention) and isinstance(layer.position, Rope):
            if isinstance(layer.position.scaling, DynamicNTKScaling | LongRopeScaling):
                raise ValueError(f"{type(layer.position.scaling).__name__} turns all rows by the longest of them, so a request would "
                                 "depend on the others; serve the model with another scaling")  # fmt: skip
