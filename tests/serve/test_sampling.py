"""The chain of settings against its definitions, a token at a time in NumPy, and against the logits processors of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from minllm.data.tokenizer import Bytes
from minllm.sample import Sampler
from minllm.serve.sampling import Knobs, Sampling, banned, draw, masked, min_p, penalize, top_k, top_p, typical
from minllm.serve.speculative import Lookup
from minllm.serve.text import Text

V = 50
LOGITS = np.random.default_rng(0).normal(0, 2, (12, V)).astype(np.float32)

DRAW = jax.jit(draw)


def kept(filtered):
    return ~np.isneginf(np.asarray(filtered))


def least_set(order, p, goal):
    """The first of `order` whose probabilities reach the goal."""
    mass, out = 0.0, np.zeros(len(p), bool)
    for i in order:
        if mass >= goal:
            break
        out[i] = True
        mass += p[i]
    return out


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


@pytest.mark.parametrize("k", [1, 2, 7, 49, 50, 1000])
def test_top_k(k):
    for ours, row in zip(kept(top_k(jnp.asarray(LOGITS), jnp.full(12, k))), LOGITS):
        assert (ours == (np.argsort(np.argsort(-row)) < k)).all()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_and_typical(p):
    settings = jnp.full(12, p, jnp.float32)
    x = jnp.asarray(LOGITS)
    for nucleus, local, row in zip(kept(top_p(x, settings)), kept(typical(x, settings)), LOGITS.astype(np.float64)):
        q = softmax(row)
        assert (nucleus == least_set(np.argsort(-q), q, p)).all()
        entropy = -(q * np.log(q)).sum()
        assert (local == least_set(np.argsort(np.abs(-np.log(q) - entropy)), q, p)).all()


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.7, 1.0])
def test_min_p(p):
    for ours, row in zip(kept(min_p(jnp.asarray(LOGITS), jnp.full(12, p))), LOGITS):
        q = softmax(row.astype(np.float64))
        assert (ours == (q >= p * q.max() * (1 - 1e-6))).all()


def test_ties_stay_together_and_minus_infinity_stays_out():
    x = jnp.asarray([[1.0, 1.0, 1.0, 0.0, -0.0, -jnp.inf, -5.0]])
    assert kept(top_k(x, jnp.array([2]))).tolist() == [[True] * 3 + [False] * 4]
    assert kept(top_k(x, jnp.array([4]))).tolist() == [[True] * 5 + [False] * 2]
    assert kept(top_k(x, jnp.array([7]))).tolist() == [[True] * 5 + [False, True]]
    assert kept(typical(x, jnp.array([0.9])))[0, 5] == False  # noqa: E712


def test_the_processors_of_transformers_agree():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(3)
    history = rng.integers(0, V, (12, 20))
    ids, x = torch.tensor(history), torch.tensor(LOGITS)
    ours, one = jnp.asarray(LOGITS), lambda value: jnp.full(12, value, jnp.float32)
    pairs = [
        (hf.RepetitionPenaltyLogitsProcessor(1.4), penalize(ours, jnp.asarray(history), jnp.full(12, 0), one(1.4), one(0), one(0))),
        (hf.TopKLogitsWarper(9), top_k(ours, jnp.full(12, 9))), (hf.TopPLogitsWarper(0.8), top_p(ours, one(0.8))),
        (hf.MinPLogitsWarper(0.2), min_p(ours, one(0.2))), (hf.TypicalLogitsWarper(0.7), typical(ours, one(0.7))),
    ]  # fmt: skip
    for processor, ours in pairs:
        theirs = processor(ids, x.clone()).numpy()
        assert (np.isneginf(theirs) == np.isneginf(ours)).all(), processor
        assert np.allclose(np.where(np.isneginf(theirs), 0, theirs), np.where(np.isneginf(ours), 0, ours), rtol=1e-6), processor
    few, gone = rng.integers(0, 4, (12, 20)), lambda row: set(np.flatnonzero(np.isneginf(row)).tolist())
    for n in (1, 2, 3):
        theirs = hf.NoRepeatNGramLogitsProcessor(n)(torch.tensor(few), x.clone()).numpy()
        for row, tokens in zip(theirs, few):
            assert set(banned(Sampling(no_repeat_ngram=n), tokens.tolist(), 0)) == gone(row)
    words = [[3], [1, 2], [0, 0, 1]]
    theirs = hf.NoBadWordsLogitsProcessor(words)(torch.tensor(few), x.clone()).numpy()
    for row, tokens in zip(theirs, few):
        assert set(banned(Sampling(bad_words=tuple(map(tuple, words))), tokens.tolist(), 0)) == gone(row)


def test_penalties_by_their_definition():
    """Presence and frequency count what was drawn, repetition the prompt as well."""
    history = jnp.asarray([[1, 2, 3, 3, 3, 4, -1, -1]])
    x = jnp.asarray([[0.5, 1.0, -1.0, 2.0, -2.0, 3.0]])
    ours = penalize(x, history, jnp.array([2]), jnp.array([2.0]), jnp.array([0.25]), jnp.array([0.5]))
    assert np.allclose(ours, [[0.5, 0.5, -2.0, 1.0 - 0.25 - 1.5, -4.0 - 0.25 - 0.5, 3.0]])


def knobs(samplings, seeds=None, index=0):
    k = Knobs.neutral(len(samplings), V)
    for r, s in enumerate(samplings):
        k.set(r, s, r if seeds is None else seeds[r], index, 0, 20)
    return k


KINDS = [
    Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.6, top_k=5), Sampling(top_p=0.7), Sampling(min_p=0.1),
    Sampling(typical_p=0.5), Sampling(repetition_penalty=1.5), Sampling(presence_penalty=1.0, frequency_penalty=0.3),
    Sampling(logit_bias=((3, 9.0), (4, -50.0))),
    Sampling(temperature=1.7, top_k=20, top_p=0.9, min_p=0.01),
]  # fmt: skip
HISTORY = jnp.asarray(np.random.default_rng(5).integers(0, V, (len(KINDS), 16)), jnp.int32)


def test_a_row_draws_the_same_with_any_neighbours():
    """Stages that only a neighbour asks for leave a row's bits alone."""
    x = LOGITS[: len(KINDS)]
    together = DRAW(x, HISTORY, knobs(KINDS))
    for r, kind in enumerate(KINDS):
        others = [Sampling(temperature=0.0)] * len(KINDS)
        others[r] = kind
        alone = DRAW(x, HISTORY, knobs(others))
        assert int(alone.token[r]) == int(together.token[r]) and float(alone.logprob[r]) == float(together.logprob[r])


