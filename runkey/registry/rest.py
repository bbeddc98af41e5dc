"""A client of MLflow's REST interface that does not import MLflow, which takes 5 s; page addresses.

Paths and names are MLflow's own: `api/2.0/mlflow/...`, `get-artifact`.  Login and certificates come
from the variables that MLflow reads: `MLFLOW_TRACKING_` with `USERNAME`, `PASSWORD`, `TOKEN`,
`INSECURE_TLS`, `SERVER_CERT_PATH`, and `REQUESTS_CA_BUNDLE`; a login also from
`~/.mlflow/credentials`.
"""

from __future__ import annotations

import base64
import configparser
import io
import json
import logging
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, cast

from runkey.errors import RegistryError
from runkey.http_limits import TIMEOUT, LimitedConnection, LimitedResponse, answer_seconds
from runkey.identity.record import LoggedRun
from runkey.paths import LOGIN, Address
from runkey.registry.answers import (
    LATEST_MS,
    ArtifactFile,
    Experiment,
    Model,
    Refusal,
    Run,
    checked,
    parsed,
)
from runkey.units import MIB, counted

logger = logging.getLogger(__name__)

ATTEMPTS = 3
_API = "api/2.0/mlflow"
_FILES = "api/2.0/mlflow-artifacts/artifacts"
_STORED_PER_SECOND = 1e6
"""Bytes that a server is given a second for, when it passes a file on to its store."""
_MOST_PAGES = 1000
_ITEMS_PER_SECOND = 20
"""That earn a long search more time."""


class UnreachedError(RegistryError):
    """The server does not answer."""


class RestError(RegistryError):
    """The server refused.

    `code` is MLflow's error code, such as RESOURCE_ALREADY_EXISTS; `status` is the HTTP status.
    """

    def __init__(self, text: str, code: str, status: int) -> None:
        super().__init__(text)
        self.code, self.status = code, status

    @property
    def is_absent(self) -> bool:
        """True if the server says clearly that there is no such thing."""
        return self.code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "HTTP_404")


class AbsentError(RestError):
    """The server has no such thing: RESOURCE_DOES_NOT_EXIST."""


class ExistsError(RestError):
    """The server has that already: RESOURCE_ALREADY_EXISTS."""


