"""`runkey env`: compare what is installed with the lock; export the lock of a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runkey.cli import output
from runkey.cli.output import AsJson, Key, answer_no, print_beside, print_json

if TYPE_CHECKING:
    from runkey.registry.environment import EnvironmentComparison

app = typer.Typer(help="Compare what is installed with the lock; get a run's lock.")


@app.command()
def check(as_json: AsJson = False) -> None:
    """Compare what is installed with what is locked.

    In a conda environment all packages with their builds against conda-lock.yml, else Python
    packages, and the CUDA that torch is built for, against requirements.txt. Exit code 3 if a
    package is missing or of another version or build; those that are not locked are listed and
    are no fault.
    """
    from runkey.registry.environment import compare_environment

    found = compare_environment(output.workspace())
    if as_json:
        print_json(found.as_dict())
    else:
        print("\n".join(_lines(found)))
    if not found.agrees:
        answer_no()


@app.command()
def export(
    key: Key,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write to; else one named as the key is."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's conda-lock.yml and requirements.txt, from its snapshot."""
    from runkey.registry.environment import export_environment
    from runkey.registry.library import find_run

    record = find_run(output.library(), key)
    target = to or Path(f"{record.label}-environment")
    lock, requirements = export_environment(output.workspace(), record, target)
    if as_json:
        print_json({"key": record.key, "files": [str(lock), str(requirements)]})
        return
    print_beside("", f"the environment of {record.label}: {lock}, {requirements}")
    print_beside("with conda: ", f"conda-lock install --name {record.label} {lock}")
    print_beside("without: ", f"uv venv --python 3.12 ENV; uv pip sync --python ENV {requirements}")


def _lines(found: EnvironmentComparison) -> list[str]:
    counts = {kind: len(found.of_kind(kind)) for kind in ("missing", "other", "extra")}
    patch = "" if found.python == found.locked_python else f" (the lock has {found.locked_python})"
    torch = f"torch for CUDA {found.cuda}" if found.cuda else "torch for the CPU"
    lines = [
        f"{found.place}, Python {found.python}{patch}, {torch}, against {found.against}",
        f"{found.same} as locked, {counts['missing']} missing, {counts['other']} of another"
        f" version, {counts['extra']} extra",
    ]
    lines += [f"  missing  {d.name} {d.locked}" for d in found.of_kind("missing")]
    lines += [
        f"  other    {d.name}: locked {d.locked}, installed {d.installed}"
        for d in found.of_kind("other")
    ]
    lines += [f"  extra    {d.name} {d.installed}" for d in found.of_kind("extra")]
    if not found.agrees:
        lines.append(f"to mend it: {found.way_out}")
    return lines
