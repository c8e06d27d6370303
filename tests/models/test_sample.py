"""Sampling: what is drawn, from what, and that neither cache nor batch changes it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import minllm
from minllm.layer import Context, Execution
from minllm.models.llama import llama3
from minllm.sample import Sampler, sample, stream
from minllm.sharding import make_mesh
from minllm.weights import unstack

tiny = partial(llama3, D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=64, scaling=None)
MODELS = {"llama": tiny(), "tied": tiny(tied=True), "window": tiny(window=4)}
PROMPTS = [[5, 9, 11], [1], [60, 2, 2, 7, 30, 8, 1, 4, 19, 55, 3], [17, 17]]
GREEDY = Sampler(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return {name: minllm.init(model, jax.random.key(3)) for name, model in MODELS.items()}


def argmax_loop(model, params, prompt, count):
    """The plain model on ever longer rows, without a cache."""
    logits = jax.jit(lambda tokens: model.apply(params, tokens, Context()).x[0])
    row = list(prompt)
    for _ in range(count):
        tokens = np.zeros((1, 48), np.int32)  # causal: what follows the row changes nothing
        tokens[0, : len(row)] = row
        row.append(int(logits(tokens)[len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_loop(name, params):
    """Ragged prompts in one batch; the window of 4 wraps its ring many times."""
    ours = sample(MODELS[name], params[name], PROMPTS, 24, sampler=GREEDY)
    assert ours == [argmax_loop(MODELS[name], params[name], prompt, 24) for prompt in PROMPTS]
    assert name == "tied" or all(len(set(row)) > 3 for row in ours)  # a tied head, untrained, repeats itself


@pytest.mark.parametrize("name", ["llama", "window"])
def test_a_prompt_gives_the_same_text_alone_and_in_any_batch(name, params):
    draw = partial(sample, MODELS[name], params[name], max_tokens=12)
    seeds = [7, 100, 3, 42]
    together = draw(PROMPTS, seeds=seeds)
    assert [draw([prompt], seeds=[seed])[0] for prompt, seed in zip(PROMPTS, seeds)] == together
    assert draw(PROMPTS[::-1] + [[1, 2]], seeds=[*seeds[::-1], 5])[:4] == together[::-1]
    assert draw(PROMPTS, seeds=[8, 101, 4, 43]) != together


def test_one_seed_counts_up_by_row(params):
    draw = partial(sample, MODELS["llama"], params["llama"], [[1, 2]] * 3, 8)
    assert draw(seeds=5) == draw(seeds=[5, 6, 7]) and len({tuple(row) for row in draw(seeds=5)}) == 3
    assert draw(seeds=5)[1] == draw(seeds=6)[0]


@pytest.mark.parametrize("name", MODELS)
def test_streaming_gives_the_same_tokens(name, params):
    """One at a time, with the prompt read in pieces: tokens, seeds and stops are those of `sample`."""
    model, prompt = MODELS[name], list(range(1, 60)) * 3
    for sampler in (GREEDY, Sampler(temperature=0.8, top_k=20)):
        for start in (prompt, [5]):
            whole = sample(model, params[name], [start], 12, sampler=sampler, seeds=7)[0]
            assert list(stream(model, params[name], start, 12, sampler=sampler, seed=7)) == whole
    cut = list(stream(model, params[name], [5], 12, sampler=sampler, seed=7, stop=(whole[4],)))
    assert cut == whole[: whole.index(whole[4])]
    with pytest.raises(ValueError, match="at least one token"):
        next(stream(model, params[name], [], 3))


def test_a_longer_text_begins_with_the_shorter(params):
    draw = partial(sample, MODELS["llama"], params["llama"], PROMPTS)
    assert [row[:5] for row in draw(16)] == draw(5)


def test_stop_tokens_end_a_row_and_no_other(params):
    draw = partial(sample, MODELS["llama"], params["llama"], PROMPTS, 20)
    free = draw()
    stop = (free[0][6], free[2][0])
    cut = [next((i for i, token in enumerate(row) if token in stop), 20) for row in free]
    assert draw(stop=stop) == [row[:n] for row, n in zip(free, cut)]
    assert cut[2] == 0 and 0 < cut[0] <= 6  # a row may end at once


def test_the_first_token_follows_the_models_distribution(params):
    """3,000 seeds; chance gives a worse chi-square once in a thousand times."""
    model, p, prompt = MODELS["llama"], params["llama"], [5, 9, 11]
    expected = np.asarray(jax.nn.softmax(model.apply(p, jnp.array([prompt]), Context()).x[0, -1].astype(jnp.float32)), np.float64)
    drawn = [row[0] for row in sample(model, p, [prompt] * 3000, 1)]
    assert chisquare(np.bincount(drawn, minlength=64), expected / expected.sum() * 3000).pvalue > 1e-3


@pytest.mark.parametrize("run", [dict(kernels="reference"), dict(scan=False, remat="full"), dict(mesh=dict(fsdp=2, tensor=4)),
                                 dict(mesh=dict(data=8))], ids=str)  # fmt: skip
def test_execution_changes_no_token(run, params):
    """Four prompts over eight devices included."""
    run = Execution(**run | {"mesh": make_mesh(**run["mesh"])} if "mesh" in run else run)
    draw = partial(sample, MODELS["llama"], params["llama"], PROMPTS, 8)
    assert draw(run=run) == draw()


def test_unstacked_parameters_and_another_cache_dtype(params):
    draw = partial(sample, MODELS["llama"], prompts=PROMPTS, max_tokens=8)
    assert draw(params=unstack(params["llama"])) == draw(params=params["llama"])
    half = draw(params=params["llama"], cache_dtype=jnp.bfloat16)
    assert [len(row) for row in half] == [8] * 4 and all(0 <= token < 64 for row in half for token in row)


def filtered_in_numpy(sampler, logits):
    """Probabilities by the definitions, one token after another."""
    p = np.exp(logits / sampler.temperature)
    kept = set(range(len(p)))
    ranked = sorted(kept, key=lambda i: -p[i])
    if sampler.top_k is not None:
        kept = set(ranked[: sampler.top_k])
    if sampler.top_p is not None:
        mass, nucleus = 0.0, set()
        for i in (i for i in ranked if i in kept):
            if mass >= sampler.top_p * sum(p[j] for j in kept):
                break
            nucleus.add(i)
            mass += p[i]
        kept = nucleus
    if sampler.min_p is not None:
        kept = {i for i in kept if p[i] >= sampler.min_p * max(p)}
    p = np.array([p[i] if i in kept else 0.0 for i in range(len(p))])
    return p / p.sum()


FILTERS = [
    Sampler(), Sampler(temperature=0.5), Sampler(temperature=2.0), Sampler(top_k=1), Sampler(top_k=3), Sampler(top_k=1000),
    Sampler(top_p=1e-6), Sampler(top_p=0.5), Sampler(top_p=0.9), Sampler(top_p=1.0), Sampler(min_p=1.0), Sampler(min_p=0.1),
    Sampler(temperature=0.7, top_k=12, top_p=0.8), Sampler(temperature=1.5, top_p=0.95, min_p=0.05),
    Sampler(temperature=1.3, top_k=9, top_p=0.9, min_p=0.2),
]  # fmt: skip


@pytest.mark.parametrize("sampler", FILTERS, ids=str)
def test_filters_keep_exactly_the_tokens_of_their_definition(sampler):
    logits = np.random.default_rng(0).normal(0, 2, (20, 40)).astype(np.float32)
    ours = np.asarray(jax.nn.softmax(sampler.filtered(jnp.asarray(logits)), -1))
    for a, row in zip(ours, logits.astype(np.float64)):
        b = filtered_in_numpy(sampler, row)
        assert ((a > 0) == (b > 0)).all()
        assert np.abs(a - b).max() <= 1e-6  # float32


@pytest.mark.parametrize("sampler", FILTERS[::2], ids=str)
def test_draws_follow_the_filtered_distribution(sampler):
    """20,000 draws; chance gives a worse chi-square once in a thousand times."""
    logits = np.random.default_rng(1).normal(0, 1.5, 16)
    keys, n = jax.random.split(jax.random.key(0), 20_000), 20_000
    drawn = np.asarray(jax.jit(sampler.draw)(jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1)), keys))
    p, seen = filtered_in_numpy(sampler, logits), np.bincount(drawn, minlength=16)
    assert not seen[p == 0].any()
    some = p > 0
    assert some.sum() == 1 or chisquare(seen[some], p[some] * n).pvalue > 1e-3


def test_temperature_zero_takes_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (50, 30))
    drawn = GREEDY.draw(logits, jax.random.split(jax.random.key(1), 50))
    assert (drawn == logits.argmax(-1)).all() and drawn.dtype == jnp.int32


@pytest.mark.parametrize("fields, message", [
    (dict(temperature=-0.5), "temperature is -0.5"), (dict(top_k=0), "top_k is 0"), (dict(top_p=0.0), "top_p is 0.0"),
    (dict(top_p=1.5), "top_p is 1.5"), (dict(min_p=-0.1), "min_p is -0.1"),
])  # fmt: skip
def test_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**fields)


@pytest.mark.parametrize("change, message", [
    (dict(prompts=[]), "at least one token"), (dict(prompts=[[1], []]), "at least one token"),
    (dict(prompts=[[1], [64]]), "token 64, the vocabulary has 64"), (dict(prompts=[[3], [-2]]), "token -2, the vocabulary has 64"),
    (dict(max_tokens=0), "max_tokens is 0"), (dict(seeds=[1]), "1 seeds for 2 prompts"),
])  # fmt: skip
def test_errors_name_the_value(change, message, params):
    with pytest.raises(ValueError, match=message):
        sample(MODELS["llama"], params["llama"], **dict(prompts=[[1], [2]], max_tokens=3) | change)


def test_one_compilation_serves_prompts_of_nearby_lengths(params):
    from minllm.sample import _generate

    draw = partial(sample, replace(MODELS["llama"], softcap=50.0), params["llama"], max_tokens=3)
    draw([[1] * 9, [2] * 12])
    before = _generate._cache_size()
    draw([[3] * 16, [4] * 3], seeds=9)
    assert _generate._cache_size() == before
