"""The MLflow store: a database beside the repository, or the server that MLFLOW_TRACKING_URI names.

The default is `<root>/mlflow.db` with artifacts in `<root>/mlartifacts`, where `<root>` is the main
checkout, also inside `dvc exp run --temp|--queue`, whose folder is deleted after the run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runkey import paths
from runkey.errors import RunkeyError, TrackingError
from runkey.http_limits import SECONDS, TIMEOUT
from runkey.identity.record_cache import sqlite_way_out
from runkey.progress import without_logins

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MAX_METRICS = 1000
"""MLflow's limit on one request."""


# Set before mlflow is imported. The last three bound how long a call to a dead server takes: with
# MLflow's defaults (7 retries, 120 s each) that is a quarter of an hour.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    TIMEOUT: f"{SECONDS:.0f}",
}


_LOCKED_SECONDS = 5.0
"""For which a locked database is waited for; a writer locks it for milliseconds."""


@dataclass(frozen=True, slots=True)
class Store:
    """An MLflow tracking store."""

    uri: str
    """MLflow's tracking URI, an `Address`; a sqlite path in it is absolute."""
    artifacts: Path | None
    """Artifact folder of new experiments; None: the server decides."""
    home: Path
    """Folder for runkey's own files beside the store: records, claims, checkpoints."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", paths.Address(self.uri))

    @property
    def full_uri(self) -> str:
        """The tracking URI with its login, for MLflow alone."""
        return paths.Address(self.uri).full

    @property
    def database(self) -> Path | None:
        """The sqlite file; None for a server or another database."""
        return (
            Path(self.uri.removeprefix(paths.SQLITE)) if self.uri.startswith(paths.SQLITE) else None
        )

    @property
    def cache(self) -> Path:
        """The cache of the store's runs, which is read without MLflow."""
        return paths.records(self.home, self.uri)

    @property
    def is_server(self) -> bool:
        """Whether it is reached over HTTP."""
        return paths.is_server(self.uri)


def locate_store(root: Path | None = None) -> Store:
    """Return the store that `MLFLOW_TRACKING_URI` names, else the one in the main checkout `root`.

    A relative sqlite path is relative to `root`, not to the current folder, which may be one of
    DVC's temporary folders.

    Raises:
        TrackingError: the path of the database holds a `?`, where MLflow takes it to end.
    """
    root = (root or paths.store_root()).resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"{paths.SQLITE}{root / 'mlflow.db'}"
    if uri.startswith(paths.SQLITE):
        database = root / uri.removeprefix(paths.SQLITE)
        uri = f"{paths.SQLITE}{database}"
        if "?" in uri:
            raise TrackingError(
                f"{database}: MLflow takes the path of a database to end at `?`;"
                " rename the folder, or set MLFLOW_TRACKING_URI to sqlite:////another/mlflow.db"
            )
    artifacts = None if paths.is_server(uri) else root / "mlartifacts"
    return Store(uri, artifacts, paths.home_of(root))


def find_store() -> Store:
    """Return the store that the current folder, `DVC_ROOT` or `MLFLOW_TRACKING_URI` names.

    Outside a repository the address alone is enough: a server's, or a database's full path.
    RunkeyError if no such address is set there.
    """
    try:
        root = paths.store_root()
    except RunkeyError as error:
        address = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        if not (paths.is_server(address) or address.startswith("sqlite:////")):
            raise RunkeyError(
                f"{error}, or set MLFLOW_TRACKING_URI to a server's address or"
                " sqlite:////full/path/mlflow.db"
            ) from None
        root = Path.cwd()
    return locate_store(root)


def quiet_mlflow() -> None:
    """Turn off MLflow's telemetry and chatter; call it before mlflow is first imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        Path.home()
    except RuntimeError:  # a container's user without a name; mlflow looks for a login there
        os.environ["HOME"] = "/nonexistent"
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # This logger prints the traceback of every database error that is also raised.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def open_client(store: Store) -> MlflowClient:
    """Open a client of the store. The first one imports mlflow (5 s) and makes the database (3 s).

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
    if store.is_server:
        from runkey.tracking.mlflow_http import limit_answers  # imports mlflow

        limit_answers()
    quiet_mlflow()  # mlflow sets its own level when it is imported
    if store.database:
        _make_database(store.database)
        _look_into(store.database)
    client = MlflowClient(store.full_uri)
    _adopt_moved(store)
    return client