@pytest.mark.parametrize("kind", [k for k in KINDS if k.temperature], ids=str)
def test_draws_follow_the_distribution(kind):
    """10,000 seeds; chance gives a worse chi-square once in a thousand times."""
    n, row = 10_000, np.tile(LOGITS[0, :16], (10_000, 1))
    history = jnp.tile(HISTORY[:1] % 16, (n, 1))
    k = Knobs.neutral(n, 16)
    for r in range(n):
        k.set(r, kind, r, 3, 0, 0)
    drawn = np.bincount(np.asarray(DRAW(row, history, k).token), minlength=16)
    x = LOGITS[0, :16].astype(np.float64)
    count = np.bincount(np.asarray(history[0]), minlength=16)
    x = np.where(count > 0, np.where(x > 0, x / kind.repetition_penalty, x * kind.repetition_penalty), x)
    x = x - kind.presence_penalty * (count > 0) - kind.frequency_penalty * count
    for token, add in kind.logit_bias:
        x[token] += add
    q = softmax(x / kind.temperature)
    for keep in (
        np.argsort(np.argsort(-q)) < (kind.top_k or 16), least_set(np.argsort(-q), q, kind.top_p or 2), q >= (kind.min_p or 0) * q.max(),
        least_set(np.argsort(np.abs(-np.log(q) + (q * np.log(q)).sum())), q, kind.typical_p or 2),
    ):  # fmt: skip
        if keep.all():
            continue
        q = np.where(keep, q, 0)
        q /= q.sum()
    some = q * n > 1e-6
    assert not drawn[~some].any()
    assert some.sum() == 1 or chisquare(drawn[some], q[some] * n * drawn[some].sum() / (q[some] * n).sum()).pvalue > 1e-3


