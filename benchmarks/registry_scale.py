"""How long the registry takes to answer when there are ten thousand runs.

    python benchmarks/registry_scale.py --runs 10000

The tables are made by MLflow, the runs are put into them as rows, each with the parameters, tags
and metrics that a training of this repository leaves, and a record.json on disk.  Then `runkey
index` writes the records, and commands are called as a user calls them, five times each: CPU
seconds of the whole process (user and system), the median.  The same then through `mlflow server`
on the same store.  benchmarks/results/registry_scale.md is written anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "registry_scale.md"
sys.path.insert(0, str(REPOSITORY))

from runkey.hashing import sha256_bytes  # noqa: E402
from runkey.identity.record import DETAILS, Details, StoredFile  # noqa: E402
from runkey.params import load_params  # noqa: E402
from runkey.registry.library import open_library  # noqa: E402
from runkey.registry.query import Field, Query  # noqa: E402
from runkey.tracking.store import (  # noqa: E402
    Store,
    experiment_id,
    free_port,
    locate_store,
    open_client,
    start_server,
    stop_server,
    wait_until_healthy,
)

TIMES = 5
PARTS = ("code", "params", "data", "environment")
FILES = (
    *(f"evaluation/{n}" for n in ("metrics.json", "predictions.json", "best.jpg", "worst.jpg")),
    *(f"model/{n}" for n in ("classes.json", "key.json", "model.json", "weights.safetensors")),
    *("logs/train.jsonl", "metrics/evaluate.json", "metrics/train.json"),
    *("params.yaml", "plots/curves.png", "plots/losses.csv", "run.json"),
)
METRICS = (
    *(f"eval/{n}" for n in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")),
    *(f"{s}/loss{t}" for s in ("eval", "val", "train") for t in ("", "_class", "_l1", "_giou")),
    *(f"val/{n}" for n in ("AP", "AP50", "AP75")),
    *(f"train/{n}" for n in ("lr", "epoch", "grad_norm", "images_per_second", "seconds")),
    *(f"system/{n}" for n in ("cpu", "memory", "disk", "gpu")),
)
_NOTE = """\
Server columns: CPU seconds are the command's own.  Sorted by a metric the server itself takes
seconds: MLflow's query joins the metric's values without an index on sqlite."""


def fill(store: Store, runs: int) -> list[str]:
    """Put runs into the store.  Returns their keys, oldest first."""
    client = open_client(store)
    number = int(experiment_id(client, store, "detection"))
    params = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in load_params(REPOSITORY / "params.yaml").flat(runtime=True).items()
    }
    chance = random.Random(0)
    assert store.database is not None
    assert store.artifacts is not None
    keys = []
    with closing(sqlite3.connect(store.database)) as database, database:
        for index in range(runs):
            key = f"rk2-{sha256_bytes(str(index).encode())}"
            run = hashlib.md5(key.encode()).hexdigest()
            folder = store.artifacts / run / "artifacts"
            folder.mkdir(parents=True)
            (folder / DETAILS).write_text(_details(key).as_json(), encoding="utf-8")
            _insert(database, number, run, key, folder.as_uri(), index, params, chance)
            keys.append(key)
    return keys


def _insert(
    database: sqlite3.Connection,
    experiment: int,
    run: str,
    key: str,
    uri: str,
    index: int,
    params: dict[str, str],
    chance: random.Random,
) -> None:
    started = 1_760_000_000_000 + index * 300_000
    lr = json.dumps(round(10 ** chance.uniform(-5, -3), 6))
    columns = (
        "run_uuid, name, source_type, status, start_time, end_time, lifecycle_stage,"
        " artifact_uri, experiment_id, user_id, source_name, entry_point_name, source_version"
    )
    values = (run, f"lr={lr}", "LOCAL", "FINISHED", started, started + 240_000, "active", uri)
    database.execute(
        f"INSERT INTO runs ({columns}) VALUES ({', '.join('?' * 13)})",
        (*values, experiment, "user", "python -m stages.train", "", ""),
    )
    own = {**params, "lr": lr, "seed": str(index % 7), "key": key}
    own |= {f"key.{part}": sha256_bytes(f"{part}{index}".encode()) for part in PARTS}
    tags = {
        "key": key,
        "mlflow.runName": f"lr={lr}",
        "mlflow.user": "user",
        "mlflow.source.name": "python -m stages.train",
        "mlflow.source.type": "LOCAL",
        "device": "cpu x86_64",
        "micro_batch": "8",
        "precision": "off",
        "torch": "2.9.1",
        "snapshot": sha256_bytes(key.encode())[:40],
        "decision": "no run of this key: trained",
        "key.audit": "ok",
        "host": f"machine-{index % 5}",
        "event.training_end": json.dumps({"seconds": 240.0, "reason": "last epoch"}),
    }
    for table, pairs in (("params", own), ("tags", tags)):
        database.executemany(
            f"INSERT INTO {table} (key, value, run_uuid) VALUES (?, ?, ?)",
            [(name, value, run) for name, value in pairs.items()],
        )
    latest = [(n, chance.random(), started + 200_000, 1000, 0, run) for n in METRICS]
    database.executemany(
        'INSERT INTO latest_metrics ("key", value, timestamp, step, is_nan, run_uuid)'
        " VALUES (?, ?, ?, ?, ?, ?)",
        latest,
    )


def _details(key: str) -> Details:
    return Details(
        stage="train",
        files={p: StoredFile(sha256=sha256_bytes(f"{p}{key}".encode()), size=1000) for p in FILES},
        outputs=sorted(FILES),
        witness={
            "device": "cpu x86_64",
            "micro_batch": 8,
            "world_size": 1,
            "threads": 1,
            "precision": "off",
            "interpreter": "CPython 3.12.1 Linux x86_64",
            "package_differences": [],
            "undeclared_files": [],
            "commit": "0" * 40,
            "dirty": False,
        },
        host="machine-0",
        snapshot=sha256_bytes(key.encode())[:40],
        pointer_md5=None,
        decision="no run of this key: trained",
    )


def cpu_seconds(root: Path, *arguments: str, times: int = TIMES) -> float:
    """Median CPU seconds of a command, of the process and what it starts."""
    seconds = []
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "runkey", *arguments]
        subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


def wall_ms(action: Callable[[], Any], times: int = TIMES) -> float:
    """Median milliseconds of an action."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


