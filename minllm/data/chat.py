"""Chat templates: messages -> text, the ranges of it that are special tokens, and the ranges that are learned.

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    <bos>### user\\nHi\\n\\n### assistant\\nHello<eos>
    ^^^^^                                    ^^^^^      special: written by the template, so they become one id
                                        ^^^^^^^^^^      learned: what the assistant says, and the marker that ends its turn

Templates are Jinja as Hugging Face runs it: sandboxed, with trim_blocks, lstrip_blocks and `{% generation %}`. A template with that tag
says itself what is learned. For any other, an assistant's turn is what rendering one message more adds, after the generation prompt:

    learned_i = render(messages[: i + 1]) - render(messages[: i], add_generation_prompt=True)        each a prefix of the next, or an error

A message that quotes `<|eot_id|>` must not end a turn. Where a message could be taken for (part of) a special token, a noncharacter is
put before it; it travels through the template, keeps that place from being a special token, and is removed. `{% generation %}` leaves
two more of them. Unicode reserves them for programs' own use, so no text holds them.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

QUOTE, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{QUOTE}{BEGIN}{END}]")

# A heading for each message; the assistant's end with eos, the others (and its own, where there is no eos) with a blank line.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + (eos_token or '\\n\\n') }}{% endgeneration %}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)

Ranges = tuple[tuple[int, int], ...]  # of characters: in order, apart from each other


class Rendering(NamedTuple):
    text: str
    special: Ranges
    learned: Ranges


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace("\\ufdd0", QUOTE) if ensure_ascii else text


class Template:
    """A compiled chat template. `specials` are the texts that the tokenizer has single ids for."""

    def __init__(self, source: str, specials: Sequence[str] = (), bos: str = "", eos: str = ""):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json  # Jinja's own escapes HTML
        environment.globals["raise_exception"] = _raise
        # No strftime_now, which Hugging Face has: a batch does not depend on the day. Templates fall back to a fixed date.
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja (line {error.lineno}: {error}): correct it") from None
        self.marked = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self.constants = {"bos_token": bos, "eos_token": eos, "documents": None}

        specials = sorted(filter(None, specials), key=len, reverse=True)
        self.longest = len(specials[0]) if specials else 0
        self.heads = {s[:n] for s in specials for n in range(1, len(s))}
        self.tails = {s[n:] for s in specials for n in range(1, len(s))}
        firsts, names = "".join({re.escape(s[0]) for s in specials}), "|".join(map(re.escape, specials))
        never = re.compile(r"(?!)")
        self.starts = re.compile(f"(?=[{firsts}])(?={names})") if specials else never  # the class first: it is fast
        self.special = re.compile(f"(?<!{QUOTE})(?=[{firsts}])(?:{names})") if specials else never

    def __call__(self, messages: list, tools: Any = None) -> Rendering:
        """ValueError where the template fails, or what is learned cannot be told exactly."""
        messages, tools = self._quoted(messages), self._quoted(tools)
        whole = self._fill(messages, tools)
        special = [match.span() for match in self.special.finditer(whole)]
        learned = self._generated(whole) if self.marked else self._turns(messages, tools, whole, {end for _, end in special})
        marks = [match.start() for match in MARKS.finditer(whole)]

        def unmarked(ranges) -> Ranges:
            return tuple((a - bisect_left(marks, a), b - bisect_left(marks, b)) for a, b in ranges)

        return Rendering(MARKS.sub("", whole), unmarked(special), tuple(r for r in unmarked(learned) if r[0] < r[1]))

    def prompt(self, messages: list, tools: Any = None) -> Rendering:
        """The messages and the heading of the answer that is to come. Nothing of it is learned."""
        whole = self._fill(self._quoted(messages), self._quoted(tools), prompt=True)
        marks, special = [match.start() for match in MARKS.finditer(whole)], [match.span() for match in self.special.finditer(whole)]
        return Rendering(MARKS.sub("", whole), tuple((a - bisect_left(marks, a), b - bisect_left(marks, b)) for a, b in special), ())

    def _fill(self, messages: list, tools: Any, prompt: bool = False) -> str:
        try:
            return self.template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **self.constants)
        except Exception as error:  # a template is a program: it fails in any way
            what = f"{len(messages)} message{'s' * (len(messages) != 1)}"
            raise ValueError(f"the chat template fails on {what}: {error or type(error).__name__}") from None

    def _generated(self, whole: str) -> list[tuple[int, int]]:
        found = [match.span(1) for match in re.finditer(f"{BEGIN}([^{BEGIN}{END}]*){END}", whole)]
        if not len(found) == whole.count(BEGIN) == whole.count(END):
            raise ValueError("the chat template nests or cuts {% generation %} blocks: let each hold one assistant turn, as it is printed")
        return found

    def _turns(self, messages: list, tools: Any, whole: str, ends: set[int]) -> list[tuple[int, int]]:
        found, way_out = [], "put {% generation %} ... {% endgeneration %} around what the assistant says in the template"
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, upto = self._fill(messages[:i], tools), self._fill(messages[: i + 1], tools)
            opened = self._fill(messages[:i], tools, prompt=True)
            for shorter, longer in ((opened, upto), (upto, whole)):
                if not longer.startswith(shorter):
                    at = next(n for n, (a, b) in enumerate(zip(shorter, longer + "\0")) if a != b)
                    clash = " and ".join(repr(MARKS.sub("", text[max(0, at - 10) : at + 20])) for text in (shorter, longer))
                    said = f"the chat template renders the messages up to {i + 1} differently when more follow"
                    raise ValueError(f"{said} ({clash}): {way_out}")
            turn, content = upto[len(opened) :], message.get("content")
            if opened == before and isinstance(content, str) and not turn.lstrip().startswith(content.strip()):
                said = MARKS.sub("", turn[:40])
                raise ValueError(
                    f"the chat template writes {said!r} for message {i + 1}, which does not start with its content, and no generation "
                    f"prompt: {way_out}, or write the assistant's heading where add_generation_prompt is set"
                )
            # White space after the special token that ends a turn belongs to the format: sampling has stopped by then.
            end = len(opened) + len(turn.rstrip())
            found.append((len(opened), end if end in ends else len(upto)))
        return found

    def _quoted(self, value: Any) -> Any:
        """Strings with a mark before each place that is, ends in, or starts with, (a part of) the text of a special token."""
        if isinstance(value, list):
            return [self._quoted(item) for item in value]
        if isinstance(value, dict):
            return {self._quoted(key): self._quoted(item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        if mark := MARKS.search(value):
            raise ValueError(f"a message holds U+{ord(mark[0]):04X}, a noncharacter that is reserved for programs' own use: remove it")
        places = {match.start() for match in self.starts.finditer(value)}
        for end in {len(value), len(value.rstrip())}:  # templates trim
            places |= {end - n for n in range(1, min(end, self.longest) + 1) if value[end - n : end] in self.heads}
        for start in {0, len(value) - len(value.lstrip())}:
            places |= {start} if any(value[start : start + n] in self.tails for n in range(1, self.longest)) else set()
        cuts = [0, *sorted(places), len(value)]
        return QUOTE.join(value[a:b] for a, b in zip(cuts, cuts[1:])) if places else value
