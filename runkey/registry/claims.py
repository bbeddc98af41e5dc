"""Claims: which process trains a key.

Beside a local store a claim is a file, `<home>/claims/<key>.g<N>.json`; on a tracking server it is
a registered model, whose names MLflow makes once.  There the first generation is named by the key,
so that the page "Models" shows one entry for a key, and tags hold what the claim says.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from runkey.errors import RegistryError
from runkey.files import FormatError, expect, read_json, write_atomically
from runkey.identity.key import ANY_KEY, ANY_SCHEMA
from runkey.identity.record import Record, this_host
from runkey.paths import is_server
from runkey.processes import Process, is_running, this_process
from runkey.registry.answers import LATEST_MS, Model, parsed
from runkey.registry.rest import AbsentError, ExistsError, RestClient, UnreachedError

logger = logging.getLogger(__name__)

State = Literal["running", "finished", "failed"]
StateNow = Literal[State, "dead", "silent"]
DEAD = "DEAD"
"""Status of a run that MLflow has as RUNNING although its process is gone."""
_NAME = re.compile(rf"^({ANY_SCHEMA}-[0-9a-f]{{64}})(?:\.g([1-9][0-9]{{0,8}}))?$")
_END = ".json"


@dataclass(frozen=True, kw_only=True)
class Owner(Process):
    """A process that claims a key."""

    host: str
    nonce: str
    """New for every claim: it recognises one's own claim when the answer to it was lost."""

    @property
    def label(self) -> str:
        """For messages: `host:pid`."""
        return f"{self.host}:{self.pid}"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the owner that `asdict` gave; ValueError if fields are missing or wrong."""
        owner: Self = expect(cls, stored)
        if stored != asdict(owner):  # of another version: which process it is cannot be told
            raise FormatError("holds other fields than this runkey's")
        if not all(0 <= n < 2**63 for n in (owner.pid, owner.started)):
            raise FormatError("pid and started must be whole numbers")
        return owner


def this_owner() -> Owner:
    """Return this process as the owner of a new claim."""
    return Owner(host=this_host(), nonce=secrets.token_hex(8), **asdict(this_process()))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One generation of the claim on a key, as last read."""

    key: str
    generation: int
    """From 1."""
    owner: Owner | None = None
    """None: unreadable (the machine lost power while writing)."""
    state: State = "running"
    run_id: str | None = None
    """MLflow run, once it is known."""
    beat: int = 0
    """The heartbeat, which rises while the owner lives: on a server its time in milliseconds since
    1970 when it was written, elsewhere a count."""
    since_ms: int = 0
    """Creation time by the owner's clock, in milliseconds since 1970; only shown."""

    @property
    def name(self) -> str:
        """`<key>.g<generation>`."""
        return f"{self.key}.g{self.generation}"

    @property
    def who(self) -> str:
        """For messages: the owner, or that it is unknown."""
        return self.owner.label if self.owner else "an unknown process"

    @property
    def line(self) -> str:
        """For messages: who trains the key, and since when by local time, if that is known."""
        if not self.owner:
            return "its claim cannot be read, so a process may train it"
        if not self.since_ms:
            return f"{self.who} trains it"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_ms / 1000))
        return f"{self.who} trains it since {since}"

    def is_same(self, other: Claim | None) -> bool:
        """Return True if both are the same claim, whatever its state and beat are."""
        mine, theirs = (one and one.owner and one.owner.nonce for one in (self, other))
        return other is not None and (self.name, mine) == (other.name, theirs)


class Claims(ABC):
    """The claims of a store.  All methods raise `RegistryError` if it cannot be reached."""

    place: str
    """For messages: a folder, or a server's address."""

    def of(self, key: str) -> list[Claim]:
        """Return all generations of a key, oldest first."""
        return [claim for claim in self.all(key) if claim.key == key]

    def all(self, prefix: str = ANY_KEY) -> list[Claim]:
        """Return all claims whose key begins so, by key and generation."""
        return sorted(self._read(prefix), key=lambda claim: (claim.key, claim.generation))

    def newest(self, key: str, first: int = 1) -> Claim | None:
        """Return the generation of a key that counts, if there is any.

        `first`: a generation that was there; only it and later ones need to be looked for.
        """
        generations = [claim for claim in self.of(key) if claim.generation >= first]
        return generations[-1] if generations else None

    def next_beat(self, beat: int) -> int:
        """Return the beat to write after this one."""
        return beat + 1

    @abstractmethod
    def age_seconds(self, claim: Claim) -> float | None:
        """Return the seconds since the last beat of a claim that was just read.

        Only the clock of the store counts, not those of owner and reader; None: it is not known.
        """

    @abstractmethod
    def make(self, claim: Claim) -> bool:
        """Create a claim atomically; False if another process has its name."""

    @abstractmethod
    def update(self, claim: Claim) -> bool:
        """Write state, run and beat of the caller's own claim; False if somebody deleted it."""

    def remove(self, claim: Claim) -> None:
        """Delete a generation; RegistryError if it is the newest of its key, which must stay.

        Without it the next generation would be the first again, and an owner that comes back would
        not see that it lost.
        """
        if not any(other.generation > claim.generation for other in self.of(claim.key)):
            raise RegistryError(f"{claim.name}: the newest claim of its key stays")
        self._delete(claim)

    def clear(self, key: str) -> None:
        """Delete all generations of a key, of which the caller holds the newest, that one last."""
        for claim in self.of(key):
            self._delete(claim)

    @abstractmethod
    def _read(self, prefix: str) -> Iterable[Claim]: ...

    @abstractmethod
    def _delete(self, claim: Claim) -> None: ...


