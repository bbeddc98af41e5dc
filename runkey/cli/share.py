"""`runkey publish | fetch | export | import`: share a run with others, and get one from them."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson, Key
from runkey.errors import RegistryError
from runkey.identity.key import short_key
from runkey.paths import Address, is_server
from runkey.registry.library import find_run, open_library
from runkey.tracking.store import Store
from runkey.units import counted, format_bytes

if TYPE_CHECKING:
    from runkey.registry.share import Checkout, Handed, Team

Server = Annotated[
    str,
    Option(
        "--server",
        help="MLflow server of the team; default: runtime.team_server of params.yaml, else"
        " MLFLOW_TRACKING_URI.",
    ),
]
Remote = Annotated[str, Option("--remote", help="DVC remote; default: DVC's own (core.remote).")]
GitRemote = Annotated[str, Option("--git-remote", help="git remote for the snapshot.")]
WithData = Annotated[
    bool, Option("--with-data", help="The raw data too, which data.dvc has a remote for.")
]


def export_run(
    key: Key,
    file: Annotated[Path, Argument(help="Archive to write, such as run.zip.")],
    with_data: WithData = False,
    force: Annotated[
        bool, Option("--force", help="Write over a file that is there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run to one file: results, DVC's entries, snapshot and MLflow run."""
    from runkey.registry import share

    if file.exists() and not force:
        raise RegistryError(f"{file}: is there already; name another, or say --force")
    here = this_checkout()
    record = find_run(here.library, key)
    done = share.export_run(record, here, file, with_data=with_data)
    packed = file.stat().st_size
    size = f"{counted(done.files, 'file')} ({format_bytes(done.size)}) in {file}"
    text = f"{size}, {format_bytes(packed)}; `runkey import {file.name}` takes it in"
    answer = asdict(done) | {"file": str(file), "archive_size": packed}
    output.print_answer(answer, (f"{short_key(done.key)}: ", text), as_json=as_json)


def import_run(
    file: Annotated[Path, Argument(help="Archive that `runkey export` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Import a run from a file, all of it checked; `dvc repro` then restores it."""
    from runkey.registry import share

    here = this_checkout()
    done = share.import_run(file, here)
    state = "taken in as" if done.is_new else "was here already as"
    verified = f"{counted(done.files, 'file')} ({format_bytes(done.size)}) verified"
    text = f"{verified}, {state} MLflow run {done.run_id}"
    output.print_answer(asdict(done), (f"{short_key(done.key)}: ", text), as_json=as_json)


def publish(
    key: Key,
    remote: Remote = "",
    git_remote: GitRemote = "origin",
    server: Server = "",
    with_data: WithData = False,
    as_json: AsJson = False,
) -> None:
    """Publish a run to the team: results, DVC's entries, snapshot and MLflow run."""
    from runkey.registry import share

    here, team = this_checkout(), team_of(remote, git_remote, server)
    record = find_run(here.library, key)
    done = share.publish(record, here, team, with_data=with_data)
    lines = _parts(done, f"sent to {done.dvc}")
    if done.state == "published from elsewhere":
        lines = [f"  MLflow  run {done.run_id} on {done.server}; nothing was sent"]
    title = f"{short_key(done.key)}: {_STATES[done.state]}"
    output.print_answer(asdict(done), title, *lines, as_json=as_json)


def fetch(
    key: Key,
    remote: Remote = "",
    git_remote: GitRemote = "origin",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Get a published run from the team, so that `dvc repro` restores it."""
    from runkey.registry import share

    here, team = this_checkout(), team_of(remote, git_remote, server)
    record = find_run(team.library, key)
    done = share.fetch(record, here, team)
    title = f"{short_key(done.key)}: fetched; `dvc repro` restores it where the tree has this key"
    output.print_answer(asdict(done), title, *_parts(done, "new here"), as_json=as_json)


_STATES = {
    "new": "published",
    "already there": "published already",
    "published from elsewhere": "another run of this key is published already",
}


def this_checkout() -> Checkout:
    """This checkout; copies of runs go to the experiment of params.yaml."""
    from runkey.params import load_params
    from runkey.registry.share import Checkout
    from runkey.tracking.describe import committed_params
    from runkey.tracking.transfer import StoreRuns

    root, store = output.workspace(), output.store()
    experiment = load_params(root / paths.PARAMS).runtime.experiment
    runs = StoreRuns(store, experiment, committed_params(root))

    def commit(stages: Collection[str]) -> None:
        from runkey.dvc_transfer import commit_stages

        commit_stages(root, stages)

    return Checkout(root, store.home, output.library(), runs, commit)


def team_of(remote: str, git_remote: str, server: str) -> Team:
    """The team's places; its server is the option's, that of params.yaml, or the environment's."""
    from runkey.dvc_transfer import DvcRemote
    from runkey.params import load_params  # 0.3 s
    from runkey.registry.share import Team
    from runkey.tracking.transfer import StoreRuns

    root, home = output.workspace(), output.store().home
    runtime = load_params(root / paths.PARAMS).runtime
    named = runtime.team_server
    own = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    address = Address(server or (named if named != "none" else own))
    if not server and not is_server(address):
        raise RegistryError(
            "no MLflow server of the team is named; set runtime.team_server in params.yaml, or"
            " say --server http://..."
        )
    return Team(
        dvc=DvcRemote(root, remote or None),
        git=git_remote,
        library=open_library(address, home),
        runs=StoreRuns(Store(address, None, home), runtime.experiment),
    )


def _parts(done: Handed, sent: str) -> list[str]:
    objects = f"{counted(done.objects, 'object')} ({format_bytes(done.size)})"
    objects = f"{objects}, {counted(done.entries, 'stage')}"
    new = f"{done.new_objects} {sent}" if done.new_objects else "all were there"
    ref = done.ref and done.ref.replace(done.key, f"{short_key(done.key)}...")
    return [
        f"  DVC     {objects}; {new}",
        f"  git     {ref or 'no snapshot: it was trained outside git'}",
        f"  MLflow  run {done.run_id}{' was there' if done.state == 'already there' else ''}",
    ]
