"""python -m minllm.generate: a GGUF file, a Hugging Face folder and a run of ours, to continue and to chat; and what it refuses."""

import io
import sys

import jax
import pytest

import minllm
from minllm import generate, models, pretrained
from minllm.data.tokenizer import BPE
from minllm.interop import gguf, hf
from minllm.sample import Sampler, sample

CHAT = (
    "{% for m in messages %}{{ '<bos>' + m.role + ': ' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    made = models.build("llama", D=32, layers=1, heads=2, kv_heads=1, hidden=64, vocab=300, scaling=None)
    live = BPE(vocab_size=300).build(lambda limit: ["the quick brown fox jumps over the lazy dog; naïve Größe 北京 " * 3] * 9)
    return made, jax.tree.map(lambda a: 4 * a, minllm.init(made, jax.random.key(0))), live


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    gguf.save(folder / "model.gguf", *model[:2], tokenizer=model[2], chat_template=CHAT)
    hf.save(folder / "hf", *model)
    (folder / "hf/chat_template.jinja").write_text(CHAT)
    return {"gguf": folder / "model.gguf", "hf": folder / "hf"}


def expected(model, text, count):
    made, params, live = model
    return live.decode(sample(made, params, [live.encode(text).tolist()], count, sampler=Sampler(temperature=0.0), stop=(live.eos,))[0])


@pytest.mark.parametrize("which", ["gguf", "hf"])
def test_it_continues_a_text(which, places, model, capsys):
    arguments = ["--prompt", "the quick", "--max-tokens", "20", "--temperature", "0"]
    assert generate.main(["--model", str(places[which]), *arguments]) == 0
    said = capsys.readouterr()
    assert said.out == "the quick" + expected(model, "the quick", 20) + "\n"
    assert "loaded in" in said.err and "tokens/s" in said.err


@pytest.mark.parametrize("which", ["gguf", "hf"])
def test_it_chats(which, places, model, capsys, monkeypatch):
    """Two turns from standard input: the second prompt holds the first answer, as text."""
    asked = []
    real = model[2].__class__.encode_ranges
    monkeypatch.setattr(model[2].__class__, "encode_ranges", lambda self, text, *more: (asked.append(text), real(self, text, *more))[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand <eos> more\n\n"))
    arguments = ["--chat", "--system", "Be brief.", "--max-tokens", "6", "--temperature", "0"]
    assert generate.main(["--model", str(places[which]), *arguments]) == 0
    first, second = capsys.readouterr().out.rstrip("\n").split("\n")[:1], asked[1]
    assert asked[0] == "<bos>system: Be brief.<eos><bos>user: hello<eos><bos>assistant: "
    assert second.startswith(asked[0] + first[0]) and second.endswith("<bos>user: and <eos> more<eos><bos>assistant: ")


def test_special_tokens_in_a_message_are_text(places, model):
    """Typed by a user, <eos> is five characters."""
    from minllm.data.chat import Template

    live = model[2]
    rendered = Template(CHAT, tuple(live.specials)).prompt([{"role": "user", "content": "a<eos>b"}])
    ids = live.encode_ranges(rendered.text, rendered.special, ())[0].tolist()
    assert ids.count(live.eos) == 1 and ids.count(live.bos) == 2 and rendered.learned == ()


@pytest.mark.parametrize("arguments, message", [
    (["--model", "nowhere", "--prompt", "a"], "nowhere is no model"),
    (["--model", "GGUF", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
    (["--model", "GGUF", "--prompt", "a", "--max-tokens", "0"], "max_tokens is 0"),
])  # fmt: skip
def test_errors_are_one_sentence(arguments, message, places, capsys):
    assert generate.main([str(places["gguf"]) if word == "GGUF" else word for word in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("error: ")


def test_a_model_without_a_template_does_not_chat(model, tmp_path, capsys):
    gguf.save(tmp_path / "plain.gguf", *model[:2], tokenizer=model[2])
    assert generate.main(["--model", str(tmp_path / "plain.gguf"), "--chat", "--prompt", "hi"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_pretrained_knows_gguf(places, model):
    found = pretrained.load(places["gguf"])
    assert pretrained.kind(places["gguf"]) == "gguf" and pretrained.describe(places["gguf"]) == found.model
    assert found.tokenizer.vocab_size == 300 and pretrained.chat_template(places["gguf"]) == CHAT
    assert pretrained.chat_template(places["hf"]) == CHAT and pretrained.opening(places["hf"], model[2]) == []
