"""Eight processes ask for one key at the same time, again and again; one of them is killed.

    python -m benchmarks.claims files                    # local store: claims are files
    python -m benchmarks.claims server                   # a real `mlflow server` on sqlite
    python -m benchmarks.claims containers               # files, a pid namespace for each process
    python -m benchmarks.claims server --uri http://...  # a server that runs already
    python -m benchmarks.claims many --uri http://... --processes 200    # workers of a large team

`many` does what so many workers ask of a server, in threads: each claims a key (a tenth looks for
its runs first, as a training does), beats for a while, and ends.  `--fill 100000 --database
postgresql://...` puts so many keys with finished runs into the server's database first.  Seconds of
CPU are those of `--pids` and of all that these started.

Every round asks for two keys.  First all ask, one trains, the others get its files.  Then all ask
again, the owner is killed (SIGKILL) somewhere in its training, one of the others takes over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from runkey.registry.claims import Claim, Claims, open_claims, this_owner
from runkey.registry.library import open_library
from runkey.registry.once import HeldClaim, Rhythm, decide
from runkey.registry.rest import RestClient
from runkey.tracking.store import Store, free_port, start_server, stop_server, wait_until_healthy
from tests.support.claim_rounds import CONTAINER, QUICK, Askers, Outcome
from tests.support.records import key_of

UNSEEN = Rhythm(beat_seconds=0.5, dead_after=4.0, poll_seconds=0.2)
"""For processes that cannot see each other: death is only known by the beat."""


def rounds(askers: Askers, number: int) -> dict[str, object]:
    """Play the rounds; counts and times."""
    counts: Counter[str] = Counter()
    waits, reactions, takeovers, wrong = [], [], [], []
    claims = open_claims(askers.uri, askers.root / ".runkey")
    for _ in range(number):
        for kill in (False, True):
            key = key_of(secrets.token_hex(8))
            outcome = askers.ask(key, kill=kill)
            counts.update(event["event"] for event in outcome.events)
            counts["killed"] += kill
            if text := problem(outcome, askers.count, kill):
                wrong.append(text)
                continue
            last = claims.of(key)[-1]
            if (last.state, last.generation) != ("finished", 1 + kill):
                wrong.append(f"newest claim: {last}")
            waits += outcome.waits
            reactions += outcome.reactions
            if kill:
                takeovers.append(outcome.takeover_seconds)
    return {
        "rounds": number,
        "processes": askers.count,
        "questions": 2 * number * askers.count,
        **{name: counts[name] for name in ("trained", "reused", "killed", "lost", "alone")},
        "takeovers": len(takeovers),
        "exceptions": counts["error"],
        "rounds that went wrong": wrong,
        "wait, median s": round(statistics.median(waits), 3),
        "files after the end of the training, median s": round(statistics.median(reactions), 3),
        "the same, slowest": round(max(reactions), 3),
        "death to takeover, median s": round(statistics.median(takeovers), 3),
        "the same, slowest takeover": round(max(takeovers), 3),
    }


def problem(outcome: Outcome, count: int, kill: bool) -> str:
    """What is not as promised; empty: nothing."""
    found = Counter(event["event"] for event in outcome.events if event["event"] != "said")
    promised = Counter(trains=1 + kill, trained=1, reused=count - 1 - kill)
    if found != promised:
        texts = [event["text"] for event in outcome.of("error")]
        return f"{dict(found)} instead of {dict(promised)}: {texts}"
    return "" if outcome.shared else "somebody has other files than were trained"


@contextlib.contextmanager
def server(root: Path) -> Iterator[str]:
    """A real MLflow server with a new database; its address."""
    store = Store(f"sqlite:///{root / 'mlflow.db'}", root / "artifacts", root)
    port = free_port()
    process = start_server(store, port)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, process)
        yield address
    finally:
        stop_server(process)


FILL = """
INSERT INTO registered_models (workspace, name, creation_time, last_updated_time, description)
  SELECT 'default', key, 1, 1, '' FROM keys;
INSERT INTO registered_model_tags (workspace, name, key, value)
  SELECT 'default', key, tag, value FROM keys, (VALUES ('runkey.owner', '{}'), ('runkey.beat', '9'),
  ('runkey.run', 'x'), ('runkey.state', 'finished'), ('runkey.since_ms', '1')) AS t (tag, value);
INSERT INTO runs (run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri,
  experiment_id) SELECT md5(key), 'filled', 'FINISHED', 1, 2, 'active', 'mlflow-artifacts:/0/x', 0
  FROM keys;
INSERT INTO tags (key, value, run_uuid) SELECT 'key', key, md5(key) FROM keys;
INSERT INTO tags (key, value, run_uuid) SELECT tag, 'x', md5(key) FROM keys,
  (VALUES ('device'), ('host'), ('mlflow.user'), ('mlflow.source.name'), ('snapshot')) AS t (tag);
