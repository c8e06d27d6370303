"""Rotary positions against Hugging Face: frequencies, magnitudes, rotated heads."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, modeling_rope_utils
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minllm.layer import positions_of
from minllm.layers.position import (
    AxialRope,
    DynamicNTKScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Sinusoidal,
    YarnScaling,
)

SHORT, LONG = tuple(1 + 0.03 * i for i in range(16)), tuple(1 + 0.9 * i for i in range(16))


def hf(rope_type, longest, original=None, **more):
    """Hugging Face's (rope parameters, max_position_embeddings)."""
    return {"rope_type": rope_type, **({"original_max_position_embeddings": original} if original else {}), **more}, longest


BANDS = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
FACTORS = dict(short_factor=list(SHORT), long_factor=list(LONG))
SCALINGS = {
    "llama3": (Llama3Scaling(), *hf("llama3", 131_072, 8192, **BANDS)),
    "llama3_tiny": (Llama3Scaling(4.0, 1.5, 3.0, 64), *hf("llama3", 256, 64, factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0)),
    "linear": (LinearScaling(4.0), *hf("linear", 64, factor=4.0)),
    "yarn": (YarnScaling(4.0, 4096), *hf("yarn", 16_384, 4096, factor=4.0)),
    "yarn_options": (YarnScaling(16.0, 2048, 16.0, 2.0, 1.25, round_dims=False),
                     *hf("yarn", 32_768, 2048, factor=16.0, beta_fast=16, beta_slow=2, attention_factor=1.25, truncate=False)),
    "dynamic": (DynamicNTKScaling(2.0, 32), *hf("dynamic", 32, factor=2.0)),
    "longrope": (LongRopeScaling(SHORT, LONG, 4.0, 32), *hf("longrope", 128, 32, factor=4.0, **FACTORS)),
    "longrope_temperature": (LongRopeScaling(SHORT, LONG, 1.0, 32, 1.1),
                             *hf("longrope", 128, 32, factor=1.0, attention_factor=1.1, **FACTORS)),
}  # fmt: skip
ON_DEVICE = ("dynamic", "longrope", "longrope_temperature")  # they depend on the length of the call


def config(name, theta=10_000.0):
    _, rope, longest = SCALINGS.get(name, (None, {"rope_type": "default"}, 64))
    rope = {"rope_theta": theta, **rope}
    return LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=longest, rope_parameters=rope)