def test_the_keys_are_those_of_sample():
    sampler = Sampler(temperature=0.9, top_k=12)
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 7))(jnp.arange(100, 112))
    theirs = sampler.draw(jnp.asarray(LOGITS), keys)
    k = knobs([Sampling(temperature=0.9, top_k=12)] * 12, seeds=range(100, 112), index=7)
    assert (DRAW(LOGITS, jnp.full((12, 4), -1, jnp.int32), k).token == theirs).all()


def test_masks_to_the_bit():
    allowed = [0, 5, 31, 32, 49]
    mask = np.zeros((12, 2), np.uint32)
    for v in allowed:
        mask[:, v // 32] |= np.uint32(1 << v % 32)
    assert (kept(masked(jnp.asarray(LOGITS), jnp.asarray(mask))) == np.isin(np.arange(V), allowed)).all()
    k = knobs([Sampling(temperature=0.0)] * 12)
    for r in range(12):
        k.ban(r, [int(LOGITS[r].argmax())])
    assert (DRAW(LOGITS, jnp.full((12, 4), -1, jnp.int32), k).token == np.argsort(LOGITS, 1)[:, -2]).all()
    k.mask[3] = 0
    assert DRAW(LOGITS, jnp.full((12, 4), -1, jnp.int32), k).stuck.tolist() == [r == 3 for r in range(12)]


@pytest.mark.parametrize("fields, message", [
    (dict(temperature=-1.0), "temperature is -1.0"), (dict(temperature=float("nan")), "finite number"),
    (dict(temperature=1e-9), "below 1e-5"), (dict(top_p=0.0), "top_p is 0.0"),
    (dict(top_k=0), "top_k is 0"), (dict(no_repeat_ngram=0), "no_repeat_ngram is 0"),
    (dict(repetition_penalty=0.0), "repetition_penalty is 0.0"),
    (dict(bad_words=((),)), "bad word has no tokens"), (dict(logit_bias=((1, float("inf")),)), "finite number"),
    (dict(logit_bias=tuple((i, 1.0) for i in range(321))), "names 321 tokens"),
])  # fmt: skip
def test_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_text_comes_in_whole_characters():
    """Byte by byte: every piece is valid text, and together they are the text."""
    whole = "naïve — 漢字 😀 �!"
    text = Text(Bytes().build(), [65])
    pieces = [text.add(byte) for byte in whole.encode()] + [text.end()]
    assert "".join(pieces) == whole and max(map(len, pieces)) == 1
    cut = Text(Bytes().build(), [65])
    assert [cut.add(b) for b in "é".encode()[:1]] == [""] and cut.end() == "�"


@pytest.mark.parametrize("include", [False, True])
def test_nothing_of_a_stop_string_is_shown(include):
    text, shown = Text(Bytes().build(), [65], ("END", "ENOUGH"), include), ""
    for byte in b"aEaENaENDb":
        shown += text.add(byte)
        assert not shown.endswith("EN")
        if text.stopped:
            break
    assert shown + text.end() == ("aEaENaEND" if include else "aEaENa")
    open_end = Text(Bytes().build(), [65], ("END",))
    assert "".join(open_end.add(b) for b in b"xEN") == "x" and open_end.end() == "EN"


def test_lookup_guesses_what_followed_the_last_time():
    look = Lookup(ahead=3, longest=2, shortest=1)
    assert look([1, 2, 3, 4, 9, 1, 2], 10) == [3, 4, 9]
    assert look([1, 2, 3, 4, 9, 1, 2], 2) == [3, 4]
    assert look([5, 7, 5, 8, 5], 10) == [8, 5]          # the later place wins
    assert look([1, 2, 3], 10) == [] and look([1], 10) == []
    with pytest.raises(ValueError, match="shortest <= longest"):
        Lookup(longest=1, shortest=2)