def newest(claims: Claims, key: str) -> Claim | None:
    """Return the generation of a key that counts, if there is any."""
    return claims.newest(key)


def state_now(claim: Claim) -> StateNow:
    """Return what one look can tell of a claim.

    `dead`: its owner ran on this machine and is gone; `silent`: it is marked as running, but its
    owner cannot be seen from here, so that only its beat can tell.
    """
    if claim.state != "running":
        return claim.state
    seen = is_running(claim.owner) if claim.owner else None
    return "silent" if seen is None else "running" if seen else "dead"


def status_now(record: Record, claims: Claims) -> str:
    """Return the current status of a run: MLflow's, or `DEAD` if its claim shows that.

    Of a server that does not answer nothing is known but MLflow's status.
    """
    # A reproduction trains beside the claim of its key.
    if record.run.status != "RUNNING" or record.reproduction_of:
        return record.run.status
    claim = None
    with suppress(UnreachedError):
        claim = newest(claims, record.key)
    if claim is None:
        return record.run.status
    # A claim that was taken over names its run only when that goes on.
    alive = claim.run_id in (None, record.run.run_id)
    alive = alive and state_now(claim) in ("running", "silent")
    return record.run.status if alive else DEAD


def _split_name(name: str) -> tuple[str, int] | None:
    """Split `<key>` (the first generation) or `<key>.g<N>`; None: not the name of a claim."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2] or 1)) if match else None


def _parse(key: str, generation: int, stored: Any) -> Claim:
    """Return the stored claim; what cannot be read keeps its default: running, no owner."""
    claim = Claim(key=key, generation=generation)
    with suppress(ValueError, TypeError, KeyError, OverflowError):
        claim = replace(claim, owner=Owner.from_dict(stored["owner"]))
    with suppress(ValueError, TypeError, KeyError, OverflowError):
        run_id, beat, since_ms = stored["run_id"], int(stored["beat"]), int(stored["since_ms"])
        fits = isinstance(run_id, str | None) and beat >= 0 and 0 <= since_ms <= LATEST_MS
        if fits and stored["state"] in get_args(State):
            state = stored["state"]
            claim = replace(claim, state=state, run_id=run_id or None, beat=beat, since_ms=since_ms)
    return claim


class FileClaims(Claims):
    """The claims in a folder.

    A claim is written to another file and then linked to its own name, which fails if that is
    taken: readers see it whole, and of several processes that make it one succeeds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.place = folder, str(folder)
        self._named: set[str] = set()
        """Warnings given: a process that waits reads its claims every two seconds."""

    def make(self, claim: Claim) -> bool:
        """See `Claims`."""
        assert claim.owner, "only an owner makes a claim"
        draft = self._folder / f".{claim.name}.{claim.owner.nonce}"
        try:
            write_atomically(draft, json.dumps(asdict(claim), sort_keys=True))
            try:
                os.link(draft, self._path(claim))
            except FileExistsError:
                return False
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise RegistryError(f"{self._path(claim)}: {error.strerror}") from None
        return True

    def update(self, claim: Claim) -> bool:
        """See `Claims`."""
        path = self._path(claim)
        try:
            if is_there := path.exists():
                write_atomically(path, json.dumps(asdict(claim), sort_keys=True))
        except OSError as error:
            raise RegistryError(f"{path}: {error.strerror}") from None
        return is_there

    def age_seconds(self, claim: Claim) -> float | None:
        """See `Claims`; on a network the file's server sets both times."""
        try:
            with tempfile.TemporaryFile(dir=self._folder) as now:
                now.write(b"now")
                now.flush()
                return os.fstat(now.fileno()).st_mtime - self._path(claim).stat().st_mtime
        except OSError:  # a folder that only others may write to, a claim that was deleted
            return None

    def _delete(self, claim: Claim) -> None:
        self._path(claim).unlink(missing_ok=True)

    def _path(self, claim: Claim) -> Path:
        return self._folder / f"{claim.name}{_END}"

    def _read(self, prefix: str) -> Iterator[Claim]:
        for path in self._folder.glob(f"{prefix}*{_END}"):
            if named := _split_name(path.name.removesuffix(_END)):
                try:
                    yield _parse(*named, read_json(path))
                except FileNotFoundError:
                    continue  # removed since the folder was listed
                except FormatError as error:
                    warning = f"{path}: {error}; counts as a claim without an owner"
                    if warning not in self._named:
                        self._named.add(warning)
                        logger.warning(warning)
                    yield _parse(*named, {})


