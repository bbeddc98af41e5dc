"""Find trained models: a run's files by its key, and runs that MLflow's model registry names.

    run_id = registered_run(uri, "models:/detection@production")
    folder = copy_model(library, home, find_run(library, "rk2-7252"))     # .../model

Reading takes no import of mlflow; `runkey.tracking.logged_model` writes to the model registry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runkey import paths
from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.initial_weights import OLD_WEIGHTS, WEIGHTS
from runkey.identity.key import short_key
from runkey.identity.record import Record
from runkey.registry.dvc_cache import download
from runkey.registry.library import Library, opened
from runkey.registry.rest import AbsentError, RestClient

COPIES = Path("models")
"""Below `Store.home`: copies of runs' models, in folders named by the sha256 of their weights."""
THRESHOLDS = f"{paths.EVALUATION}/thresholds.json"
_REFERENCE = re.compile(
    r"models:/(?:(?P<id>m-[0-9a-f]{32})|(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]{1,18})))"
)


def copy_model(library: Library, home: Path, record: Record) -> Path:
    """Copy the model of a run, with its score thresholds, out of the store; return its folder.

    Files that are there already are hashed, and fetched again only if they are not what the run
    recorded.

    Raises:
        RegistryError: the run recorded no model, or its files are missing or changed.
    """
    files = record.details.files if record.details else {}
    folder = paths.MODEL.as_posix()
    weights = files.get(f"{folder}/{WEIGHTS}") or files.get(f"{folder}/{OLD_WEIGHTS}")
    if weights is None:
        raise RegistryError(
            f"{record.label}: run {record.run.run_id} is {record.run.status} and recorded no model;"
            " `runkey list --where status=FINISHED` shows those that did"
        )
    target = home / COPIES / weights.sha256
    wanted = [path for path in files if path.startswith(f"{folder}/") or path == THRESHOLDS]
    download(library, record, [p for p in wanted if not _is(target / p, files[p].sha256)], target)
    return target / paths.MODEL


def _is(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def registered_run(uri: str, reference: str) -> str:
    """Return the MLflow id of the run whose model a reference names.

    Args:
        uri: of the store, a server's or that of a sqlite file.
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`.

    Raises:
        RegistryError: it names no model, or one that no run made.
    """
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise RegistryError(
            f"{reference}: not a model; write models:/NAME@ALIAS, models:/NAME/VERSION or"
            " models:/m-ID"
        )
    found = (_ask_server if paths.is_server(uri) else _ask_database)(uri, **match.groupdict())
    if not found:
        raise RegistryError(
            f"{reference}: no model of a run in {paths.Address(uri)}; `runkey promote KEY --alias"
            " NAME` makes one"
        )
    return found


def _ask_server(
    uri: str, id: str | None, name: str | None, alias: str | None, version: str | None
) -> str | None:
    client = RestClient(uri)
    try:
        if id:
            return _text(client.get(f"logged-models/{id}"), "model", "info", "source_run_id")
        if alias:
            query = {"name": str(name), "alias": alias}
            answer = client.get("registered-models/alias", query)
        else:
            query = {"name": str(name), "version": str(version)}
            answer = client.get("model-versions/get", query)
    except AbsentError:
        return None
    return _text(answer, "model_version", "run_id")


def _text(value: object, *names: str) -> str | None:
    """Return the text under names within each other, if there is one: any server may answer."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else None


_BY_ALIAS = """SELECT v.run_id FROM registered_model_aliases a JOIN model_versions v
ON v.name = a.name AND v.version = a.version WHERE a.name = ? AND a.alias = ?"""
_BY_VERSION = """SELECT run_id FROM model_versions
WHERE name = ? AND version = ? AND current_stage <> 'Deleted_Internal'"""
_BY_ID = "SELECT source_run_id FROM logged_models WHERE model_id = ? AND lifecycle_stage = 'active'"
_PROMOTED = """SELECT a.name, a.alias, v.run_id FROM registered_model_aliases a
JOIN model_versions v ON v.name = a.name AND v.version = a.version ORDER BY a.name, a.alias"""


def _ask_database(
    uri: str, id: str | None, name: str | None, alias: str | None, version: str | None
) -> str | None:
    if id:
        question: tuple[str, tuple[object, ...]] = (_BY_ID, (id,))
    elif alias:
        question = (_BY_ALIAS, (name, alias))
    else:
        question = (_BY_VERSION, (name, int(version or 0)))
    with opened(uri) as database:
        row = database.execute(*question).fetchone()
    return _text(row[0]) if row else None


@dataclass(frozen=True, slots=True)
class Promotion:
    """An alias of a registered model, and the run whose model it names."""

    name: str
    alias: str
    run_id: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


def promotions(uri: str) -> list[Promotion]:
    """List all aliases in the model registry of a store; none where there is no database yet.

    Raises:
        RegistryError: the store cannot be read.
    """
    if paths.is_server(uri):
        return _promotions_of_server(RestClient(uri))
    if not (uri.startswith(paths.SQLITE) and Path(uri.removeprefix(paths.SQLITE)).is_file()):
        return []
    with opened(uri) as database:
        rows = database.execute(_PROMOTED).fetchall()
    return [Promotion(name, alias, run_id or "") for name, alias, run_id in rows]


def _promotions_of_server(client: RestClient) -> list[Promotion]:
    found = []
    for model in client.models(""):
        for one in model.aliases:
            query = {"name": model.name, "alias": one.alias}
            answer = client.get("registered-models/alias", query)
            run_id = _text(answer, "model_version", "run_id") or ""
            found.append(Promotion(model.name, one.alias, run_id))
    return found


def promoted_as(uri: str, records: list[Record]) -> dict[str, list[Promotion]]:
    """Return the aliases that name the models of some runs, by the runs' MLflow ids."""
    ids = {record.run.run_id for record in records}
    found: dict[str, list[Promotion]] = {}
    for one in promotions(uri):
        if one.run_id in ids:
            found.setdefault(one.run_id, []).append(one)
    return found


def check_not_promoted(uri: str, records: list[Record]) -> None:
    """Refuse to delete runs whose model an alias names.

    Raises:
        RegistryError: names run and alias, and the way out.
    """
    for record in records:
        for aliases in promoted_as(uri, [record]).values():
            names = ", ".join(map(str, aliases))
            raise RegistryError(
                f"{record.label}: run {record.run.run_id[:8]} is promoted as {names}; promote"
                f" another run first, or `runkey promote {short_key(record.key)} --name"
                f" {aliases[0].name} --alias {aliases[0].alias} --remove`"
            )
