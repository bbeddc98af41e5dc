"""Where things lie.  No other file resolves a path against the current folder.

Two roots, which differ only inside `dvc exp run --temp|--queue`: the *workspace* is the folder that
a stage runs in (its inputs and outputs), the *store root* is the main checkout, which outlives it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

from runkey.errors import RunkeyError
from runkey.hashing import sha256_bytes

PARAMS = Path("params.yaml")
LOCK = Path("conda-lock.yml")
REQUIREMENTS = Path("requirements.txt")
INITIAL_WEIGHTS = Path(".initial_weights")
"""Links to weights that parameters name, the output of the stage `check`."""
PREPARED = Path("prepared")
MEMORY = Path("memory")
MODEL = Path("model")
RUN_JSON = Path("run.json")
LOGS = Path("logs")
TRAIN_LOG = LOGS / "train.jsonl"
"""In the folder of a training, and in a run, by the same name."""
EVALUATION = Path("evaluation")
METRICS = Path("metrics")
PLOTS = Path("plots")
HOME = Path(".runkey")
"""Beside the store: records, claims, checkpoints, decoded images, work of `runkey reproduce`."""
DECODED = "decoded"
"""In `HOME`, see `runkey.data.cache`."""
DATABASE = "mlflow.db"
SQLITE = "sqlite:///"
STATE_FOLDERS = (".dvc", ".git", "mlartifacts", "mlruns", HOME.as_posix())
"""In which DVC, git, MLflow and runkey keep their own files."""


LOGIN = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), or write"
    " ~/.mlflow/credentials"
)
"""Where a login belongs, for messages."""
_QUERY_LOGIN = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token)[^=&]*=)[^&#]*", re.IGNORECASE)


class Address(str):
    """Address of a store or server, which prints, compares and is stored without its login.

    Only what connects uses `full`, so that no other code can show a password.
    """

    full: str
    """With the login, percent-encoded."""
    login: tuple[str, str]
    """User and password; empty where there is none."""
    hides: bool
    """Whether there is a login, or a password or token behind a `?`."""

    def __new__(cls, text: str) -> Self:
        """Args: text: a URL or SQLAlchemy address; of a server's, a `/` at the end is dropped."""
        if isinstance(text, cls):
            return text
        if is_server(text):
            text = text.rstrip("/")
        scheme, mark, rest = text.partition("://")
        host = _host(rest)
        address = super().__new__(cls, _QUERY_LOGIN.sub(r"\1...", f"{scheme}{mark}{host}"))
        user, colon, word = rest.removesuffix(host).removesuffix("@").partition(":")
        address.login = unquote(user), unquote(word)
        address.hides = any(address.login) or bool(_QUERY_LOGIN.search(host))
        login = colon.join(quote(part, safe="") for part in address.login)
        address.full = f"{scheme}{mark}{login}@{host}" if login else text
        return address


def _host(rest: str) -> str:
    """What follows the login in an address, whose password may hold a `/` that is not encoded."""
    before, at, _ = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")
    port = re.match(r"[^/?#@\[]*:([^/?#@]*)", rest)
    if ":" in before or (port and not port[1].isdecimal()):
        return rest.rpartition("@")[2]
    return rest.removeprefix(f"{before}{at}")


def is_server(address: str) -> bool:
    """Return True if a store's address is that of a tracking server."""
    return address.startswith(("http://", "https://"))


def home_of(root: Path) -> Path:
    """Return `HOME` of the store in use: beside a sqlite file that `MLFLOW_TRACKING_URI` names.

    `root` is the main checkout.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    beside = (root / uri.removeprefix(SQLITE)).parent if uri.startswith(SQLITE) else root
    return beside / HOME


def records(home: Path, uri: str = "") -> Path:
    """Return the cache of a store's runs, see `runkey.identity.record_cache`.

    Beside a local store (`home`) there is one; each server has its own, whatever the login.
    """
    if not is_server(uri):
        return home / "runs.sqlite"
    return home / f"runs-{sha256_bytes(Address(uri).encode())[:12]}.sqlite"


def workspace(start: Path | None = None) -> Path:
    """Return the nearest folder at or above `start` (the current one) with params.yaml and stages/.

    Raises:
        RunkeyError: there is none.
    """
    first = (start or Path.cwd()).resolve()
    for folder in (first, *first.parents):
        if (folder / PARAMS).is_file() and (folder / "stages").is_dir():
            return folder
    raise RunkeyError(
        f"no folder with params.yaml and stages/ at or above {first}; change to a folder of the"
        " repository"
    )


def store_root(root: Path | None = None) -> Path:
    """The main checkout: `DVC_ROOT` where DVC set it, so that runs from temporary folders last.

    Elsewhere it is the workspace `root`, which is looked for if it is not known.
    """
    from_dvc = os.environ.get("DVC_ROOT")
    return Path(from_dvc).resolve() if from_dvc else root or workspace()
