"""Llama beyond what every family is tested for (test_parity.py): every generation and scaling, packed rows, prefill in pieces."""


import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from parity import SHAPE, Pair

from minllm import spec
from minllm.layer import Context
from minllm.weights import unstack

LONGROPE = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=128, short_factor=[1.0 + 0.1 * i for i in range(8)],
                long_factor=[1.0 + i for i in range(8)])  # fmt: skip
CONFIGS = {
    "llama2": dict(model_type="llama", **SHAPE | dict(num_key_value_heads=4)),
    "linear": dict(model_type="llama", **SHAPE, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "dynamic": dict(model_type="llama", **SHAPE | dict(max_position_embeddings=128), rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    "yarn": dict(model_type="llama", **SHAPE, rope_scaling=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=128,
                                                                beta_fast=16.0, attention_factor=1.1)),
    "longrope": dict(model_type="llama", **SHAPE | dict(max_position_embeddings=512), rope_scaling=LONGROPE),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_scalings(name, tmp_path, monkeypatch):
    """Beyond the trained length, each alone in its call: two of the scalings follow the length. (parity.Pair has a row for each.)"""
    monkeypatch.setitem(parity.FAMILIES, name, CONFIGS[name])
    pair = Pair(name, tmp_path / name)
    model, params = pair.loaded
    for T in (65, 700):
        ours = np.asarray(jax.jit(model.apply)(params, pair.tokens[None, :T], Context()).x[0])
        assert np.abs(ours - pair.logits(pair.tokens[:T])).max() <= 2e-5
    pair.round_trip()


@pytest.fixture(scope="module", params=["llama", "mistral"])
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("llama") / request.param)


def test_prefill_in_pieces_and_decoding(pair):
    """A prefill, a chunk longer than the window, short chunks and single tokens give the logits of the whole row at once."""
    model, params = pair.loaded
    loose, step, x = unstack(params), jax.jit(model.apply), pair.tokens[None, :640]
    cache, ends, parts = spec.init(model.cache(1, 640), jax.random.key(0)), [500, 600, 637, 638, 639, 640], []
    for start, end in zip([0, *ends], ends):
        out = step(loose, x[:, start:end], Context(positions=jnp.arange(start, end)[None]), cache)
        cache = out.cache
        parts.append(out.x[0])
    assert np.abs(np.concatenate(parts) - pair.logits(x[0])).max() <= 2e-5


def test_packed_documents(pair):
    """One row of three documents: segments here, positions that restart there; and each document alone."""
    model, params = pair.loaded
    x, lengths = pair.tokens[None, :200], [3, 90, 107]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    apply = jax.jit(model.apply)
    out = np.asarray(apply(params, x, Context(segments=jnp.asarray(segments, jnp.int32))).x[0])
    with torch.no_grad():
        theirs = pair.theirs(torch.tensor(x), position_ids=torch.tensor(positions), use_cache=False).logits[0].numpy()
    assert np.abs(out - theirs).max() <= 1e-5
    apart = [np.asarray(apply(params, part, Context()).x[0]) for part in np.split(x, np.cumsum(lengths)[:-1], 1)]
    assert np.abs(out - np.concatenate(apart)).max() <= 1e-5
