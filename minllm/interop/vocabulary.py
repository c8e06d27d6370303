"""The vocabulary in a GGUF file, as a tokenizer, and back.

    tokenizer.ggml.model "gpt2"     byte-level BPE: tokens in GPT-2's printable alphabet, merges, and `pre`, the name of the split
    tokenizer.ggml.model "llama"    SentencePiece's BPE: tokens, scores and types

A file names the split and does not say it; the regular expressions are those of the models' own tokenizers. A name that is not known is an
error: numbers and spaces would be cut in other places.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

from minllm.data.tokenizer import _BYTE_OF, PATTERNS, HuggingFace, LiveTokenizer, _Json, _Ranks, _SentencePiece

DIGIT = r"\p{N}"
QWEN2 = PATTERNS["llama3"].replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `pre` -> the splits, one after the other.
SPLITS = {
    "gpt-2": (PATTERNS["gpt2"],),
    "llama-bpe": (PATTERNS["llama3"],),
    "qwen2": (QWEN2,),
    "smollm": (DIGIT, PATTERNS["gpt2"]),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("mpt", "olmo"), (PATTERNS["gpt2"],)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), (DIGIT, PATTERNS["gpt2"])),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), (QWEN2,)),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a piece that is a token is that token, whatever the merges would make of it
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens: SentencePiece's numbers
# Where splits differ: two tokenizers that agree on it split alike.
PROBE = (
    "Hello, y'all! I'm 3.14159 or 20261121; DON'T stop.\n\n  \t naïve Ångström café 北京 тест é ½²\r\n"
    "x=foo_bar(1234)//  'LL we'Ll \u00a0end 🙂🙂   "
)


def tokenizer(metadata: Mapping[str, Any]) -> LiveTokenizer:
    """The tokenizer of a file's metadata. ValueError for none, or a kind that is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(metadata)
    if kind == "llama":
        return _sentencepiece(metadata)
    said = "has no vocabulary" if kind in (None, "none", "no_vocab") else f"has a vocabulary of the kind {kind!r}, which is not supported"
    raise ValueError(f"the GGUF file {said}; known are gpt2 (byte-level BPE) and llama (SentencePiece)")


def metadata(live: LiveTokenizer, size: int) -> dict[str, Any]:
    """What a file says of a tokenizer, for a model of `size` tokens: those that the tokenizer lacks are written as unused.

    ValueError for a tokenizer that is larger, or has no form in GGUF.
    """
    if live.vocab_size > size:
        raise ValueError(f"the tokenizer has {live.vocab_size} tokens, the model {size}: it is another model's")
    if isinstance(live, _Json):
        said = _of_json(live)
    elif isinstance(live, _Ranks):
        said = _of_ranks(live)
    elif isinstance(live, _SentencePiece):
        said = _of_sentencepiece(live)
    else:
        raise ValueError(f"a {live.config.kind} tokenizer has no form in GGUF; byte-level BPE (tokenizer.json) and SentencePiece have")
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    for i in range(len(tokens), size):
        tokens.append(f"[PAD{i}]")
        types.append(UNUSED)
        if "tokenizer.ggml.scores" in said:
            said["tokenizer.ggml.scores"].append(0.0)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (id := getattr(live, name)) is not None:
            said[f"tokenizer.ggml.{key}_token_id"] = id
    return said


# --- byte-level BPE ---------------------------------------------------------------------------------------------------------------


def _byte_level(said: Mapping[str, Any]) -> LiveTokenizer:
    pre = said.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise ValueError(f"the GGUF file splits text by {pre!r}; known are {', '.join(SPLITS)}")
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ", 1)) for merge in said["tokenizer.ggml.merges"]]
    names = {name: tokens[said[key]] for name, key in (("bos", "tokenizer.ggml.bos_token_id"), ("eos", "tokenizer.ggml.eos_token_id"),
                                                       ("pad", "tokenizer.ggml.padding_token_id")) if key in said}  # fmt: skip
    return _Json(HuggingFace(path="tokenizer.json", **names), json.dumps(byte_level_json(pre, tokens, types, merges)).encode())


