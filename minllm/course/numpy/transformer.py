"""The encoder-decoder Transformer of 2017, trained by hand.

    memory = encoder(source)         x = norm(x + attention(x))    x = norm(x + mlp(x))
    logits = decoder(target, memory) the same, with attention to the memory between the two; logits = x E^T

Vaswani et al. 2017, arXiv 1706.03762, section 3: post-norm, sinusoidal positions, ReLU, embeddings times sqrt(D), one table for both
embeddings and the head, label smoothing. (Its dropout is left out.) Run it, and it learns to write backwards:
python -m minllm.course.numpy.transformer
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from minllm.course.numpy.adam import Adam
from minllm.course.numpy.attention import causal, multi_head, multi_head_init
from minllm.course.numpy.layers import Back, Tree, cross_entropy, embedding, layer_norm, layer_norm_init, mlp, mlp_init, relu
from minllm.course.numpy.position import sinusoidal

BEGIN = 0  # the token that a target starts with


@dataclass(frozen=True)
class Transformer:
    """The defaults are the paper's base model (table 3): 6 + 6 layers."""

    vocab: int
    D: int = 512
    layers: int = 6
    heads: int = 8
    hidden: int = 2048

    def init(self, seed: int = 0) -> Tree:
        rng = np.random.default_rng(seed)
        post = lambda inner: {"inner": inner, "norm": layer_norm_init(self.D)}
        attend, feed = lambda: post(multi_head_init(rng, self.D)), lambda: post(mlp_init(rng, self.D, self.hidden))
        return {
            "embed": rng.normal(0, self.D**-0.5, (self.vocab, self.D)),
            "encoder": [{"self": attend(), "mlp": feed()} for _ in range(self.layers)],
            "decoder": [{"self": attend(), "cross": attend(), "mlp": feed()} for _ in range(self.layers)],
        }

    def _embed(self, p: Tree, tokens: Int[np.ndarray, "B T"]) -> tuple[Float[np.ndarray, "B T D"], Back]:
        x, back = embedding(p["embed"], tokens)
        return x * math.sqrt(self.D) + sinusoidal(tokens.shape[1], self.D), lambda dx: back(dx * math.sqrt(self.D))

    def encode(self, p: Tree, source: Int[np.ndarray, "B S"]) -> tuple[Float[np.ndarray, "B S D"], Back]:
        """back(dmemory) gives the gradients of the embedding table and of the encoder's layers."""
        x, embed_back = self._embed(p, source)
        backs = []
        for layer in p["encoder"]:
            x, self_back = _post(layer["self"], x, lambda q, x: multi_head(q, x, x, self.heads))
            x, mlp_back = _post(layer["mlp"], x, lambda q, x: mlp(q, x, relu))
            backs.append((self_back, mlp_back))

        def back(dx):
            layers = []
            for self_back, mlp_back in reversed(backs):
                dx, feed = mlp_back(dx)
                dx, dmemory, attend = self_back(dx)
                dx = dx + dmemory
                layers.append({"self": attend, "mlp": feed})
            return embed_back(dx), layers[::-1]

        return x, back

    def decode(
        self, p: Tree, target: Int[np.ndarray, "B T"], memory: Float[np.ndarray, "B S D"]
    ) -> tuple[Float[np.ndarray, "B T V"], Back]:
        """Logits of the token after each; back(dlogits) gives dmemory and the gradients of the embedding table and the decoder's layers."""
        x, embed_back = self._embed(p, target)
        seen, backs = causal(target.shape[1]), []
        for layer in p["decoder"]:
            x, self_back = _post(layer["self"], x, lambda q, x: multi_head(q, x, x, self.heads, seen))
            x, cross_back = _post(layer["cross"], x, lambda q, x: multi_head(q, x, memory, self.heads))
            x, mlp_back = _post(layer["mlp"], x, lambda q, x: mlp(q, x, relu))
            backs.append((self_back, cross_back, mlp_back))

        def back(dlogits):
            dembed = np.einsum("btv,btd->vd", dlogits, x, optimize=True)
            dx, dmemory, layers = dlogits @ p["embed"], np.zeros_like(memory), []
            for self_back, cross_back, mlp_back in reversed(backs):
                dx, feed = mlp_back(dx)
                dx, dseen, cross = cross_back(dx)
                dmemory = dmemory + dseen  # every layer of the decoder reads the memory
                dx, dkv, attend = self_back(dx)
                dx = dx + dkv
                layers.append({"self": attend, "cross": cross, "mlp": feed})
            return dmemory, dembed + embed_back(dx), layers[::-1]

        return x @ p["embed"].T, back

    def loss(self, p: Tree, source: Int[np.ndarray, "B S"], target: Int[np.ndarray, "B T"], smoothing: float = 0.1) -> tuple[float, Tree]:
        """Mean nats of each target token given the source and the target tokens before it, and the gradients."""
        before = np.concatenate([np.full((len(target), 1), BEGIN), target[:, :-1]], 1)
        memory, encoder_back = self.encode(p, source)
        logits, decoder_back = self.decode(p, before, memory)
        loss, dlogits = cross_entropy(logits, target, smoothing)
        dmemory, dembed, decoder = decoder_back(dlogits)
        dembed_source, encoder = encoder_back(dmemory)
        return loss, {"embed": dembed + dembed_source, "encoder": encoder, "decoder": decoder}

    def translate(self, p: Tree, source: Int[np.ndarray, "B S"], count: int) -> Int[np.ndarray, "B T"]:
        """`count` tokens for each source, the likeliest at each step."""
        memory, _ = self.encode(p, source)
        target = np.full((len(source), 1), BEGIN)
        for _ in range(count):
            logits, _ = self.decode(p, target, memory)
            target = np.concatenate([target, logits[:, -1:].argmax(-1)], 1)
        return target[:, 1:]