class Torch64:
    """torch whose float is float64: Hugging Face's own formulae, without their rounding."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.mark.parametrize("length", [20, 100, 5000])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name, theta, length, monkeypatch):
    """1e-12 relative where both are float64, 1e-6 where ours are computed on the device, in float32."""
    ours, rope, _ = SCALINGS[name]
    monkeypatch.setattr(modeling_rope_utils, "torch", Torch64())
    theirs, magnitude = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config(name, theta), seq_len=length)
    base = theta ** -(np.arange(0, 32, 2) / 32)
    frequencies = np.asarray(ours.frequencies(base, theta, jnp.int32(length)), np.float64)
    assert np.abs(frequencies / theirs.double().numpy() - 1).max() <= (1e-6 if name in ON_DEVICE else 1e-12)
    assert float(ours.magnitude(jnp.int32(length))) == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("name", ["none", *SCALINGS])
@pytest.mark.parametrize("T", [16, 50])
def test_rotated_heads(name, T):
    """Within and beyond the trained length of 32. 1e-5: angles of 50 radians, each side rounded to float32."""
    scaling = SCALINGS[name][0] if name in SCALINGS else None
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((2, T, n, 32)).astype(np.float32) for n in (3, 1))
    positions = np.stack([np.arange(T), np.maximum(np.arange(T) - 5, 0)])
    cos, sin = LlamaRotaryEmbedding(config(name))(torch.tensor(q), torch.tensor(positions))
    theirs = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin, unsqueeze_dim=2)
    rope = Rope(10_000.0, scaling)
    for a, b in zip((q, k), theirs):
        assert np.abs(np.asarray(rope.apply(jnp.asarray(a), jnp.asarray(positions, jnp.int32))) - b.numpy()).max() <= 1e-5


def test_both_layouts_are_one_permutation_apart():
    """Neighbours (Meta, DeepSeek) and halves (Hugging Face) turn the same pairs: exactly the same numbers, in other places."""
    x = jax.random.normal(jax.random.key(0), (2, 12, 3, 16))
    positions = jnp.tile(jnp.arange(12), (2, 1))
    order = np.r_[0:16:2, 1:16:2]
    neighbours = Rope(pairs="neighbours").apply(x, positions)
    assert (Rope().apply(x[..., order], positions) == neighbours[..., order]).all()
    cos, sin = (torch.tensor(np.concatenate([t, t], -1)) for t in map(np.asarray, Rope().table(16, positions)))
    theirs, _ = apply_rotary_pos_emb_interleave(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(x)), cos, sin, unsqueeze_dim=2)
    assert np.abs(np.asarray(neighbours[..., order]) - theirs.numpy()).max() <= 1e-6  # fused multiply-adds


@pytest.mark.parametrize("name", ["none", "llama3", "yarn", "linear"])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_scores_depend_on_the_distance_only(name, pairs):
    """Angles are float32: at position 1000 the last bit of a radian count is 6e-5, and a score adds 32 products of size one."""
    rope = Rope(scaling=SCALINGS[name][0] if name in SCALINGS else None, pairs=pairs)
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 32)) for i in (0, 1))

    def score(at):
        return jnp.sum(rope.apply(q, jnp.array([[at + 7]])) * rope.apply(k, jnp.array([[at]])))

    scores = np.array([float(score(at)) for at in (0, 1, 17, 100, 1000)])
    assert np.abs(scores[:4] - scores[0]).max() <= 1e-4 and abs(scores[4] - scores[0]) <= 1e-3
    assert abs(float(jnp.sum(rope.apply(q, jnp.array([[9]])) * k)) - scores[0]) > 1e-2  # another distance, another score


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_angles_are_position_times_frequency(theta):
    """The formula of the paper in float64; the wavelength of dim i is 2 pi theta^(2i/H)."""
    cos, sin = Rope(theta).table(64, jnp.array([[0, 1, 2, 30]]))
    wavelengths = [2 * math.pi * theta ** (2 * i / 64) for i in range(32)]
    angle = 2 * math.pi * np.array([0, 1, 2, 30])[:, None] / np.array(wavelengths)
    assert np.abs(cos[0] - np.cos(angle)).max() <= 4e-6 and np.abs(sin[0] - np.sin(angle)).max() <= 4e-6  # 2 ulp of 30 radians
    assert (cos[0, 0] == 1).all() and (sin[0, 0] == 0).all()


def test_partial_rotation_turns_the_front_and_passes_the_rest():
    x, positions = jax.random.normal(jax.random.key(0), (1, 9, 2, 32)), jnp.arange(9)[None]
    y = Rope(fraction=0.25).apply(x, positions)
    assert (y[..., 8:] == x[..., 8:]).all() and (y[..., :8] == Rope().apply(x[..., :8], positions)).all()
    assert (y[:, 0] == x[:, 0]).all()  # position 0 turns nothing


def test_rotation_keeps_lengths_and_dtype():
    x, positions = jax.random.normal(jax.random.key(0), (1, 50, 2, 32)), jnp.arange(50)[None]
    y = Rope().apply(x, positions)
    assert jnp.abs(jnp.linalg.norm(y, axis=-1) / jnp.linalg.norm(x, axis=-1) - 1).max() <= 1e-6
    assert Rope().apply(x.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_positions_restart_at_each_document(segments):
    expected, last = [], SimpleNamespace(segment=None, position=-1)
    for segment in segments:
        last.position = last.position + 1 if segment == last.segment else 0
        last.segment = segment
        expected.append(last.position)
    padded = segments + [9] * (30 - len(segments))  # one shape, one compilation
    assert positions_of(jnp.array([padded], jnp.int32))[0, : len(segments)].tolist() == expected


# --- positions that are added, and those of pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [False, True])
def test_sinusoids_are_the_papers(halves):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same, in float64 by hand; 1e-6 because ours are float32."""
    D, positions = 10, np.array([[0, 1, 5, 500]])
    ours = np.asarray(Sinusoidal(halves=halves).apply({}, jnp.zeros((1, 4, D)), jnp.asarray(positions)))
    angle = positions[..., None] / 10_000 ** (np.arange(0, D, 2) / D)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    if not halves:
        expected = expected.reshape(1, 4, 2, D // 2).swapaxes(2, 3).reshape(1, 4, D)
    assert np.abs(ours - expected).max() <= 5e-5 and np.abs(ours[:, :3] - expected[:, :3]).max() <= 1e-6


def test_a_step_of_sinusoids_is_linear():
    """PE(p + k) is a rotation of PE(p) that does not depend on p (the reason the paper gives for them)."""
    D, k = 8, 3
    table = np.asarray(Sinusoidal(halves=True).apply({}, jnp.zeros((1, 20, D)), jnp.arange(20)[None]))[0].astype(np.float64)
    turn, *rest = np.linalg.lstsq(table[:-k], table[k:], rcond=None)
    assert np.abs(table[:-k] @ turn - table[k:]).max() <= 1e-5


def test_learned_positions():
    """A row of the table is added; more tokens than rows is an error, and a position beyond them gives NaN, never another row."""
    layer = Learned(6)
    p = {"table": jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)}
    y = layer.apply(p, jnp.zeros((1, 3, 4)), jnp.array([[2, 5, -1]]))
    assert (y[0, :2] == p["table"][jnp.array([2, 5])]).all() and bool(jnp.isfinite(y).all())
    assert bool(jnp.isnan(layer.apply(p, jnp.zeros((1, 1, 4)), jnp.array([[6]]))).all())
    with pytest.raises(ValueError, match="has learned 6 positions, the call has 7 tokens"):
        layer.apply(p, jnp.zeros((1, 7, 4)), jnp.arange(7)[None])


def test_pixtrals_axial_rotation():
    """Patches of a picture, row by row."""
    from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
    from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
    from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb as rotate

    width, N, H = 5, 2, 16
    config = PixtralVisionConfig(hidden_size=N * H, num_attention_heads=N, image_size=16 * width, patch_size=16)
    x = np.random.default_rng(0).standard_normal((1, 3 * width, N, H)).astype(np.float32)
    at = torch.arange(3 * width)
    cos, sin = PixtralVisionRotaryEmbedding(config)(torch.tensor(x), torch.stack([at // width, at % width], -1))
    theirs = rotate(*(torch.tensor(x).transpose(1, 2),) * 2, cos, sin, unsqueeze_dim=0)[0].transpose(1, 2)
    ours = AxialRope(width).apply(jnp.asarray(x), jnp.arange(3 * width)[None])
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= 1e-5
    with pytest.raises(ValueError, match="a head of 6 dims does not divide"):
        AxialRope(3).apply(jnp.zeros((1, 2, 1, 6)), jnp.arange(2)[None])
