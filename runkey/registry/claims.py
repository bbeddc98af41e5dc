"""Claims on a tracking server: registered models, whose names MLflow makes once.

The first generation is the model named by the key, so that the page "Models" shows one entry for a
key; later ones are `<key>.g<N>`.  What a claim says stands in the model's tags, which are given in
the call that makes it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

from runkey.errors import RegistryError
from runkey.identity.key import ANY_KEY, ANY_SCHEMA
from runkey.identity.record import this_host
from runkey.registry.rest import RestClient, RestError

# Who trains: a process, told apart from every other one that ever was.


_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"
_ENDED = frozenset("ZX")
"""States in /proc of a process that has ended: a zombie is one whose parent has not noticed yet."""
_AFTER_NAME_STATE, _AFTER_NAME_START = 0, 19
"""Places of `state` and `starttime` in /proc/PID/stat, counted after the name in brackets."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that claims a key."""

    host: str
    pid: int
    boot: str
    """The machine since it was started; empty where there is no /proc."""
    namespace: str
    """What `pid` is counted in: containers of one machine count their own."""
    started: int
    """Clock ticks from boot to the start of the process: a pid is given out again, this is not."""
    nonce: str
    """New for every claim; by it a claim whose answer was lost is recognised as one's own."""

    @property
    def label(self) -> str:
        """For people: `host:pid`."""
        return f"{self.host}:{self.pid}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """The owner that `as_dict` gave.

        Raises:
            ValueError: fields are missing or of another type.
        """
        try:
            owner = cls(**stored)
        except TypeError as error:
            raise ValueError(str(error)) from None
        if not isinstance(owner.pid, int) or not isinstance(owner.started, int):
            raise ValueError("pid and started must be whole numbers")
        return owner


def this_process() -> Owner:
    """This process as the owner of one claim."""
    pid, proc_is_ours = os.getpid(), _proc_is_ours()
    stat = _stat(pid) if proc_is_ours else None
    return Owner(
        host=this_host(),
        pid=pid,
        boot=_BOOT_ID.read_text(encoding="ascii").strip() if stat else "",
        namespace=str((_PROC / "self/ns/pid").readlink()) if stat else "",
        started=stat[1] if stat else 0,
        nonce=secrets.token_hex(8),
    )


def is_running(owner: Owner) -> bool | None:
    """Whether the owner's process is there; None: it cannot be seen from here."""
    here = this_process()
    if not here.boot or (here.boot, here.namespace) != (owner.boot, owner.namespace):
        return None
    stat = _stat(owner.pid)
    return stat is not None and stat[0] not in _ENDED and stat[1] == owner.started


def _proc_is_ours() -> bool:
    """Whether /proc counts processes as this one does.

    A pid namespace made without a /proc of its own still sees the outer one, where its pids name
    other processes.
    """
    try:
        return (_PROC / "self").readlink() == Path(str(os.getpid()))
    except OSError:
        return False


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time of a process; None if there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return fields[_AFTER_NAME_STATE], int(fields[_AFTER_NAME_START])


# Claims: which process trains a key.


State = Literal["running", "finished", "failed"]
StateNow = Literal["running", "finished", "failed", "dead", "silent"]
STATES: tuple[State, ...] = ("running", "finished", "failed")
_NAME = re.compile(rf"^({ANY_SCHEMA}-[0-9a-f]{{64}})(?:\.g([1-9][0-9]{{0,8}}))?$")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One generation of the claim on a key, as it was read."""

    key: str
    generation: int
    """From 1."""
    owner: Owner | None
    """None: what was written cannot be read (a machine that lost power while writing)."""
    state: State
    run_id: str | None
    """Of the MLflow run, once it is known."""
    beat: int
    """Counted up by the owner while it lives."""
    since_ms: int
    """When it was made by the owner's clock, in milliseconds since 1970; only for people."""

    @property
    def name(self) -> str:
        """`<key>.g<generation>`."""
        return f"{self.key}.g{self.generation}"

    @property
    def who(self) -> str:
        """For people: the owner, or that it is not known."""
        return self.owner.label if self.owner else "an unreadable claim"

    @property
    def since(self) -> str:
        """For people: local date and time."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_ms / 1000))

    def is_same(self, other: Claim | None) -> bool:
        """Whether both are one claim, however its state or beat went on."""
        mine = self.owner.nonce if self.owner else None
        theirs = other.owner.nonce if other and other.owner else None
        return other is not None and (self.name, mine) == (other.name, theirs)


class Claims(Protocol):
    """Where claims are kept.  All methods raise `RegistryError` when it cannot be reached."""

    @property
    def place(self) -> str:
        """For messages: a folder, or a server's address."""

    def of(self, key: str) -> list[Claim]:
        """All generations of a key, oldest first."""

    def all(self) -> list[Claim]:
        """All claims, by key and generation."""

    def make(self, claim: Claim) -> bool:
        """Make the claim's name, with its contents, at once and exclusively.

        Returns:
            Whether the claim is the caller's; False: the name is there and another's.
        """

    def update(self, claim: Claim) -> bool:
        """Write the state, run and beat of the caller's own claim.

        Returns:
            False: it is not there (somebody deleted it).
        """

    def remove(self, claim: Claim) -> None:
        """Delete a generation that is not the newest one of its key.

        Raises:
            RegistryError: it is the newest one, which must stay: without it the next generation
                would be the first again, and an owner that comes back would not see that it lost.
        """


