"""`runkey replay KEY`: send to MLflow what it lacks of a training."""

from __future__ import annotations

from dataclasses import asdict

from runkey.cli import place
from runkey.cli.output import AsJson, Key, print_json


def replay(key: Key, as_json: AsJson = False) -> None:
    """Send MLflow what it lacks of a training that ended while it was away.

    A training that MLflow never heard of gets its run.
    """
    from runkey.registry.library import find_run
    from runkey.tracking.kept import find_training
    from runkey.tracking.replay import send_kept

    store, say = place.store(), (lambda _: None) if as_json else print
    folder = find_training(store.home, key)
    if folder is None:
        run = find_run(place.library(), key).run
        answer = {"run_id": run.run_id, "status": run.status, "values": 0, "files": 0}
        say(f"run {run.run_id}, {run.status}: nothing is kept here that it could lack")
    else:
        sent = send_kept(store, folder, say)
        answer = asdict(sent)
        say(f"run {sent.run_id}, {sent.status}: {sent.values} values and {sent.files} files sent")
    if as_json:
        print_json(answer)
