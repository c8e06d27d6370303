"""Law 8 for every family: its tiny model in `transformers`, read by us from its folder, gives the same logits, gradients and tokens, and
goes back as the same bytes."""

import shutil

import pytest
from parity import FAMILIES, Pair

# In the default suite: a family for each kind of layer. All of them every night.
SOME = {"llama", "mistral", "gemma3_text", "gpt2"}
nightly = pytest.mark.nightly


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    yield Pair(request.param, folder / request.param)
    shutil.rmtree(folder)


def test_logits(pair):
    """2e-5: the inventory's bar for logits of size one in float32, at 5, 65 and 700 tokens."""
    assert max(pair.logit_errors) <= 2e-5, pair.logit_errors


def test_round_trip(pair):
    pair.round_trip()


@pytest.mark.parametrize("pair", [name if name in SOME else pytest.param(name, marks=nightly) for name in FAMILIES], indirect=True)
def test_decoding(pair):
    """1e-5: the inventory's bar for cached against full."""
    assert pair.decode_error <= 1e-5


@pytest.mark.parametrize("pair", [name if name in SOME else pytest.param(name, marks=nightly) for name in FAMILIES], indirect=True)
def test_gradients(pair):
    """1e-4 in relative L2 for each tensor: the inventory's bar."""
    worst = max(pair.gradient_errors, key=pair.gradient_errors.get)
    assert pair.gradient_errors[worst] <= 1e-4, (worst, pair.gradient_errors[worst])


@nightly
def test_greedy(pair):
    differ, ties = pair.greedy()
    assert differ == ties
