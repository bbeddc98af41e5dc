"""Delete runs with all that this checkout keeps of them.

    deletion = plan(scope, ["rk2-7252"])    # lists everything, deletes nothing
    deletion.apply()

A run is listed as long as its record is there, which goes last: an interrupted deletion is finished
by the same command.  What other runs use stays: objects of DVC's cache (`dvc gc` removes those that
nothing names), shared snapshots.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.initial_weights import weights_of
from runkey.identity.key import ANY_KEY, SCHEMAS, short_key, split_training
from runkey.identity.record import ORIGIN, Record, RunPointer, StartedFrom
from runkey.identity.record_cache import remove_record
from runkey.progress import each
from runkey.registry.claims import Claim, Claims, newest, state_now, this_owner
from runkey.registry.dvc_cache import DvcCache, pointer_md5
from runkey.registry.gc import Item, Scope, artifacts_folder, current_key, remove_path, size_of
from runkey.registry.library import no_such_run, split_address
from runkey.registry.lineage import origin
from runkey.registry.models import check_not_promoted
from runkey.registry.once import Rhythm
from runkey.registry.show import average_precision
from runkey.registry.snapshot import git, has_git, snapshot_refs
from runkey.training.lock import holder_of

logger = logging.getLogger(__name__)

_EXPERIMENT = re.compile("refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/.+")
_APPLIED = "refs/exps/exec/EXEC_APPLY"
"""DVC's note of the experiment that was applied last."""


@dataclass(frozen=True)
class Deletion:
    """What belongs to some runs."""

    scope: Scope
    items: list[Item]
    """In the order in which they are deleted."""
    keys: dict[str, Claim | None]
    """Keys of which no run is left, each with its newest claim."""
    notes: list[str]

    def apply(self) -> list[str | None]:
        """Delete all; return for each item why it could not be deleted.

        Meanwhile the keys are claimed, so that no training of one begins.
        """
        held = [_claim(self.scope.claims, key, last) for key, last in self.keys.items()]
        errors = [item.try_to_remove() for item in each("delete", self.items, "items")]
        for claim in held:
            if any(errors):  # so that the command can be repeated at once
                self.scope.claims.update(replace(claim, state="failed"))
            else:
                self.scope.claims.clear(claim.key)
        return errors


def plan(scope: Scope, addresses: Iterable[str], rhythm: Rhythm | None = None) -> Deletion:
    """List what belongs to the runs of some keys; `KEY:RUN` is one run of a key.

    Raises:
        RegistryError: there is nothing of an address, several keys begin so, a key is trained now,
            a run that stays was started from weights of which no other copy is here, or an alias
            of MLflow's model registry names a run.
    """
    chosen: dict[str, list[Record]] = {}
    whole: dict[str, Claim | None] = {}
    for address in addresses:
        key, records, is_whole = _find(scope, address)
        known = {record.run.run_id for record in chosen.setdefault(key, [])}
        chosen[key] += [record for record in records if record.run.run_id not in known]
        if is_whole:
            whole[key] = newest(scope.claims, key)
    for key in chosen:
        _check_quiet(scope, key, rhythm or Rhythm())
    records = [record for some in chosen.values() for record in some]
    _check_descendants(scope, records)
    check_not_promoted(scope.library.uri, records)
    items = [_items(scope, key, some, is_whole=key in whole) for key, some in chosen.items()]
    return Deletion(scope, [*chain(*items)], whole, _notes(scope, records))


def _find(scope: Scope, address: str) -> tuple[str, list[Record], bool]:
    """Return the key of an address, its runs, and True if these are all runs of the key."""
    schema, digits, run_id = split_address(address)
    prefixes = [f"{one}-{digits}" for one in ([schema] if schema else SCHEMAS)]
    records = [record for prefix in prefixes for record in scope.library.matching(prefix)]
    keys = {record.key for record in records}
    if not records:  # what an interrupted deletion, or a training without MLflow, left
        claims = (claim.key for prefix in prefixes for claim in scope.claims.all(prefix))
        folders = (split_training(folder)[0] for folder in scope.trainings)
        keys = {*claims, *(key for key in folders if key.startswith(tuple(prefixes)))}
    if len(keys) > 1:
        shown = ", ".join(map(short_key, sorted(keys)[:4]))
        raise RegistryError(f"{address}: {len(keys)} keys begin so: {shown}; give more of it")
    found = [record for record in records if record.run.run_id.startswith(run_id)]
    if not keys or (run_id and not found):
        raise no_such_run(scope.library, address)
    return keys.pop(), list(map(scope.library.with_details, found)), len(found) == len(records)


