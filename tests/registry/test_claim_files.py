"""Claims as files: made once, whole, and never handed over."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.registry.claims import FileClaims, newest, open_claims, state_now
from tests.support.claims import KEY, a_claim
from tests.support.records import key_of


def test_a_claim_is_read_as_it_was_made_and_updated(claims: FileClaims) -> None:
    assert newest(claims, KEY) is None
    claim = a_claim()
    assert claims.make(claim)
    assert claims.of(KEY) == [claim]
    after = replace(claim, state="finished", run_id="ab", beat=3)
    assert claims.update(after)
    assert claims.of(KEY) == claims.all() == [after]
    assert after.is_same(claim)


def test_a_generation_is_made_once(claims: FileClaims) -> None:
    first = a_claim()
    assert claims.make(first)
    assert not claims.make(a_claim())
    assert claims.make(a_claim(2))
    assert claims.make(a_claim(10))
    assert claims.make(a_claim(key=key_of("another")))
    assert [claim.generation for claim in claims.of(KEY)] == [1, 2, 10]
    assert claims.of(KEY)[0] == first
    assert len(claims.all()) == 4


def test_of_many_threads_one_makes_each_generation(claims: FileClaims) -> None:
    wins: list[int] = []
    start = threading.Barrier(8)

    def race() -> None:
        for generation in range(1, 21):
            start.wait()
            if claims.make(a_claim(generation)):
                wins.append(generation)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(1, 21))
    assert not [path for path in Path(claims.place).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("torn", ["", '{"key": "rk2-', "[]", '{"owner": {"host": 1}}', "\x00" * 40])
def test_a_torn_file_is_a_claim_of_nobody_that_only_time_ends(
    claims: FileClaims, torn: str
) -> None:
    whole = a_claim()
    claims.make(whole)
    Path(claims.place, f"{whole.name}.json").write_text(torn, encoding="utf-8")
    found = newest(claims, KEY)
    assert found
    assert (found.generation, found.owner, found.state) == (1, None, "running")
    assert found.who == "an unknown process"
    assert found.line == "its claim cannot be read, so a process may train it"
    assert state_now(found) == "silent"
    assert not claims.make(a_claim())
    assert claims.make(a_claim(2))


def test_a_file_that_says_something_else_than_its_name_counts_by_its_name(
    claims: FileClaims,
) -> None:
    claims.make(a_claim())
    folder = Path(claims.place)
    Path(folder, f"{KEY}.g1.json").rename(folder / f"{KEY}.g3.json")
    assert [claim.generation for claim in claims.of(KEY)] == [3]
    for strange in ("notes.json", f"{KEY}.g0.json", f"{KEY}.gx.json", "rk2-abc.g1.json"):
        (folder / strange).write_text("{}", encoding="utf-8")
    assert [claim.name for claim in claims.all()] == [f"{KEY}.g3"]


def test_the_newest_generation_stays(claims: FileClaims) -> None:
    first, second = a_claim(), a_claim(2)
    claims.make(first)
    with pytest.raises(RegistryError, match="newest claim of its key stays"):
        claims.remove(first)
    claims.make(second)
    claims.remove(first)
    assert claims.all() == [second]
    assert not claims.update(replace(first, beat=1))
    with pytest.raises(RegistryError, match="newest claim of its key stays"):
        claims.remove(second)


def test_what_one_look_tells(claims: FileClaims) -> None:
    running = a_claim()
    assert running.owner
    gone = replace(running.owner, started=running.owner.started - 1)
    assert state_now(running) == "running"
    assert state_now(replace(running, owner=gone)) == "dead"
    assert state_now(replace(running, owner=replace(gone, boot="another"))) == "silent"
    assert state_now(replace(running, owner=gone, state="finished")) == "finished"
    assert state_now(replace(running, state="failed")) == "failed"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".runkey").mkdir()
    (tmp_path / ".runkey" / "claims").write_text("not a folder", encoding="utf-8")
    claims = open_claims(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / ".runkey")
    with pytest.raises(RegistryError, match="claims"):
        claims.make(a_claim())


def test_an_owner_of_another_version_still_shows_its_heartbeat(claims: FileClaims) -> None:
    claim = replace(a_claim(), run_id="ab", beat=7)
    assert claims.make(claim)
    (file,) = Path(claims.place).iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"owner": content["owner"] | {"more": 1}}))
    assert claims.of(KEY) == [replace(claim, owner=None)]