def _post(p: Tree, x: Float[np.ndarray, "B T D"], f: Callable) -> tuple[Float[np.ndarray, "B T D"], Back]:
    """norm(x + f(x)). back(dy) gives dx, whatever f's back gives between its dx and its parameters, and the parameters' gradients."""
    h, inner_back = f(p["inner"], x)
    y, norm_back = layer_norm(p["norm"], x + h)

    def back(dy):
        dsum, norm = norm_back(dy)
        dx, *between, inner = inner_back(dsum)
        return dsum + dx, *between, {"inner": inner, "norm": norm}

    return y, back


def warmup(step: int, D: int, steps: int) -> float:
    """The paper's rate (section 5.3): it grows for `steps` steps, then falls with the square root."""
    return D**-0.5 * min((step + 1) ** -0.5, (step + 1) * steps**-1.5)


def train(model: Transformer, length: int, steps: int, rows: int = 64, report: Callable[[int, float], None] | None = None) -> Tree:
    """Parameters of a model that writes rows of `length` random tokens backwards."""
    rng, adam, p = np.random.default_rng(1), Adam(b2=0.98, eps=1e-9), model.init()
    state = adam.init(p)
    for step in range(steps):
        source = rng.integers(1, model.vocab, (rows, length))
        loss, grads = model.loss(p, source, source[:, ::-1])
        p, state = adam.update(p, grads, state, warmup(step, model.D, max(steps // 4, 1)))
        if report:
            report(step, loss)
    return p


def accuracy(model: Transformer, p: Tree, length: int, rows: int = 200) -> float:
    """The share of right tokens in rows that training has not seen (of vocab^length there are enough)."""
    source = np.random.default_rng(2).integers(1, model.vocab, (rows, length))
    return float((model.translate(p, source, length) == source[:, ::-1]).mean())


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, shows rows written backwards, and gives back the accuracy."""
    parser = argparse.ArgumentParser(prog="python -m minllm.course.numpy.transformer", description="Learn to write backwards, in NumPy.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=8)
    args = parser.parse_args(argv)
    model, began = Transformer(vocab=27, D=64, layers=2, heads=4, hidden=128), time.monotonic()

    def report(step: int, loss: float) -> None:
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:4d}   loss {loss:.3f}   {time.monotonic() - began:5.1f} s", flush=True)

    p = train(model, args.length, args.steps, report=report)
    source = np.random.default_rng(3).integers(1, model.vocab, (4, args.length))
    spell = lambda row: "".join(chr(96 + i) for i in row)
    for row, out in zip(source, model.translate(p, source, args.length)):
        print(f"{spell(row)} -> {spell(out)}")
    right = accuracy(model, p, args.length)
    print(f"right tokens of 200 new rows: {right:.2%}")
    return right


if __name__ == "__main__":
    main()