def _check_quiet(scope: Scope, key: str, rhythm: Rhythm) -> None:
    """Refuse a key that is trained now."""
    claim = newest(scope.claims, key)
    if claim and (state_now(claim) == "running" or _gives_signs(scope.claims, claim, rhythm)):
        raise RegistryError(f"{short_key(key)}: {claim.line}; end that first, or wait")
    for folder in scope.trainings:
        holder = holder_of(folder) if folder.name.startswith(key) else None
        if holder is not None:
            who = f"process {holder}" if holder > 0 else "a process out of sight"
            raise RegistryError(f"{short_key(key)}: {who} trains it in {folder}; end that first")


def _gives_signs(claims: Claims, claim: Claim, rhythm: Rhythm) -> bool:
    """Watch a claim whose owner cannot be seen from here; return True if it beats."""
    if state_now(claim) != "silent":
        return False
    seconds = rhythm.dead_after
    logger.info(
        f"{short_key(claim.key)}: waiting {seconds:.0f} s for a sign of life of {claim.who}"
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(rhythm.poll_seconds, seconds))
        if newest(claims, claim.key) != claim:
            return True
    return False


def _check_descendants(scope: Scope, records: list[Record]) -> None:
    """Refuse the only copy of weights that a run which stays was started from."""
    going = {record.run.run_id for record in records}
    parents = {weights: record for record in records for weights in weights_of(record)}
    if not parents:
        return
    staying = [r for r in scope.library.matching(ANY_KEY) if r.run.run_id not in going]
    for child in staying:
        began = origin(scope.library, child)
        if began and began.weights in parents and not _has_copy(scope, child, began, staying):
            parent, value = parents[began.weights].label, child.run.params.get(began.param, "")
            raise RegistryError(
                f"{parent}: {child.label} was started from its weights ({began.param}), and there"
                f" is no other copy here; name {child.label} too, or put the file of `runkey get"
                f" {parent} --only model` at {value}"
            )


def _has_copy(scope: Scope, child: Record, began: StartedFrom, staying: list[Record]) -> bool:
    """Return True if weights are in a run that stays, or in a file that the parameter names."""
    for other in staying:
        details = scope.library.with_details(other).details
        if details and any(file.sha256 == began.weights for file in details.files.values()):
            return True
    place = scope.root / child.run.params.get(began.param, "")
    files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    return any(file.is_file() and sha256_file(file) == began.weights for file in files)


def _items(scope: Scope, key: str, records: list[Record], *, is_whole: bool) -> Iterator[Item]:
    pointers = set[str]()
    for record in records:
        with suppress(RegistryError):  # its artifacts are elsewhere, and so is DVC's part
            pointers.add(pointer_md5(scope.library, record) or "")
    pointers.discard("")
    yield from _experiments(scope, pointers)
    yield from _run_cache(scope, pointers)
    yield from _snapshots(scope, key, records, is_whole)
    ids = {record.run.run_id for record in records}
    for folder in scope.trainings:
        own = RunPointer.read(folder)
        if folder.name.startswith(key) and (is_whole or (own and own.run_id in ids)):
            why = "checkpoints and log of a training"
            name = f"{short_key(key)}{folder.name.removeprefix(key)}/"
            remove = partial(remove_path, folder)
            yield Item("checkpoint", name, why, size_of(folder), 0.0, remove)
    for record in records:
        yield from _run(scope, record)


def _experiments(scope: Scope, pointers: set[str]) -> Iterator[Item]:
    """DVC's experiments whose dvc.lock names the run.json of a run."""
    if not pointers or not has_git(scope.root):
        return
    printed = git(scope.root, "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps/")
    refs = [line.split(" ") for line in printed.splitlines()]
    oids = {ref: oid for ref, oid in refs if _EXPERIMENT.fullmatch(ref)}
    if not oids:
        return
    patterns = [word for pointer in sorted(pointers) for word in ("-e", pointer)]
    search = ("grep", "-l", "--fixed-strings", *patterns, *set(oids.values()), "--", "dvc.lock")
    naming = {
        line.partition(":")[0] for line in git(scope.root, *search, accept=(0, 1)).splitlines()
    }
    applied = git(scope.root, "rev-parse", "--quiet", "--verify", _APPLIED, accept=(0, 1))
    for ref, oid in oids.items():
        if oid in naming:
            gone = [(ref, oid), *([(_APPLIED, oid)] if applied == oid else [])]
            remove = partial(_remove_refs, scope.root, gone)
            yield Item("experiment", ref.rpartition("/")[2], "DVC's experiment", 0, 0.0, remove)


