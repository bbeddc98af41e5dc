"""`runkey trial` and `runkey sweep`: one training, or many, of this repository's snapshots."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from runkey import paths
from runkey.cli import output
from runkey.cli.memory import Changes, parse_changes
from runkey.cli.output import AsJson
from runkey.errors import Interrupted, RegistryError, StoppedError
from runkey.identity.key import make_recipe, short_key
from runkey.progress import escaped, log_to_terminal, say
from runkey.units import counted, format_score, format_seconds

if TYPE_CHECKING:
    from runkey.sweep.driver import Entry, Source, Sweep
    from runkey.sweep.executor import Executor
    from runkey.sweep.placement import Placement
    from runkey.sweep.record import SweepRecord
    from runkey.sweep.space import Point, Space
    from runkey.sweep.trial import Place

logger = logging.getLogger(__name__)


def trial(
    commit: Annotated[str, Argument(help="Snapshot: a commit, a branch or a tag.")],
    changes: Changes = None,
    wait: Annotated[
        bool, Option("--wait/--no-wait", help="Wait while another process trains the key.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train a snapshot with changed parameters, in a worktree; safe to start anywhere.

    Exit code 0: its run is finished; 75: try again, maybe on another machine; 1: do not.
    """
    from runkey.sweep.trial import AP, run_trial

    _end_by_signals()
    log_to_terminal(stderr=True)
    values = parse_changes(changes or [])
    stream = sys.stderr if as_json else sys.stdout
    record = run_trial(_place(), commit, values, stream, wait=wait)
    answer = {"key": record.key, "run": record.run.run_id, "AP": record.run.metrics[AP]}
    score = format_score(record.run.metrics, AP)
    line = f"{short_key(record.key)}: AP {score}, run {record.run.run_id}"
    output.print_answer(answer, line, as_json=as_json)


def _end_by_signals() -> None:
    """End in one line after Ctrl-C, and as then if a process manager or a closed terminal asks."""

    def stop(number: int, _: Any) -> None:
        text = f"stopped by {signal.Signals(number).name}; the same command goes on"
        raise Interrupted(signal.Signals(number), text)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after `nohup`
            signal.signal(number, stop)


def _place() -> Place:
    """The store and checkout of the current folder, and the team if a server is named."""
    from runkey.cli.share import team_of, this_checkout
    from runkey.dvc_transfer import NoUsableRemoteError
    from runkey.params import load_params
    from runkey.sweep.trial import Place

    here, team = this_checkout(), None
    named = load_params(here.root / paths.PARAMS).runtime.team_server
    if named != "none" or paths.is_server(os.environ.get("MLFLOW_TRACKING_URI", "")):
        team = team_of("", "origin", "")
        try:
            team.dvc.check()
        except NoUsableRemoteError as error:
            logger.warning(f"runs are not published: {error}")
            team = None
        except RegistryError as error:
            raise StoppedError(f"{error}; the run could not be published") from None
    return Place(output.store(), here, team)


