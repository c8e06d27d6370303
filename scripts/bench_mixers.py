"""Token mixers side by side: python scripts/bench_mixers.py [scaling] [language] [recall] [--steps N] [--seeds N] [--out FOLDER]

    scaling   seconds of softmax and linear attention against the length, the slope of both, and their ratio at 4,096 tokens
    language  models of equal size on the Python standard library: held-out nats a byte, tokens/s, bytes of decode cache
    recall    multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 3): the share of right answers

Each writes FOLDER/NAME.csv and NAME.png. Models differ in their mixer alone: the feed-forward width makes up for the mixer's parameters.
"""

import argparse
import csv
import statistics
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from minllm import spec
from minllm.layer import Context
from minllm.layers.attention import Attention
from minllm.layers.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from minllm.layers.linear import GatedLinearAttention, LinearAttention, Retention
from minllm.layers.mlp import GLU, silu
from minllm.layers.norm import RMSNorm
from minllm.layers.position import Rope
from minllm.layers.residual import PreNorm
from minllm.layers.ssm import Mamba2
from minllm.layers.stack import Stack
from minllm.models.transformer import Decoder
from minllm_kernels import attention, linear_attention

matplotlib.use("agg")
import matplotlib.pyplot as plt

D, N, H = 128, 4, 32


def softmax(**fields):
    return Attention(**{"heads": N, "kv_heads": N, "head_dim": H, "position": Rope(), **fields})


MIXERS = {  # a pattern of mixers each, repeated to the depth
    "attention": (softmax(),),
    "grouped queries": (softmax(kv_heads=1),),
    "sliding window": (softmax(window=32),),
    "linear": (LinearAttention(N, H),),
    "retention": (Retention(N, H, H),),
    "GLA": (GatedLinearAttention(N, H, H),),
    "DeltaNet": (DeltaNet(N, N, H),),
    "Gated DeltaNet": (GatedDeltaNet(N, N, H),),
    "KDA": (KimiDeltaAttention(N, N, H),),
    "Mamba-2": (Mamba2(2 * N, H, 32),),
    "hybrid 3:1": (*(GatedDeltaNet(N, N, H),) * 3, softmax()),
}


