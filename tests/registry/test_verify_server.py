"""The same run asked of a real MLflow server over REST."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runkey.registry.library import open_library, run_reader
from runkey.registry.rest import RestClient
from runkey.registry.verify import Report, Sources, verify_run
from runkey.tracking.store import (
    free_port,
    locate_store,
    open_client,
    start_server,
    stop_server,
    wait_until_healthy,
)
from tests.support.recorded_checkout import Checkout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def address(checkout: Checkout) -> Iterator[str]:
    store, port = locate_store(checkout.root), free_port()
    open_client(store)  # the copied database names the original's folders
    server = start_server(store, port)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, server)
        yield address
    finally:
        stop_server(server)


def verify(checkout: Checkout, address: str) -> Report:
    library = open_library(address, checkout.root / ".runkey")
    (found,) = library.matching(checkout.record.key)
    record = library.with_details(found)
    assert record.details
    sources = Sources(
        library=library,
        stored=run_reader(address),
        root=checkout.root,
        is_shared=True,
    )
    return verify_run(record, sources)


def test_a_run_of_a_server(checkout: Checkout, address: str) -> None:
    report = verify(checkout, address)
    assert report.is_right, report.findings
    assert {f.state for f in report.findings} == {"ok"}

    (checkout.artifacts / "model/weights.pt").write_bytes(b"damaged")
    (checkout.artifacts / "params.yaml").unlink()
    texts = [f.text for f in verify(checkout, address).of("fault")]
    assert [text.split(":")[0] for text in texts] == ["model/weights.pt", "params.yaml"]

    record = checkout.record
    RestClient(address).post("runs/delete", {"run_id": record.run.run_id})
    sources = Sources(
        library=open_library(address, checkout.root / ".runkey"),
        stored=run_reader(address),
        root=checkout.root,
        is_shared=True,
        quick=True,
    )
    report = verify_run(record, sources)
    assert "is not in MLflow" in next(f.text for f in report.of("fault") if f.check == "mlflow")


def test_a_server_that_is_gone_is_one_line(checkout: Checkout) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    sources = Sources(
        library=open_library(locate_store(checkout.root).uri, checkout.root / ".runkey"),
        stored=run_reader(address),
        root=checkout.root,
        is_shared=True,
    )
    (fault,) = verify_run(checkout.record, sources).of("fault")
    assert fault.check == "mlflow"
    assert "cannot be reached" in fault.text
