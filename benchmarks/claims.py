"""Eight processes ask for one key at the same time, again and again; one of them is killed.

    python -m benchmarks.claims files                    # local store: claims are files
    python -m benchmarks.claims server                   # a real `mlflow server` on sqlite
    python -m benchmarks.claims containers               # files, a pid namespace for each process
    python -m benchmarks.claims server --uri http://...  # a server that runs already

Every round asks for two keys.  First all ask, one trains, the others get its files.  Then all ask
again, the owner is killed (SIGKILL) somewhere in its training, one of the others takes over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from runkey.registry.claims import open_claims
from runkey.registry.once import Rhythm
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


def main() -> None:
    """Play, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("where", choices=["files", "server", "containers"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--uri", help="address of a server that runs already")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runkey-")))
        uri = f"sqlite:///{root / 'mlflow.db'}"
        if options.where == "server":
            uri = options.uri or stack.enter_context(server(root))
        unseen = options.where == "containers"
        rhythm, prefix = (UNSEEN, CONTAINER) if unseen else (QUICK, ())
        askers = Askers(uri, root, options.processes, rhythm, prefix)
        result = rounds(stack.enter_context(askers), options.rounds)
        print(json.dumps({"where": options.where} | result, indent=2))


if __name__ == "__main__":
    main()
