"""Pages and scheduler as a model checker sees them: random operations, and what must hold after each.

The cache is played by a list of what was written where. Every token that goes through the "model" must find, at every earlier position of
its row, exactly its row's own token: this is what copy on write, the prefix tree, preemption and slots could break.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllm.serve.pages import Pages
from minllm.serve.scheduler import Row, Scheduler


class World:
    """A scheduler, a pool that remembers tokens, and a model whose next token is a hash of all before."""

    def __init__(self, pages=24, size=4, slots=4, budget=12, chunk=None, remember=True, guess=None, vocab=5):
        self.pages = Pages(pages, size, remember)
        self.scheduler = Scheduler(self.pages, slots, budget, chunk, guess)
        self.pool = [[None] * size for _ in range(pages)]
        self.rows, self.ended, self.vocab, self.order = [], {}, vocab, 0

    def next(self, tokens):
        return hash(tuple(tokens)) % self.vocab

    def add(self, prompt, new, leader=None):
        row = Row(self.order, list(prompt), len(prompt) + new, leader=leader)
        self.order += 1
        self.scheduler.add(row)
        self.rows.append(row)
        return row

    def cancel(self, row):
        self.scheduler.remove(row)
        self.rows.remove(row)

    def step(self):
        oldest = min(self.scheduler.running, key=lambda r: r.order, default=None)
        S, plan = self.pages.size, self.scheduler.plan()
        assert oldest is None or oldest.slot >= 0, "the oldest is never put back"
        contents = {to: list(self.pool[page]) for to, page in plan.copies.items()}      # all at once
        for to, content in contents.items():
            self.pool[to] = content
        assert sum(p.stop - p.start for p in plan.pieces) <= self.scheduler.budget
        assert len({id(p.row) for p in plan.pieces}) == len(plan.pieces)
        for piece in plan.pieces:
            row = piece.row
            tokens = row.tokens + row.guesses
            assert piece.start == row.done and piece.stop - piece.start <= self.scheduler.chunk
            for at in range(piece.start, piece.stop):
                assert not self.pages.shared(row.pages[at // S]), "a page that others read is written"
                self.pool[row.pages[at // S]][at % S] = tokens[at]
        for piece in plan.pieces:                                                       # written first, then read
            row = piece.row
            tokens = row.tokens + row.guesses
            assert [self.pool[row.pages[at // S]][at % S] for at in range(piece.stop)] == tokens[: piece.stop]
        for piece in plan.pieces:
            row, drawn = piece.row, []
            for at in range(max(piece.start, len(row.tokens) - 1), piece.stop):
                drawn.append(self.next([*row.tokens, *drawn]))
                guess = at + 1 - len(row.tokens)
                if guess >= len(row.guesses) or row.guesses[guess] != drawn[-1] or len(row.tokens) + len(drawn) == row.limit:
                    break
            self.scheduler.advance(piece, drawn)
            if len(row.tokens) == row.limit:
                self.cancel(row)
                self.ended[row.order] = row.tokens
        self.check()
        return plan

    def check(self):
        pages, scheduler = self.pages, self.scheduler
        holders = [0] * pages.count
        for row in scheduler.running:
            for page in row.pages:
                holders[page] += 1
            assert len(row.pages) * pages.size >= row.done and len(row.path) == row.done // pages.size
        for page in pages.at:
            holders[page] += 1
        assert holders == pages.refs, "a page leaked, or is held by nobody who knows"
        assert sorted(pages.free) == [page for page, n in enumerate(holders) if n == 0]
        slots = sorted([r.slot for r in scheduler.running] + scheduler.free_slots)
        assert slots == list(range(len(slots)))
        assert all(r.slot < 0 and not r.pages for r in scheduler.waiting)
        assert sorted(map(id, scheduler.running + scheduler.waiting)) == sorted(map(id, self.rows))
        stack = [pages.root]
        seen = 0
        while stack:
            for name, node in stack.pop().below.items():
                assert pages.at[node.page] is node and self.pool[node.page] == list(name)
                seen += 1
                stack.append(node)
        assert seen == len(pages.at)

    def finish(self):
        for _ in range(5000):
            if not self.rows:
                break
            assert self.step().pieces, "requests wait and nothing is computed"
        assert not self.rows and self.pages.held() == 0
        self.pages.forget()
        assert len(self.pages.free) == self.pages.count


def alone(world, prompt, new):
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(world.next(tokens))
    return tokens


def lookup(row, room):
    """Guesses that are sometimes right."""
    tokens = list(row.tokens)
    for i in range(min(room, 3)):
        tokens.append(hash(tuple(tokens)) % 5 if i < 2 else 0)
    return tokens[len(row.tokens) :]


SETTINGS = dict(
    plain={}, tight=dict(pages=8), guesses=dict(guess=lookup), tight_guesses=dict(pages=8, guess=lookup, budget=7),
    forgetful=dict(remember=False, pages=9), one_by_one=dict(chunk=1, remember=False, pages=9), pages_of_one=dict(size=1, pages=34),
)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_thousand_random_operations_leak_no_page(name):
    """And every request ends with the tokens of a lone run, whatever came before and beside it."""
    rng, world, asked = random.Random(name), World(**SETTINGS[name]), {}
    roots = [[rng.randrange(5) for _ in range(rng.randrange(3, 14))] for _ in range(4)]
    for _ in range(10_000 if name == "tight_guesses" else 1_500):
        what = rng.random()
        if what < 0.25 and len(world.rows) < 12:
            prompt = rng.choice(roots)[: rng.randrange(1, 14)] + [rng.randrange(5) for _ in range(rng.randrange(0, 6))]
            new, leader = rng.randrange(1, 12), None
            for _ in range(rng.choice((1, 1, 1, 3))):
                row = world.add(prompt, new, leader if world.pages.remember else None)
                leader = leader or row
                asked[row.order] = prompt, new
        elif what < 0.3 and world.rows:
            world.cancel(rng.choice(world.rows))
            world.check()
        else:
            world.step()
    world.finish()
    assert len(world.ended) > 100
    assert all(tokens == alone(world, *asked[order]) for order, tokens in world.ended.items())
    if "tight" in name:
        assert world.scheduler.preempted > 10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_settings_any_order(data):
    """Hypothesis looks for the pool, the budget and the order of arrival that break it."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    size, slots = draw(1, 5), draw(1, 5)
    world = World(pages=-(-24 // size) + draw(0, 4), size=size, slots=slots, budget=slots + draw(0, 8), remember=data.draw(st.booleans()),
                  guess=data.draw(st.sampled_from([None, lookup])))  # fmt: skip
    asked = {}
    for _ in range(draw(1, 25)):
        match draw(0, 3):
            case 0:
                prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
                row = world.add(prompt, draw(1, 10))
                asked[row.order] = prompt, row.limit - len(prompt)
            case 1 if world.rows:
                world.cancel(world.rows[draw(0, len(world.rows) - 1)])
            case _:
                world.step()
    world.finish()
    assert all(tokens == alone(world, *asked[order]) for order, tokens in world.ended.items())


def test_a_common_prefix_is_read_once():
    world = World(pages=40, budget=64)
    prompt = list(range(17))
    world.add(prompt, 3)
    world.step()
    second = world.add([*prompt[:13], 9, 9, 9], 3)
    plan = world.step()
    piece = next(p for p in plan.pieces if p.row is second)
    assert (piece.start, second.cached) == (12, 12)     # three whole pages of four
    third = world.add(prompt, 3)
    assert next(p for p in world.step().pieces if p.row is third).start == 16       # the last token is always computed
    world.finish()


def test_choices_share_their_prompt_to_the_last_token():
    world = World(pages=40, budget=64)
    prompt = list(range(10))
    leader = world.add(prompt, 5)
    followers = [world.add(prompt, 5, leader) for _ in range(2)]
    assert [p.row for p in world.step().pieces] == [leader]
    plan = world.step()
    assert [(p.start, p.stop) for p in plan.pieces if p.row in followers] == [(9, 10)] * 2
    assert len(plan.copies) == 2 and set(plan.copies.values()) == {leader.pages[2]}     # copied on the first write
    world.finish()
    assert len({tuple(tokens) for tokens in world.ended.values()}) == 1


def test_every_page_can_be_taken_again():
    """The last one to be free included, whatever its number."""
    pages = Pages(2, 1)
    for token in (1, 2):
        page = pages.take()
        pages.enter(pages.root, [token], page)
        pages.drop(page)
    assert sorted([pages.take(), pages.take()]) == [0, 1] and pages.take() is None


def test_the_least_recently_used_page_goes_first():
    pages = Pages(3, 1)
    for token in (1, 2, 3):
        page = pages.take()
        pages.enter(pages.root, [token], page)
        pages.drop(page)
    [node] = pages.match([1])
    pages.drop(node.page)                               # 2 is now the oldest
    pages.take()
    assert [bool(pages.match([token])) for token in (1, 2, 3)] == [True, False, True]


def test_the_one_with_least_to_recompute_is_put_back():
    world = World(pages=8, size=4, slots=3, budget=30)
    old, long, short = world.add([1] * 8, 20), world.add([2] * 12, 4), world.add([3] * 4, 4)
    world.step()
    while not world.scheduler.preempted:
        world.step()
    assert short.slot < 0 and old.slot >= 0 and long.slot >= 0
    world.finish()


@pytest.mark.parametrize("make, message", [
    (lambda: Pages(0, 4), "at least one page"), (lambda: World(slots=4, budget=3), "a step of 3 tokens"),
    (lambda: World(pages=3).add([1] * 10, 4), "needs 4 pages of 4, the pool has 3"),
])  # fmt: skip
def test_errors_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
