"""Run the benchmarks: `make bench`, or `python -m benchmarks [NAME…] [--facebook-dino PATH] [--quick]`."""

import argparse
import importlib
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.measure import Row, Setting, limits
from benchmarks.results import environment, markdown, record, summary, table_of
from dino import distributed, progress

NAMES = ("step", "parts", "loss", "crops", "endtoend", "extraction", "grids", "optimizer", "scaling", "sources")
RESULTS = Path(__file__).parent / "results"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run (all): {', '.join(NAMES)}")
    parser.add_argument("--facebook-dino", type=Path, metavar="PATH", help="a checkout of facebookresearch/dino")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that everything runs, records nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="results folder (%(default)s)")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="print a results file, or gpu.json, as a table; measures nothing"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"expected names from {', '.join(NAMES)}, found {', '.join(unknown)}")
    if arguments.facebook_dino is not None and not (arguments.facebook_dino / "main_dino.py").is_file():
        parser.error(
            f"expected a checkout of facebookresearch/dino, found no main_dino.py in {arguments.facebook_dino}"
        )
    return arguments


def run_all(arguments: argparse.Namespace, setting: Setting, path: Path | None) -> tuple[list[Row], int]:
    """Run the chosen benchmarks; each row is written before the next is measured.

    Returns:
        All rows, and the number of failed benchmarks.
    """
    rows, failures = [], 0
    names = arguments.names or NAMES
    with progress.bar("benchmarks", len(names)) as bar:
        for name in names:
            bar.advance(0, name)
            started = time.monotonic()
            try:
                found = limits(setting)
                for row in importlib.import_module(f"benchmarks.{name}").run(setting):
                    rows.append(record(row, name, found, environment(setting.device), path))
                    progress.say(f"  {summary(rows[-1])}")
            except Exception as error:  # a failure, or results that differ, must not stop the others
                failures += 1
                progress.warn(f"{name}: {type(error).__name__}: {error}")
            bar.advance(1, f"{name}: {time.monotonic() - started:.0f} s")
    return rows, failures


def main(words: list[str] | None = None) -> int:
    """Run the benchmarks and print a table; returns 1 if one failed."""
    arguments = parse(words)
    if arguments.markdown is not None:
        print(markdown(arguments.markdown), end="")
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = distributed.choose_device(arguments.device)
    facts = environment(device)
    path = None
    if not arguments.quick:
        slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['device']} {facts['cores']} cores".lower()).strip("-")
        path = arguments.output / f"{facts['date'][:10]}-{slug}.jsonl"
    progress.say(
        f"{facts['device']}, {facts['cores']} cores, {torch.get_num_threads()} threads, load {facts['load']}, "
        f"commit {facts['commit']}, torch {facts['versions']['torch']}"
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        notice = lambda line: progress.say(f"  {line}")  # noqa: E731
        setting = Setting(device, Path(folder), arguments.quick, arguments.facebook_dino, notice)
        rows, failures = run_all(arguments, setting, path)
    table: Table = table_of(rows)
    progress.console.print(table)
    minutes = (time.monotonic() - started) / 60
    progress.say(f"{minutes:.1f} minutes; " + (f"results in {path}" if path else "--quick: nothing recorded"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
