"""The engine's promise: a request's tokens are those of a lone run, and its logits have the same bits, whatever runs beside it."""

import random
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import attention
from jax.experimental import topologies

import minllm
from minllm import spec
from minllm.data.tokenizer import Bytes
from minllm.layer import Context, Execution, Pool
from minllm.layers.delta import GatedDeltaNet
from minllm.layers.mlp import GLU, silu
from minllm.layers.moe import MoE, Router
from minllm.layers.position import Alibi, DynamicNTKScaling, Rope
from minllm.layers.residual import PreNorm
from minllm.layers.ssm import Mamba
from minllm.layers.stack import Stack
from minllm.models import build
from minllm.models.gpt2 import gpt2
from minllm.models.llama import llama3
from minllm.models.mixtral import mixtral
from minllm.models.transformer import Decoder
from minllm.sample import Sampler, sample
from minllm.serve import Engine, Lookup, Request, Sampling
from minllm.serve.engine import _step
from minllm.serve.sampling import Knobs
from minllm.sharding import ALL, make_mesh, sharding
from minllm.weights import unstack
from minllm_kernels.mask import Full

V = 260
tiny = partial(llama3, D=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=V, scaling=None)
GREEDY = Sampling(temperature=0.0)
hybrid = Decoder(V, 32, (Stack((PreNorm(GatedDeltaNet(4, 2, 8)), PreNorm(attention())), 2),))
stateful = Decoder(V, 32, (Stack((PreNorm(Mamba(48, state=8, rank=4)), PreNorm(attention(position=None, relative=Alibi()))), 1),))
MODELS = {
    "llama": tiny(), "window": tiny(window=7), "mixtral": mixtral(D=32, layers=2, heads=4, kv_heads=2, hidden=24, vocab=V, experts=4),
    "gpt2": gpt2(D=32, layers=2, heads=4, vocab=V, length=96), "hybrid": hybrid, "stateful": stateful,
    "gemma_like": Decoder(
        V, 32, (Stack((PreNorm(attention(window=4, softcap=5.0)), PreNorm(GLU(48, silu)), PreNorm(attention(sinks=True))), 1),),
        tied=True, softcap=30.0),
}  # fmt: skip