def _run_cache(scope: Scope, pointers: set[str]) -> Iterator[Item]:
    """Entries that name a run's run.json: by these DVC restores the run instead of training it."""
    cache = DvcCache(scope.root)
    for pointer in sorted(pointers):
        for path in cache.naming(pointer):
            place = cache.runs / path
            name = f"{place.parent.name[:12]}/{place.name[:12]}"
            why = "by it DVC would restore the result"
            yield Item("run-cache", name, why, size_of(place), 0.0, partial(_remove_entry, place))


def _remove_entry(path: Path) -> None:
    """Delete an entry; DVC fails at a folder of entries that is empty."""
    folder = path.parent
    if folder.is_dir() and [one.name for one in folder.iterdir()] == [path.name]:
        going = folder.with_name(f".{folder.name}")
        folder.rename(going)  # at once: a deletion may be killed
        remove_path(going)
    else:
        path.unlink(missing_ok=True)


def _snapshots(scope: Scope, key: str, records: list[Record], is_whole: bool) -> Iterator[Item]:
    if not has_git(scope.root):
        return
    ids = {record.run.run_id for record in records}
    others = [r for r in scope.library.matching(key) if r.run.run_id not in ids]
    needed = {_snapshot(scope.library.with_details(record)) for record in others}
    own = {_snapshot(record) for record in records}
    for ref, oid in snapshot_refs(scope.root, key).items():
        if is_whole or (oid in own and oid not in needed):
            why = "the code that ran, as a commit"
            name = f"{short_key(key)}/{oid[:12]}"
            yield Item(
                "snapshot", name, why, 0, 0.0, partial(_remove_refs, scope.root, [(ref, oid)])
            )


def _snapshot(record: Record) -> str | None:
    return record.details.snapshot if record.details else record.run.tags.get("snapshot")


def _run(scope: Scope, record: Record) -> Iterator[Item]:
    run, folder, size = record.run, None, 0
    score = average_precision(run)
    about = [run.name, run.status, f"AP {score}" if score else "", record.reproduction_of or ""]
    if origin := run.tags.get(ORIGIN):
        about.append(f"a copy of run {origin[:8]}")
    if scope.is_local:
        folder = artifacts_folder(scope, record)
        size = size_of(folder) if folder else 0
        for model in _models(scope, run.run_id):
            why, remove = "MLflow's model of the run", partial(remove_path, model)
            yield Item("model", model.name, why, size_of(model), 0.0, remove)
    else:
        files = record.details.files.values() if record.details else ()
        size = sum(file.size for file in files)
        about.append(f"on {scope.library.place}; its files go with `mlflow gc` there")
    remove = partial(_remove_run, scope, record, folder)
    text = ", ".join(filter(None, about))
    age = scope.age(run.ended_ms or run.started_ms)
    yield Item("run", f"{record.label}:{run.run_id}", text, size, age, remove)


def _models(scope: Scope, run_id: str) -> Iterator[Path]:
    """The folders of MLflow's models that name a run, see `runkey.tracking.describe`."""
    for pointer in sorted(
        scope.home.parent.glob("mlartifacts/models/*/artifacts/data/data/run.json")
    ):
        with suppress(OSError):
            if run_id in pointer.read_text(encoding="utf-8", errors="replace"):
                yield pointer.parents[3]


def _remove_run(scope: Scope, record: Record, folder: Path | None) -> None:
    scope.delete_run(record.run.run_id)
    if folder:
        remove_path(folder)
    remove_record(scope.cache, record.run.run_id)


def _remove_refs(root: Path, refs: list[tuple[str, str]]) -> None:
    for ref, oid in refs:
        git(root, "update-ref", "-d", ref, oid)


def _claim(claims: Claims, key: str, last: Claim | None) -> Claim:
    """Claim a key, so that no training of it begins; `last` is its newest claim so far."""
    claim = Claim(
        key=key,
        generation=last.generation + 1 if last else 1,
        owner=this_owner(),
        since_ms=time.time_ns() // 1_000_000,
    )
    if not claims.make(claim):
        raise RegistryError(f"{short_key(key)}: a training has just begun; nothing is deleted")
    return claim


def _notes(scope: Scope, records: list[Record]) -> list[str]:
    here = current_key(scope.root)
    if here in {record.key for record in records}:
        return [
            "the working tree still holds this result; `dvc repro --force train` trains it again"
        ]
    return []
