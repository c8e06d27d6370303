"""A model in the terminal: python -m minllm.generate --model PATH [--chat] [--prompt TEXT]

PATH is a GGUF file, a Hugging Face folder, or a run of minllm. With --prompt it writes one continuation or, with --chat, one answer;
without, --chat is a conversation: a line is a turn, an empty line or Ctrl-D ends it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Tokens that end a turn, whatever the file calls its end of text.
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minllm.generate", description="Talk with a model, or let it continue a text.")
    parser.add_argument("--model", required=True, metavar="PATH", help="a .gguf file, a Hugging Face folder, or a run folder of minllm")
    parser.add_argument("--chat", action="store_true", help="in turns, by the model's chat template")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue or, with --chat, to answer")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="at most so many tokens a text (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.05, metavar="P", help="(default: 0.05)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the parameters (default: as they are stored)")
    args = parser.parse_args(argv)
    if args.prompt is None and not args.chat:
        parser.error("give --prompt, or --chat for a conversation")

    from minllm import pretrained  # what answers --help does not wait for JAX
    from minllm.config import load
    from minllm.sample import Sampler
    from minllm.weights import unstack

    try:
        asked = [f"{name}={value}" for name in ("temperature", "top_k", "top_p", "min_p") if (value := getattr(args, name)) is not None]
        sampler = load(Sampler, None, asked).value
        began = time.monotonic()
        template = pretrained.chat_template(args.model) if args.chat else None
        if args.chat and template is None:
            raise ValueError(f"{args.model} has no chat template: ask it without --chat, with a --prompt to continue")
        model, params, tokenizer = pretrained.load(args.model, dtype=args.dtype)
        if tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer; put the model's tokenizer.json beside it")
        # decoding walks over layers: they are taken apart once
        talk = Talk(model, unstack(params), tokenizer, sampler, args.max_tokens, args.seed)
        _note(f"{Path(args.model).name}: loaded in {time.monotonic() - began:.1f} s")
        if template is not None:
            talk.chat(template, args.system, args.prompt)
        else:
            talk.say([*pretrained.opening(args.model, tokenizer), *tokenizer.encode(args.prompt).tolist()], args.prompt)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


class Talk:
    """A model that is asked, again and again."""

    def __init__(self, model: Any, params: Any, tokenizer: Any, sampler: Any, max_tokens: int, seed: int):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.sampler, self.max_tokens, self.seed = sampler, max_tokens, seed
        ends = [tokenizer.specials[name] for name in ENDS if name in tokenizer.specials]
        self.stop = tuple(sorted({*ends, *(() if tokenizer.eos is None else (tokenizer.eos,))}))

    def say(self, prompt: list[int], shown: str = "") -> str:
        """The continuation, written to the terminal as it comes; then how fast it came."""
        from minllm.sample import stream

        print(shown, end="", flush=True)
        ids, text, times = [], "", [time.monotonic()]
        for token in stream(self.model, self.params, prompt, self.max_tokens, sampler=self.sampler, seed=self.seed, stop=self.stop):
            times.append(time.monotonic())
            ids.append(token)
            whole = self.tokenizer.decode(ids)
            if not whole.endswith("�"):  # a character may end in a later token than it begins in
                print(whole[len(text) :], end="", flush=True)
                text = whole
        whole = self.tokenizer.decode(ids)
        print(whole[len(text) :])
        if len(ids) > 2:  # the first step compiles
            speed = (len(ids) - 2) / (times[-1] - times[2])
            _note(f"{len(ids)} tokens, {speed:.1f} tokens/s, the first after {times[1] - times[0]:.1f} s")
        return whole

    def chat(self, template: str, system: str | None, prompt: str | None) -> None:
        """One answer to `prompt`, or turns from the terminal."""
        from minllm.data.chat import Template

        live = self.tokenizer
        name = {id: text for text, id in live.specials.items()}
        rendering = Template(template, tuple(live.specials), name.get(live.bos, ""), name.get(live.eos, ""))
        messages = [] if system is None else [{"role": "system", "content": system}]
        while True:
            turn = prompt if prompt is not None else _line()
            if not turn:
                return
            messages.append({"role": "user", "content": turn})
            rendered = rendering.prompt(messages)
            answer = self.say(live.encode_ranges(rendered.text, rendered.special, ())[0].tolist())
            messages.append({"role": "assistant", "content": answer})
            if prompt is not None:
                return


def _line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _note(text: str) -> None:
    """What is no part of the text goes to standard error."""
    print(f"[{text}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
