"""A model from one format to another: a Hugging Face folder, a GGUF file or a run of ours in, a Hugging Face folder out.

    python scripts/convert.py runs/quickstart exported/ [--dtype bfloat16] [--family llama]

Nothing is written before the whole is known to fit; an interrupted conversion leaves no folder.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a Hugging Face folder, a run folder, or one of its checkpoints/N")
    parser.add_argument("target", help="the folder to write; it must not be there, or be empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: what is stored")
    parser.add_argument("--family", help="as what the model is written; default: the first family that can express it")
    arguments = parser.parse_args()

    from minllm import pretrained
    from minllm.interop import hf

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console) as bars:
            tasks = {}

            def report(what, done, total):
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done)

            foreign = pretrained.kind(arguments.source) == "hf"
            model, params, tokenizer = pretrained.load(arguments.source, dtype=arguments.dtype, report=report)
            like = arguments.source if foreign else None        # then its tokenizer files go along as they are
            family = arguments.family or (hf.describe(arguments.source)[0].name if foreign else None)
            hf.save(arguments.target, model, params, None if foreign else tokenizer, family=family, like=like, report=report)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    console.print(f"{arguments.target} is written", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
