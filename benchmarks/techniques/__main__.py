"""The command: run, collect, tables, pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.techniques import __doc__ as about
from benchmarks.techniques.collect import collect
from benchmarks.techniques.pictures import draw_all
from benchmarks.techniques.run import REPOSITORY, run_all
from benchmarks.techniques.tables import write_tables
from benchmarks.techniques.variants import BY_NAME, VARIANTS


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--only", nargs="*", default=[v.name for v in VARIANTS], choices=list(BY_NAME))
    run.add_argument("--device", choices=("cpu", "cuda"))
    run.add_argument("--seeds", type=int, nargs="*")
    run.add_argument("--jobs", type=int, default=1)
    run.add_argument("--mlflow", action="store_true")
    run.add_argument("--deadline", type=float, default=1e9, help="seconds; none begins after it")
    commands.add_parser("collect").add_argument("folders", type=Path, nargs="+")
    commands.add_parser("tables")
    commands.add_parser("pictures")
    arguments = parser.parse_args()
    if arguments.command == "run":
        _run(arguments)
    elif arguments.command == "collect":
        print(collect(arguments.folders))
    else:
        for path in write_tables() if arguments.command == "tables" else draw_all():
            print(path.relative_to(REPOSITORY))


def _run(arguments: argparse.Namespace) -> None:
    chosen = [BY_NAME[name] for name in arguments.only]
    if arguments.device:
        chosen = [variant for variant in chosen if variant.device == arguments.device]
    rounds = arguments.seeds or range(max(variant.seeds for variant in chosen))
    jobs = [
        (variant, seed)
        for seed in rounds
        for variant in chosen
        if arguments.seeds or seed < variant.seeds
    ]
    run_all(jobs, arguments.out, arguments.jobs, arguments.mlflow, arguments.deadline)


if __name__ == "__main__":
    main()
