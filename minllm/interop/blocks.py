"""GGUF's block formats: a row of weights in blocks, each with its own scale, as small integers.

    Q8_0  w = d q               32 weights, q of 8 bits
    Q4_0  w = d (q - 8)         Q4_1  w = d q + m             32 weights, q of 4 bits
    Q5_0  w = d (q - 16)        Q5_1  w = d q + m             32 weights, the fifth bits apart
    Qn_K  w = d s q - m t       256 weights in groups with scales s and t of their own, of 4 to 8 bits (Q3_K, Q6_K: w = d s (q - offset))

The layouts are those of llama.cpp's ggml (ggml-common.h; reference quantizer in ggml-quants.c). A format is a NumPy record, which says
where the bytes of a block lie. What llama.cpp's own encoder rounds, this one rounds the same way, so that files are equal byte for byte;
the K formats are read only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

Blocks = np.ndarray  # records, one a block
Weights = Float[np.ndarray, "blocks size"]


@dataclass(frozen=True)
class Format:
    """number: GGUF's. size: weights a block. record: the bytes of one. encode is None for a format that is only read."""

    number: int
    size: int
    record: np.dtype
    decode: Callable[[Blocks], Weights]
    encode: Callable[[Weights], Blocks] | None = None

    def bytes(self, weights: int) -> int:
        return weights // self.size * self.record.itemsize


def decode(data: UInt8[np.ndarray, " bytes"], name: str) -> Float[np.ndarray, " weights"]:
    """float32 weights of the bytes of whole blocks."""
    known = FORMATS[name]
    return known.decode(data.view(known.record)).reshape(-1)


def encode(weights: Float[np.ndarray, "*rows n"], name: str) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a tensor. ValueError for a format that is only read, or rows that are no whole blocks."""
    known = FORMATS[name]
    if known.encode is None:
        written = ", ".join(name for name, known in FORMATS.items() if known.encode)
        raise ValueError(f"{name} can be read but not written; choose from {written}")
    if weights.shape[-1] % known.size:
        raise ValueError(f"rows of {weights.shape[-1]} weights are no whole blocks of {known.size}, which {name} needs; choose BF16 or F16")
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, known.size)
    return known.encode(blocks).reshape(-1).view(np.uint8)


def _plain(number: int, dtype: type) -> Format:
    """One number a weight."""
    kind = np.dtype(dtype)
    return Format(number, 1, kind, lambda data: data.astype(np.float32), lambda w: w.astype(kind))


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 of a block of zeros."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """The low halves of the bytes, then their high halves."""
    return np.concatenate([q & 15, q >> 4], -1)


def _packed(q: np.ndarray) -> np.ndarray:
    low, high = np.split(q & 15, 2, -1)
    return low | high << 4


def _bits(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, axis=-1, bitorder="little")


# --- 32 weights a block -----------------------------------------------------------------------------------------------------------

_Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", 32)])


def _encode_q8_0(w):
    d = np.abs(w).max(-1, keepdims=True) / np.float32(127)
    y = w * _inverse(d)
    whole = np.trunc(y)
    out = np.empty(len(w), _Q8_0)
    out["d"], out["q"] = d[:, 0], whole + np.sign(y) * (np.abs(y - whole) >= 0.5)  # halves away from zero
    return out


def _symmetric(number: int, bits: int) -> Format:
    """w = d (q - 2^(bits - 1)): the weight of the largest magnitude is the lowest q, whatever its sign."""
    half, high = 1 << (bits - 1), [("high", "u1", 4)] * (bits == 5)
    record = np.dtype([("d", "<f2"), *high, ("q", "u1", 16)])

    def encode(w):
        top = np.take_along_axis(w, np.abs(w).argmax(-1, keepdims=True), -1)
        d = top / np.float32(-half)
        q = np.minimum((w * _inverse(d) + np.float32(half + 0.5)).astype(np.uint8), 2 * half - 1)
        return _record(record, q, d=d[:, 0])

    return Format(number, 32, record, lambda b: _column(b, "d") * (_quants(b) - np.float32(half)), encode)


def _affine(number: int, bits: int) -> Format:
    """w = d q + m: from the block's smallest weight to its largest."""
    most, high = (1 << bits) - 1, [("high", "u1", 4)] * (bits == 5)
    record = np.dtype([("d", "<f2"), ("m", "<f2"), *high, ("q", "u1", 16)])

    def encode(w):
        least = w.min(-1, keepdims=True)
        d = (w.max(-1, keepdims=True) - least) / np.float32(most)
        q = np.minimum(((w - least) * _inverse(d) + np.float32(0.5)).astype(np.uint8), most)
        return _record(record, q, d=d[:, 0], m=least[:, 0])

    return Format(number, 32, record, lambda b: _column(b, "d") * _quants(b) + _column(b, "m"), encode)


