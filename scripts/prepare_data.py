"""Tokenise and pack a corpus into the data cache, as training does on first use.

    python scripts/prepare_data.py --config configs/quickstart.yaml [--verify] [data.length=512 ...]

Reads the `data:` section of a run's config alone. Running it again costs one look at the files.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table
from ruamel.yaml import YAML, YAMLError

from minllm.config import config, load
from minllm.data import Data, Prepared, prepare
from minllm.data.packing import padding
from minllm.data.shards import check


def section(path: str, overrides: list[str]) -> Data:
    """The `data:` section of a run's config, checked with the places of its lines; the other sections are not looked at."""
    try:
        top = YAML(typ="safe", pure=True).load(Path(path))
    except (OSError, YAMLError, UnicodeDecodeError):
        top = {}  # load says what is wrong, and where
    others = [key for key in top if key != "data"] if isinstance(top, dict) else []
    body = {"__annotations__": {"data": Data, **dict.fromkeys(others, Any)}, "data": Data(), **dict.fromkeys(others)}
    file: Any = config(type("File", (), body))
    return load(file, path, overrides).value.data


def report(prepared: Prepared) -> Table:
    table = Table("split", "documents", "tokens", "bytes", "bytes/token", "rows", "padding", title=f"data {prepared.identity[:12]}")
    for (name, stats), rows in zip(prepared.stats.items(), (prepared.train, prepared.held_out), strict=True):
        counts = [f"{n:,}" for n in asdict(stats).values()]
        places = sum(len(part) * part.T for part in rows)
        waste = sum(padding(part) * len(part) * part.T for part in rows) / places if places else 0.0
        ratio = stats.bytes / stats.tokens if stats.tokens else 0.0
        table.add_row(name, *counts[:3], f"{ratio:.3f}", counts[3], f"{waste:.2%}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a run's YAML file")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file, however large the corpus")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value")
    arguments = parser.parse_args()
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console) as bars:
            tasks: dict[str, Any] = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total or None)
                bars.update(tasks[what], completed=done, total=total or None)

            prepared = prepare(section(arguments.config, arguments.overrides), progress)
        if arguments.verify:
            for rows in (*prepared.train, *prepared.held_out):
                check(rows.tokens.folder, everything=True)
                check(rows.plan, everything=True)
    except ValueError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 2
    console.print(report(prepared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
