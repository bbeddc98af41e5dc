"""A client of MLflow's REST interface that does not import MLflow, which takes 5 s; page addresses.

Paths and names are MLflow's own: `api/2.0/mlflow/...`, `get-artifact`.  Login and certificates come
from the variables that MLflow reads: `MLFLOW_TRACKING_` with `USERNAME`, `PASSWORD`, `TOKEN`,
`INSECURE_TLS`, `SERVER_CERT_PATH`; a login also from `~/.mlflow/credentials`.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.identity.record import LoggedRun
from runkey.paths import LOGIN, Address

SECONDS = 20.0
"""Timeout of one answer."""
ATTEMPTS = 3
_API = "api/2.0/mlflow"


class UnreachedError(RegistryError):
    """The server does not answer."""


class RestError(RegistryError):
    """The server refused.

    `code` is MLflow's error code, such as RESOURCE_ALREADY_EXISTS; `status` is the HTTP status.
    """

    def __init__(self, text: str, code: str, status: int) -> None:
        super().__init__(text)
        self.code, self.status = code, status


class AbsentError(RestError):
    """The server has no such thing: RESOURCE_DOES_NOT_EXIST."""


class RestClient:
    """A tracking server.  All methods raise `RestError` if it refuses, else `RegistryError`."""

    def __init__(self, address: str, seconds: float = SECONDS) -> None:
        """Send nothing yet; the address is `http[s]://[user:password@]host[:port][/prefix]`."""
        self.address = Address(address)
        self._seconds = seconds
        self._headers = _login(self.address)
        # An opener of its own: urllib's shared one keeps the proxies of its first use for ever.
        is_secure = self.address.startswith("https:")
        tls = [urllib.request.HTTPSHandler(context=_tls())] if is_secure else []
        self._opener = urllib.request.build_opener(*tls)

    def get(self, path: str, query: Mapping[str, str | int] | None = None) -> Any:
        """Return the JSON answer to `GET api/2.0/mlflow/<path>`."""
        tail = f"?{urllib.parse.urlencode(query)}" if query else ""
        return self._ask("GET", f"{_API}/{path}{tail}")

    def post(self, path: str, data: Mapping[str, Any], *, repeat: bool = False) -> Any:
        """Return the JSON answer to `POST api/2.0/mlflow/<path>`.

        `repeat` sends again when the connection breaks; only for requests that may be done twice.
        """
        return self._ask("POST", f"{_API}/{path}", data, attempts=ATTEMPTS if repeat else 1)

    def send(self, method: str, path: str, data: Mapping[str, Any]) -> Any:
        """Return the JSON answer to another method (PATCH, DELETE), which may be repeated."""
        return self._ask(method, f"{_API}/{path}", data)

    def pages(
        self, path: str, query: Mapping[str, Any], name: str, *, post: bool = False
    ) -> Iterator[Any]:
        """Yield the items called `name` in the answers to a search, page by page."""
        while True:
            answer = self.post(path, query, repeat=True) if post else self.get(path, query)
            yield from answer.get(name, ())
            if not answer.get("next_page_token"):
                return
            query = {**query, "page_token": answer["next_page_token"]}

    def artifact(self, run_id: str, path: str) -> HTTPResponse:
        """Open a run's artifact, wherever the server keeps it; the caller closes it."""
        query = urllib.parse.urlencode({"run_uuid": run_id, "path": path})
        answer: HTTPResponse = self._ask("GET", f"get-artifact?{query}", read=lambda one: one)
        return answer

    def artifact_bytes(self, run_id: str, path: str) -> bytes:
        """Return a small artifact of a run."""
        query = urllib.parse.urlencode({"run_uuid": run_id, "path": path})
        data: bytes = self._ask("GET", f"get-artifact?{query}", read=_read)
        return data

    def _read_json(self, answer: HTTPResponse) -> Any:
        try:
            found = json.loads(_read(answer) or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RegistryError(
                f"{self.address}: did not answer as an MLflow server does; is the address right?"
            )
        return found

    def _ask(
        self,
        method: str,
        path: str,
        data: Any = None,
        *,
        attempts: int = ATTEMPTS,
        read: Callable[[HTTPResponse], Any] | None = None,
    ) -> Any:
        """Send a request and read the answer, as JSON if there is no `read`.

        Try again after a broken connection, an answer cut off anywhere in its body, one that is not
        JSON, and an error of the server's own.
        """
        body = None if data is None else json.dumps(data).encode()
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        request = urllib.request.Request(
            f"{self.address}/{path}", data=body, headers=headers, method=method
        )
        for attempt in range(1, attempts + 1):
            try:
                try:
                    answer = self._opener.open(request, None, self._seconds)
                except urllib.error.HTTPError as error:
                    with error:
                        raise _refusal(self.address, error) from None
                return (read or self._read_json)(answer)
            except RestError as error:
                failure: RegistryError = error
                if error.status < 500:
                    raise
            except RegistryError as error:
                failure = error
            except (OSError, HTTPException) as error:
                why = getattr(error, "reason", None) or error
                failure = UnreachedError(
                    f"{self.address}: cannot be reached ({why}); does the server run there?"
                )
            if attempt < attempts:
                time.sleep(0.3 * attempt)
        raise failure from None


def _read(answer: HTTPResponse) -> bytes:
    with answer:
        return answer.read()


def _login(address: Address) -> dict[str, str]:
    """Return the header of the address's own login, else of the one that MLflow would use."""
    name, word = address.login
    if not (name and word):
        stored, file = configparser.ConfigParser(), Path("~/.mlflow/credentials").expanduser()
        try:
            stored.read(file, encoding="utf-8")
            name, word = (
                os.environ.get(variable.upper(), "") or stored.get("mlflow", variable, fallback="")
                for variable in ("mlflow_tracking_username", "mlflow_tracking_password")
            )
        except (configparser.Error, UnicodeDecodeError):
            raise RegistryError(f"{file}: not of MLflow's form, [mlflow] and two lines") from None
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if name and word:
        pair = base64.b64encode(f"{name}:{word}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _refusal(address: str, error: urllib.error.HTTPError) -> RestError:
    """Return MLflow's own error, if the answer has one."""
    body = error.read()
    try:
        answer = json.loads(body)
        code, text = str(answer["error_code"]), str(answer["message"])
    except (ValueError, KeyError, TypeError):
        code, text = f"HTTP_{error.code}", f"HTTP {error.code} {error.reason}"
    if error.code in (401, 403):
        why = "no login, or a wrong one" if error.code == 401 else "this login may not do that"
        return RestError(f"{address}: {why} (HTTP {error.code}); {LOGIN}", code, error.code)
    kind = AbsentError if code == "RESOURCE_DOES_NOT_EXIST" else RestError
    return kind(f"{address}: {' '.join(text.split())[:300]}", code, error.code)


# --- addresses of MLflow's pages


def list_page(server: str, experiment: str, view: str) -> str:
    """Return the page that lists an experiment's runs, in a shared view of its columns.

    Without such an experiment it is the start page; without such a view the columns are MLflow's.
    RegistryError if the server does not answer, or refuses.
    """
    try:
        answer = RestClient(server).get("experiments/get-by-name", {"experiment_name": experiment})
    except AbsentError:
        return server
    found = answer["experiment"]
    tags = {tag["key"] for tag in found.get("tags", ())}
    shared = {"viewStateShareKey": view} if f"mlflow.sharedViewState.{view}" in tags else {}
    return f"{server}/#/experiments/{found['experiment_id']}/runs?{_tail(**shared)}"


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
