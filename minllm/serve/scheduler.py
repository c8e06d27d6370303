"""Which tokens of which request go through the model next.

Continuous batching (Orca, Yu et al. 2022, OSDI, section 3): a request joins and leaves between any two steps. A step has room for `budget`
tokens. The next token of every running request goes first, then what prompts still lack, in pieces (Sarathi, Agrawal et al. 2023, arXiv
2308.16369), in the order of arrival; then waiting requests are let in, as long as there is room, a slot and pages.

Where pages run out, of the requests that came later than the one in need the one with the least to compute again is put back: it gives up
its pages and later computes its tokens again, as though they were its prompt. The oldest request is never put back, and a pool holds the
longest request whole, so every request ends. Plain Python: nothing here knows of arrays.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minllm.serve.pages import Node, Pages


@dataclass(eq=False)
class Row:
    """A request, or one of its choices, while it is served.

    order: by arrival. tokens: the prompt and what has been drawn since; limit: their largest number. done: how many of them have gone
    through the model since it was let in. slot: its place among the running. guesses: tokens that may come next, to be verified.
    leader: the choice whose prompt this one shares, until it has been read. own: what the caller keeps with it.
    """

    order: int
    tokens: list[int]
    limit: int
    own: Any = None
    leader: "Row | None" = None
    prompt: int = 0
    done: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)      # of its full pages
    guesses: list[int] = field(default_factory=list)
    cached: int = 0                                     # tokens of the prompt that were found in the tree
    reached: int = 0                                    # the most that `done` has been

    def __post_init__(self):
        self.prompt = len(self.tokens)


@dataclass(frozen=True)
class Piece:
    """Tokens start to stop of a row (guesses count on from its tokens) go through the model."""

    row: Row
    start: int
    stop: int


@dataclass
class Plan:
    """pieces: in the order in which they are to be computed. copies: page -> the page whose content it gets, all at
    once and before anything else."""

    pieces: list[Piece] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)


class Scheduler:
    """
    slots: how many requests run at once. budget: tokens a step. chunk: tokens of one row a step; 1 where a row's tokens must come one after
    the other (recurrent layers). guess: asked for the tokens that may come next in a row, at most so many.
    """

    def __init__(
        self, pages: Pages, slots: int, budget: int, chunk: int | None = None, guess: Callable[[Row, int], Sequence[int]] | None = None
    ):
        if budget < slots:
            raise ValueError(f"a step of {budget} tokens cannot serve {slots} running requests a token each; raise budget or lower slots")
        self.pages, self.budget, self.chunk, self.guess = pages, budget, chunk or budget, guess
        self.free_slots = list(range(slots - 1, -1, -1))
        self.waiting: list[Row] = []                    # both by order
        self.running: list[Row] = []
        self.preempted = 0                              # how often
        self.recomputed = 0                             # tokens that went through the model a second time

    def add(self, row: Row) -> None:
        """Raises ValueError for a row that the pool cannot hold."""
        assert 0 < len(row.tokens) < row.limit
        self.check(row.limit)
        insort(self.waiting, row, key=lambda r: r.order)

    def check(self, tokens: int) -> None:
        """Raises ValueError where the pool cannot hold a row of so many tokens."""
        if (need := -(-tokens // self.pages.size)) > self.pages.count:
            raise ValueError(f"a request of {tokens} tokens needs {need} pages of {self.pages.size}, the pool has {self.pages.count}; "
                             "ask for fewer tokens, or start with more pages")  # fmt: skip

    def remove(self, row: Row) -> None:
        """A row that has ended or is not wanted any more: its pages and its slot are free at once."""
        if row.slot >= 0:
            self.running.remove(row)
            self._release(row)
        else:
            self.waiting.remove(row)

    def plan(self) -> Plan:
        """What the next step computes; empty if there is nothing to do."""
        plan, left, before = Plan(), self.budget, self.preempted
        newest = lambda row: len(row.tokens) - row.done == 1
        spare = left - sum(map(newest, self.running))   # a guess takes nobody's next token its place
        for row in sorted(self.running, key=lambda r: (not newest(r), r.order)):
            if row.slot < 0:
                continue                                # put back for the sake of an earlier one
            row.guesses = []
            if newest(row) and self.guess and (room := min(spare, self.chunk - 1, row.limit - len(row.tokens) - 1)) > 0:
                row.guesses = list(self.guess(row, room))[:room]
                spare -= len(row.guesses)
            stop = min(len(row.tokens) + len(row.guesses), row.done + min(left, self.chunk))
            if stop > row.done and self._room(row, stop, plan):
                plan.pieces.append(Piece(row, row.done, stop))
                left -= stop - row.done
        for row in list(self.waiting):
            if not left or not self.free_slots or self.preempted > before:
                break
            if row.leader is not None and row.leader.slot >= 0 and row.leader.done < row.leader.prompt:
                continue                                # its prompt is being read
            self._begin(row)
            stop = min(len(row.tokens), row.done + min(left, self.chunk))
            if not self._room(row, stop, plan, preempt=False):
                self._release(row)
                break                                   # in order: nobody overtakes a request that waits for pages
            self.waiting.remove(row)
            insort(self.running, row, key=lambda r: r.order)
            plan.pieces.append(Piece(row, row.done, stop))
            left -= stop - row.done
        return plan

    def advance(self, piece: Piece, drawn: Sequence[int]) -> None:
        """The piece has been computed, and these tokens were drawn after it (none inside a prompt). Guesses that agreed with what was
        drawn are done with; the others will be computed again."""
        row = piece.row
        self.recomputed += max(0, min(piece.stop, row.reached) - piece.start)
        row.done = min(piece.stop, len(row.tokens) + max(len(drawn) - 1, 0))
        row.reached = max(row.reached, row.done)
        row.tokens.extend(drawn)
        S = self.pages.size
        while (len(row.path) + 1) * S <= row.done:
            i = len(row.path)
            above = row.path[-1] if row.path else self.pages.root
            row.path.append(self.pages.enter(above, row.tokens[i * S : (i + 1) * S], row.pages[i]))
            row.pages[i] = row.path[-1].page

    def _begin(self, row: Row) -> None:
        """A slot, and the pages that hold the beginning of its tokens already. The last token is always computed: it is drawn after."""
        row.slot, leader, S = self.free_slots.pop(), row.leader, self.pages.size
        row.leader = None
        known = row.tokens[: len(row.tokens) - 1] if self.pages.remember else []
        row.path = self.pages.match(known)
        row.pages, row.done = [n.page for n in row.path], len(row.path) * S
        if leader is not None and leader.slot >= 0 and self.pages.remember and len(row.path) == len(known) // S < len(leader.pages):
            page = leader.pages[len(row.path)]          # partly the prompt's: shared until one of them writes
            if row.done < len(known):
                self.pages.hold(page)
                row.pages.append(page)
                row.done = len(known)
        row.cached = max(row.cached, min(row.done, row.prompt))

    def _room(self, row: Row, stop: int, plan: Plan, preempt: bool = True) -> bool:
        """Pages for the tokens up to `stop` that nobody else reads; False if the row has been put back, or must wait."""
        S = self.pages.size
        for i in range(row.done // S, -(-stop // S)):
            if i < len(row.pages) and not self.pages.shared(row.pages[i]):
                continue
            while (page := self.pages.take()) is None:
                if not preempt or not self._put_back(row, plan):
                    return False
            plan.copies.pop(page, None)                 # meant for one who has been put back since
            if i < len(row.pages):
                plan.copies[page] = row.pages[i]
                self.pages.drop(row.pages[i])
                row.pages[i] = page
            else:
                row.pages.append(page)
        return True

    def _put_back(self, needy: Row, plan: Plan) -> bool:
        """Free some pages; False if they were the needy's own."""
        later = [r for r in self.running if r.order > needy.order]
        victim = min(later, key=lambda r: (r.done, -r.order), default=needy)
        self.preempted += 1
        plan.pieces = [piece for piece in plan.pieces if piece.row is not victim]
        self.running.remove(victim)
        self._release(victim)
        insort(self.waiting, victim, key=lambda r: r.order)
        return victim is not needy

    def _release(self, row: Row) -> None:
        for page in reversed(row.pages):                # the deepest is the first to be given up
            self.pages.drop(page)
        self.free_slots.append(row.slot)
        row.pages, row.path, row.guesses, row.done, row.slot = [], [], [], 0, -1
