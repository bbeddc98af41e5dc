"""`runkey publish` and `runkey fetch`: runs to the team, and from it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runkey import paths
from runkey.cli.output import AsJson, Key, print_json
from runkey.cli.place import library, store, workspace
from runkey.errors import RegistryError
from runkey.identity.key import short_key
from runkey.progress import progress

if TYPE_CHECKING:
    from runkey.registry.team.team import Handed, Places
    from runkey.tracking.store import Store
    from runkey.tracking.transfer import StoreRuns

_HTTP = ("http://", "https://")

Server = Annotated[
    str,
    typer.Option(
        "--server",
        help="MLflow server of the team; default: runtime.team_server of params.yaml, else"
        " MLFLOW_TRACKING_URI.",
    ),
]
Remote = Annotated[
    str, typer.Option("--remote", help="DVC remote; default: DVC's own (core.remote).")
]
GitRemote = Annotated[str, typer.Option("--git-remote", help="git remote for the snapshot.")]
WithData = Annotated[
    bool, typer.Option("--with-data", help="The raw data too, which data.dvc has a remote for.")
]


def publish(
    key: Key,
    remote: Remote = "",
    git_remote: GitRemote = "origin",
    server: Server = "",
    with_data: WithData = False,
    as_json: AsJson = False,
) -> None:
    """Hand a run to the team: results, DVC's entries, snapshot and MLflow run."""
    from runkey.registry.library import find_run
    from runkey.registry.team.team import PARTS
    from runkey.registry.team.team import publish as hand_over

    places, team = _places(remote, git_remote, server)
    record = find_run(library(), key)
    mine, theirs = runs_of(store()), runs_of(team)
    with progress("publish", PARTS, "parts") as steps:
        done = hand_over(record, places, mine, theirs, with_data=with_data, steps=steps)
    if as_json:
        print_json(asdict(done))
        return
    print(f"{short_key(done.key)}: {_STATES[done.state]}")
    if done.state == "published from elsewhere":
        print(f"  MLflow  run {done.run_id} on {done.server}; nothing was sent")
        return
    _print_parts(done, f"sent to {done.dvc}")


def fetch(
    key: Key,
    remote: Remote = "",
    git_remote: GitRemote = "origin",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Get a published run from the team, so that `dvc repro` restores it."""
    from runkey.registry.library import find_run
    from runkey.registry.team.team import PARTS
    from runkey.registry.team.team import fetch as get

    places, team = _places(remote, git_remote, server)
    record = find_run(places.server, key)
    mine, theirs = runs_of(store()), runs_of(team)
    with progress("fetch", PARTS, "parts") as steps:
        done = get(record, places, library(), mine, theirs, steps=steps)
    if as_json:
        print_json(asdict(done))
        return
    print(f"{short_key(done.key)}: fetched; `dvc repro` restores it where the tree has this key")
    _print_parts(done, "new here")


_STATES = {
    "new": "published",
    "already there": "published already",
    "published from elsewhere": "another run of this key is published already",
}


def runs_of(place: Store) -> StoreRuns:
    """MLflow's part of a store; copies go to the experiment of params.yaml."""
    from runkey.params import load_params
    from runkey.tracking.transfer import StoreRuns

    return StoreRuns(place, load_params(workspace() / paths.PARAMS).runtime.experiment)


def _places(remote: str, git_remote: str, server: str) -> tuple[Places, Store]:
    """Where to and where from; and the team's server as a store."""
    from runkey.registry.open import open_library
    from runkey.registry.team.dvc_remote import DvcRemote
    from runkey.registry.team.team import Places
    from runkey.tracking.store import Store

    root, own = workspace(), store()
    address = server or _team_server(root)
    team = Store(address, None, own.home)
    places = Places(
        root=root,
        home=own.home,
        dvc=DvcRemote(root, remote or None),
        git=git_remote,
        server=open_library(address, own.home),
        own=own.uri.rstrip("/") == address.rstrip("/"),
    )
    return places, team


def _team_server(root: Path) -> str:
    """The server that params.yaml or the environment names.

    Raises:
        RegistryError: neither does.
    """
    from runkey.params import load_params  # 0.3 s

    named = load_params(root / paths.PARAMS).runtime.team_server
    address = named if named != "none" else os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not address.startswith(_HTTP):
        raise RegistryError(
            "no MLflow server of the team is named; set runtime.team_server in params.yaml, or"
            " say --server http://..."
        )
    return address


def _print_parts(done: Handed, sent: str) -> None:
    from runkey.registry.reading.columns import size

    print(f"  DVC     {done.objects} objects ({size(done.size)}), {done.entries} stages;", end=" ")
    print(f"{done.new_objects} {sent}" if done.new_objects else "all were there")
    ref = done.ref and done.ref.replace(done.key, f"{short_key(done.key)}...")
    print(f"  git     {ref or 'no snapshot: it was trained outside git'}")
    print(f"  MLflow  run {done.run_id}{' was there' if done.state == 'already there' else ''}")