def sweep(
    changes: Annotated[
        list[str] | None,
        Option(
            "--set-param",
            "-S",
            help="NAME=VALUE,VALUE for a grid; NAME=log:LOW:HIGH, uniform: or int: for --random"
            " and --tpe; repeatable.",
        ),
    ] = None,
    points: Annotated[
        Path | None, Option("--points", help="YAML or CSV file with a list of points instead.")
    ] = None,
    draws: Annotated[
        int, Option("--random", min=0, max=10_000, help="Train so many random points.")
    ] = 0,
    tpe: Annotated[
        int, Option(min=0, max=10_000, help="Train so many points that Optuna's TPE proposes.")
    ] = 0,
    search_seed: Annotated[int, Option(min=0, help="Of --random and --tpe.")] = 0,
    on: Annotated[
        str, Option("--on", help="What runs the trials: local, ray, ray:ADDRESS or slurm.")
    ] = "local",
    jobs: Annotated[
        int, Option(min=0, help="Most trials at once; 0: by cores, and memory in any case.")
    ] = 0,
    dry: Annotated[bool, Option("--dry-run", help="Print the keys and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a grid, a list, random points or a search over parameters, each key once.

    Started again with the same line it goes on: finished keys are found, dead ones are resumed.
    """
    from runkey.params import load_params
    from runkey.registry.snapshot import take_snapshot
    from runkey.sweep.driver import Sweep
    from runkey.sweep.placement import Placement
    from runkey.sweep.record import SweepRecord
    from runkey.sweep.space import MOST_POINTS
    from runkey.sweep.trial import push_commit

    _end_by_signals()
    log_to_terminal(stderr=True)
    place = _place()
    params = load_params(place.root / paths.PARAMS)
    recipe = make_recipe("train", place.root, params)
    commit = take_snapshot(place.root, place.root, recipe)
    if commit is None:
        raise RegistryError(f"{place.root}: not a git repository, so no trial can check it out")
    chosen = _Chosen(tuple(changes or ()), points, draws, tpe, search_seed)
    record = SweepRecord.of(place.store.home, commit, chosen.settings())
    placement = Placement(place, params)
    source = chosen.source(record)
    begun = Sweep(place, commit, recipe, params, source, placement.bound, record.begun)
    executor = _executor(on, begun, placement, record.folder / "logs", jobs)
    # A search proposes its later points by the results of the first ones.
    begun.extend(executor.capacity() if tpe else MOST_POINTS)
    say(_head(begun, executor), stderr=as_json)
    _print_points(begun.entries, stderr=as_json)
    if dry:
        if as_json:
            listed = [one.as_dict() for one in begun.entries]
            output.print_json({"sweep": record.key, "points": listed})
        return
    if executor.is_remote:
        push_commit(place, commit)
    try:
        with _board(begun, record) as changed:
            begun.run(executor, changed)
    except KeyboardInterrupt:
        running = sum(one.state == "running" for one in begun.entries)
        say(f"ending {counted(running, 'trial')}; a training writes a checkpoint", stderr=True)
        raise
    finally:
        executor.close()
        record.write(begun.entries)
    _print_result(begun, record, as_json=as_json)


@dataclass(frozen=True)
class _Chosen:
    """What the options say to train."""

    changes: tuple[str, ...]
    points: Path | None
    draws: int
    tpe: int
    seed: int

    def __post_init__(self) -> None:
        ways = sum(map(bool, (self.points, self.draws, self.tpe)))
        if ways > 1 or (self.points and self.changes):
            raise BadParameter("give -S options, with --random or --tpe, or --points FILE")
        if not (self.points or self.changes):
            raise BadParameter("nothing varies; give -S NAME=VALUE,VALUE or --points FILE")

    @cached_property
    def space(self) -> Space:
        from runkey.sweep.space import parse_space

        return parse_space(self.changes)

    @cached_property
    def fixed(self) -> list[Point]:
        from runkey.sweep.space import draw_points, grid, read_points

        if self.points:
            return read_points(self.points)
        return draw_points(self.space, self.draws, self.seed) if self.draws else grid(self.space)

    def settings(self) -> dict[str, Any]:
        """Return what makes the sweep's key, beside the snapshot."""
        if not self.tpe:
            return {"points": self.fixed}
        from runkey.sweep.space import describe_space

        return {"space": describe_space(self.space), "tpe": self.tpe, "seed": self.seed}

    def source(self, record: SweepRecord) -> Source:
        if not self.tpe:
            from runkey.sweep.driver import FixedPoints

            return FixedPoints(self.fixed)
        from runkey.sweep.search import TpeSearch

        begun = [one["point"] for one in record.begun]
        return TpeSearch(self.space, self.tpe, self.seed, begun, output.workspace())


def _executor(on: str, begun: Sweep, placement: Placement, logs: Path, jobs: int) -> Executor:
    """Return what runs the trials, by its name in `--on`."""
    from runkey.sweep.executor import LocalExecutor

    if on == "local":
        return LocalExecutor(
            begun.place.root,
            logs,
            jobs=jobs or placement.jobs,
            devices=placement.devices,
            peak_of=begun.peak,
        )
    engine, _, address = on.partition(":")
    if engine == "ray":
        from runkey.sweep.ray import RayExecutor

        return RayExecutor(begun.place.root, address or "auto", logs)
    if on == "slurm":
        from runkey.sweep.slurm import SlurmExecutor

        return SlurmExecutor(begun.place.root, logs)
    raise BadParameter(f"{on!r} is none of local, ray, ray:ADDRESS, slurm", param_hint="'--on'")


def _head(begun: Sweep, executor: Executor) -> str:
    """Say how many points there are, what is done, and how long the rest takes if that is known."""
    entries, counts = begun.entries, Counter(one.state for one in begun.entries)
    parts = [f"{counts['finished']} finished", f"{counts['elsewhere']} running elsewhere"]
    parts += [f"{counts['failed']} that cannot run", f"{counts['waiting']} to train"]
    parts.append(f"{begun.source.count - len(entries)} to be proposed")
    shown = [part for part in parts if not part.startswith("0 ")]
    text = f"{counted(begun.source.count, 'point')}: {', '.join(shown)}"
    expected = begun.expected_seconds() if counts["waiting"] else None
    if expected and len(entries) == begun.source.count:
        seconds, runs = expected
        at_once = min(executor.capacity(), counts["waiting"])
        text += f"; about {format_seconds(seconds / at_once)} of training on {executor.place}"
        text += f", {at_once} at a time, by the times of {counted(runs, 'earlier run')}"
    return text


def _print_points(entries: Sequence[Entry], *, stderr: bool) -> None:
    for one in entries:
        note = f": {one.note}" if one.note else ""
        say(f"  {short_key(one.key)}  {one.trial.label}  {_STATES[one.state]}{note}", stderr=stderr)


_STATES = {
    "finished": "finished",
    "elsewhere": "running elsewhere",
    "waiting": "to train",
    "running": "running",
    "failed": "failed",
    "pruned": "ended early",
}


_EVERY_SECONDS = 60.0


@contextmanager
def _board(begun: Sweep, record: SweepRecord) -> Iterator[Callable[[Entry], None]]:
    """Show the trainings as a table on a terminal, else a line for each change; keep the record."""
    entries = begun.entries
    live, printed = sys.stderr.isatty(), time.monotonic()

    def print_line(one: Entry) -> None:
        over = sum(entry.is_over for entry in entries)
        score = one.val_ap if one.ap is None else one.ap
        text = f"{short_key(one.key)}  {one.trial.label}  {_STATES[one.state]}"
        if one.state == "running" and one.epoch:
            text += f", epoch {one.epoch}/{one.params.training.epochs}"
        text += "" if score is None else f", AP {score:.3f}"
        text += f": {one.note}" if one.note else ""
        say(f"{text} ({over} of {begun.source.count} are over)", stderr=True)

    def changed(one: Entry) -> None:
        nonlocal printed
        record.write(entries)
        # Of an evaluation only now and then: a sweep has thousands.
        is_evaluation = one.state == "running" and one.epoch
        if not live and not (is_evaluation and time.monotonic() < printed + _EVERY_SECONDS):
            print_line(one)
            printed = time.monotonic()

    if not live:
        yield changed
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(
        get_renderable=lambda: _table(entries),
        console=console,
        refresh_per_second=1,
        transient=True,
    ):
        yield changed


def _table(entries: Sequence[Entry]) -> Any:
    """Return the entries as a table of rich's, those that run first."""
    from rich.table import Table

    table = Table("key", "parameters", "state", "epoch", "AP", box=None)
    for one in sorted(entries, key=lambda entry: entry.state != "running"):
        score = one.val_ap if one.ap is None else one.ap
        epoch = f"{one.epoch}/{one.params.training.epochs}" if one.epoch else ""
        cells = (short_key(one.key), one.trial.label, _STATES[one.state], epoch)
        table.add_row(*map(escaped, cells), "" if score is None else f"{score:.3f}")
    return table


def _print_result(begun: Sweep, record: SweepRecord, *, as_json: bool) -> None:
    """Print the comparison, best last; RegistryError if a training failed."""
    from runkey.params.load import as_text
    from runkey.sweep.record import best_first

    shares = record.compare(begun.entries)
    entries = best_first(begun.entries)
    failed = [one for one in entries if one.state == "failed"]
    best = next((one for one in entries if one.ap is not None), None)
    if as_json:
        points = [one.as_dict() for one in entries]
        answer = {"sweep": record.key, "folder": str(record.folder), "points": points}
        output.print_json(answer | {"importance": shares, "best": best and best.key})
    else:
        names = list(dict.fromkeys(name for one in entries for name in one.point))
        rows = [
            [
                short_key(one.key),
                *(as_text(one.point[n]) if n in one.point else "" for n in names),
                "" if one.ap is None else f"{one.ap:.3f}",
                _STATES[one.state],
            ]
            for one in entries
        ]
        output.print_table(
            ["key", *names, "AP", "state"], rows, right=[*names, "AP"], whole=["key"]
        )
        if shares:
            text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            say(f"what AP depends on (random forest): {text}")
        say(f"{short_key(record.key)}: table and picture in {record.folder}")
        if best:
            say(f"best: {short_key(best.key)}  AP {best.ap:.3f} with {best.trial.label}")
    if failed:
        first = f"{failed[0].trial.label}: {failed[0].note or 'no message'}"
        text = f"{len(failed)} of {counted(len(entries), 'point')} failed, first {first}"
        raise RegistryError(text)
