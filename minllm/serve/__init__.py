"""Serving: many requests share one model, and each gets the tokens that it would get alone.

    engine = Engine(model, params, tokenizer)
    for event in engine.stream(Request(prompt, max_tokens=100, sampling=Sampling(temperature=0.7), seed=1)):
        print(event.text, end="")
"""

from minllm.serve.engine import Completion, Engine, Event, Matcher, Request, Token
from minllm.serve.sampling import Sampling
from minllm.serve.speculative import Lookup

__all__ = ["Completion", "Engine", "Event", "Lookup", "Matcher", "Request", "Sampling", "Token"]
