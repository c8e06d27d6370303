"""Guesses of what comes next, verified by the model several at a time.

A guess is right if it is the very token that the model would have drawn there, from the same logits with the same key. So what is drawn is
what it would have been without guesses, token by token, greedy or at random; guesses only save steps. A guess without a distribution of its
own is accepted with the model's probability of it, which no other exact rule exceeds (Leviathan et al. 2023, arXiv 2211.17192, theorem
3.5, with the guess's distribution on one token).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lookup:
    """Prompt look-up: what followed the last time that the row's last tokens occurred (Saxena 2023, "Prompt lookup decoding"; Yang et al.
    2023, arXiv 2304.04487). longest: tokens that have to agree, down to `shortest`. ahead: how many guesses."""

    ahead: int = 4
    longest: int = 3
    shortest: int = 2

    def __post_init__(self):
        if self.ahead < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError(f"Lookup guesses at least 1 token from 1 <= shortest <= longest; got {self}")

    def __call__(self, tokens: Sequence[int], room: int) -> list[int]:
        row = np.asarray(tokens)
        for n in range(min(self.longest, len(row) - 1), self.shortest - 1, -1):
            runs = np.lib.stride_tricks.sliding_window_view(row[:-1], n)
            if len(same := np.flatnonzero((runs == row[-n:]).all(1))):
                start = int(same[-1]) + n
                return row[start : start + min(room, self.ahead)].tolist()
        return []