def newest(claims: Claims, key: str) -> Claim | None:
    """The generation of a key that counts."""
    generations = claims.of(key)
    return generations[-1] if generations else None


def state_now(claim: Claim) -> StateNow:
    """What one look can tell of a claim.

    Returns:
        `dead`: its owner ran on this machine and is gone; `silent`: it says that it runs, but its
        owner cannot be seen from here, so that only its beat would tell.
    """
    if claim.state != "running":
        return claim.state
    seen = is_running(claim.owner) if claim.owner else None
    if seen is None:
        return "silent"
    return "running" if seen else "dead"


def in_order(found: Iterable[Claim]) -> list[Claim]:
    """By key, then by generation."""
    return sorted(found, key=lambda claim: (claim.key, claim.generation))


def split_name(name: str) -> tuple[str, int] | None:
    """Key and generation in `<key>` (the first) or `<key>.g<N>`; None: not the name of a claim."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2] or 1)) if match else None


# Claims as files beside a local store: `<home>/claims/<key>.g<N>.json`.


_END = ".json"


class FileClaims:
    """The claims in a folder.

    A file is written under another name and then linked to its own, which fails if that is taken:
    whoever reads it finds it whole, and of several who make it one succeeds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self._folder)

    def of(self, key: str) -> list[Claim]:
        """See `Claims`."""
        return self._read(f"{key}.g*{_END}")

    def all(self) -> list[Claim]:
        """See `Claims`."""
        return self._read(f"*{_END}")

    def make(self, claim: Claim) -> bool:
        """See `Claims`."""
        temporary = self._write(claim)
        try:
            os.link(temporary, self._path(claim))
        except FileExistsError:
            return False
        except OSError as error:
            raise RegistryError(f"{self._path(claim)}: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def update(self, claim: Claim) -> bool:
        """See `Claims`."""
        path = self._path(claim)
        if not path.exists():
            return False
        temporary = self._write(claim)
        try:
            temporary.replace(path)
        except OSError as error:
            raise RegistryError(f"{path}: {error.strerror}") from None
        return True

    def remove(self, claim: Claim) -> None:
        """See `Claims`."""
        if not any(other.generation > claim.generation for other in self.of(claim.key)):
            raise RegistryError(f"{claim.name}: the newest claim of its key stays")
        self._path(claim).unlink(missing_ok=True)

    def _path(self, claim: Claim) -> Path:
        return self._folder / f"{claim.name}{_END}"

    def _write(self, claim: Claim) -> Path:
        """The claim under a name that only this claim's owner uses, on disk as a whole."""
        assert claim.owner, "only the owner writes a claim"
        temporary = self._folder / f".{claim.name}.{claim.owner.nonce}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(claim), file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RegistryError(f"{temporary}: {error.strerror}") from None
        return temporary

    def _read(self, pattern: str) -> list[Claim]:
        found = []
        for path in self._folder.glob(pattern):
            named = split_name(path.name.removesuffix(_END))
            if named is None:
                continue
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                continue  # removed since the folder was listed
            except OSError as error:
                raise RegistryError(f"{path}: {error.strerror}") from None
            found.append(_parse_file(text, *named))
        return in_order(found)


def _parse_file(text: str, key: str, generation: int) -> Claim:
    """The claim in a file; the file's name says which one it is, even if the rest is unreadable."""
    unreadable = Claim(
        key=key, generation=generation, owner=None, state="running", run_id=None, beat=0, since_ms=0
    )
    try:
        stored: dict[str, Any] = json.loads(text)
        owner = Owner.from_dict(stored.pop("owner"))
        claim = Claim(**{**stored, "key": key, "generation": generation, "owner": owner})
    except (ValueError, TypeError, KeyError, AttributeError):
        return unreadable
    whole = claim.state in STATES and isinstance(claim.beat, int)
    return claim if whole else replace(unreadable, owner=owner)


_PAGE = 1000
"""Models in one answer; the most that MLflow gives."""
_OWNER, _SINCE = "runkey.owner", "runkey.since_ms"
_CHANGING = ("runkey.run", "runkey.state", "runkey.beat")
"""In the order in which they are written: the run is known before the state says finished."""


class ServerClaims:
    """The claims on a server."""

    def __init__(self, client: RestClient) -> None:
        self._client = client
        self._written: dict[str, dict[str, str]] = {}

    @property
    def place(self) -> str:
        """The server's address."""
        return self._client.address

    def of(self, key: str) -> list[Claim]:
        """See `Claims`."""
        return [claim for claim, _ in self._search(key) if claim.key == key]

    def all(self) -> list[Claim]:
        """See `Claims`."""
        return [claim for claim, _ in self._search(ANY_KEY)]

    def make(self, claim: Claim) -> bool:
        """See `Claims`."""
        assert claim.owner, "only an owner makes a claim"
        tags = {
            _OWNER: json.dumps(claim.owner.as_dict(), sort_keys=True),
            _SINCE: str(claim.since_ms),
            **_changing(claim),
        }
        content = {
            "name": _name(claim),
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
            "description": f"Claim of runkey: which process trains this key ({claim.who}).",
        }
        try:
            self._client.post("registered-models/create", content, repeat=True)
        except RestError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
            # The first answer may have been lost on its way: then the name is there and ours.
            return claim.is_same(self._read(claim))
        return True

    def update(self, claim: Claim) -> bool:
        """See `Claims`."""
        before = self._written.get(claim.name, {})
        tags = _changing(claim)
        try:
            for key in _CHANGING:
                if before.get(key) != tags[key]:
                    content = {"name": _name(claim), "key": key, "value": tags[key]}
                    self._client.post("registered-models/set-tag", content, repeat=True)
        except RestError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._written[claim.name] = tags
        return True

    def remove(self, claim: Claim) -> None:
        """See `Claims`."""
        found = [(c, model) for c, model in self._search(claim.key) if c.key == claim.key]
        if not any(other.generation > claim.generation for other, _ in found):
            raise RegistryError(f"{claim.name}: the newest claim of its key stays")
        for other, model in found:
            if other.generation == claim.generation:
                if model.get("latest_versions"):
                    raise RegistryError(
                        f"{claim.name}: somebody keeps model versions in it at {self.place}"
                    )
                self._client.send("DELETE", "registered-models/delete", {"name": _name(claim)})

    def _read(self, claim: Claim) -> Claim | None:
        try:
            answer = self._client.get("registered-models/get", {"name": _name(claim)})
        except RestError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return _parse_version(answer["registered_model"], claim.key, claim.generation)

    def _search(self, beginning: str) -> list[tuple[Claim, Mapping[str, Any]]]:
        """Claims whose names begin so, in order, each with the model as MLflow has it."""
        models: dict[str, tuple[Claim, Mapping[str, Any]]] = {}
        query: dict[str, str | int] = {"filter": f"name LIKE '{beginning}%'", "max_results": _PAGE}
        while True:
            answer = self._client.get("registered-models/search", query)
            for model in answer.get("registered_models", []):
                if named := split_name(model["name"]):
                    claim = _parse_version(model, *named)
                    models[claim.name] = claim, model
            if not answer.get("next_page_token"):
                break
            query["page_token"] = answer["next_page_token"]
        return [models[claim.name] for claim in in_order(claim for claim, _ in models.values())]


def _name(claim: Claim) -> str:
    return claim.key if claim.generation == 1 else claim.name


def _changing(claim: Claim) -> dict[str, str]:
    return dict(zip(_CHANGING, (claim.run_id or "", claim.state, str(claim.beat)), strict=True))


def _parse_version(model: Mapping[str, Any], key: str, generation: int) -> Claim:
    """The claim in a registered model; one that somebody else made has no readable owner."""
    tags = {tag["key"]: tag.get("value", "") for tag in model.get("tags", [])}
    run, state, beat = (tags.get(name, "") for name in _CHANGING)
    try:
        owner = Owner.from_dict(json.loads(tags[_OWNER]))
    except (KeyError, ValueError, TypeError):
        owner = None
    return Claim(
        key=key,
        generation=generation,
        owner=owner,
        state=cast(State, state) if state in STATES else "running",
        run_id=run or None,
        beat=int(beat) if beat.isdecimal() else 0,
        since_ms=int(tags[_SINCE]) if tags.get(_SINCE, "").isdecimal() else 0,
    )
