"""`runkey replay KEY`: send to MLflow what it lacks of a training."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from runkey import paths
from runkey.cli import place
from runkey.cli.output import AsJson, Key, print_json

if TYPE_CHECKING:
    from runkey.identity.record import LoggedRun


def replay(key: Key, as_json: AsJson = False) -> None:
    """Send MLflow what it lacks of a training that ended while it was away, or make the run."""
    from runkey.identity.record import update_record
    from runkey.registry.library import find_run
    from runkey.tracking.kept import clear_training, find_training, read_details
    from runkey.tracking.replay import replay as send
    from runkey.training.checkpoint.lock import locked

    store, told = place.store(), (lambda _: None) if as_json else print
    folder = find_training(store.home, key)
    if folder is None:
        run = find_run(place.library(), key).run
        answer = {"run_id": run.run_id, "status": run.status, "values": 0, "files": 0}
        told(f"run {run.run_id}, {run.status}: nothing is kept here that it could lack")
    else:
        with locked(folder, told):
            details = read_details(folder)

            def changed(run: LoggedRun) -> None:
                if not store.is_server:
                    update_record(store.home / paths.RECORDS, run, details)

            sent = send(store, folder, told, changed)
            if sent.status == "FINISHED":
                clear_training(folder, everything=True)
        answer = asdict(sent)
        told(f"run {sent.run_id}, {sent.status}: {sent.values} values and {sent.files} files sent")
    if as_json:
        print_json(answer)
