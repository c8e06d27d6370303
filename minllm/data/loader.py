"""The loader: batch = f(seed, step). There is no state but the step.

    sample i of the run   ->  (source k, its j-th sample)          the mixture's schedule, one period in a table
    its j-th sample       ->  epoch e = j // n_k, place p = j % n_k
    row                   =   plan_k[index_shuffle(p, seed, e, n_k)]

Step s takes samples [start_of(s), start_of(s) + size_of(s)), host h of H the h-th part of that range. So the order of samples does
not depend on the number of hosts, on how batches are cut, or on where a run was interrupted; and going to a step costs nothing.
Rows are read ahead on Grain's threads.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import pairwise
from math import lcm

import numpy as np
from jaxtyping import Int, Shaped
from pydantic import Field

from minllm.config import config
from minllm.data.packing import Rows

Batch = dict[str, Shaped[np.ndarray, "B T"]]
Share = int | Sequence[int]  # which of `host_count` equal parts of each batch a host reads

# ---------------------------------------------------------------------------------------------------------- permutation

ROUNDS = 8


@lru_cache(1024)
def _keys(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(f"{seed} {epoch} {n}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def index_shuffle(i: Int[np.ndarray, " m"] | int, seed: int, epoch: int, n: int) -> Int[np.ndarray, " m"] | int:
    """Where place i of epoch `epoch` comes from: a pseudo-random permutation of [0, n) in constant memory.

    A Feistel network (Luby & Rackoff 1988) permutes [0, 4^h), the least such power of at least n; walking its cycle until it is back
    below n (Black & Rogaway 2002) makes it a permutation of [0, n), in at most four steps on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask, keys = (np.uint64(1) << half) - np.uint64(1), _keys(seed, epoch, n)
    x = np.atleast_1d(np.asarray(i)).astype(np.uint64)
    assert x.size == 0 or int(x.max()) < n
    out, todo = x.copy(), np.arange(x.size)
    while todo.size:
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            # splitmix64's finaliser as the round function
            z = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    out = out.astype(np.int64)
    return int(out[0]) if np.ndim(i) == 0 else out


# ------------------------------------------------------------------------------------------------------------- mixtures

PERIOD = 2**16


