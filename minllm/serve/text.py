"""Tokens to text while they come: no character is split, and nothing that may be part of a stop string is shown.

A token may end inside a character, and what it adds may depend on the tokens before it (SentencePiece drops a text's first space). So the
bytes of the newest tokens are taken behind those of the tokens just before them, and what is no whole character yet waits.
"""

import codecs
from collections.abc import Sequence

from minllm.data.tokenizer import LiveTokenizer

BEFORE = 4      # tokens of the prompt that the text goes on from


class Text:
    """The text of one request. stops: the text ends before the first of them to occur, or after it if `include`."""

    def __init__(self, tokenizer: LiveTokenizer, prompt: Sequence[int], stops: Sequence[str] = (), include: bool = False):
        self.tokenizer, self.stops, self.include = tokenizer, tuple(stops), include
        self._ids = [int(token) for token in prompt[-BEFORE:]]
        self._known = tokenizer.decode_bytes(self._ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = ""
        self.stopped = False

    def add(self, token: int, watch: bool = True) -> str:
        """What can be shown now. `stopped` says whether a stop string was found; nothing may be added then. watch: for stop strings."""
        assert not self.stopped
        self._ids.append(token)
        whole = self.tokenizer.decode_bytes(self._ids)
        new, self._known = whole[len(self._known) :], whole
        if len(self._ids) > 4 * BEFORE and new:         # the beginning has no more to say
            self._ids = self._ids[-BEFORE:]
            self._known = self.tokenizer.decode_bytes(self._ids)
        return self._show(self._decoder.decode(new), () if not watch else self.stops)

    def end(self) -> str:
        """What waited for more that did not come."""
        return "" if self.stopped else self._show(self._decoder.decode(b"", True), self.stops, final=True)

    def _show(self, new: str, stops: tuple[str, ...], final: bool = False) -> str:
        text = self._waiting + new
        found = [(text.index(stop), stop) for stop in stops if stop in text]
        if found:
            at, stop = min(found, key=lambda f: (f[0], -len(f[1])))
            self.stopped, self._waiting = True, ""
            return text[: at + len(stop)] if self.include else text[:at]
        hold = 0 if final else max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._waiting = text[len(text) - hold :]
        return text[: len(text) - hold]