def model(mixers, vocab, layers, budget=None) -> Decoder:
    """`layers` blocks; with a budget the feed-forward width is the one whose number of parameters comes nearest to it."""

    def build(hidden):
        block = tuple(part for mixer in mixers for part in (PreNorm(mixer), PreNorm(GLU(hidden, silu))))
        return Decoder(vocab, D, (Stack(block, layers // len(mixers)),), RMSNorm(), tied=True)

    return build(256 if budget is None else max(8, round((budget - spec.count(build(8).params())) / (3 * D * layers)) + 8))


def train(net, batches, steps, rate):
    """(params, seconds a step): AdamW with a linear warm-up and a cosine, on batches of (tokens, targets, weights)."""
    params = spec.init(net.params(), jax.random.key(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 10 + 1, steps)))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(lambda p: loss(net, p, batch)[0])(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    times = []
    for i in range(steps):
        start = time.perf_counter()
        params, state, value = step(params, state, batches(i))
        value.block_until_ready()
        times.append(time.perf_counter() - start)
    return params, statistics.median(times[1:] or times)


def loss(net, params, batch):
    """(mean loss, share of right answers) over the positions that count."""
    tokens, targets, weights = batch
    logits = net.apply(params, tokens, Context()).x.astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (logits.argmax(-1) == targets) * weights
    return (each * weights).sum() / weights.sum(), right.sum() / weights.sum()


def cache_bytes(net, S):
    """A decode cache of one row of S tokens, in bfloat16 where the layer does not ask for more."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(spec.abstract(net.cache(1, S, jnp.bfloat16))))


# --- scaling ----------------------------------------------------------------------------------------------------------------------


def seconds(f, *args, rounds):
    f(*args)[0].block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f(*args)[0].block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def scaling(options):
    """One row of 4 heads of 64, float32, forward: the faster of our softmax attention and jax.nn.dot_product_attention."""
    rows = []
    for T in [256, 512, 1024, 2048, 4096, 8192]:
        q, k, v = (jax.random.normal(jax.random.key(i), (1, T, 4, 64)) for i in range(3))
        pos = jnp.arange(T)[None]
        ours = jax.jit(lambda q, k, v, pos=pos: (attention(q, k, v, q_pos=pos, kv_pos=pos),))
        theirs = jax.jit(lambda q, k, v: (jax.nn.dot_product_attention(q, k, v, is_causal=True),))
        linear = jax.jit(linear_attention)
        rounds = max(3, 2**15 // T)
        dot = {"softmax (ours)": seconds(ours, q, k, v, rounds=rounds), "softmax (jax.nn)": seconds(theirs, q, k, v, rounds=rounds)}
        rows.append({"tokens": T, **dot, "linear": seconds(linear, q, k, v, rounds=rounds)})
        rows[-1]["ratio"] = min(dot.values()) / rows[-1]["linear"]
        print(rows[-1], flush=True)
    for name in ("softmax (ours)", "softmax (jax.nn)", "linear"):
        slope = np.polyfit(np.log([r["tokens"] for r in rows[2:]]), np.log([r[name] for r in rows[2:]]), 1)[0]
        print(f"{name}: seconds grow like tokens^{slope:.2f}")
        plt.loglog([r["tokens"] for r in rows], [r[name] for r in rows], "o-", label=f"{name}, slope {slope:.2f}")
    plt.xlabel("tokens"), plt.ylabel("seconds"), plt.legend()
    return rows


# --- language ---------------------------------------------------------------------------------------------------------------------


def language(options):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).astype(np.int32)
    cut, B, T = int(len(text) * 0.95), 16, 256

    def sample(part, seed):
        at = np.random.default_rng(seed).integers(0, len(part) - T - 1, B)
        window = np.stack([part[i : i + T + 1] for i in at])
        return jnp.asarray(window[:, :-1]), jnp.asarray(window[:, 1:]), jnp.ones((B, T))

    budget, rows = spec.count(model(MIXERS["attention"], 256, 4).params()), []
    for name, mixers in MIXERS.items():
        net = model(mixers, 256, 4, budget)
        held = jax.jit(lambda p, b, net=net: loss(net, p, b)[0])
        for seed in range(options.seeds):
            params, second = train(net, lambda i, seed=seed: sample(text[:cut], (seed, i)), options.steps, 2e-3)
            value = statistics.mean(float(held(params, sample(text[cut:], (99, i)))) for i in range(8))
            rows.append({"mixer": name, "seed": seed, "parameters": spec.count(net.params()), "nats a byte": round(value, 4),
                         "tokens/s": round(B * T / second), "cache bytes at 8192": cache_bytes(net, 8192)})  # fmt: skip
            print(rows[-1], flush=True)
    bars(rows, "nats a byte")
    return rows


# --- recall -----------------------------------------------------------------------------------------------------------------------


def recall_batch(seed, pairs, B=64, vocab=256):
    """`pairs` keys and their values, then the keys in another order: after each stands its value, which is what counts."""
    r = np.random.default_rng(seed)
    keys = np.stack([r.permutation(vocab // 2)[:pairs] for _ in range(B)])
    values = r.integers(vocab // 2, vocab, (B, pairs))
    order = np.stack([r.permutation(pairs) for _ in range(B)])
    first = np.stack([keys, values], -1).reshape(B, -1)
    again = np.stack([np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)], -1).reshape(B, -1)
    row = np.concatenate([first, again], 1).astype(np.int32)
    weights = np.zeros(row.shape, np.float32)
    weights[:, 2 * pairs :: 2] = 1
    return jnp.asarray(row[:, :-1]), jnp.asarray(row[:, 1:]), jnp.asarray(weights[:, :-1])


def recall(options):
    budget, rows = spec.count(model(MIXERS["attention"], 256, 4).params()), []
    for name, mixers in MIXERS.items():
        net = model(mixers, 256, 4, budget)
        held = jax.jit(lambda p, b, net=net: loss(net, p, b)[1])
        for seed in range(options.seeds):
            params, second = train(net, lambda i, seed=seed: recall_batch((seed, i), options.pairs), options.steps, 2e-3)
            right = statistics.mean(float(held(params, recall_batch((99, i), options.pairs))) for i in range(8))
            rows.append({"mixer": name, "seed": seed, "pairs": options.pairs, "right": round(right, 4), "seconds a step": round(second, 4)})
            print(rows[-1], flush=True)
    bars(rows, "right")
    return rows


def bars(rows, what):
    names = list(dict.fromkeys(r["mixer"] for r in rows))
    values = [[r[what] for r in rows if r["mixer"] == name] for name in names]
    spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
    plt.barh(names, [statistics.mean(v) for v in values], xerr=spread)
    plt.xlabel(what)


BENCHES = {"scaling": scaling, "language": language, "recall": recall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=32, help="recall: keys to remember")
    parser.add_argument("--out", type=Path, default=Path("runs/mixers"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHES):
        parser.error(f"{min(unknown)!r} is none of {', '.join(BENCHES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or BENCHES:
        plt.figure(figsize=(7, 4), layout="constrained")
        rows = BENCHES[name](options)
        with open(options.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plt.savefig(options.out / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