class Schedule:
    """Which source each sample comes from: after any n samples, source k has given n p_k of them, to within one.

    Tijdeman's rule for the chairman assignment problem (1980): of the sources that may be chosen, the one whose next sample is due
    first. Rational shares repeat with their common denominator, so one period in a table answers for every sample. Shares whose
    denominator is above 65,536 are rounded to 65,536ths; `shares` are the exact ones in use.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(w)) for w in weights]
        shares = [w / sum(exact) for w in exact]
        period = reduce(lcm, (p.denominator for p in shares))
        if period > PERIOD:
            period, whole = PERIOD, [max(1, int(p * PERIOD)) for p in shares]
            while missing := PERIOD - sum(whole):  # to the largest remainder; from the largest share where many are tiny
                k = int(np.argmax([p * PERIOD - w for p, w in zip(shares, whole)] if missing > 0 else whole))
                whole[k] += 1 if missing > 0 else -1
            shares = [Fraction(w, PERIOD) for w in whole]
        self.shares, self.period = shares, period
        self.counts = np.array([int(p * period) for p in shares], np.int64)  # samples of each source in a period
        self.source, self.rank = self._period()

    def _period(self) -> tuple[np.ndarray, np.ndarray]:
        # In integers, with everything times P (2K - 2): deficit_k(n) = n p_k - taken_k.
        K, P, c = len(self.shares), self.period, self.counts
        scale = max(1, 2 * K - 2)
        taken, source, rank = np.zeros(K, np.int64), np.empty(P, np.int32), np.empty(P, np.int64)
        for n in range(P):
            deficit = ((n + 1) * c - taken * P) * scale  # if k is not chosen now
            due = np.where(deficit >= P, (P * scale - P - deficit) / c, np.inf) if K > 1 else np.zeros(1)
            k = int(np.argmin(due))
            source[n], rank[n] = k, taken[k]
            taken[k] += 1
        return source, rank

    def __call__(self, samples: Int[np.ndarray, " m"]) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """(source, index within the source) of each sample."""
        turn, place = np.divmod(samples, self.period)
        source = self.source[place]
        return source, turn * self.counts[source] + self.rank[place]


# ----------------------------------------------------------------------------------------------------------------- ramp


@config
class Ramp:
    """Batch sizes by step: stages of (first step, batch size). `start_of(step)` is the first sample of a step, in closed form."""

    stages: tuple[tuple[int, int], ...] = Field(min_length=1)

    def __post_init__(self):
        steps = [step for step, _ in self.stages]
        if steps[0] != 0 or any(a >= b for a, b in pairwise(steps)) or min(size for _, size in self.stages) < 1:
            raise ValueError(f"batch stages {list(self.stages)} must start at step 0, with rising steps and batch sizes of at least 1")

    @classmethod
    def of(cls, batch: "int | Ramp | Sequence[tuple[int, int]]") -> "Ramp":
        if isinstance(batch, int):
            return cls(stages=((0, batch),))
        return batch if isinstance(batch, Ramp) else cls(stages=tuple(tuple(stage) for stage in batch))

    def size_of(self, step: int) -> int:
        return next(size for first, size in reversed(self.stages) if first <= step)

    def start_of(self, step: int) -> int:
        ends = [first for first, _ in self.stages[1:]] + [step]
        return sum(size * max(0, min(step, end) - first) for (first, size), end in zip(self.stages, ends, strict=True))


# --------------------------------------------------------------------------------------------------------------- loader


class Batches:
    """An iterator of batches that reads ahead on Grain's threads. `waited`: seconds that next() has made its caller wait."""

    def __init__(self, batch, start: int, stop: int, threads: int, ahead: int):
        import grain  # here, because importing it takes a second and brings in jax

        dataset = grain.MapDataset.range(start, stop).map(batch)
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
        self.waited = 0.0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        before = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.waited += time.perf_counter() - before

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Loader:
    """Batches of packed rows by step, endless. `batch` is an int, a Ramp or its stages, counted over all hosts. host_index: which of
    host_count equal parts of each batch this host reads: one, or several."""

    def __init__(
        self, sources: Sequence[Rows], batch: int | Ramp | Sequence[tuple[int, int]], *, weights: Sequence[float] = (1.0,), seed: int = 0,
        host_index: Share = 0, host_count: int = 1,
    ):  # fmt: skip
        self.sources, self.ramp, self.seed, self.schedule = tuple(sources), Ramp.of(batch), seed, Schedule(weights)
        self.parts, self.host_count = _parts(host_index), host_count
        for step, size in self.ramp.stages:
            if size % host_count:
                down = size - size % host_count
                near = f"{down} or {down + host_count}" if down else f"{host_count}"
                raise ValueError(f"batch size {size} (from step {step}) does not divide among {host_count} hosts: use {near}")

    def samples(self, step: int) -> range:
        """The global numbers of the samples of a step, over all hosts."""
        first = self.ramp.start_of(step)
        return range(first, first + self.ramp.size_of(step))

    def origin(self, samples: Sequence[int]) -> Int[np.ndarray, "n 3"]:
        """(source, epoch, row) of each sample: what a report on a bad batch names."""
        source, index = self.schedule(np.asarray(samples, np.int64))
        lengths = np.array([len(rows) for rows in self.sources])
        epoch, place = np.divmod(index, lengths[source])
        row = np.empty_like(place)
        for k, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            here = (source == k) & (epoch == e)
            row[here] = index_shuffle(place[here], self.seed + (k << 32), e, int(lengths[k]))
        return np.stack([source, epoch, row], 1)

    def rows(self, samples: Sequence[int]) -> Batch:
        """The given samples, in the order given."""
        origin = self.origin(samples)
        if len(self.sources) == 1:
            return self.sources[0].batch(origin[:, 2].tolist())
        return _gather(self.sources, origin[:, 0], origin[:, 2])

    def batch(self, step: int) -> Batch:
        """This host's part of the batch of a step: arrays [B / hosts, T]."""
        samples = self.samples(step)
        share = len(samples) // self.host_count
        return self.rows([sample for i in self.parts for sample in samples[i * share : (i + 1) * share]])

    def batches(self, start: int = 0, stop: int = 2**62, *, threads: int = 1, ahead: int = 4) -> Batches:
        """Steps start, start + 1, ... read `ahead` of the caller. Starting anywhere costs the same."""
        return Batches(self.batch, start, stop, threads, ahead)