@contextmanager
def tracked(store: Store, what: str) -> Iterator[MlflowClient]:
    """Yield a client of the store; `what` says what cannot be done if anything fails in the block.

    Raises:
        TrackingError: whatever MLflow, its database driver, the network or the disk raised.
    """
    try:
        yield open_client(store)
    except RunkeyError:
        raise
    # Answers of a strange server end in a dozen kinds of errors in MLflow.
    except Exception as error:  # noqa: BLE001
        way_out = sqlite_way_out(str(error)) if store.database else ""
        raise TrackingError(f"{store.uri}: {what} ({in_one_line(error)}){way_out}") from None


# Before the cause of a failed request; the address is named anyway.
_REQUEST = re.compile(
    r"API request to \S+ failed with exception |\w*Pool\(host=[^)]*\): "
    r"|Max retries exceeded with url: \S+ "
)


def in_one_line(error: BaseException, characters: int = 160) -> str:
    """Shorten an error to one line; of a database error keep the cause, without the statement."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = without_logins(" ".join(f"{type(error).__name__}: {error}".split()))
    text = _REQUEST.sub("", text)
    if re.search(r"\berror code 40[13]\b|\b40[13] Client Error\b", text):
        return f"{text[:characters]}; {paths.LOGIN}"
    return text if len(text) <= characters else text[: characters - 1] + "…"


def experiment_id(client: MlflowClient, store: Store, name: str) -> str:
    """Return the id of the experiment; create it if need be, also from several processes at once.

    Raises:
        TrackingError: the experiment was deleted in the UI.
        MlflowException: the store cannot be reached or refuses.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # By default it is in the current folder of this process, which may be temporary.
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
    # Another process may set it at the same time, and a server may forbid it: not worth a run.
    with suppress(MlflowException):
        if NOTE not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, NOTE, " ".join(_ABOUT.split()))
        if is_due(experiment.tags):
            client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view_text())
    return str(experiment.experiment_id)


def _make_database(path: Path) -> None:
    """Make MLflow's database under a temporary name and rename it when it is complete.

    MLflow makes its tables in dozens of steps, and cannot open a database that lacks some.
    """
    from mlflow import MlflowClient

    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix=".runkey-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        draft.touch()  # sqlite would leave out the group's right to write, whatever the umask
        MlflowClient(f"{paths.SQLITE}{draft}")
        try:
            path.hardlink_to(draft)
        except OSError:  # another process was faster, or the file system has no hard links
            if not path.exists():
                draft.rename(path)


def _look_into(path: Path) -> None:
    """Raise at once if the database cannot be read: MLflow tries for 100 seconds.

    TrackingError, or the sqlite3.Error.
    """
    if not path.is_file():
        raise TrackingError(f"{path}: not a file; move it away: the next run makes a database")
    with closing(sqlite3.connect(path, timeout=_LOCKED_SECONDS)) as database:
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=20.0)) as database, database:
        yield database


_PLACES = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    ("logged_models", "artifact_location"),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
"""Tables and columns in which MLflow keeps absolute paths of artifacts."""


def _adopt_moved(store: Store) -> None:
    """Point the database at the artifacts beside it if the checkout was moved or copied.

    MLflow stores absolute artifact paths, so a copy would keep writing into the original's folder.
    Changed are paths that end in our own folder's name, and that of the experiment `Default`, which
    MLflow sets to the current folder of the process that makes the database.
    """
    if not (store.database and store.artifacts):
        return
    here = store.artifacts.as_uri()
    with _connected(store.database) as database:
        moved = database.execute(
            "SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?"
            " AND artifact_location <> ?",
            (f"file://%/{store.artifacts.name}", here),
        ).fetchall()
        for (old,) in moved if store.database.parent == store.artifacts.parent else ():
            for table, column in _PLACES:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (here, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
        database.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0"
            " AND name = 'Default' AND artifact_location LIKE '%mlruns/0'",
            (here,),
        )


