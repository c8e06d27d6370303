"""What the README shows is what happens: its Python runs, its configs load, its new layer keeps the laws, its pictures are there."""

import re
import sys
from pathlib import Path

import pytest
from examples import EXAMPLES, Example

from minllm.config import load, undecorated
from minllm.run import Run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_python_example_runs():
    names = {}
    exec(PYTHON[0], names)
    assert names["logits"].shape == (2, 16, names["model"].vocab)
    assert [len(text) for text in names["texts"]] == [8, 8]


def test_the_new_layer_keeps_the_laws(monkeypatch):
    """The layer that the README adds, under every law that a line in tests/examples.py gives it."""
    from laws import test_layer_laws as laws

    module = type(sys)("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
    module.__dict__["__name__"] = "readme"
    exec(next(code for code in PYTHON if "class Gate" in code), module.__dict__)
    monkeypatch.setitem(EXAMPLES, "gate", Example(module.Gate()))
    for law in (name for name in vars(laws) if name.startswith("test_law_")):
        getattr(laws, law)("gate")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_config_loads(file):
    assert load(Run, file).value.steps > 0
    assert undecorated(Run) == []


def test_every_picture_and_command_exists():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 10_000
    for command in re.findall(r"scripts/run (\w+)", README):
        assert command == "test" or (ROOT / f"minllm/{command}.py").exists()
