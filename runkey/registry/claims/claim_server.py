"""Claims on a tracking server: registered models, whose names MLflow makes once.

The first generation is the model named by the key, so that the page "Models" shows one entry for a
key; later ones are `<key>.g<N>`.  What a claim says stands in the model's tags, which are given in
the call that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from runkey.errors import RegistryError
from runkey.identity.key import ANY_KEY
from runkey.registry.claims.claims import STATES, Claim, State, in_order, split_name
from runkey.registry.claims.owner import Owner
from runkey.registry.rest import RestClient, RestError

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
        return _parse(answer["registered_model"], claim.key, claim.generation)

    def _search(self, beginning: str) -> list[tuple[Claim, Mapping[str, Any]]]:
        """Claims whose names begin so, in order, each with the model as MLflow has it."""
        models: dict[str, tuple[Claim, Mapping[str, Any]]] = {}
        query: dict[str, str | int] = {"filter": f"name LIKE '{beginning}%'", "max_results": _PAGE}
        while True:
            answer = self._client.get("registered-models/search", query)
            for model in answer.get("registered_models", []):
                if named := split_name(model["name"]):
                    claim = _parse(model, *named)
                    models[claim.name] = claim, model
            if not answer.get("next_page_token"):
                break
            query["page_token"] = answer["next_page_token"]
        return [models[claim.name] for claim in in_order(claim for claim, _ in models.values())]


def _name(claim: Claim) -> str:
    return claim.key if claim.generation == 1 else claim.name


def _changing(claim: Claim) -> dict[str, str]:
    return dict(zip(_CHANGING, (claim.run_id or "", claim.state, str(claim.beat)), strict=True))


def _parse(model: Mapping[str, Any], key: str, generation: int) -> Claim:
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