def set_tag(
    store: Store, run_id: str, name: str, value: str, post: Callable[[str, dict[str, str]], object]
) -> None:
    """Set a tag of a run without importing mlflow, which takes 5 s; only in sqlite or on a server.

    `post` sends a JSON object to a path below the server's `api/2.0/mlflow/`. TrackingError if the
    database cannot be written.
    """
    if store.is_server:
        post("runs/set-tag", {"run_id": run_id, "key": name, "value": value})
    elif store.database:
        try:
            with _connected(store.database) as database:
                database.execute(
                    "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)"
                    " ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value",
                    (name, value, run_id),
                )
        except sqlite3.Error as error:
            raise TrackingError(f"{store.database}: {error}") from None


NOTE = "mlflow.note.content"
"""Tag that holds the description of a run or an experiment."""
_ABOUT = """Training runs of runkey. A run's name says which parameters differ from the committed
ones, and its description gives the result. `eval/AP` is COCO's AP on the held-out images, 0 to 1,
and `class_AP/...` that of each class: on test where the tag `split` says so (then `eval/val/AP` is
that on val), else on val. The tag `key` is a hash of the code, parameters, data and
packages: `runkey show KEY` in a terminal prints all that is known of a run."""
VIEW = "runkey"
"""Name of the view that selects the columns of MLflow's run list."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# Increase it with every change of the columns (MLflow has a time in milliseconds here).
_VERSION_MS = 1_795_600_000_001

_COLUMNS = {
    "duration": 80,
    "metrics.`eval/AP`": 85,
    "metrics.`eval/AP50`": 85,
    "metrics.`eval/AP75`": 85,
    "metrics.`eval/loss`": 85,
    "params.`lr`": 80,
    "params.`training.epochs`": 125,
    "params.`training.batch_size`": 150,
    "params.`seed`": 60,
    "params.`key.code`": 90,
    "params.`key.params`": 100,
    "params.`key.data`": 90,
    "params.`key.environment`": 140,
    "tags.`key`": 90,
    "tags.`device`": 100,
    "attributes.`Models`": 150,
    "attributes.`Dataset`": 200,
}
"""Width in pixels of each column after name and time, from the left, by MLflow's names."""
_STATE = {
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "selectedColumns": list(_COLUMNS),
    "columnOrder": list(_COLUMNS),
    "columnWidths": _COLUMNS,
}
"""Order and columns of the run list, as MLflow's pages keep them."""


def view_text() -> str:
    """Return the tag's value: a named view as MLflow's pages save one, its state as JSON text."""
    view = {"name": VIEW, "createdAt": _VERSION_MS, "updatedAt": _VERSION_MS}
    return json.dumps(view | {"state": json.dumps(_STATE)})


def is_due(tags: Mapping[str, str]) -> bool:
    """Return True if an experiment has no view, or an older one that no user has edited."""
    try:
        view = json.loads(tags[VIEW_TAG])
        return bool(view["createdAt"] == view["updatedAt"] < _VERSION_MS)
    except KeyError:
        return True
    except (TypeError, ValueError):
        return False


_START_SECONDS = 180.0
_HOST = "127.0.0.1"
_APP = "runkey"
"""Entry point `mlflow.app` of pyproject.toml, `create_app`."""
_START_PAGE = "RUNKEY_START_PAGE"
"""Environment variable of the server: name of the experiment whose runs the address shows."""
# MLflow's own settings of a browser, by the names under which its pages keep them. Without them a
# new browser shows the menu of generative AI, an assistant, and a notice about usage data. The
# columns are put where the pages keep those that a user chose: of a shared view they say in a bar
# that it is one. They are there before the pages' own scripts run, so the request has to block.
_BROWSER = """<script>
const preset = (name, value) =>
  localStorage.getItem(name) ?? localStorage.setItem(name, JSON.stringify(value))
preset("mlflow.workflowType_v1", "machine_learning")
preset("mlflow.settings.telemetry.enabled_v1", false)
preset("mlflow.telemetry.info.alert.dismissed_v1", true)
preset("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", true)
const asked = new XMLHttpRequest()
asked.open("GET", "ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=EXPERIMENT", false)
if ("EXPERIMENT") asked.send()
if (asked.status === 200) {
  const id = JSON.parse(asked.responseText).experiment.experiment_id
  preset(`MLflowLocalStorage-1.1-ExperimentPage-["${id}"]-ReactComponentState`, STATE)
  if (["", "#/"].includes(location.hash))
    location.replace(`#/experiments/${id}/runs?workflowType=machine_learning`)
}
</script>"""