ANALYZE;
"""


def fill(database: str, keys: int) -> None:
    """Put finished runs and their claims into a server's database."""
    made = "CREATE TEMP TABLE keys AS SELECT 'rk2-' || encode(sha256(('f' || n)::bytea), 'hex') AS"
    made += f" key FROM generate_series(1, {keys}) AS n;"
    subprocess.run(["psql", "-q", "-1", database], input=made + FILL, text=True, check=True)


class Meter:
    """Counts the requests of all clients, and their seconds, by kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._ask = RestClient._ask

    def __enter__(self) -> Self:
        ask = self._ask

        def timed(client: RestClient, method: str, path: str, *args: Any, **more: Any) -> Any:
            began = time.monotonic()
            try:
                return ask(client, method, path, *args, **more)
            finally:
                kind = path.partition("?")[0].removeprefix("api/2.0/mlflow/")
                self.seconds[kind].append(time.monotonic() - began)

        RestClient._ask = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        RestClient._ask = self._ask  # type: ignore[method-assign]

    def take(self, wall: float, cpu: float) -> dict[str, object]:
        """What was asked since the last call."""
        taken, self.seconds = self.seconds, defaultdict(list)
        every = sorted(second for some in taken.values() for second in some)
        count = max(1, len(every))
        return {
            "wall s": round(wall, 1),
            "requests": len(every),
            "requests/s": round(len(every) / wall, 1),
            "server CPU ms/request": round(1000 * cpu / count, 1),
            "median s": round(statistics.median(every or [0.0]), 3),
            "95% s": round(every[int(0.95 * (count - 1))] if every else 0.0, 3),
            "kinds": {
                kind: [len(some), round(statistics.median(some), 3)]
                for kind, some in sorted(taken.items())
            },
        }


def cpu_of(pids: Sequence[int]) -> float:
    """CPU seconds of processes and all that they started."""
    total = 0.0
    for pid in pids:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def many(
    uri: str, root: Path, clients: int, seconds: float, pids: Sequence[int]
) -> dict[str, object]:
    """Let so many workers train a key each at the same time; what that asks of the server.

    Each tenth looks its key up as a training does; the others claim theirs and beat.
    """
    begun, over, done = (
        threading.Barrier(clients + 1),
        threading.Event(),
        threading.Barrier(clients + 1),
    )
    faults: list[str] = []

    def work(number: int) -> None:
        claims, held = open_claims(uri, root), None
        try:
            held = started(claims, number)
        except Exception as error:  # noqa: BLE001  counted
            faults.append(str(error)[:200])
        begun.wait()
        with held or contextlib.nullcontext():
            over.wait()
            if held:
                held.finish("ab")
        done.wait()

    def started(claims: Claims, number: int) -> HeldClaim | None:
        key = key_of(f"{root}-{number}")
        if number % 10 == 0:
            return decide(open_library(uri, root), claims, key, require=True).claim
        claim = Claim(key=key, generation=1, owner=this_owner())
        return HeldClaim(claims, claim, Rhythm()) if claims.make(claim) else None

    with Meter() as meter:
        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(clients)]
        began, cpu = time.monotonic(), cpu_of(pids)
        for thread in threads:
            thread.start()
        begun.wait()
        starts = meter.take(time.monotonic() - began, cpu_of(pids) - cpu)
        began, cpu = time.monotonic(), cpu_of(pids)
        time.sleep(seconds)
        beats = meter.take(time.monotonic() - began, cpu_of(pids) - cpu)
        began, cpu = time.monotonic(), cpu_of(pids)
        over.set()
        done.wait()
        ends = meter.take(time.monotonic() - began, cpu_of(pids) - cpu)
    return {"clients": clients, "starts": starts, "beats": beats, "ends": ends, "faults": faults}


def main() -> None:
    """Play, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("where", choices=["files", "server", "containers", "many"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--uri", help="address of a server that runs already")
    parser.add_argument("--seconds", type=float, default=60.0, help="of beating, with `many`")
    parser.add_argument("--fill", type=int, default=0, help="keys to put into --database first")
    parser.add_argument("--pids", type=int, nargs="*", default=[], help="of MLflow and PostgreSQL")
    parser.add_argument("--database", default="", help="the server's, as psql takes it")
    options = parser.parse_args()
    if options.fill:
        fill(options.database, options.fill)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runkey-")))
        uri = f"sqlite:///{root / 'mlflow.db'}"
        if options.where == "server":
            uri = options.uri or stack.enter_context(server(root))
        if options.where == "many":
            uri = options.uri or stack.enter_context(server(root))
            print(
                json.dumps(
                    many(uri, root, options.processes, options.seconds, options.pids), indent=1
                )
            )
            return
        unseen = options.where == "containers"
        rhythm, prefix = (UNSEEN, CONTAINER) if unseen else (QUICK, ())
        askers = Askers(uri, root, options.processes, rhythm, prefix)
        result = rounds(stack.enter_context(askers), options.rounds)
        print(json.dumps({"where": options.where} | result, indent=2))


if __name__ == "__main__":
    main()