class BucketLoader:
    """Batches of rows of one length, endless: step s has [budget // T_k, T_k] for the bucket k whose turn it is.

    `rows` holds the buckets, `budget` is the number of positions in a batch. Buckets take turns as sources of a mixture do, each with
    the share of batches that it can fill, and each keeps its own epochs.
    """

    def __init__(self, rows: Sequence[Rows], budget: int, *, seed: int = 0, host_index: Share = 0, host_count: int = 1):
        sizes = [budget // bucket.T // host_count * host_count for bucket in rows]
        if not all(sizes):
            least = host_count * max(bucket.T for bucket in rows)
            raise ValueError(f"a batch of {budget} positions has no row of the longest bucket for every host: allow at least {least}")
        filled = [k for k in range(len(rows)) if len(rows[k])]
        self.loaders = [Loader([rows[k]], sizes[k], seed=seed + k, host_index=host_index, host_count=host_count) for k in filled]
        self.schedule = Schedule([len(rows[k]) / sizes[k] for k in filled])

    def batch(self, step: int) -> Batch:
        """This host's part of the batch of a step."""
        bucket, turn = self.schedule(np.array([step]))
        return self.loaders[int(bucket[0])].batch(int(turn[0]))

    def batches(self, start: int = 0, stop: int = 2**62, *, threads: int = 1, ahead: int = 4) -> Batches:
        return Batches(self.batch, start, stop, threads, ahead)


def _parts(host_index: int | Sequence[int]) -> tuple[int, ...]:
    return (host_index,) if isinstance(host_index, int) else tuple(sorted(host_index))


def _gather(sources: Sequence[Rows], source: np.ndarray, row: np.ndarray) -> Batch:
    """Rows of several sources in one batch, in the order given."""
    parts = [(np.flatnonzero(source == k), rows.batch(row[source == k].tolist())) for k, rows in enumerate(sources)]
    order = np.argsort(np.concatenate([place for place, _ in parts]))
    return {name: np.concatenate([part[name] for _, part in parts])[order] for name in parts[0][1]}


# ----------------------------------------------------------------------------------------------------------- evaluation


class Evaluation:
    """The held-out text once, in order, in windows that do not overlap; the last batch is filled with rows of weight 0.

    Summed over all batches the weights are `tokens`, and the text those tokens spell is `bytes` long, so that
    nats/token = nats / tokens and nats/byte = nats / bytes are exact. (Nats for an end-of-document token are counted, it has no bytes.)
    With `rows`, only so many windows, evenly spaced: an estimate, nats / (summed weights) x tokens / bytes, for use during training.
    """

    def __init__(self, sources: Sequence[Rows], batch_size: int, *, rows: int | None = None, host_index: Share = 0, host_count: int = 1):
        if batch_size % host_count:
            raise ValueError(f"evaluation batch size {batch_size} does not divide among {host_count} hosts: use a multiple of {host_count}")
        self.sources, self.batch_size, self.parts, self.host_count = tuple(sources), batch_size, _parts(host_index), host_count
        self.ends = np.cumsum([len(source) for source in sources])
        total = int(self.ends[-1])
        self.rows = total if rows is None else min(rows, total)
        self.chosen = range(total) if self.rows == total else np.linspace(0, total, self.rows, endpoint=False).astype(np.int64)
        self.tokens = sum(rows.tokens.predicted_tokens for rows in sources)
        self.bytes = sum(rows.tokens.predicted_bytes for rows in sources)

    def __len__(self) -> int:
        return (self.rows + self.batch_size - 1) // self.batch_size

    def batch(self, i: int) -> Batch:
        """This host's part of batch i: arrays [batch_size / hosts, T], whatever i is."""
        share = self.batch_size // self.host_count
        firsts = [i * self.batch_size + part * share for part in self.parts]
        rows = np.concatenate([np.asarray(self.chosen[first : first + share], np.int64) for first in firsts])
        source = np.searchsorted(self.ends, rows, "right")
        batch = _gather(self.sources, source, rows - np.concatenate([[0], self.ends])[source])
        missing, pad = share * len(self.parts) - len(rows), self.sources[0].pad
        fill = {"tokens": pad, "targets": pad, "segments": 0, "positions": 0, "weights": 0}
        return {name: np.pad(x, ((0, missing), (0, 0)), constant_values=fill[name]) for name, x in batch.items()}

    def batches(self, *, threads: int = 1, ahead: int = 4) -> Batches:
        return Batches(self.batch, 0, len(self), threads, ahead)

    def __iter__(self) -> Iterator[Batch]:
        with self.batches() as batches:
            yield from batches