def byte_level_json(pre: str, tokens: list[str], types: Any, merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE that splits text as `pre` says."""
    split = lambda regex: {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": types[i] == CONTROL} for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(split, SPLITS[pre]), byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in WHOLE_WORDS_FIRST,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }  # fmt: skip


def _of_json(live: _Json) -> dict[str, Any]:
    stored = json.loads(live.files["tokenizer.json"])
    model = stored["model"]
    if model["type"] != "BPE" or not live.byte_level:
        raise ValueError(f"a tokenizer.json of type {model['type']} that is not byte-level has no form in GGUF; byte-level BPE has")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    added = {token["id"]: token for token in stored["added_tokens"]}
    by_id = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(live.vocab_size)]
    types = [(CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL if i in by_id else UNUSED
             for i in range(live.vocab_size)]  # fmt: skip
    before = stored["pre_tokenizer"] or {}
    regexes = tuple(part["pattern"].get("Regex") for part in before.get("pretokenizers", [before]) if part.get("type") == "Split")
    return _named(live, tokens, types, merges, bool(model.get("ignore_merges")), regexes)


def _of_ranks(live: _Ranks) -> dict[str, Any]:
    """Ranks as merges: whatever two tokens make a third may merge, the lowest rank of the third first."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, live.files["tokenizer.tiktoken"].splitlines())}
    letter = {b: c for c, b in _BYTE_OF.items()}
    text = lambda token: "".join(letter[b] for b in token)
    by_id = {rank: text(token) for token, rank in ranks.items()} | {i: name for name, i in live.specials.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(live.vocab_size)]
    types = [CONTROL if live._special(i) else NORMAL if i in by_id else UNUSED for i in range(live.vocab_size)]
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        parts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(text(a), text(b)) for a, b in sorted(parts, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    return _named(live, tokens, types, merges, True)


def _named(live: LiveTokenizer, tokens: list[str], types: list[int], merges: list[tuple[str, str]], whole_words: bool,
           regexes: tuple = ()) -> dict[str, Any]:  # fmt: skip
    """What the file says, with the name of the split by which the probe becomes the same tokens; that of the same `regexes` first."""
    wanted = live.encode(PROBE).tolist()
    for pre in sorted(SPLITS, key=lambda name: SPLITS[name] != regexes):
        if not whole_words or pre in WHOLE_WORDS_FIRST:  # merges that were learned make of a token's text that token
            again = _Json(HuggingFace(path="tokenizer.json"), json.dumps(byte_level_json(pre, tokens, types, merges)).encode())
            if again.encode(PROBE).tolist() == wanted:
                return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
                        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
                        "tokenizer.ggml.add_bos_token": False}  # fmt: skip
    raise ValueError(f"the tokenizer splits text in none of the ways that have a name in GGUF: {', '.join(SPLITS)}")


# --- SentencePiece ----------------------------------------------------------------------------------------------------------------


def _messages() -> Any:
    """SentencePiece's protocol buffer messages, which type checkers cannot see."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _sentencepiece(said: Mapping[str, Any]) -> LiveTokenizer:
    pb = _messages()
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"].tolist()
    scores, unknown = said["tokenizer.ggml.scores"].tolist(), said.get("tokenizer.ggml.unknown_token_id", 0)
    model = pb.ModelProto()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types)):
        model.pieces.add(piece=token, score=score, type=UNUSED if kind == UNKNOWN and i != unknown else kind)  # there can be only one
    spec, normal = model.trainer_spec, model.normalizer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = pb.TrainerSpec.BPE, len(tokens), BYTE in types
    for name, key, absent in (("unk", "unknown", 0), ("bos", "bos", -1), ("eos", "eos", -1), ("pad", "padding", -1)):
        id = said.get(f"tokenizer.ggml.{key}_token_id", absent)
        setattr(spec, f"{name}_id", id)
        if 0 <= id < len(tokens):
            setattr(spec, f"{name}_piece", tokens[id])
    normal.name, normal.remove_extra_whitespaces, normal.escape_whitespaces = "identity", False, True
    normal.add_dummy_prefix = bool(said.get("tokenizer.ggml.add_space_prefix", True))
    return _SentencePiece(model.SerializeToString())


def _of_sentencepiece(live: _SentencePiece) -> dict[str, Any]:
    pb = _messages()
    model = pb.ModelProto.FromString(live.files["tokenizer.model"])
    if model.trainer_spec.model_type != pb.TrainerSpec.BPE:
        raise ValueError("a unigram SentencePiece model has no form in llama.cpp's `llama` vocabulary; one of model_type bpe has")
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        raise ValueError("a SentencePiece model that normalizes its text has no form in GGUF; one with the identity has")
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), 0)
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces], "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [int(piece.type) for piece in model.pieces], "tokenizer.ggml.unknown_token_id": unknown,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    }  # fmt: skip