def create_app() -> Any:
    """Return MLflow's server, whose pages open in model training and send no usage data."""
    from mlflow.server import app as flask
    from mlflow.server.fastapi_app import app

    experiment = urllib.parse.quote(os.environ.get(_START_PAGE, ""), safe="")
    script = _BROWSER.replace("EXPERIMENT", experiment).replace("STATE", json.dumps(_STATE))
    page = Path(str(flask.static_folder), "index.html").read_text(encoding="utf-8")
    whole = page.replace("<head>", f"<head>{script}", 1)
    flask.view_functions["serve"] = lambda: flask.response_class(whole, mimetype="text/html")
    return app


def has_own_pages() -> bool:
    """Return True if the servers that start here show the pages of `create_app`."""
    from importlib.metadata import entry_points  # with zipfile and email: 10 ms

    return bool(entry_points(group="mlflow.app", name=_APP))


@contextmanager
def served(
    store: Store, port: int, experiment: str = ""
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve MLflow's pages on a local store until the block ends; yield address and process.

    The address shows the runs of the experiment, if one is named.

    Raises:
        TrackingError: there is no store yet, the port is taken, or MLflow does not start.
    """
    if store.database and not store.database.is_file():
        raise TrackingError(f"{store.database}: not found; `make repro` records the first run")
    port = free_port(port)
    logger.info("starting MLflow's server (some 10 s) ...")
    process = start_server(store, port, experiment)
    try:
        address = f"http://{_HOST}:{port}"
        wait_until_healthy(address, process)
        yield address, process
    finally:
        stop_server(process)


def start_server(store: Store, port: int, experiment: str = "") -> subprocess.Popen[str]:
    """Start `mlflow server` with one worker on a local port; end it with `stop_server`."""
    quiet_mlflow()
    # Without this, jobs (for generative AI) are a second process of 240 MB.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    environment[_START_PAGE] = experiment
    environment["MLFLOW_BACKEND_STORE_URI"] = store.full_uri  # every user can read command lines
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        _HOST,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    if store.artifacts:
        command += ["--default-artifact-root", store.artifacts.as_uri()]
    if has_own_pages():
        command += ["--app-name", _APP]
    else:
        logger.warning("MLflow's pages as MLflow ships them: `make env` installs ours")
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    # A session of its own, to end the process that serves together with the one that starts it.
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    process.stderr = errors  # for `wait_until_healthy`
    return process


def stop_server(process: subprocess.Popen[str], kill: bool = False) -> None:
    """Stop the server and the processes that it started, with SIGKILL if `kill` is true."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    process.wait()
    if process.stderr:
        process.stderr.close()


def wait_until_healthy(address: str, process: subprocess.Popen[str]) -> None:
    """Wait until the server answers; TrackingError if it ends, or three minutes have passed."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise TrackingError(
                f"mlflow server ended with code {process.returncode}{_why(process)}"
            )
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.3)
    raise TrackingError(f"mlflow server did not answer at {address} in {_START_SECONDS:.0f} s")


def _why(process: subprocess.Popen[str]) -> str:
    """Return the last line that a server wrote before it ended, and what helps."""
    if not process.stderr:
        return ""
    process.stderr.seek(0)
    lines = process.stderr.read().split("\n")
    last = without_logins(next((line.strip() for line in reversed(lines) if line.strip()), ""))[
        :200
    ]
    if "No module named" in last:
        return (
            f" ({last}): install that driver into .venv, or set MLFLOW_TRACKING_URI to the address"
            " of a server that uses the database"
        )
    return f" ({last}); is MLFLOW_TRACKING_URI right?"


def free_port(port: int = 0) -> int:
    """Return `port`, or any local one; TrackingError if a process listens on it."""
    try:
        with socket.create_server((_HOST, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise TrackingError(f"port {port}: {why}; name another, or 0 for any free one") from None
