"""Limits on what a server may answer MLflow's own client, which has one for a single read only."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from mlflow.utils import request_utils
from requests import PreparedRequest, Response
from requests.exceptions import ContentDecodingError, RequestException
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import TimeoutError as SlowError

from runkey.http_limits import LimitedConnection

_TOKEN = re.compile(r"[?&]page_token=[^&]*")
_MOST_PAGES = 1000


def limit_answers() -> None:
    """Make MLflow's client open its connections so; before it opens the first one."""
    module: Any = request_utils
    module.TCPKeepAliveHTTPAdapter, module.Retry = _Adapter, _Retry


class _Http(LimitedConnection, HTTPConnection):
    pass


class _Https(LimitedConnection, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _Retry(Retry):
    """MLflow's retries, but for answers that were too slow: they would be so again."""

    def increment(self, *args: Any, **options: Any) -> Any:
        if isinstance(error := options.get("error"), SlowError):
            raise error
        return super().increment(*args, **options)


class _Adapter(request_utils.TCPKeepAliveHTTPAdapter):
    _pages: tuple[str, int] = ("", 0)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)  # type: ignore[no-untyped-call]
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        address = _TOKEN.sub("", request.url or "")
        self._pages = (address, self._pages[1] + 1 if address == self._pages[0] else 1)
        if self._pages[1] > _MOST_PAGES and _TOKEN.search(request.url or ""):
            raise RequestException(f"{urlsplit(address).path}: pages without end")
        # Some kB that are packed can hold gigabytes.
        request.headers["Accept-Encoding"] = "identity"
        response: Response = super().send(request, *args, **options)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise ContentDecodingError("the answer is packed, though that was not asked for")
        return response