def _column(blocks: Blocks, name: str) -> np.ndarray:
    return blocks[name].astype(np.float32)[:, None]


def _quants(blocks: Blocks) -> np.ndarray:
    q = _nibbles(blocks["q"])
    return (q | _bits(blocks["high"]) << 4 if "high" in (blocks.dtype.names or ()) else q).astype(np.float32)


def _record(record: np.dtype, q: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> Blocks:
    out = np.empty(len(q), record)
    out["d"], out["q"] = d, _packed(q)
    if m is not None:
        out["m"] = m
    if "high" in (record.names or ()):
        out["high"] = np.packbits(q >> 4, axis=-1, bitorder="little")
    return out


# --- 256 weights a block ----------------------------------------------------------------------------------------------------------


def _twos(q: np.ndarray, chunk: int) -> np.ndarray:
    """Two bits of each byte, then the next two, in chunks of bytes."""
    return (q.reshape(len(q), -1, 1, chunk) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K's and Q5_K's 8 + 8 numbers of 6 bits in 12 bytes: four of each in 6 bits, the other eight in 4 bits and, above those, 2."""
    a, b, c = (packed[:, i : i + 4] for i in (0, 4, 8))
    s = np.concatenate([a & 63, (c & 15) | (a >> 2 & 48)], -1)
    m = np.concatenate([b & 63, c >> 4 | (b >> 2 & 48)], -1)
    return s.astype(np.float32), m.astype(np.float32)


def _grouped(q: np.ndarray, scale: np.ndarray, low: np.ndarray | None = None) -> Weights:
    """scale q - low, by groups."""
    y = scale[..., None] * q.reshape(len(q), scale.shape[1], -1).astype(np.float32)
    return (y if low is None else y - low[..., None]).reshape(len(q), -1)


def _decode_q2_k(b):
    return _grouped(_twos(b["q"], 32), _column(b, "d") * (b["scales"] & 15), _column(b, "m") * (b["scales"] >> 4))


def _decode_q3_k(b):
    low, high = _nibbles(b["scales"][:, :8]), b["scales"][:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    s = (low | high.reshape(len(b), 16) << 4).astype(np.float32) - 32
    third = np.moveaxis(_bits(b["high"][..., None]), -1, 1)  # bit i of byte j: of weight j of the i-th 32
    return _grouped(_twos(b["q"], 32).reshape(len(b), 256).astype(np.int8) - 4 * (1 - third.reshape(len(b), 256).astype(np.int8)),
                    _column(b, "d") * s)  # fmt: skip


def _decode_q4_k(b):
    s, m = _scales_and_mins(b["scales"])
    return _grouped(_nibbles(b["q"].reshape(len(b), 4, 32)), _column(b, "d") * s, _column(b, "m") * m)


def _decode_q5_k(b):
    s, m = _scales_and_mins(b["scales"])
    fifth = np.moveaxis(_bits(b["high"][..., None]), -1, 1)
    q = _nibbles(b["q"].reshape(len(b), 4, 32)).reshape(len(b), 256) | fifth.reshape(len(b), 256) << 4
    return _grouped(q, _column(b, "d") * s, _column(b, "m") * m)


def _decode_q6_k(b):
    low = _nibbles(b["q"].reshape(len(b), 2, 64)).reshape(len(b), 256)
    q = (low | _twos(b["high"], 32).reshape(len(b), 256) << 4).astype(np.int8) - np.int8(32)
    return _grouped(q, _column(b, "d") * b["scales"])


_SCALE, _SCALES, _LOW = [("d", "<f2")], [("scales", "u1", 12)], [("m", "<f2")]
FORMATS = {
    "F32": _plain(0, np.float32),
    "F16": _plain(1, np.float16),
    "BF16": _plain(30, ml_dtypes.bfloat16),
    "Q8_0": Format(8, 32, _Q8_0, lambda b: _column(b, "d") * b["q"], _encode_q8_0),
    "Q4_0": _symmetric(2, 4),
    "Q4_1": _affine(3, 4),
    "Q5_0": _symmetric(6, 5),
    "Q5_1": _affine(7, 5),
    "Q2_K": Format(10, 256, np.dtype([("scales", "u1", 16), ("q", "u1", 64), *_SCALE, *_LOW]), _decode_q2_k),
    "Q3_K": Format(11, 256, np.dtype([("high", "u1", 32), ("q", "u1", 64), *_SCALES, *_SCALE]), _decode_q3_k),
    "Q4_K": Format(12, 256, np.dtype([*_SCALE, *_LOW, *_SCALES, ("q", "u1", 128)]), _decode_q4_k),
    "Q5_K": Format(13, 256, np.dtype([*_SCALE, *_LOW, *_SCALES, ("high", "u1", 32), ("q", "u1", 128)]), _decode_q5_k),
    "Q6_K": Format(14, 256, np.dtype([("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), *_SCALE]), _decode_q6_k),
}
