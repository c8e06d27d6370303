"""The parity table: every family's tiny model in `transformers` and in minllm.

    python scripts/cross_check.py --all            every family
    python scripts/cross_check.py llama gemma2     some

Logits at 5, 65 and 700 tokens, decoding against the whole row, the worst gradient, greedy tokens (steps where the likeliest differs, of
these ties within 1e-3), and the round trip of the files. Exit status 1 where one is beyond its bar. Needs the `test` extra.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
LOGITS, DECODE, GRADIENT = 2e-5, 1e-5, 1e-4


def main() -> int:
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    from parity import FAMILIES, PROMPTS, pair

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    names = list(FAMILIES) if arguments.all else arguments.families
    if not names:
        parser.error("name families, or --all")
    table = Table(title="minllm against transformers: largest difference")
    for column in ("family", *(f"logits {T}" for T in PROMPTS), "decode", "gradient", "greedy", "files"):
        table.add_column(column, justify="left" if column == "family" else "right")
    bad = 0
    for name in names:
        one = pair(name)
        gradient = max(one.gradient_errors.values())
        differ, ties = one.greedy()
        try:
            one.round_trip()
            files = "equal"
        except AssertionError as error:
            files = f"differ: {error}"
        wrong = max(one.logit_errors) > LOGITS or one.decode_error > DECODE or gradient > GRADIENT or differ != ties or files != "equal"
        bad += wrong
        greedy = f"{64 - len(differ)}/64" + (f", {len(ties)} ties" if ties else "")
        table.add_row(name, *(f"{e:.1e}" for e in (*one.logit_errors, one.decode_error, gradient)), greedy, files,
                      style="red" if wrong else None)  # fmt: skip
    Console(width=130).print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