def night(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def weights():
    return {name: minllm.init(model, jax.random.key(3)) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def engine(weights):
    """One engine of each kind, as a compilation takes seconds."""
    made = {}

    def make(name="llama", dtype=jnp.float32, **fields):
        key = name, dtype, tuple(sorted(fields.items()))
        if key not in made:
            p = jax.tree.map(lambda a: a.astype(dtype), weights[name])
            made[key] = Engine(MODELS[name], p, Bytes().build(), ends=(), **dict(length=96, slots=4, tile=4, page=4) | fields)
        one = made[key]
        assert not one.busy
        one.scheduler.pages.forget()
        return one

    return make


def prompts(count, seed=0, longest=30):
    """Some begin alike."""
    rng = random.Random(seed)
    roots = [[rng.randrange(V) for _ in range(longest)] for _ in range(3)]
    return [rng.choice(roots)[: rng.randrange(0, longest)] + [rng.randrange(V) for _ in range(rng.randrange(1, 6))] for _ in range(count)]


@pytest.mark.parametrize("name", [night(name) if name in ("window", "gpt2", "gemma_like") else name for name in MODELS])
def test_greedy_tokens_are_those_of_the_model(name, engine, weights):
    """Prefill in tiles, pages and row caches against the plain model on whole rows: each token is its likeliest, but for rounding."""
    model, p = MODELS[name], weights[name]
    logits = jax.jit(lambda tokens: model.apply(p, tokens, Context()).x)
    asked = [Request(prompt, 10, GREEDY, logprobs=3) for prompt in prompts(5, longest=20)]
    whole = np.zeros((5, 40), np.int32)
    answers = [choices[0] for choices in engine(name).run(asked)]
    for row, request, answer in zip(whole, asked, answers):
        row[: len(request.prompt) + 10] = [*request.prompt, *answer.ids]
    log = np.asarray(jax.nn.log_softmax(logits(whole)), np.float64)
    for i, (request, answer) in enumerate(zip(asked, answers)):
        assert len(answer.tokens) == 10 and answer.finish == "length"
        for j, token in enumerate(answer.tokens):
            there = log[i, len(request.prompt) + j - 1]
            assert there[token.id] >= there.max() - 2e-5           # float32 over a few layers
            assert abs(token.logprob - there[token.id]) <= 2e-5
            assert token.top[0] == (token.id, token.logprob) and list(token.top) == sorted(token.top, key=lambda one: -one[1])


def test_drawn_tokens_are_those_of_sample(engine, weights):
    """The same keys: `minllm.sample` of the same seeds gives the same text."""
    asked = prompts(6)
    sampler = dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01)
    ours = engine().run([Request(prompt, 12, Sampling(**sampler), seed=50 + i) for i, prompt in enumerate(asked)])
    theirs = sample(MODELS["llama"], weights["llama"], asked, 12, sampler=Sampler(**sampler), seeds=50)
    assert [choices[0].ids for choices in ours] == theirs


def logits_of(engine, requests):
    """Every logprob that was seen of each request: 64-bit prints of float32, so equal means equal bits."""
    return [[(token.id, token.logprob, token.top) for token in choices[0].tokens] for choices in engine.run(requests)]


@pytest.mark.parametrize("name, dtype", [
    ("llama", jnp.float32), ("mixtral", jnp.bfloat16), night("llama", jnp.bfloat16), night("mixtral", jnp.float32),
    night("hybrid", jnp.float32), night("hybrid", jnp.bfloat16),
])  # fmt: skip
def test_logits_have_the_same_bits_for_any_number_of_rows(name, dtype, engine):
    """1, 2, 16, 31 and 64 requests at once, the one in question at any place among them."""
    one = engine(name, dtype, slots=64, tile=8, budget=128)
    question = Request(prompts(1, seed=9)[0], 6, Sampling(temperature=0.7), seed=4, logprobs=20)
    alone = logits_of(one, [question])[0]
    for rows in (2, 16, 31, 64):
        others = [Request(prompt, 6, Sampling(top_k=5), seed=i, logprobs=2) for i, prompt in enumerate(prompts(rows - 1, seed=rows))]
        place = random.Random(rows).randrange(rows)
        one.scheduler.pages.forget()
        assert logits_of(one, [*others[:place], question, *others[place:]])[place] == alone, rows


def random_requests(count, seed):
    rng = random.Random(seed)
    kinds = [GREEDY, Sampling(), Sampling(temperature=0.8, top_p=0.9), Sampling(top_k=7, typical_p=0.8),
             Sampling(temperature=0.0, repetition_penalty=1.3, no_repeat_ngram=2), Sampling(frequency_penalty=0.5, presence_penalty=0.2),
             Sampling(temperature=0.0, logit_bias=((5, 3.0), (9, -100.0)), bad_words=((7,), (3, 4)))]  # fmt: skip
    return [
        Request(prompt, rng.randrange(1, 14), rng.choice(kinds), seed=rng.randrange(1000), min_tokens=rng.randrange(2),
                stop_tokens=(rng.randrange(V),) * rng.randrange(2), logprobs=rng.choice([None, 2]))
        for prompt in prompts(count, seed)
    ]  # fmt: skip


def in_disorder(engine, requests, order, rng):
    """Requests that arrive while others run, some of which are cancelled and asked for again."""
    waiting, ids, got = list(order), {}, {}
    while waiting or engine.busy:
        for _ in range(rng.randrange(3)):
            if waiting:
                i = waiting.pop()
                id = ids[i] = engine.submit(requests[i])
                got[id] = []
                if rng.random() < 0.1:
                    for _ in range(rng.randrange(4)):
                        collect(engine.step(), got)
                    engine.cancel(id)
                    if got[id] and got[id][-1] is not None:         # it has not ended by itself
                        waiting.insert(0, i)
                    elif not got[id]:
                        waiting.insert(0, i)
        collect(engine.step(), got)
    return [[t for t in got[ids[i]] if t is not None] for i in range(len(requests))]


def collect(events, got):
    for event in events:
        got[event.request] += [(token.id, token.logprob, token.top) for token in event.tokens]
        if event.finish and event.finish != "cancelled":
            got[event.request].append(None)


TIGHT = dict(pages=26, budget=9)
GUESSING = dict(guess=Lookup(3, 2, 1), **TIGHT)


@pytest.mark.parametrize("name, dtype, fields, count, orders", [
    ("llama", jnp.float32, GUESSING, 24, 3), ("hybrid", jnp.float32, dict(pages=26), 24, 2), night("llama", jnp.bfloat16, GUESSING, 24, 3),
    night("window", jnp.float32, TIGHT, 24, 3), night("mixtral", jnp.bfloat16, TIGHT, 24, 3),
    night("llama", jnp.float32, GUESSING, 200, 20), night("llama", jnp.bfloat16, GUESSING, 200, 20),
])  # fmt: skip
def test_every_request_gets_what_it_gets_alone(name, dtype, fields, count, orders, engine):
    """Random arrivals, a pool too small for all, a prefix cache, guesses and cancellations: tokens and logprobs to the bit."""
    requests = random_requests(count, seed=5)
    roomy = engine(name, dtype)
    alone = []
    for request in requests:
        roomy.scheduler.pages.forget()
        alone.append(logits_of(roomy, [request])[0])
    busy = engine(name, dtype, **fields)
    for seed in range(orders):
        rng = random.Random(seed)
        order = list(range(len(requests)))
        rng.shuffle(order)
        assert in_disorder(busy, requests, order, rng) == alone
    stats = busy.stats()
    assert stats["pages_held"] == 0 and stats["preempted"] > 0
    assert name == "hybrid" or stats["cached"] > 0
    assert "guess" not in fields or stats["right"] > 0


def test_nothing_compiles_while_it_serves(engine):
    one = engine()
    count = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: count.append(name) if "compile" in name else None)
    one.run(random_requests(12, seed=3))
    one.run([Request([1, 2, 3, 4, 5, 6], 5, n=3)])
    assert not [name for name in count if "backend_compile" in name], count


