"""Who holds which page of the cache: reference counts, and a prefix tree that remembers what pages hold.

A page holds the keys and values of S consecutive tokens (Kwon et al. 2023, arXiv 2309.06180, section 4). Its content depends on all
tokens up to its end, so a page is known by them: the tree has one edge a page, named by the page's S tokens, and a path from the root
spells a prefix (RadixAttention, Zheng et al. 2023, arXiv 2312.07104, section 3). Only full pages are in the tree; nobody writes them.

The tree holds a reference to each of its pages. One that nobody else holds is given up when a page is wanted and none is free: the least
recently used first, and leaves before what they stand on. A request holds all pages from the root on, so what it stands on stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count as counting


@dataclass(eq=False)
class Node:
    """A full page after all pages above it. used: when it was last held; page is -1 once it has been given up."""

    page: int
    tokens: tuple[int, ...] = ()
    above: "Node | None" = None
    below: dict[tuple[int, ...], "Node"] = field(default_factory=dict)
    used: int = 0


class Pages:
    """`count` pages of `size` tokens. remember: whether the tree is kept; without it, a page that nobody holds is free at once."""

    def __init__(self, count: int, size: int, remember: bool = True):
        if count < 1 or size < 1:
            raise ValueError(f"a pool has at least one page of at least one token; got {count} of {size}")
        self.count, self.size, self.remember = count, size, remember
        self.free = list(range(count - 1, -1, -1))
        self.refs = [0] * count
        self.root = Node(-1)
        self.at: dict[int, Node] = {}                       # the node of each page in the tree
        self._old: list[tuple[int, int, Node]] = []         # perhaps to be given up: (used, a number that decides ties, node)
        self._clock, self._ties = counting(1), counting()

    def take(self) -> int | None:
        """A page that nobody else holds; None if there is none to have."""
        if not self.free and self._give_up() is None:
            return None
        page = self.free.pop()
        self.refs[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that has some."""
        assert self.refs[page] > 0, page
        self.refs[page] += 1

    def drop(self, page: int) -> None:
        """One holder less. A page that is left to the tree stays until it is wanted."""
        assert self.refs[page] > 0, page
        self.refs[page] -= 1
        if self.refs[page] == 0:
            self.free.append(page)
        elif node := self.at.get(page):
            node.used = next(self._clock)
            self._may_go(node)

    def shared(self, page: int) -> bool:
        """Whether somebody else holds it too: it must then be copied before it is written."""
        return self.refs[page] > 1

    def match(self, tokens: Sequence[int]) -> list[Node]:
        """The longest path of full pages that spells the beginning of `tokens`; its pages are now held by the caller as well."""
        path, node = [], self.root
        for start in range(0, len(tokens) - self.size + 1, self.size):
            node = node.below.get(tuple(tokens[start : start + self.size]))
            if node is None:
                break
            self.hold(node.page)
            path.append(node)
        return path

    def enter(self, above: Node, tokens: Sequence[int], page: int) -> Node:
        """The node of a page that has just been filled with `tokens` after `above`. If the tree has such a page already, the caller's is
        dropped and the tree's is held in its place: their contents are equal."""
        assert len(tokens) == self.size and (above is self.root or above.page >= 0)
        name = tuple(tokens)
        if not self.remember:
            return Node(page, name, above)
        if node := above.below.get(name):
            self.hold(node.page)
            self.drop(page)
            return node
        node = above.below[name] = self.at[page] = Node(page, name, above)
        self.hold(page)
        return node

    def forget(self) -> None:
        """Give up every page that only the tree holds."""
        while (page := self._give_up()) is not None:
            assert self.refs[page] == 0

    def held(self) -> int:
        """How many pages somebody besides the tree holds."""
        return sum(n > (page in self.at) for page, n in enumerate(self.refs))

    def _may_go(self, node: Node) -> None:
        if self.refs[node.page] == 1 and not node.below:
            heappush(self._old, (node.used, next(self._ties), node))

    def _give_up(self) -> int | None:
        while self._old:
            used, _, node = heappop(self._old)
            page = node.page
            if page < 0 or node.used != used or node.below or self.refs[page] > 1:
                continue                                    # it has been held since, or stands below another
            del node.above.below[node.tokens], self.at[page]
            node.page = -1
            self.refs[page] = 0
            self.free.append(page)
            if node.above is not self.root:
                self._may_go(node.above)
            return page
        return None
