"""Runs in a real MLflow store as training leaves them, with their records."""

from __future__ import annotations

from pathlib import Path

from runkey.hashing import sha256_bytes
from runkey.identity.record import DETAILS, Record, StartedFrom
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.tracking.transfer import logged_run
from tests.support.records import FILES, key_of, make_run

KEYS = [key_of(str(number)) for number in range(4)]


def log_runs(store: Store, scratch: Path) -> list[Record]:
    """Runs in MLflow as training leaves them; the last one goes on, the first is reproduced.

    Number 2 was started from the weights of number 1.
    """
    weights = sha256_bytes(FILES["model/weights.pt"])
    began = StartedFrom(param="model.init_from", weights=weights, key=KEYS[1])
    client = open_client(store)
    experiment = experiment_id(client, store, "detection")
    records = []
    for number, key in enumerate([*KEYS, KEYS[0]]):
        own = {"reproduction_of": records[0].run.run_id} if number == len(KEYS) else {}
        is_child = key == KEYS[2]
        if is_child:
            own = {name: value for name, value in began.tags.items() if value}
        run = client.create_run(
            experiment, run_name=f"run {number}", start_time=1_700_000_000_000 + number,
            tags={"key": key, "host": "here", **own},
        )  # fmt: skip
        run_id = run.info.run_id
        if is_child:
            client.log_param(run_id, began.param, KEYS[1][:12])
        for name, value in {"key": key, "lr": f"{number}e-05", "text": "ü 'x' \"y\""}.items():
            client.log_param(run_id, name, value)
        for name, value in {"eval/AP": number / 8, "system/cpu": 1.0, "odd": float("nan")}.items():
            client.log_metric(run_id, name, value)
        record = make_run(scratch, key, run_id, started_from=began if is_child else None)
        running = number == len(KEYS) - 1
        if not running:
            assert record.details
            (scratch / DETAILS).write_text(record.details.as_json())
            client.log_artifact(run_id, str(scratch / DETAILS))
            client.set_terminated(run_id, "FINISHED", end_time=1_700_000_060_000)
        logged = logged_run(client.get_run(run_id))
        records.append(Record(run=logged, details=None if running else record.details))
    client.create_run(experiment, run_name="of somebody else", tags={"mlflow.note": "x"})
    return records
