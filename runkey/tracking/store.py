"""Where runs are recorded: a database beside the repository, or the server that a team names.

The default is `<root>/mlflow.db` with artifacts in `<root>/mlartifacts`, where `<root>` is the main
checkout also inside `dvc exp run --temp|--queue` (whose folder is deleted after the run).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runkey import paths
from runkey.errors import TrackingError
from runkey.tracking.view import offer_view

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_SERVER = ("http://", "https://")

# Set before mlflow is imported.  The two last ones bound how long a dead server holds a call up;
# MLflow's own defaults (7 retries, 120 s each) are a quarter of an hour.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


@dataclass(frozen=True, slots=True)
class Store:
    """An MLflow tracking store."""

    uri: str
    """What MLflow calls the tracking URI; a sqlite path in it is absolute."""
    artifacts: Path | None
    """Folder that new experiments put artifacts in; None: the server decides."""
    home: Path
    """Folder of what runkey itself keeps beside the store: records, claims, checkpoints."""

    @property
    def database(self) -> Path | None:
        """The sqlite file, or None for a server or another database."""
        return Path(self.uri.removeprefix(_SQLITE)) if self.uri.startswith(_SQLITE) else None

    @property
    def is_server(self) -> bool:
        """Whether the store is asked over HTTP."""
        return self.uri.startswith(_SERVER)


def locate_store(root: Path | None = None) -> Store:
    """The store that `MLFLOW_TRACKING_URI` names, else the one in `root`.

    A relative sqlite path is taken from `root`, not from the current folder, which may be one of
    DVC's temporary folders.

    Args:
        root: the main checkout; `paths.store_root()` when None.
    """
    root = (root or paths.store_root()).resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"{_SQLITE}{root / 'mlflow.db'}"
    if uri.startswith(_SQLITE):
        uri = f"{_SQLITE}{root / uri.removeprefix(_SQLITE)}"
    database = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
    home = (database.parent if database else root) / paths.HOME
    is_server = uri.startswith(_SERVER)
    return Store(uri, None if is_server else root / "mlartifacts", home)


def quiet_mlflow() -> None:
    """Turn telemetry and chatter off; must run before mlflow is imported anywhere."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints the traceback of each database error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def open_client(store: Store) -> MlflowClient:
    """A client of the store.  The first one imports mlflow (5 s) and makes the database (3 s).

    Raises:
        TrackingError: mlflow is not installed, or the database's folder is not there.
    """
    quiet_mlflow()
    if store.database and not store.database.parent.is_dir():
        raise TrackingError(f"{store.database.parent}: no such folder; set MLFLOW_TRACKING_URI")
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise TrackingError(f"mlflow cannot be imported ({error}); run `make env`") from None
    quiet_mlflow()  # mlflow sets its own level when it is imported
    _adopt_moved(store)
    if store.database:
        _make_database(store.database)
    client = MlflowClient(store.uri)
    _place_default(store)
    return client


def in_one_line(error: BaseException, characters: int = 160) -> str:
    """An error for people: of a database's, what the database said, without the statement."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= characters else text[: characters - 1] + "…"


def experiment_id(client: MlflowClient, store: Store, name: str) -> str:
    """The id of the experiment, made if need be; several processes may ask at the same time.

    Its artifact location is given explicitly: MLflow would take the current folder of whichever
    process came first, and that may be temporary.

    Raises:
        TrackingError: the experiment was deleted in the UI.
        MlflowException: the store cannot be reached or refuses.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = store.artifacts.as_uri() if store.artifacts else None
        try:
            client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} was deleted; restore it in the UI or set another name as"
            " runtime.experiment"
        )
    offer_view(client, experiment.experiment_id, experiment.tags)
    return str(experiment.experiment_id)


def _make_database(path: Path) -> None:
    """Make MLflow's database under another name, and give it its own when it is whole.

    MLflow makes its tables in dozens of steps.  A process that is killed between two of them leaves
    a database that no MLflow opens again.
    """
    from mlflow import MlflowClient

    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        MlflowClient(f"{_SQLITE}{draft}")
        try:
            path.hardlink_to(draft)
        except OSError:  # another process was first, or this file system has no hard links
            if not path.exists():
                draft.rename(path)


def _adopt_moved(store: Store) -> None:
    """Point the database at the artifacts beside it, if the checkout was moved or copied.

    MLflow keeps artifact folders as absolute paths, so a copy would go on writing into the
    original's folder.  Only paths that end in our own folder's name are touched.
    """
    if not (store.database and store.artifacts and store.database.is_file()):
        return
    if store.database.parent != store.artifacts.parent:
        return
    here = store.artifacts.as_uri()
    tail = f"/{store.artifacts.name}"
    with closing(sqlite3.connect(store.database, timeout=20)) as database, database:
        if not database.execute(
            "SELECT 1 FROM sqlite_master WHERE type='table' AND name='experiments'"
        ).fetchone():
            return
        moved = database.execute(
            "SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?"
            " AND artifact_location <> ?",
            (f"file://%{tail}", here),
        ).fetchall()
        for (old,) in moved:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (here, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


def _place_default(store: Store) -> None:
    """Put the artifacts of MLflow's own experiment `Default` where all others' are.

    We log nothing there, but whoever does should not find it in a folder that DVC deleted: MLflow
    takes the current folder of the process that makes the database.
    """
    if not (store.database and store.artifacts):
        return
    with closing(sqlite3.connect(store.database, timeout=20)) as database, database:
        database.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0"
            " AND name = 'Default' AND artifact_location LIKE '%mlruns/0'",
            (store.artifacts.as_uri(),),
        )
