"""Who does what when in a pipeline: a table of time slots by stages, in plain Python.

A model is cut into P = S V virtual stages; stage s of S holds the chunks v = 0 .. V-1, chunk v being virtual stage v S + s. Each microbatch
goes forward through all of them (F), and backward (B; or B for the gradient of the activations and W for that of the weights). An
operation's input leaves the neighbour in one slot and can be used from the next one on. All stages pass a slot together, so a slot lasts as
long as the longest operation in it, and an operation shares its slot with others of its kind where that costs nothing.

    gpipe         all F, then all B                  Huang et al. 2019, arXiv 1811.06965       bubble (S - 1) / M
    1f1b          B as soon as there is one          Narayanan et al. 2021, arXiv 2104.04473   bubble (S - 1) / (V M)
    zero_bubble   W fills the slots without B or F   Qi et al. 2023, arXiv 2401.10241 (H1)     bubble (S - 1) (F + B - W) / (M (F + B + W))

with V > 1 interleaved (2104.04473, section 2.2). Bubbles are time lost over time used, S - 1 < M; the last row holds for F = B = W.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

Kind = Literal["gpipe", "1f1b", "zero_bubble"]


class Op(NamedTuple):
    kind: Literal["F", "B", "W"]
    chunk: int
    microbatch: int


Table = list[list[Op | None]]  # [slot][stage]


def table(kind: Kind, stages: int, microbatches: int, chunks: int = 1, consecutive: int | None = None) -> Table:
    """The schedule of M microbatches, any number of them.

    consecutive: how many microbatches go through a chunk before the stage turns to the next chunk (Llama 3 paper, section 3.3.2): S
        (the default) is depth first and holds the fewest activations, M is breadth first.
    """
    S, M, V = stages, microbatches, chunks
    N = consecutive or S
    if min(S, M, V, N) < 1:
        raise ValueError(f"a pipeline needs at least one stage, microbatch, chunk and consecutive microbatch; got {S}, {M}, {V}, {N}")
    groups = [range(g, min(g + N, M)) for g in range(0, M, N)]
    forward = [(v, m) for group in groups for v in range(V) for m in group]
    backward = [(v, m) for group in groups for v in reversed(range(V)) for m in group]
    todo = {"F": [list(forward) for _ in range(S)], "B": [list(backward) for _ in range(S)], "W": [[] for _ in range(S)]}
    done: dict[tuple[str, int, int], int] = {}  # (kind, virtual stage, microbatch) -> slot
    slots: Table = []

    def ready(k: str, s: int) -> Op | None:
        """The stage's next operation of a kind, if what it needs was made in an earlier slot."""
        if not todo[k][s]:
            return None
        v, m = todo[k][s][0]
        p, P = v * S + s, V * S
        before = {"F": [("F", p - 1, m)] * (p > 0), "B": [("F", p, m)] + [("B", p + 1, m)] * (p < P - 1), "W": [("B", p, m)]}[k]
        return Op(k, v, m) if all(done.get(b, len(slots)) < len(slots) for b in before) else None

    def fill(choose: Callable[[int], Op | None]) -> None:
        ops = [choose(s) for s in range(S)]
        for s, op in enumerate(ops):
            if op:
                todo[op.kind][s].remove(op[1:])
                done[op.kind, op.chunk * S + s, op.microbatch] = len(slots)
                if op.kind == "B" and kind == "zero_bubble":
                    todo["W"][s].append(op[1:])
        if any(ops):
            slots.append(ops)

    def greedy(s: int) -> Op | None:
        """B first; F while the stage holds no more than it must to keep the last one busy, with what waits for its W; else W."""
        held = len(todo["B"][s]) - len(todo["F"][s])
        room = (V - 1) * N + S - s + (S - s - 1) * (V > 1)
        go = held < room and held + len(todo["W"][s]) < room + s + 1 + S // 2
        return ready("B", s) or (ready("F", s) if go else None) or ready("W", s)

    while any(any(lists) for lists in todo.values()):
        if kind == "zero_bubble":
            fill(greedy)
        else:
            fill(lambda s: ready("F", s))
            if kind == "1f1b" or not any(todo["F"]):
                fill(lambda s: ready("B", s))
    return slots


def length(slots: Table, costs: dict[str, int | float]) -> float:
    """Time of a table, each slot as long as its longest operation. costs: of F, B (and W) on one chunk."""
    return float(sum(max(costs[op.kind] for op in slot if op) for slot in slots))


def bubble(slots: Table, costs: dict[str, int | float]) -> float:
    """Time that the stages wait over the time that they work."""
    work = sum(costs[op.kind] for slot in slots for op in slot if op) / len(slots[0])
    return length(slots, costs) / work - 1


def lifetimes(slots: Table) -> tuple[list[dict], list[dict]]:
    """When each stage holds what: for activations and for gradients, a dict (chunk, microbatch) -> (slot of arrival, slot of last use) for
    every stage. What the first virtual stage reads and the last one starts from comes from nobody and is in neither."""
    S = len(slots[0])
    P = S * (1 + max(op.chunk for slot in slots for op in slot if op))
    when = {(op.kind, op.chunk * S + s, op.microbatch): t for t, slot in enumerate(slots) for s, op in enumerate(slot) if op}
    acts: list[dict] = [{} for _ in range(S)]
    grads: list[dict] = [{} for _ in range(S)]
    for (k, p, m), t in when.items():
        if k == "B":
            here, end = (p // S, m), when.get(("W", p, m), t)
            if p > 0:
                acts[p % S][here] = (when["F", p - 1, m] + 1, end)
            if p < P - 1:
                grads[p % S][here] = (when["B", p + 1, m] + 1, end)
    return acts, grads


def places(spans: dict[tuple[int, int], tuple[int, int]]) -> dict[tuple[int, int], int]:
    """A buffer place for each span, reused when it is free: as few as possible."""
    found: dict[tuple[int, int], int] = {}
    free_at: list[int] = []
    for key, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        place = next((i for i, t in enumerate(free_at) if t < first), len(free_at))
        free_at[place : place + 1] = [last]
        found[key] = place
    return found


def draw(slots: Table) -> str:
    """The table as text, a line a stage."""
    chunked = any(op and op.chunk for slot in slots for op in slot)
    cell = lambda op: f"{op.kind}{op.microbatch}{'abcdefghijklmnop'[op.chunk] if chunked else ''}" if op else "."
    rows = [[cell(slot[s]) for slot in slots] for s in range(len(slots[0]))]
    width = max(len(c) for row in rows for c in row)
    return "\n".join(" ".join(c.ljust(width) for c in row).rstrip() for row in rows)