def measure(root: Path, uri: str, key: str) -> list[tuple[str, float, str]]:
    """Commands on the store, and the lookup by itself."""
    prefix = key[:10]
    library = open_library(uri, root / ".runkey")
    rows = [
        ("lookup of a prefix in the process", wall_ms(lambda: library.matching(prefix)), "ms wall")
    ]
    best = Query(sort=Field("metrics", "eval/AP"), limit=20)
    sorted_ms = wall_ms(lambda: library.find(best), times=1)
    rows.append(("20 runs sorted by AP, in the process", sorted_ms, "ms wall"))
    commands = (
        ("show", prefix),
        ("list", "--limit", "20"),
        ("list", "--limit", "20", "--sort", "AP"),
        ("list", "--limit", "20", "--where", "seed=3", "--where", "AP>0.9"),
        ("list", "--limit", "20", "--sort", "lr"),
        ("list", "--limit", "20", "--where", "AP>0.5", "--sort", "lr"),
    )
    for command in commands:
        if uri.startswith("http") and command[-2:] == ("--sort", "lr"):
            continue  # asks for all runs there: a minute
        rows.append((f"runkey {' '.join(command)}", cpu_seconds(root, *command), "s CPU"))
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Fill, index, measure, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="folder that is used, or filled and left there")
    options = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory(prefix="runkey-") as temporary:
        root = (options.keep or Path(temporary)).resolve()
        (root / "stages").mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "params.yaml", root)
        store = locate_store(root)
        if store.database and not store.database.exists():
            fill(store, options.runs)
        key = f"rk2-{sha256_bytes(str(options.runs // 2).encode())}"
        shutil.rmtree(store.home, ignore_errors=True)
        index = cpu_seconds(root, "index", times=1)
        first = cpu_seconds(root, "list", times=1)
        local = measure(root, store.uri, key)
        process = start_server(store, port := free_port())
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until_healthy(address, process)
            os.environ["MLFLOW_TRACKING_URI"] = address
            served = measure(root, address, key)
        finally:
            stop_server(process)
    local += [("runkey index (all records gone)", index, "s CPU")]
    local += [("runkey list, the first after that", first, "s CPU")]
    RESULTS.write_text(report(options.runs, local, served), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def report(
    runs: int, local: list[tuple[str, float, str]], served: list[tuple[str, float, str]]
) -> str:
    """The page of results."""
    there = {name: value for name, value, _ in served}
    params = len(load_params(REPOSITORY / "params.yaml").flat(runtime=True))
    lines = [
        f"# The registry with {runs:,} runs",
        "",
        f"`python benchmarks/registry_scale.py --runs {runs}`, {time.strftime('%Y-%m-%d')}; "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}; "
        f"{len(METRICS)} metrics, {params} parameters and 14 tags a run; median of 5.",
        "",
        "| | unit | local store | `mlflow server` |",
        "|---|---|---|---|",
    ]
    for name, value, unit in local:
        other = f"{there[name]:.3g}" if name in there else "-"
        lines.append(f"| {name} | {unit} | {value:.3g} | {other} |")
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    lines += ["", _NOTE]
    lines += ["", f"Load of the machine at the end (1, 5, 15 minutes): {load}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