_TAG = "runkey."
_MOST_GENERATIONS = 1000
_FIRST_TIME = 10**12
"""Beats from here on are times: older versions of runkey count them from 0 on servers too."""


class ServerClaims(Claims):
    """The claims on a server."""

    def __init__(self, client: RestClient) -> None:
        self._client, self.place = client, client.address
        self._written: dict[str, dict[str, str]] = {}

    def make(self, claim: Claim) -> bool:
        """See `Claims`."""
        assert claim.owner, "only an owner makes a claim"
        tags = _tags(claim)
        content = {
            "name": _name(claim),
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
            "description": f"Claim of runkey: which process trains this key ({claim.who}).",
        }
        try:
            self._client.post("registered-models/create", content, repeat=True)
        except ExistsError:
            # The first answer may have been lost: then the name is there and ours.
            model = self._client.model(_name(claim))
            if not (model and claim.is_same(_parse_model(model, claim.key, claim.generation))):
                return False
        self._written[claim.name] = tags
        return True

    def update(self, claim: Claim) -> bool:
        """See `Claims`."""
        before = self._written.get(claim.name, {})
        tags = _tags(claim)
        try:
            for key, value in tags.items():
                if before.get(key) != value:
                    content = {"name": _name(claim), "key": key, "value": value}
                    self._client.post("registered-models/set-tag", content, repeat=True)
        except AbsentError:
            return False
        self._written[claim.name] = tags
        return True

    def newest(self, key: str, first: int = 1) -> Claim | None:
        """See `Claims`.

        A search goes through all models of the server; names are found by the database's index.
        Generations have no gaps but those that somebody made by deleting models.
        """
        found = None
        for generation in range(first, first + _MOST_GENERATIONS):
            claim = Claim(key=key, generation=generation)
            model = self._client.model(_name(claim))
            if model:
                found = _parse_model(model, key, generation)
            elif generation > first:
                return found
        count = f"more than {_MOST_GENERATIONS} claims of {key}"
        raise RegistryError(f"{self._client.address}: has {count}; does it run MLflow?")

    def next_beat(self, beat: int) -> int:
        """See `Claims`."""
        return max(beat + 1, self._client.now_ms() or 0)

    def age_seconds(self, claim: Claim) -> float | None:
        """See `Claims`."""
        now_ms = self._client.now_ms()
        if now_ms is None or claim.beat < _FIRST_TIME:
            return None
        return (now_ms - claim.beat) / 1000

    def _delete(self, claim: Claim) -> None:
        model = self._client.model(_name(claim))
        if model and model.latest_versions:
            raise RegistryError(
                f"{claim.name}: somebody keeps model versions in it at {self.place}"
            )
        if model:
            self._client.send("DELETE", "registered-models/delete", {"name": _name(claim)})

    def _read(self, prefix: str) -> Iterable[Claim]:
        named = {_split_name(model.name): model for model in self._client.models(prefix)}
        return [_parse_model(model, *name) for name, model in named.items() if name]


def _name(claim: Claim) -> str:
    return claim.key if claim.generation == 1 else claim.name


def _tags(claim: Claim) -> dict[str, str]:
    """Return what the claim says, in the order of writing: the run before that it is finished."""
    assert claim.owner, "only an owner makes a claim"
    return {
        f"{_TAG}owner": json.dumps(asdict(claim.owner), sort_keys=True),
        f"{_TAG}since_ms": str(claim.since_ms),
        f"{_TAG}run": claim.run_id or "",
        f"{_TAG}state": claim.state,
        f"{_TAG}beat": str(claim.beat),
    }


def _parse_model(model: Model, key: str, generation: int) -> Claim:
    """Return the claim in a registered model; one that somebody else made has no readable owner."""
    tags: dict[str, Any] = {tag.key.removeprefix(_TAG): tag.value for tag in model.tags}
    tags["run_id"] = tags.get("run", "")
    with suppress(ValueError):
        tags["owner"] = parsed(dict[str, Any], tags.get("owner", ""))
    return _parse(key, generation, tags)


def open_claims(uri: str, home: Path) -> Claims:
    """Return the claims of a store; a server keeps them itself."""
    return ServerClaims(RestClient(uri)) if is_server(uri) else FileClaims(home / "claims")