def test_choices_are_requests_with_seeds_that_count_up(engine):
    one = engine()
    prompt = prompts(1, seed=2)[0]
    together = one.run([Request(prompt, 8, seed=10, n=4)])[0]
    assert [c.ids for c in together] == [one.run([Request(prompt, 8, seed=10 + i)])[0][0].ids for i in range(4)]
    assert len({tuple(c.ids) for c in together}) > 1


class Digits:
    """A grammar of two digits and then nothing but token 0."""

    def __init__(self):
        self.said = []

    def mask(self):
        mask = np.zeros(-(-V // 32), np.uint32)
        for token in range(48, 58) if len(self.said) < 2 else [0]:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def accept(self, token):
        self.said.append(token)


class Broken(Digits):
    def mask(self):
        raise RuntimeError("no such rule")


class Silent(Digits):
    def mask(self):
        return np.zeros(-(-V // 32), np.uint32)


def test_masks_hold_and_a_broken_one_ends_its_own_request_only(engine):
    one = engine()
    plain = Request([5, 6, 7], 6, seed=3)
    asked = [Request([1, 2], 6, seed=1, matcher=Digits, stop_tokens=(0,)), plain, Request([1, 2], 6, matcher=Broken),
             Request([1, 2], 6, GREEDY, matcher=Silent)]  # fmt: skip
    digits, free, broken, silent = (choices[0] for choices in one.run(asked))
    assert len(digits.ids) == 3 and all(48 <= t < 58 for t in digits.ids[:2]) and digits.ids[2] == 0 and digits.finish == "stop"
    assert digits.text == "".join(map(chr, digits.ids[:2]))
    assert free.ids == one.run([plain])[0][0].ids and free.finish == "length"
    assert (broken.finish, broken.message) == ("error", "the grammar failed: no such rule") and not broken.ids
    assert (silent.finish, silent.message) == ("error", "no token is allowed here")


def test_stop_tokens_least_lengths_and_stop_strings(engine):
    one = engine()
    free = one.run([Request([70, 71], 20, seed=2)])[0][0]
    end = free.ids[6]
    cut = free.ids.index(end) + 1
    short = one.run([Request([70, 71], 20, seed=2, stop_tokens=(end,))])[0][0]
    assert short.ids == free.ids[:cut] and short.finish == "stop"
    later = one.run([Request([70, 71], 20, seed=2, stop_tokens=(end,), min_tokens=cut)])[0][0]
    assert len(later.ids) >= cut and end not in later.ids[: cut - 1] and later.ids[: cut - 1] == free.ids[: cut - 1]
    letters = tuple((token, 60.0) for token in range(97, 101))
    text = one.run([Request([70], 30, Sampling(logit_bias=letters), seed=5)])[0][0].text
    assert len(text) == 30 and set(text) <= set("abcd")
    stop = text[11:14]
    at = text.index(stop)
    stopped = one.run([Request([70], 30, Sampling(logit_bias=letters), seed=5, stop=(stop, "zz"))])[0][0]
    assert stopped.text == text[:at] and stopped.finish == "stop"
    kept = one.run([Request([70], 30, Sampling(logit_bias=letters), seed=5, stop=(stop,), include_stop=True)])[0][0]
    assert kept.text == text[: at + 3]


def test_streams_run_together_and_leaving_one_frees_its_pages(engine):
    one = engine()
    a, b = Request([1, 2, 3], 12, seed=1), Request([4, 5], 12, seed=2)
    first, second = one.stream(a), one.stream(b)
    heard = [next(first), next(second), next(first)]
    held = one.stats()["pages_held"]
    second.close()
    assert one.stats()["pages_held"] < held and one.stats()["running"] == 1
    heard = [event for event in heard if event.request == heard[0].request] + list(first)
    assert [t.id for event in heard for t in event.tokens] == one.run([a])[0][0].ids and heard[-1].finish == "length"


@pytest.mark.parametrize("fields, message", [
    (dict(prompt=[]), "at least one token"), (dict(prompt=[V]), f"token {V}, the vocabulary has {V}"),
    (dict(max_tokens=0), "max_tokens is 0"), (dict(sampling=Sampling(logit_bias=((-1, 1.0),))), "token -1"),
    (dict(max_tokens=95), "more than the 96 tokens"), (dict(n=0), "n is 0"), (dict(logprobs=21), "logprobs is 21"),
    (dict(min_tokens=9), "min_tokens is 9"), (dict(stop=("",)), "empty stop string"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused_at_once(fields, message, engine):
    one = engine()
    with pytest.raises(ValueError, match=message):
        one.submit(Request(**dict(prompt=[1, 2], max_tokens=4) | fields))
    assert not one.busy


@pytest.mark.parametrize("model, message", [
    (Decoder(V, 32, (Stack((PreNorm(attention(mask=Full())),), 1),)), "looks ahead"),
    (Decoder(V, 32, (PreNorm(MoE(Router(4, 2), GLU(24), capacity=1.0)),)), "capacity"),
    (Decoder(V, 32, (PreNorm(attention(position=Rope(scaling=DynamicNTKScaling(2.0, 8)))),)), "longest"),
    (gpt2(D=32, layers=1, heads=4, vocab=V, length=64), "learned 64 positions"),
])  # fmt: skip
def test_models_that_cannot_keep_the_promise_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, {}, length=96)


@pytest.mark.parametrize("sizes", [dict(data=1), night(dict(tensor=2))], ids=str)
def test_the_step_compiles_for_a_tpu_and_writes_its_pages_in_place(sizes):
    """128 tokens against a pool of 256 MiB a device: the kernel is in the program, and what it needs beside is a small part of the pool."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(devices[: int(np.prod(list(sizes.values())))], **sizes)
    run = Execution(mesh=mesh, rules=replace(ALL, batch=None, seq=None, residual_seq=None))
    model = build("llama", layers=4, D=512, heads=8, kv_heads=4, head_dim=128, hidden=1024, vocab=1024)
    R, S, M = 128, 16, 64
    placed = lambda specs: spec.tree_map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or jnp.bfloat16, sharding=sharding(mesh, run.rules, s.axes, s.shape)), specs
    )
    cache = placed(model.cache(R, Pool(2048 * mesh.size, S, S * M), jnp.bfloat16))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)) // mesh.size
    assert size >= 2**28
    whole = sharding(mesh, ALL, "", ())
    some = lambda x: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), x)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), jax.eval_shape(unstack, placed(model.params())))
    ints = np.zeros(R, np.int32)
    args = some((ints, ints, ints > 0, np.zeros((R, M), np.int32), np.zeros((R, S * M), np.int32), Knobs.neutral(R, 1024)))
    step = jax.jit(partial(_step, model, run), donate_argnums=1)
    program = step.trace(params, cache, *args).lower(lowering_platforms=("tpu",)).compile()
    assert "paged_attention_decode" in program.as_text()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes <= size / 8, memory.temp_size_in_bytes / 2**20


def test_a_mesh_serves_the_same_tokens(weights):
    """Key/value heads over two devices. Sums over heads are in another order, so only likely ties could differ; none do here."""
    requests = [Request(prompt, 8, GREEDY) for prompt in prompts(4)]
    run = Execution(mesh=make_mesh(jax.devices()[:2], tensor=2))
    alone, spread = (
        [c[0].ids for c in Engine(MODELS["llama"], weights["llama"], length=48, slots=4, tile=4, page=4, run=r).run(requests)]
        for r in (Execution(), run)
    )
    assert alone == spread
