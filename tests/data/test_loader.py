"""The loader: a permutation that is one, mixtures to within one sample, and an order that hosts, batches and restarts cannot change."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllm.data import loader as module
from minllm.data.loader import BucketLoader, Evaluation, Loader, Ramp, Schedule, index_shuffle
from minllm.data.packing import Bucket, Concat, Rows, write_plan
from minllm.data.shards import Tokens, Writer
from minllm.data.tokenizer import Bytes


def rows_of(folder, texts, T=8, policy=None, tokens=None) -> Rows:
    if tokens is None:
        writer = Writer(folder / "tokens", Bytes().build())
        writer.add(texts)
        writer.close()
    (folder / f"plan{T}").mkdir()
    tokens = Tokens(folder / "tokens")
    write_plan(folder / f"plan{T}", policy or Concat(), tokens, T)
    return Rows(tokens, folder / f"plan{T}")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return rows_of(tmp_path_factory.mktemp("one"), [f"document {i} " * (1 + i % 5) for i in range(40)])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return rows_of(tmp_path_factory.mktemp("two"), ["X" * 50, "Y" * 70])


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def join(batches):
    batches = list(batches)
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


# ---------------------------------------------------------------------------------------------------------- permutation


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
@settings(deadline=None)
def test_index_shuffle_is_a_permutation(n, seed, epoch):
    shuffled = index_shuffle(np.arange(n), seed, epoch, n)
    assert sorted(shuffled.tolist()) == list(range(n))
    assert index_shuffle(n // 2, seed, epoch, n) == shuffled[n // 2]


@given(st.integers(2, 2**61))
@settings(deadline=None)
def test_index_shuffle_reaches_any_size(n):
    places = np.unique([(n - 1) * i // 49 for i in range(50)])
    shuffled = index_shuffle(places, 0, 0, n)
    assert len(set(shuffled.tolist())) == len(places) and 0 <= shuffled.min() <= shuffled.max() < n


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_order_of_a_few_is_as_likely(n):
    orders = list(itertools.permutations(range(n)))
    trials = 60 * len(orders)
    counts = Counter(tuple(index_shuffle(np.arange(n), 7, epoch, n).tolist()) for epoch in range(trials))
    chi2 = sum((counts[order] - 60) ** 2 / 60 for order in orders)
    assert chi2 < len(orders) - 1 + 5 * (2 * len(orders)) ** 0.5


def test_index_shuffle_is_random_enough():
    n, epochs = 1000, 300
    orders = np.stack([index_shuffle(np.arange(n), 3, e, n) for e in range(epochs)])
    # Where a place goes is uniform: chi-square over 10 x 10 cells, standard normal after scaling.
    cells = np.zeros((10, 10))
    np.add.at(cells, (np.broadcast_to(np.arange(n) // 100, orders.shape), orders // 100), 1)
    chi2 = ((cells - epochs * 10) ** 2 / (epochs * 10)).sum()
    assert chi2 < 81 + 5 * (2 * 81) ** 0.5
    # Neighbours part: steps between them take as many values as in a true shuffle, where a linear congruence has two.
    steps = np.unique(np.diff(orders[0]) % n).size
    assert abs(steps - n * (1 - np.exp(-1))) < 5 * n**0.5
    correlation = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(correlation) < 5 / (n * epochs) ** 0.5 + 1 / n
    # Epochs and seeds share places only by chance: on average one.
    assert abs(np.mean([(orders[e] == orders[e + 1]).sum() for e in range(epochs - 1)]) - 1) < 5 / epochs**0.5
    other = np.stack([index_shuffle(np.arange(n), 4, e, n) for e in range(epochs)])
    assert abs((orders == other).sum(1).mean() - 1) < 5 / epochs**0.5


# ------------------------------------------------------------------------------------------------------------- mixtures


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_mixture_counts_are_within_one_of_their_share(weights):
    schedule = Schedule([w / 10 for w in weights])
    assert [float(p) for p in schedule.shares] == pytest.approx([w / sum(weights) for w in weights])
    n = 3 * schedule.period + 5
    source, index = schedule(np.arange(n))
    for k, weight in enumerate(weights):
        taken = np.cumsum(source == k)
        exact = np.arange(1, n + 1) * weight
        assert (np.abs(taken * sum(weights) - exact) < sum(weights)).all()
        assert index[source == k].tolist() == list(range(taken[-1]))  # each source is read in order, none skipped


def test_awkward_shares_are_rounded_to_the_period(monkeypatch):
    monkeypatch.setattr(module, "PERIOD", 2**10)
    for weights in ([np.pi, np.e, 1.0], [1e-9, 1.0, 1e-9], [0.3333333, 0.6666667]):
        schedule = Schedule([float(w) for w in weights])
        assert schedule.period == 2**10 and sum(schedule.shares) == 1 and min(schedule.counts) >= 1
        assert np.bincount(schedule.source).tolist() == schedule.counts.tolist()
        assert max(abs(float(p) - w / sum(weights)) for p, w in zip(schedule.shares, weights)) < 2 / 2**10


def test_mixture_batches_draw_from_each_source_by_its_own_epochs(one, two):
    loader = Loader([one, two], 10, weights=(0.7, 0.3), seed=5)
    samples = 10 * len(one)
    origin = loader.origin(range(samples))
    assert np.bincount(origin[:, 0]).tolist() == [samples * 7 // 10, samples * 3 // 10]
    for k, rows in enumerate((one, two)):
        here = origin[origin[:, 0] == k]
        for start in range(0, len(here) - len(rows) + 1, len(rows)):
            assert sorted(here[start : start + len(rows), 2].tolist()) == list(range(len(rows)))
            assert set(here[start : start + len(rows), 1].tolist()) == {start // len(rows)}
    batch, pages = loader.batch(3), loader.origin(loader.samples(3))
    for b, (k, _, row) in enumerate(pages.tolist()):
        same({n: x[b] for n, x in batch.items()}, {n: x[0] for n, x in (one, two)[k].batch([row]).items()})


# ----------------------------------------------------------------------------------------------------------------- ramp


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 60))
def test_ramp_is_the_running_sum(stages, step):
    first = [0, *np.cumsum([gap for gap, _ in stages])[:-1].tolist()]
    ramp = Ramp.of([(f, size) for f, (_, size) in zip(first, stages)])
    sizes = [next(size for f, size in reversed(ramp.stages) if f <= s) for s in range(step + 1)]
    assert ramp.size_of(step) == sizes[-1] and ramp.start_of(step) == sum(sizes[:-1])


@pytest.mark.parametrize("stages", [[(1, 4)], [(0, 4), (0, 8)], [(0, 4), (5, 8), (3, 2)], [(0, 0)]])
def test_bad_ramps(stages):
    with pytest.raises(ValueError, match="must start at step 0"):
        Ramp.of(stages)


# ---------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("batch", [16, ((0, 8), (3, 16), (5, 24))])
@pytest.mark.parametrize("mixture", [False, True])
def test_hosts_see_parts_of_one_order(one, two, batch, mixture):
    sources, weights = ([one, two], (2.0, 1.0)) if mixture else ([one], (1.0,))
    alone = Loader(sources, batch, weights=weights, seed=1)
    for hosts in (1, 2, 4, 8):
        parts = [Loader(sources, batch, weights=weights, seed=1, host_index=h, host_count=hosts) for h in range(hosts)]
        for step in range(8):
            same(join(part.batch(step) for part in parts), alone.batch(step))


def test_a_host_may_read_several_parts(one):
    """Chips of a host that are no neighbours in the mesh hold parts that are not next to each other."""
    for make in (lambda **host: Loader([one], 16, seed=1, **host), lambda **host: Evaluation([one], 16, **host)):
        for i in range(3):
            rows = {k: a.reshape(4, 4, *a.shape[1:]) for k, a in make().batch(i).items()}
            same(make(host_index=(2, 0), host_count=4).batch(i), {k: np.concatenate([a[0], a[2]]) for k, a in rows.items()})


def test_the_order_does_not_depend_on_how_batches_are_cut(one):
    whole = Loader([one], 48, seed=2).batch(0)
    for batch in (1, 4, 16, ((0, 4), (4, 8))):
        loader = Loader([one], batch, seed=2)
        steps = next(s for s in range(99) if loader.ramp.start_of(s) == 48)
        same(join(loader.batch(s) for s in range(steps)), whole)


def test_a_restart_continues_the_order_with_another_batch_and_host_count(one):
    """Five steps of 8 on one host, then steps of 4 on two hosts: the samples go on from 40."""
    first = Loader([one], 8, seed=3)
    second = [Loader([one], ((0, 8), (5, 4)), seed=3, host_index=h, host_count=2) for h in range(2)]
    for step in range(5, 9):
        wanted = first.rows(range(40 + 4 * (step - 5), 40 + 4 * (step - 4)))
        same(join(part.batch(step) for part in second), wanted)


def test_iterating_from_a_step_equals_asking_for_it(one):
    loader = Loader([one], 4, seed=4)
    for start in (0, 7, 10**15):
        with loader.batches(start) as batches:
            for step in range(start, start + 6):
                same(next(batches), loader.batch(step))
            assert 0 <= batches.waited < 60
    assert len(list(loader.batches(2, 5, threads=2, ahead=2))) == 3


def test_an_epoch_is_every_row_once_and_epochs_differ(one):
    loader = Loader([one], 1, seed=6)
    origin = loader.origin(range(2 * len(one)))
    assert origin[:, 1].tolist() == [0] * len(one) + [1] * len(one)
    a, b = origin[: len(one), 2].tolist(), origin[len(one) :, 2].tolist()
    assert sorted(a) == sorted(b) == list(range(len(one))) and a != b != sorted(b)
    assert Loader([one], 1, seed=7).origin(range(len(one)))[:, 2].tolist() != a


def test_indivisible_batches_are_refused(one):
    with pytest.raises(ValueError, match=r"batch size 12 \(from step 9\) does not divide among 8 hosts: use 8 or 16"):
        Loader([one], ((0, 8), (9, 12)), host_count=8)
    with pytest.raises(ValueError, match=r"batch size 2 .* use 8"):
        Loader([one], 2, host_count=8)
    with pytest.raises(ValueError, match="use a multiple of 4"):
        Evaluation([one], 6, host_count=4)


def test_a_read_error_reaches_the_caller(one, monkeypatch):
    loader = Loader([one], 4)
    monkeypatch.setattr(loader, "rows", lambda samples: (_ for _ in ()).throw(ValueError("shard-00000 is corrupt")))
    with loader.batches() as batches, pytest.raises(ValueError, match="shard-00000 is corrupt"):
        next(batches)


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_covers_the_text_once(one, two, batch_size):
    evaluation = Evaluation([one, two], batch_size)
    batches = list(evaluation)
    assert len(batches) == len(evaluation) and all(b["tokens"].shape == (batch_size, 8) for b in batches)
    whole = join(batches)
    assert whole["weights"].sum() == evaluation.tokens
    predicted = whole["targets"][(whole["weights"] > 0) & (whole["targets"] < 256)]
    texts = "".join(f"document {i} " * (1 + i % 5) for i in range(40)) + "X" * 50 + "Y" * 70
    assert bytes(predicted.tolist()).decode() == texts and evaluation.bytes == len(texts)  # exactly the bytes that nats are divided by
    same(whole, join(join(Evaluation([one, two], 4 * batch_size, host_index=h, host_count=4).batch(i) for h in range(4))
                     for i in range(-(-len(batches) // 4))) if batch_size == 64 else whole)  # fmt: skip


def test_hosts_share_the_evaluation(one):
    alone = Evaluation([one], 8)
    parts = [Evaluation([one], 8, host_index=h, host_count=4) for h in range(4)]
    for i in range(len(alone)):
        same(join(part.batch(i) for part in parts), alone.batch(i))


def test_an_evaluation_of_some_rows_is_spread_over_the_text(one):
    some = Evaluation([one], 4, rows=10)
    assert len(some) == 3 and some.rows == 10
    wanted = one.batch([i * len(one) // 10 for i in range(10)])
    same({n: x[:10] for n, x in join(some).items()}, wanted)
    assert len(Evaluation([one], 4, rows=10**9)) == len(Evaluation([one], 4))


# -------------------------------------------------------------------------------------------------------------- buckets


def test_bucket_batches_have_one_length_and_the_same_budget(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 31, 200).tolist()
    policy = Bucket(lengths=(8, 16, 32))
    buckets = [rows_of(tmp_path, ["x" * n for n in sizes], T, policy, tokens=T != 8 or None) for T in policy.lengths]
    loader, steps = BucketLoader(buckets, 64, seed=1), 600
    origin, padding, shapes = {8: Counter(), 16: Counter(), 32: Counter()}, 0, Counter()
    parts = [BucketLoader(buckets, 64, seed=1, host_index=h, host_count=2) for h in range(2)]
    for step in range(steps):
        batch = loader.batch(step)
        B, T = batch["tokens"].shape
        assert B * T == 64
        shapes[T] += 1
        padding += (batch["segments"] == 0).sum()
        if step < 20:
            same(join(part.batch(step) for part in parts), batch)
    for T, rows in zip(policy.lengths, buckets):
        assert abs(shapes[T] / steps - len(rows) * T / sum(len(r) * r.T for r in buckets)) < 2 / steps + 2e-4
    assert origin and padding / (64 * steps) < 0.25  # one row a document of these sizes would waste half
    with pytest.raises(ValueError, match="allow at least 64"):
        BucketLoader(buckets, 63, host_count=2)