class RestClient:
    """A tracking server.  All methods raise `RestError` if it refuses, else `RegistryError`."""

    def __init__(self, address: str) -> None:
        """Send nothing yet; the address is `http[s]://[user:password@]host[:port][/prefix]`."""
        self.address = Address(address)
        self._seconds = answer_seconds()
        self._headers = _login(self.address)
        self._ahead_ms: int | None = None
        """The server's clock less the time since boot, by its last answer."""
        # An opener of its own: urllib's shared one keeps the proxies of its first use for ever.
        is_secure = self.address.startswith("https:")
        tls = [_HttpsHandler(context=_tls())] if is_secure else []
        self._opener = urllib.request.build_opener(_HttpHandler, _NoRedirect, *tls)

    # What is asked, and checked when it comes

    def experiments(self) -> Iterator[Experiment]:
        """Yield the active experiments."""
        query = {"max_results": 1000, "view_type": "ACTIVE_ONLY"}
        for one in self.pages("experiments/search", query, "experiments", post=True):
            yield self._checked(Experiment, one)

    def experiment(self, name: str) -> Experiment:
        """Return an experiment; AbsentError if there is none."""
        answer = self.get("experiments/get-by-name", {"experiment_name": name})
        return self._checked(Experiment, answer.get("experiment"), "experiment")

    def runs(self, query: Mapping[str, Any]) -> Iterator[LoggedRun]:
        """Yield the runs of a search; a warning tells of those that are none and left out."""
        faults = []
        for one in self.pages("runs/search", query, "runs", post=True):
            try:
                yield checked(Run, one).logged()
            except ValueError as error:
                faults.append(str(error))
        if faults:
            runs = counted(len(faults), "run")
            logger.warning(f"{self.address}: {runs} damaged there and left out ({faults[0]})")

    def run(self, run_id: str) -> LoggedRun | None:
        """Return a run by its MLflow id; None where there is none, or it was deleted."""
        try:
            answer = self.get("runs/get", {"run_id": run_id})
        except AbsentError:
            return None
        run = self._checked(Run, answer.get("run"), "run")
        return None if run.info.lifecycle_stage == "deleted" else run.logged()

    def models(self, prefix: str) -> Iterator[Model]:
        """Yield the registered models whose names begin so."""
        query = {"filter": f"name LIKE '{prefix}%'", "max_results": 1000}
        for one in self.pages("registered-models/search", query, "registered_models"):
            yield self._checked(Model, one)

    def model(self, name: str) -> Model | None:
        """Return a registered model, if there is one."""
        try:
            answer = self.get("registered-models/get", {"name": name})
        except AbsentError:
            return None
        found = self._checked(Model, answer.get("registered_model"), "registered_model")
        if found.name != name:
            raise self._strange(f"registered_model: {found.name[:100]!r}, asked for {name}")
        return found

    def now_ms(self) -> int | None:
        """Return the server's time in milliseconds since 1970, right to 2 s or one answer's delay.

        It goes on from the `Date` of the last answer; None if no answer had one yet.
        """
        return None if self._ahead_ms is None else self._ahead_ms + _since_boot_ms()

    def check_writes(self, experiment: str) -> None:
        """Raise RestError if the login may not record runs in an experiment, which is made.

        A tag of the experiment asks for the same permission as a run in it.
        """
        try:
            found = self.experiment(experiment).experiment_id
        except AbsentError:
            with suppress(ExistsError):  # another process was faster
                self.post("experiments/create", {"name": experiment}, repeat=True)
            found = self.experiment(experiment).experiment_id
        tag = {"experiment_id": found, "key": "runkey.writes", "value": "checked before trainings"}
        self.post("experiments/set-experiment-tag", tag, repeat=True)

    # How

    def get(self, path: str, query: Mapping[str, str | int] | None = None) -> dict[str, Any]:
        """Return the JSON answer to `GET api/2.0/mlflow/<path>`."""
        tail = f"?{urllib.parse.urlencode(query)}" if query else ""
        return self._ask("GET", f"{_API}/{path}{tail}", self._read_json)

    def post(self, path: str, data: Mapping[str, Any], *, repeat: bool = False) -> dict[str, Any]:
        """Return the JSON answer to `POST api/2.0/mlflow/<path>`.

        `repeat` sends again when the connection breaks; only for requests that may be done twice.
        """
        attempts = ATTEMPTS if repeat else 1
        return self._ask("POST", f"{_API}/{path}", self._read_json, data, attempts=attempts)

    def send(self, method: str, path: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer to another method (PATCH, DELETE), which may be repeated."""
        return self._ask(method, f"{_API}/{path}", self._read_json, data)

    def pages(
        self, path: str, query: Mapping[str, Any], name: str, *, post: bool = False
    ) -> Iterator[Any]:
        """Yield the items called `name` in the answers to a search, page by page.

        RegistryError if the pages come to no end: their token repeats, or they hold too little.
        """
        tokens, count, asking = set[str](), 0, 0.0
        while len(tokens) < _MOST_PAGES:
            began = time.monotonic()
            answer = self.post(path, query, repeat=True) if post else self.get(path, query)
            asking += time.monotonic() - began
            items = self._checked(list[Any], answer.get(name, []), name)
            count += len(items)
            yield from items
            named = answer.get("next_page_token")
            token = "" if named is None else self._checked(str, named, "next_page_token")
            if not token:
                return
            if token in tokens or asking > self._seconds + count / _ITEMS_PER_SECOND:
                break
            tokens.add(token)
            query = {**query, "page_token": token}
        raise self._strange(f"{path}: pages without end, {counted(count, 'item')} so far")

    def artifact(self, run_id: str, path: str, largest: int | None = None) -> Artifact:
        """Open a run's artifact, wherever the server keeps it; the caller closes it.

        It must not have more than `largest` bytes.
        """
        query = urllib.parse.urlencode({"run_uuid": run_id, "path": path})
        answer: LimitedResponse = self._ask("GET", f"get-artifact?{query}", lambda one: one)
        return Artifact(answer, self.address, largest)

    def artifact_bytes(self, run_id: str, path: str) -> bytes:
        """Return a small artifact of a run."""
        query = urllib.parse.urlencode({"run_uuid": run_id, "path": path})
        return self._ask("GET", f"get-artifact?{query}", _read)

    def _set_clock(self, date: str | None) -> None:
        with suppress(ValueError, TypeError, OverflowError):  # no date, or none that is one
            now_ms = int(parsedate_to_datetime(date or "").timestamp() * 1000)
            if 0 < now_ms <= LATEST_MS:
                self._ahead_ms = now_ms - _since_boot_ms()

    def artifact_files(self, run_id: str, folder: str) -> Iterator[ArtifactFile]:
        """Yield what is in a folder of a run's artifacts; nothing if there is no such folder."""
        query = {"run_id": run_id, "path": folder}
        for one in self.pages("artifacts/list", query, "files"):
            yield self._checked(ArtifactFile, one, "files")

    def store_file(self, path: str, pieces: Iterable[bytes], size: int) -> None:
        """Send a file of `size` bytes to a path in the server's own artifact store, once.

        What `pieces` raises comes through, and the server then has no whole file.
        """
        self._on_store("PUT", path, pieces, size)

    def remove_file(self, path: str) -> None:
        """Delete a file, or a folder with all in it, from the server's own artifact store."""
        self._on_store("DELETE", path)

    def _on_store(
        self, method: str, path: str, pieces: Iterable[bytes] | None = None, size: int = 0
    ) -> None:
        headers = self._headers
        if pieces is not None:
            kind = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            headers = headers | kind
        address = f"{self.address}/{_FILES}/{urllib.parse.quote(path)}"
        request: Any = urllib.request.Request(
            address, data=cast("Any", pieces), headers=headers, method=method
        )
        try:
            # The time of each piece, and of the answer, which comes when the file is in the store.
            seconds = self._seconds + size / _STORED_PER_SECOND
            with self._opener.open(request, None, seconds) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(self.address, error, f"{_FILES}/{path}") from None
        except (OSError, HTTPException, ValueError) as error:
            raise _unreached(self.address, error) from None

    def _strange(self, why: str) -> RegistryError:
        text = f"did not answer as an MLflow server does ({why}); is the address right?"
        return RegistryError(f"{self.address}: {text}")

    def _checked[T](self, kind: type[T], value: Any, name: str = "") -> T:
        try:
            return checked(kind, value)
        except ValueError as error:
            raise self._strange(": ".join(filter(None, [name, str(error)]))) from None

    def _read_json(self, answer: LimitedResponse) -> dict[str, Any]:
        try:
            return parsed(dict[str, Any], _read(answer) or b"{}")
        except ValueError as error:
            raise self._strange(str(error)) from None

    def _ask[T](
        self,
        method: str,
        path: str,
        read: Callable[[LimitedResponse], T],
        data: Any = None,
        *,
        attempts: int = ATTEMPTS,
    ) -> T:
        """Send a request and read the answer, all in the time of one answer.

        Try again after a broken connection, an answer cut off anywhere in its body, one that is not
        JSON, and an error of the server's own.
        """
        body = None if data is None else json.dumps(data).encode()
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        request = urllib.request.Request(
            f"{self.address}/{path}", data=body, headers=headers, method=method
        )
        end = time.monotonic() + self._seconds
        for attempt in range(1, attempts + 1):
            try:
                try:
                    left = max(end - time.monotonic(), 0.1)
                    answer = self._opener.open(request, None, left)
                    self._set_clock(answer.headers.get("Date"))
                except urllib.error.HTTPError as error:
                    with error:
                        self._set_clock(error.headers.get("Date"))
                        raise _refusal(self.address, error, path) from None
                return read(answer)
            except RestError as error:
                failure: RegistryError = error
                if error.status < 500:
                    raise
            except RegistryError as error:
                failure = error
            except (OSError, HTTPException, ValueError, OverflowError) as error:
                failure = _unreached(self.address, error)
            if attempt == attempts or time.monotonic() + 0.3 * attempt > end:
                break
            time.sleep(0.3 * attempt)
        raise failure from None


class Artifact(io.RawIOBase):
    """A file that a server sends; whatever breaks on the way is a RegistryError."""

    def __init__(self, answer: LimitedResponse, address: str, largest: int | None) -> None:
        """Read nothing yet."""
        self.length = answer.length
        """In bytes; None if the server did not state it."""
        self._answer, self._address = answer, address
        if largest is not None:
            # The head counts too.
            answer.limit(largest + MIB, earns_time=True)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read some bytes; RegistryError if the connection breaks or the server sends too many."""
        try:
            return self._answer.readinto(buffer)
        except (OSError, HTTPException, ValueError) as error:
            raise _unreached(self._address, error) from None

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()
        super().close()


def _read(answer: LimitedResponse) -> bytes:
    with answer:
        answer.limit()
        return answer.read()


class _Http(LimitedConnection, HTTPConnection):
    pass


class _Https(LimitedConnection, HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Http, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Https, req, context=self._context)  # type: ignore[attr-defined]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: urllib would take the password along, and make a GET of a POST."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _unreached(address: str, error: Exception) -> UnreachedError:
    why: Any = getattr(error, "reason", None) or error
    hint = "does the server run there? MLFLOW_TRACKING_URI or runtime.team_server names it"
    if isinstance(why, ssl.SSLCertVerificationError):
        why, hint = why.verify_message, f"name its certificate in {_CERTIFICATE}"
    elif isinstance(why, ssl.SSLError) and why.reason == "WRONG_VERSION_NUMBER":
        why, hint = "it does not speak TLS", "is its address http://...?"
    elif isinstance(why, TimeoutError) and not why.strerror:
        hint = f"does the server run there? {TIMEOUT} sets more"
    text = " ".join(str(why).split()) or type(why).__name__
    return UnreachedError(f"{address}: cannot be reached ({text[:200]}); {hint}")


def _since_boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _login(address: Address) -> dict[str, str]:
    """Return the header of the address's own login, else of the one that MLflow would use."""
    name, word = address.login
    if not (name and word):
        variables = ("mlflow_tracking_username", "mlflow_tracking_password")
        name, word = (os.environ.get(variable.upper(), "") for variable in variables)
        if not (name and word):
            stored = _credentials()
            name, word = name or stored.get(variables[0], ""), word or stored.get(variables[1], "")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if name and word:
        pair = base64.b64encode(f"{name}:{word}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _credentials() -> Mapping[str, str]:
    """Return what `~/.mlflow/credentials` says; RegistryError if it cannot be read."""
    parser, file = configparser.ConfigParser(), Path("~/.mlflow/credentials")
    try:
        file = file.expanduser()
        with file.open(encoding="utf-8") as lines:
            parser.read_file(lines)
        return dict(parser["mlflow"]) if "mlflow" in parser else {}
    except (RuntimeError, FileNotFoundError, NotADirectoryError):  # no home, no such file
        return {}
    except (configparser.Error, UnicodeDecodeError):
        raise RegistryError(f"{file}: not of MLflow's form, [mlflow] and two lines") from None
    except OSError as error:
        raise RegistryError(f"{file}: cannot be read ({error.strerror}); {LOGIN}") from None


_CERTIFICATE = "MLFLOW_TRACKING_SERVER_CERT_PATH"
_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""What MLflow's client, which is requests, reads beside it."""


def _tls() -> ssl.SSLContext:
    names = (name for name in (_CERTIFICATE, *_BUNDLES) if os.environ.get(name))
    name = next(names, _CERTIFICATE)
    path = os.environ.get(name) or None
    file, folder = (None, path) if path and Path(path).is_dir() else (path, None)
    try:
        context = ssl.create_default_context(cafile=file, capath=folder)
    except OSError as error:
        why = "holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise RegistryError(f"{name}={path}: {why}") from None
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _refusal(address: str, error: urllib.error.HTTPError, path: str) -> RestError:
    """Return MLflow's own error, if the answer has one."""
    try:
        refused = parsed(Refusal, error.read())
        code, text = refused.error_code, refused.message
    except ValueError:
        code, text = f"HTTP_{error.code}", f"HTTP {error.code} {error.reason}"
    if error.code in (401, 403):
        why = "no login, or a wrong one (HTTP 401);"
        if error.code == 403:
            asked = path.partition("?")[0].removeprefix(f"{_API}/")
            why = f"this login may not do that (HTTP 403, {asked}); ask for permission EDIT, or"
        return RestError(f"{address}: {why} {LOGIN}", code, error.code)
    if 300 <= error.code < 400:
        text += f": it is at another address, {error.headers.get('Location') or 'not said which'}"
    kinds = {"RESOURCE_DOES_NOT_EXIST": AbsentError, "RESOURCE_ALREADY_EXISTS": ExistsError}
    line = f"{address}: {' '.join(text.split())[:300]}"
    return kinds.get(code, RestError)(line, code, error.code)


# --- addresses of MLflow's pages


def list_page(server: str, experiment: str, view: str) -> str:
    """Return the page that lists an experiment's runs, in a shared view of its columns.

    Without such an experiment it is the start page; without such a view the columns are MLflow's.
    RegistryError if the server does not answer, or refuses.
    """
    try:
        found = RestClient(server).experiment(experiment)
    except AbsentError:
        return server
    tags = {tag.key for tag in found.tags}
    shared = {"viewStateShareKey": view} if f"mlflow.sharedViewState.{view}" in tags else {}
    return f"{server}/#/experiments/{found.experiment_id}/runs?{_tail(**shared)}"


def run_page(server: str, run: LoggedRun) -> str:
    """Return the page of one run."""
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}?{_tail()}"


def comparison_page(server: str, runs: Sequence[LoggedRun]) -> str:
    """Return the page that compares runs."""
    ids = json.dumps([run.run_id for run in runs])
    experiments = json.dumps(sorted({run.experiment_id for run in runs}))
    return f"{server}/#/compare-runs?{_tail(runs=ids, experiments=experiments)}"


def _tail(**query: str) -> str:
    # Without the last a new browser shows the menu of generative AI.
    return urllib.parse.urlencode(query | {"workflowType": "machine_learning"})
