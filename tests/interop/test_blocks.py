"""GGUF's block formats against the gguf package: encoded bytes equal, decoded weights equal, for every format that it knows."""

import gguf
import numpy as np
import pytest

from minllm.interop.blocks import FORMATS, decode, encode

rng = np.random.default_rng(0)
WRITTEN = [name for name, known in FORMATS.items() if known.encode]


def weights():
    """Rows as they are, of all sizes, of zeros, of one sign, with ties and halves, and with one large weight."""
    w = rng.normal(size=(64, 512)).astype(np.float32)
    w[1], w[2], w[3] = 0, np.abs(w[2]), -np.abs(w[3])
    w[4], w[5], w[6] = 1e-9 * w[4], 1e4 * w[5], 0.125 * rng.integers(-127, 128, 512)
    w[7, 3::32], w[8, ::2], w[9] = 300.0, 0, 1.5
    w[10] = np.tile([-8.0, 8.0, 0.5, -0.5], 128)
    return w


@pytest.mark.parametrize("name", WRITTEN)
def test_encoded_bytes_are_theirs(name):
    """S16, T13: equal byte for byte."""
    w, kind = weights(), gguf.GGMLQuantizationType[name]
    theirs = np.ascontiguousarray(gguf.quantize(w, kind)).view(np.uint8).reshape(-1)
    assert np.array_equal(encode(w, name), theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_weights_are_theirs(name):
    """Of random bytes: every bit of every scale and quant counts. Scales that are no numbers are left out."""
    known, kind = FORMATS[name], gguf.GGMLQuantizationType[name]
    assert (known.number, known.size, known.record.itemsize) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])
    data = rng.integers(0, 256, (300, known.record.itemsize), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        ours = decode(data.reshape(-1), name)
        theirs = gguf.dequantize(data, kind).reshape(-1)
    finite = np.isfinite(theirs)
    assert ours.shape == theirs.shape == (300 * known.size,) and finite.sum() > 150
    assert np.array_equal(ours[finite], theirs[finite])


BOUNDS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 250, "Q4_0": 1 / 7.9, "Q4_1": 1 / 14.9, "Q5_0": 1 / 15.9, "Q5_1": 1 / 30.9}


@pytest.mark.parametrize("name, bound", BOUNDS.items())
def test_rounding_stays_within_half_a_step(name, bound):
    """Relative to the largest magnitude of the block; the float16 scale adds 2^-11. Q4_0 and Q5_0 have one step less on one side."""
    w = rng.normal(size=(16, 512)).astype(np.float32)
    error = np.abs(decode(encode(w, name), name).reshape(-1, 32) - w.reshape(-1, 32)).max(-1)
    assert (error <= (bound + (0 if name in ("F32", "BF16") else 2**-10)) * np.abs(w.reshape(-1, 32)).max(-1)).all()


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="Q4_K can be read but not written"):
        encode(np.zeros((2, 256), np.float32), "Q4_K")
    with pytest.raises(ValueError, match="rows of 48 weights are no whole blocks of 32"):
        encode(np.zeros((2, 48), np.float32), "Q8_0")
