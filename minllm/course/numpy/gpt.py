"""A GPT, trained by hand: forward, backward, Adam.

    x = E[tokens] + P        x += attention(norm(x))        x += mlp(norm(x))        logits = norm(x) E^T

Radford et al. 2019 (GPT-2): pre-norm, learned positions, GELU, the embedding table is the head too. Run it, and it learns to write its own
source: python -m minllm.course.numpy.gpt
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from minllm.course.numpy.adam import Adam
from minllm.course.numpy.attention import causal, multi_head, multi_head_init
from minllm.course.numpy.layers import Back, Tree, cross_entropy, embedding, gelu, layer_norm, layer_norm_init, mlp, mlp_init
from minllm.course.numpy.position import alibi, rotary, sinusoidal


@dataclass(frozen=True)
class GPT:
    """context: the longest row. positions: learned as in GPT-2, or one of the three of `position`."""

    vocab: int
    context: int = 64
    D: int = 64
    layers: int = 2
    heads: int = 4
    positions: Literal["learned", "sinusoidal", "rotary", "alibi"] = "learned"

    def init(self, seed: int = 0) -> Tree:
        """The layers that write to the residual stream start smaller, so that its variance does not grow with depth."""
        rng, out_std = np.random.default_rng(seed), 0.02 / (2 * self.layers) ** 0.5
        block = lambda: {
            "attention_norm": layer_norm_init(self.D), "attention": multi_head_init(rng, self.D, out_std),
            "mlp_norm": layer_norm_init(self.D), "mlp": mlp_init(rng, self.D, 4 * self.D, out_std),
        }  # fmt: skip
        p = {"embed": rng.normal(0, 0.02, (self.vocab, self.D)), "blocks": [block() for _ in range(self.layers)],
             "norm": layer_norm_init(self.D)}  # fmt: skip
        return p | ({"positions": rng.normal(0, 0.02, (self.context, self.D))} if self.positions == "learned" else {})

    def apply(self, p: Tree, tokens: Int[np.ndarray, "B T"]) -> tuple[Float[np.ndarray, "B T V"], Back]:
        """The logits; back(dlogits) gives the gradients of the parameters. ValueError for a row longer than the context."""
        T = tokens.shape[1]
        if T > self.context:
            raise ValueError(f"a row has {T} tokens, the context is {self.context}; cut it, or make a GPT with a larger context")
        x, embedding_back = embedding(p["embed"], tokens)
        if self.positions == "learned":
            x = x + p["positions"][:T]
        elif self.positions == "sinusoidal":
            x = x + sinusoidal(T, self.D)
        bias = alibi(self.heads, T) if self.positions == "alibi" else None
        turn = (lambda q: rotary(q, np.arange(T))) if self.positions == "rotary" else None
        backs = []
        for block in p["blocks"]:
            h, norm_back = layer_norm(block["attention_norm"], x)
            y, attention_back = multi_head(block["attention"], h, h, self.heads, causal(T), bias, turn)
            x = x + y
            h, mlp_norm_back = layer_norm(block["mlp_norm"], x)
            y, mlp_back = mlp(block["mlp"], h, gelu)
            x = x + y
            backs.append((norm_back, attention_back, mlp_norm_back, mlp_back))
        h, last_back = layer_norm(p["norm"], x)

        def back(dlogits):
            # the head: the embedding table is used twice, so it gets two gradients
            dembed = np.einsum("btv,btd->vd", dlogits, h, optimize=True)
            dx, dnorm = last_back(dlogits @ p["embed"])
            blocks = []
            for norm_back, attention_back, mlp_norm_back, mlp_back in reversed(backs):
                dh, dmlp = mlp_back(dx)
                dy, dmlp_norm = mlp_norm_back(dh)
                dx = dx + dy  # the sum x + f(x) hands its gradient to both: the stream is a straight way back
                dq, dkv, dattention = attention_back(dx)
                dy, dattention_norm = norm_back(dq + dkv)
                dx = dx + dy
                blocks.append({"attention_norm": dattention_norm, "attention": dattention, "mlp_norm": dmlp_norm, "mlp": dmlp})
            grads = {"embed": dembed + embedding_back(dx), "blocks": blocks[::-1], "norm": dnorm}
            if self.positions == "learned":
                grads["positions"] = np.zeros_like(p["positions"])
                grads["positions"][:T] = dx.sum(0)
            return grads

        return h @ p["embed"].T, back

    def loss(self, p: Tree, rows: Int[np.ndarray, "B T1"]) -> tuple[float, Tree]:
        """Mean nats of each token given those before it in its row, and the gradients."""
        logits, back = self.apply(p, rows[:, :-1])
        loss, dlogits = cross_entropy(logits, rows[:, 1:])
        return loss, back(dlogits)

    def generate(self, p: Tree, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest token, again and again, each time from the whole row."""
        row = list(prompt)
        for _ in range(count):
            logits, _ = self.apply(p, np.array([row[-self.context :]]))
            row.append(int(logits[0, -1].argmax()))
        return row[len(prompt) :]


def batch(text: Int[np.ndarray, " n"], rows: int, T: int, rng: np.random.Generator) -> Int[np.ndarray, "B T1"]:
    """Rows from random places of the text, one token longer than T: the last is only a target."""
    starts = rng.integers(0, len(text) - T, rows)
    return text[starts[:, None] + np.arange(T + 1)]


def unigram_entropy(text: Int[np.ndarray, " n"]) -> float:
    """The loss of a model that knows how frequent each token is, and nothing else."""
    share = np.unique(text, return_counts=True)[1] / len(text)
    return float(-(share * np.log(share)).sum())


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, writes a text, and gives back the last loss."""
    parser = argparse.ArgumentParser(prog="python -m minllm.course.numpy.gpt", description="Train a character GPT in NumPy.")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text file (default: this program)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", type=int, default=200, help="characters to write at the end")
    parser.add_argument("--positions", choices=["learned", "sinusoidal", "rotary", "alibi"], default="learned")
    args = parser.parse_args(argv)
    text = args.text.read_text("utf-8")
    alphabet = sorted(set(text))
    ids = np.array([alphabet.index(c) for c in text])
    model, adam, rng = GPT(len(alphabet), positions=args.positions), Adam(), np.random.default_rng(0)
    p = model.init()
    state, loss, began = adam.init(p), float("nan"), time.monotonic()
    print(f"{args.text.name}: {len(ids)} characters, {len(alphabet)} different; by their frequencies alone {unigram_entropy(ids):.3f} nats")
    for step in range(args.steps):
        loss, grads = model.loss(p, batch(ids, 16, model.context, rng))
        rate = 3e-3 * min(1, (step + 1) / 20) * (1 - step / args.steps)
        p, state = adam.update(p, grads, state, rate)
        if step % 25 == 0 or step == args.steps - 1:
            print(f"step {step:4d}   loss {loss:.3f}   {time.monotonic() - began:5.1f} s", flush=True)
    prompt = text[:16]
    written = model.generate(p, [alphabet.index(c) for c in prompt], args.write)
    print(repr(prompt), "goes on:", "".join(alphabet[i] for i in written), sep="\n")
    return loss


if __name__ == "__main__":
    main()
