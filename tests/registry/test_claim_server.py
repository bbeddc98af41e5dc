"""Claims on a real MLflow server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims import server
from runkey.errors import RegistryError
from runkey.registry.claims import ServerClaims, newest, open_claims
from runkey.registry.rest import RestClient
from tests.support.claims import a_claim
from tests.support.records import key_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestClient]:
    with server(tmp_path_factory.mktemp("server")) as address:
        yield RestClient(address)


@pytest.fixture
def claims(client: RestClient) -> ServerClaims:
    return ServerClaims(client)


def test_a_claim_is_read_as_it_was_made_and_updated(
    claims: ServerClaims, client: RestClient
) -> None:
    key = key_of("read")
    claim = a_claim(key=key)
    assert newest(claims, key) is None
    assert claims.make(claim)
    assert claims.of(key) == [claim]
    after = replace(claim, state="finished", run_id="ab", beat=3)
    assert claims.update(after)
    fresh = open_claims(client.address, Path("unused"))
    assert fresh.of(key) == [after]
    model = client.get("registered-models/get", {"name": key})["registered_model"]
    assert claim.who in model["description"]


def test_a_generation_is_made_once_and_a_lost_answer_is_recognised(claims: ServerClaims) -> None:
    key = key_of("once")
    first = a_claim(key=key)
    assert claims.make(first)
    assert not claims.make(a_claim(key=key))
    assert claims.make(first)  # sent again: the name is there, and the nonce is ours
    assert claims.make(a_claim(10, key=key))
    assert claims.make(a_claim(2, key=key))
    assert [claim.generation for claim in claims.of(key)] == [1, 2, 10]


def test_of_many_threads_one_makes_each_generation(client: RestClient) -> None:
    key, wins, start = key_of("race"), list[int](), threading.Barrier(8)

    def race() -> None:
        claims = ServerClaims(client)
        for generation in range(1, 6):
            start.wait()
            if claims.make(a_claim(generation, key=key)):
                wins.append(generation)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [1, 2, 3, 4, 5]


def test_the_newest_generation_stays_and_what_others_keep_there_too(
    claims: ServerClaims, client: RestClient
) -> None:
    key = key_of("remove")
    first, second, third = (a_claim(number, key=key) for number in (1, 2, 3))
    claims.make(first)
    with pytest.raises(RegistryError, match="newest claim of its key stays"):
        claims.remove(first)
    claims.make(second)
    claims.make(third)
    content = {"name": second.name, "source": "runs:/nothing"}
    client.post("model-versions/create", content | {"source": "mlflow-artifacts:/1/x/artifacts"})
    claims.remove(first)
    with pytest.raises(RegistryError, match="somebody keeps model versions"):
        claims.remove(second)
    assert claims.of(key) == [second, third]
    assert not claims.update(replace(first, beat=1))


def test_a_model_that_somebody_named_like_a_key_is_a_claim_of_nobody(
    claims: ServerClaims, client: RestClient
) -> None:
    key = key_of("somebody's")
    client.post("registered-models/create", {"name": key})
    client.post("registered-models/create", {"name": f"{key}-notes"})
    found = newest(claims, key)
    assert found
    assert (found.owner, found.state, found.generation) == (None, "running", 1)
    assert not claims.make(a_claim(key=key))
    assert key in {claim.key for claim in claims.all()}
