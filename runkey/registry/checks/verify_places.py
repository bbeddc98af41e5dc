"""Parts of `runkey verify`: MLflow's record of a run, its code snapshot, its environment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from runkey.errors import RegistryError
from runkey.identity.key import PARTS, Recipe
from runkey.identity.record import KEY, Details, LoggedRun, Record
from runkey.registry.checks.findings import Finding, State, some
from runkey.registry.checks.mlflow_run import ReadRun
from runkey.registry.diff.code_tree import changed_files
from runkey.registry.git import git, has_git
from runkey.registry.snapshot import REFS, has_snapshot


def check_mlflow(
    record: Record, recipe: Recipe | None, stored: ReadRun | None
) -> Iterator[Finding]:
    """What MLflow has of the run now, beside the record and the key.

    Args:
        record: the run.
        recipe: its key's, from key.json; None: that was unreadable.
        stored: reads MLflow's runs.
    """
    run_id = record.run.run_id
    if stored is None:
        yield Finding("mlflow", "warning", "its database is read through a server only; skipped")
        return
    run = stored(run_id)
    if run is None:
        text = f"run {run_id} is not in MLflow, or was deleted there"
        way_out = f"restore it on MLflow's pages, or `runkey fetch {record.label}`"
        yield Finding("mlflow", "fault", text, way_out)
        return
    wrong = [*_incomplete(run, record, recipe), *_changed(run, record.run)]
    way_out = "`runkey index` takes over what MLflow has, if that is right"
    yield from (Finding("mlflow", "fault", f"run {run_id}: {text}", way_out) for text in wrong)
    if not wrong:
        text = f"{len(run.params)} params, {len(run.metrics)} metrics, the key and its parts"
        yield Finding("mlflow", "ok", text)


def _incomplete(run: LoggedRun, record: Record, recipe: Recipe | None) -> Iterator[str]:
    """What every finished run has."""
    for place, value in (("param", run.params.get(KEY)), ("tag", run.tags.get(KEY))):
        if value != record.key:
            yield f"{place} {KEY} is {value or 'missing'}, the run's key {record.key}"
    for part in PARTS:
        value = run.params.get(f"{KEY}.{part}")
        if not value or (recipe and value != recipe.parts[part]):
            yield f"param {KEY}.{part} is {value or 'missing'}, not that of the key"
    evaluated = {
        n: v
        for e in (record.details.evaluations if record.details else {}).values()
        for n, v in e.items()
    }
    missing = sorted(evaluated.keys() - run.metrics.keys())
    if missing:
        yield f"metrics of its evaluation are missing: {some(missing)}"


def _changed(now: LoggedRun, recorded: LoggedRun) -> Iterator[str]:
    """Where MLflow's run is not the recorded one any more.  Tags are free to be edited."""
    if now.status != recorded.status:
        yield f"status {now.status}, recorded {recorded.status}"
    for kind, here, there in (
        ("param", now.params, recorded.params),
        ("metric", now.metrics, recorded.metrics),
    ):
        yield from _other_values(kind, here, there)


def _other_values(
    kind: str, now: Mapping[str, str | float], recorded: Mapping[str, str | float]
) -> Iterator[str]:
    for name in sorted(now.keys() | recorded.keys()):
        value, was = now.get(name, "missing"), recorded.get(name, "missing")
        if value != was and not (_is_nan(value) and _is_nan(was)):
            yield f"{kind} {name} is {value}, recorded {was}"


def _is_nan(value: str | float) -> bool:
    return isinstance(value, float) and math.isnan(value)


def check_snapshot(
    record: Record, details: Details, recipe: Recipe | None, root: Path, *, away: bool
) -> Iterator[Finding]:
    """The commit of the tree that ran: there, kept, and of the code that the key names.

    Args:
        record: the run.
        details: its own.
        recipe: its key's; None: its files are not hashed.
        root: the main checkout.
        away: another machine ran it, so that its snapshot need not be here.
    """
    oid = details.snapshot
    if oid is None or not has_git(root):
        where = "it ran outside git" if oid is None else f"{root} is no git repository"
        yield Finding("snapshot", "warning", f"none: {where}")
        return
    fetch = f"`runkey fetch {record.label}`"
    try:
        git(root, "cat-file", "-e", f"{oid}^{{tree}}")
    except RegistryError:
        state: State = "warning" if away else "fault"
        where = f" (it ran on {details.host})" if away else ""
        yield Finding("snapshot", state, f"commit {oid[:12]} is not in git here{where}", fetch)
        return
    if not has_snapshot(root, oid):
        ref = f"{REFS}/{record.key}/{oid[:12]}"
        text = f"{ref} is missing: git's gc may delete commit {oid[:12]}"
        yield Finding("snapshot", "fault", text, f"`git update-ref {ref} {oid}`")
        return
    wrong = changed_files(root, oid, recipe.preimages["code"]) if recipe else {}
    for path, why in wrong.items():
        yield Finding("snapshot", "fault", f"commit {oid[:12]}: {path} {why}", fetch)
    if not wrong:
        count = len(recipe.preimages["code"]["files"]) if recipe else 0
        told = f", its {count} files of code hash as in the key" if recipe else ""
        yield Finding("snapshot", "ok", f"commit {oid[:12]}{told}")


def check_environment(details: Details, recipe: Recipe | None) -> Iterator[Finding]:
    """The locked packages are stated; what was otherwise when it ran is a warning."""
    if recipe is not None:
        locked = recipe.preimages["environment"]
        if locked.get("packages"):
            text = f"{len(locked['packages'])} locked packages for {locked.get('platform')}"
            yield Finding("environment", "ok", text)
        else:
            yield Finding("environment", "fault", "key.json: its environment names no packages")
    witness = details.witness
    differing = witness["package_differences"]
    if differing:
        text = f"{len(differing)} packages were not as locked: {some(differing)}"
        yield Finding("environment", "warning", text)
    for path in witness["undeclared_files"]:
        text = f"{path} was imported, and is no part of the key"
        yield Finding("environment", "warning", text)
