"""A training killed again and again must be the training that nobody killed.

    python -m benchmarks.training_kills --kills 60 --terms 10 --workers 0 2 4

The real stage, `python -m stages.train`, on a small data set with a real MLflow store.  A third of
the SIGKILLs come while a checkpoint is being written.  Compared with an uninterrupted training are
the last checkpoint, the model, the tables of the plots, the log, and MLflow with the log.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.support.kill_digest import digests, log_of, mlflow_faults
from tests.support.kill_project import make_project
from tests.support.kill_rounds import Training, kill_again_and_again
from tests.support.project import Project


def run(
    folder: Path,
    *,
    kills: int,
    terms: int,
    worker_kills: int = 0,
    workers: tuple[int, ...] = (0, 2, 4),
    seed: int = 0,
    epochs: int = 14,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Counts, and what was not as it should be.

    Args:
        folder: an empty one.
        kills: by SIGKILL.
        terms: by SIGTERM.
        worker_kills: of a loader process.
        workers: numbers of loader processes, in turn.
        seed: decides when.
        epochs: of the training, of three steps each.
        say: prints a line.
    """
    started = time.monotonic()
    project = make_project(folder / "project", epochs)
    quiet = Training(_copy(project, folder / "quiet"), folder / "quiet-store", 3 * epochs)
    say(f"project: {_since(started)}")
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(_uninterrupted, quiet, rng)
        for training in kill_again_and_again(
            project,
            folder,
            3 * epochs,
            kills=kills,
            terms=terms,
            worker_kills=worker_kills,
            workers=workers,
            rng=rng,
        ):
            expected, _ = whole.result()
            found = digests(project.root, training.final)
            new = [f"{name} differs" for name in expected if found.get(name) != expected[name]]
            new += _log_faults(quiet.project.root, project.root)
            new += mlflow_faults(project.root, training.store) + _wrong_ends(training)
            if new:
                new.append(f"its last process said: {training.lives[-1].output[-3000:]}")
            counts += _counted(training)
            say(f"{_since(started)}: {dict(counts)}; {new or 'identical'}")
            faults += new
        expected, faults_alone = whole.result()
    return {
        **counts,
        "compared": sorted(expected),
        "faults": faults_alone + faults,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def _uninterrupted(quiet: Training, rng: random.Random) -> tuple[dict[str, str], list[str]]:
    """Digests of the training that nobody kills, and what is wrong with it."""
    life = quiet.live("none", 0, rng)
    if life.code:
        raise RuntimeError(f"the uninterrupted training failed: {life.output}")
    root = quiet.project.root
    return digests(root, quiet.final), mlflow_faults(root, quiet.store)


def _copy(project: Project, root: Path) -> Project:
    shutil.copytree(project.root, root, symlinks=True)
    return Project(root)


def _counted(training: Training) -> Counter[str]:
    """Ends by kind; `killed while writing` are those that left a file half written."""
    ended = [life for life in training.lives if life.was_ended]
    counts = Counter({"trainings": 1, "processes": len(training.lives)})
    counts["SIGTERM"] = sum(life.kind == "term" for life in ended)
    counts["loader process killed"] = sum(life.kind == "worker" for life in ended)
    counts["SIGKILL"] = len(ended) - counts["SIGTERM"] - counts["loader process killed"]
    counts["killed while writing"] = sum(life.was_writing for life in ended)
    counts.update(f"{life.workers} workers" for life in ended)
    return counts


def _wrong_ends(training: Training) -> list[str]:
    """Processes that did not end as they should have."""
    expected = {"term": 143, "worker": 1, "none": 0}
    wrong = []
    for number, life in enumerate(training.lives):
        code = expected.get(life.kind, -9)
        told = life.kind not in ("term", "worker") or "`dvc repro` goes on" in life.output
        if life.was_ended and (life.code != code or not told):
            wrong.append(f"life {number} ({life.kind}): code {life.code}: {life.output[-2000:]}")
    return wrong


def _log_faults(quiet: Path, killed: Path) -> list[str]:
    """The first entries of two logs that differ."""
    pairs = zip_longest(log_of(quiet), log_of(killed))
    return [f"log: {a} became {b}" for a, b in pairs if a != b][:3]


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


def main() -> int:
    """Run; the result as JSON, exit code 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--worker-kills", type=int, default=3, help="of a loader process")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="in turn")
    parser.add_argument("--seed", type=int, default=0, help="decides when")
    parser.add_argument("--epochs", type=int, default=14, help="of three steps each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        result = run(
            Path(folder),
            kills=options.kills,
            terms=options.terms,
            worker_kills=options.worker_kills,
            workers=tuple(options.workers),
            seed=options.seed,
            epochs=options.epochs,
            say=partial(print, flush=True),
        )
    print(json.dumps(result, indent=1))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
