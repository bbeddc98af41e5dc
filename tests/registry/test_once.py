"""The decision for every state that a key can be in: real records, real claims, real processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.registry import once
from runkey.registry.claims import Claim, Claims, FileClaims, newest, open_claims
from runkey.registry.library import NotStoredError, ServerLibrary, open_library
from runkey.registry.once import Decision, Rhythm
from runkey.registry.rest import RestError
from runkey.tracking.store import free_port
from tests.support.claims import FAST, KEY, a_claim, owner_of
from tests.support.odd_server import OddAnswer, OddServer, body
from tests.support.records import make_run


@pytest.fixture
def decide(tmp_path: Path, claims: FileClaims, said: list[str]) -> Any:
    library = open_library("sqlite:///", tmp_path / ".runkey")

    def ask(**changes: Any) -> Decision:
        given = {"claims": claims, "rhythm": FAST} | changes
        return once.decide(library, given.pop("claims"), KEY, **given)

    return ask


def test_a_key_without_a_run_is_trained_here(decide: Any, claims: FileClaims) -> None:
    decision = decide()
    assert decision.line.endswith("no run of this key: trained here")
    assert (decision.record, decision.superseded) == (None, ())
    with decision.claim as held:
        held.set_run("ab")
        assert newest(claims, KEY) == held.claim
        held.finish("ab")


def test_a_finished_run_is_reused_and_no_claim_is_made(
    decide: Any, claims: FileClaims, tmp_path: Path
) -> None:
    run = make_run(tmp_path, KEY)
    decision = decide()
    assert decision.record == run
    assert decision.claim is None
    assert decision.line.endswith(f"finished run {run.run.run_id[:8]} of here is reused")
    assert claims.all() == []


@pytest.mark.parametrize("unfit", [{"status": "FAILED"}, {"with_details": False}])
def test_a_run_that_is_not_whole_is_not_reused(
    decide: Any, tmp_path: Path, unfit: dict[str, Any]
) -> None:
    make_run(tmp_path, KEY, **unfit)
    assert decide().claim


def test_the_oldest_whole_run_that_repeats_no_other_is_reused(decide: Any, tmp_path: Path) -> None:
    make_run(tmp_path, KEY, "a" * 32, started_ms=1, tags={"key": KEY, "reproduction_of": "c" * 32})
    make_run(tmp_path, KEY, "b" * 32, started_ms=2, status="KILLED")
    make_run(tmp_path, KEY, "c" * 32, started_ms=3)
    make_run(tmp_path, KEY, "d" * 32, started_ms=4)
    assert decide().record.run.run_id == "c" * 32
    assert decide(not_this={"c" * 32}).record.run.run_id == "d" * 32
    assert decide(not_this={"c" * 32, "d" * 32}).record.run.run_id == "a" * 32


def test_a_damaged_run_is_trained_again_once(
    decide: Any, claims: FileClaims, tmp_path: Path
) -> None:
    run = make_run(tmp_path, KEY).run.run_id
    claims.make(a_claim(state="finished", run_id=run))
    decision = decide(not_this={run})
    assert decision.claim.claim.generation == 2
    assert f"run {run[:8]} of " in decision.line
    assert decision.line.endswith("not there, or damaged: trained here as generation 2")
    with pytest.raises(RegistryError, match="trains it since"):
        decide(not_this={run}, wait=False)


def test_another_store_is_asked_second(decide: Any, tmp_path: Path) -> None:
    team = open_library("sqlite:///", tmp_path / "team" / ".runkey")
    theirs = make_run(tmp_path / "team", KEY, "e" * 32, host="far")
    decision = decide(elsewhere=[team])
    assert (decision.record, decision.library) == (theirs, team)
    assert f"of far ({team.place}) is reused" in decision.line
    ours = make_run(tmp_path, KEY)
    assert decide(elsewhere=[team]).record == ours


def test_without_reuse_nothing_is_looked_at(
    decide: Any, claims: FileClaims, tmp_path: Path
) -> None:
    make_run(tmp_path, KEY)
    decision = decide(reuse=False)
    assert (decision.record, decision.claim) == (None, None)
    assert "runtime.reuse is false" in decision.line
    assert claims.all() == []


def test_a_training_that_lives_is_refused_or_waited_for(
    decide: Any, claims: FileClaims, other: subprocess.Popen[str], tmp_path: Path, said: list[str]
) -> None:
    theirs = a_claim(owner=owner_of(other))
    claims.make(theirs)
    with pytest.raises(RegistryError, match=f"{theirs.who} trains it since .*runtime.wait"):
        decide(wait=False)

    def finish() -> None:
        time.sleep(0.3)
        make_run(tmp_path, KEY)
        claims.update(replace(theirs, state="finished"))

    helper = threading.Thread(target=finish)
    helper.start()
    decision = decide()
    helper.join()
    assert decision.record
    assert decision.line.endswith("is reused, after 0 s of waiting")
    assert [line for line in said if "waiting for its result" in line] == said
    assert len(said) == 1


def test_a_killed_owner_is_followed_at_once(
    decide: Any, claims: FileClaims, other: subprocess.Popen[str]
) -> None:
    claims.make(a_claim(owner=owner_of(other), run_id="f" * 32))
    other.kill()
    begin = time.monotonic()
    decision = decide(rhythm=replace(FAST, dead_after=3600))
    assert time.monotonic() - begin < 5
    assert decision.claim.claim.generation == 2
    assert "was dead (process gone): taken over as generation 2" in decision.line
    assert decision.superseded == ("f" * 32,)


def test_an_unseen_owner_is_followed_when_its_beat_stands_still(
    decide: Any, claims: FileClaims, said: list[str]
) -> None:
    begin = time.monotonic()
    claims.make(unseen_claim())
    decision = decide()
    assert time.monotonic() - begin > FAST.dead_after
    assert "claim of far:7 was dead (no sign of life for 1 s)" in decision.line
    assert len(said) == 1


def unseen_claim() -> Claim:
    """The claim of a process on another machine."""
    claim = a_claim()
    assert claim.owner
    return replace(claim, owner=replace(claim.owner, host="far", pid=7, boot="another"))


def test_the_time_of_a_dead_owner_began_with_its_last_beat(
    decide: Any, claims: FileClaims, said: list[str]
) -> None:
    """By the clock of the file system: who comes later waits for one more beat, and no minute."""
    claims.make(unseen_claim())
    path = Path(claims.place, f"{KEY}.g1.json")
    os.utime(path, (path.stat().st_mtime - 7200, path.stat().st_mtime - 7200))
    decision = decide(rhythm=replace(FAST, dead_after=3600))
    assert "claim of far:7 was dead (no sign of life for 7200 s)" in decision.line


def test_an_owner_that_beats_again_after_a_stop_of_all_is_alive(
    decide: Any, claims: FileClaims, said: list[str]
) -> None:
    """Server, owner and watcher stood still for hours, and go on."""
    theirs = unseen_claim()
    claims.make(theirs)
    path = Path(claims.place, f"{KEY}.g1.json")
    os.utime(path, (path.stat().st_mtime - 7200, path.stat().st_mtime - 7200))
    looked = threading.Event()

    class Watched(FileClaims):
        def newest(self, key: str, first: int = 1) -> Claim | None:
            looked.set()
            return super().newest(key, first)

    def live() -> None:
        looked.wait()
        claims.update(replace(theirs, beat=1))
        time.sleep(1)
        claims.update(replace(theirs, state="failed"))

    owner = threading.Thread(target=live)
    owner.start()
    rhythm = Rhythm(beat_seconds=2, dead_after=3600, poll_seconds=0.02)
    decision = decide(claims=Watched(Path(claims.place)), rhythm=rhythm)
    owner.join()
    assert decision.line.endswith("training by far:7 failed: trained here as generation 2")


def test_a_torn_claim_is_followed_when_time_is_up(
    decide: Any, claims: FileClaims, said: list[str]
) -> None:
    claims.make(a_claim())
    Path(claims.place, f"{KEY}.g1.json").write_text('{"key":', encoding="utf-8")
    assert "claim of an unknown process was dead (no sign of life" in decide().line
    damaged, waits = said  # once each, however often the claim was read
    assert "g1.json: not JSON" in damaged
    assert "waiting for a sign of life for 1 s (Ctrl-C leaves)" in waits


def test_a_failed_training_is_followed_and_leaves_no_run_to_end(
    decide: Any, claims: FileClaims
) -> None:
    claims.make(a_claim(state="failed", run_id="f" * 32))
    decision = decide()
    assert decision.line.endswith("failed: trained here as generation 2")
    assert decision.superseded == ()


def test_runs_of_all_dead_owners_are_told(
    decide: Any, claims: FileClaims, other: subprocess.Popen[str]
) -> None:
    other_owner = owner_of(other)
    other.kill()
    for generation, state, run in ((1, "running", "a"), (2, "failed", "b"), (3, "running", "c")):
        claims.make(a_claim(generation, owner=other_owner, state=state, run_id=run))
    assert decide().superseded == ("a", "c")


def test_a_dead_owner_that_had_recorded_its_run_is_reused(
    decide: Any, claims: FileClaims, other: subprocess.Popen[str], tmp_path: Path
) -> None:
    claims.make(a_claim(owner=owner_of(other)))
    other.kill()
    make_run(tmp_path, KEY)
    assert decide().record
    assert len(claims.all()) == 1


class SlowClaims(FileClaims):
    """Lets something happen between the last look and the making of a claim."""

    def __init__(self, folder: Path, between: Any) -> None:
        super().__init__(folder)
        self.between = between

    def make(self, claim: Claim) -> bool:
        self.between(claim)
        return super().make(claim)


def test_a_run_finished_just_before_the_claim_is_reused(
    decide: Any, claims: FileClaims, tmp_path: Path
) -> None:
    slow = SlowClaims(Path(claims.place), lambda claim: make_run(tmp_path, KEY))
    decision = decide(claims=slow)
    assert decision.record
    assert decision.claim is None
    assert [(c.state, c.run_id) for c in claims.all()] == [("finished", decision.record.run.run_id)]


def test_a_generation_that_others_left_behind_is_not_held(
    decide: Any, claims: FileClaims, tmp_path: Path
) -> None:
    """Stopped before it made generation 1; meanwhile 1 and 2 came, and 1 was cleared away."""

    def meanwhile(claim: Claim) -> None:
        if claim.generation == 1:
            claims.make(a_claim(2, state="failed"))

    slow = SlowClaims(Path(claims.place), meanwhile)
    assert decide(claims=slow).claim.claim.generation == 3


def unreachable(tmp_path: Path) -> Claims:
    return open_claims(f"http://127.0.0.1:{free_port()}", tmp_path)


def test_training_does_not_depend_on_a_server(decide: Any, tmp_path: Path, said: list[str]) -> None:
    decision = decide(claims=unreachable(tmp_path))
    assert (decision.record, decision.claim) == (None, None)
    assert "cannot be reached" in decision.line
    assert decision.line.endswith("trained here without a claim")
    away = open_library(f"http://127.0.0.1:{free_port()}", tmp_path)
    assert decide(elsewhere=[away]).claim
    assert len(said) >= 1
    assert f"not looked up in {away.place}" in said[-1]


def test_a_claim_that_is_required_is_one_line(decide: Any, tmp_path: Path, said: list[str]) -> None:
    claims = unreachable(tmp_path)
    with pytest.raises(RegistryError) as caught:
        decide(claims=claims, require=True)
    assert str(caught.value).startswith(f"{claims.place}: cannot be reached")
    assert "MLFLOW_TRACKING_URI or runtime.team_server names it" in str(caught.value)
    assert str(caught.value).endswith(
        "not trained without a claim (runtime.require_claim: false does so)"
    )
    assert said == []


def test_claims_in_files_need_no_server(decide: Any, tmp_path: Path, said: list[str]) -> None:
    away = open_library(f"http://127.0.0.1:{free_port()}", tmp_path)
    assert decide(elsewhere=[away], require=True).claim


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "500 Oops"])
def test_a_server_that_refuses_to_look_ends_it(decide: Any, tmp_path: Path, status: str) -> None:
    with OddServer(OddAnswer("refuses", body("", status=status))) as server:
        team = open_library(server.address, tmp_path)
        with pytest.raises(RegistryError, match=f"HTTP {status[:3]}.*runtime.require_claim"):
            decide(elsewhere=[team], require=True)
        assert decide(elsewhere=[team]).claim


def test_what_may_not_be_written_is_no_claim(decide: Any, claims: FileClaims) -> None:
    def refuse() -> None:
        raise RestError("there: this login may not do that", "PERMISSION_DENIED", 403)

    with pytest.raises(RestError, match="may not"):
        decide(before_claim=refuse, reuse=False)
    assert "without a claim" in decide(before_claim=refuse).line
    assert claims.all() == []


class Interrupted(FileClaims):
    """Cannot be reached for some looks after the first."""

    def __init__(self, folder: Path, looks: int) -> None:
        super().__init__(folder)
        self.looks, self.done = looks, 0

    def of(self, key: str) -> list[Claim]:
        self.done += 1
        if 2 <= self.done <= 1 + self.looks:
            raise RegistryError("cannot be reached")
        return super().of(key)


def test_who_waits_outlasts_a_server_that_is_started_again(
    decide: Any, claims: FileClaims, other: subprocess.Popen[str]
) -> None:
    claims.make(a_claim(owner=owner_of(other)))
    folder = Path(claims.place)
    threading.Timer(0.2, other.kill).start()
    assert decide(claims=Interrupted(folder, 5)).claim.claim.generation == 2


def test_who_waits_does_not_outlast_a_server_that_is_gone(
    decide: Any, claims: FileClaims, other: subprocess.Popen[str]
) -> None:
    claims.make(a_claim(owner=owner_of(other)))
    decision = decide(claims=Interrupted(Path(claims.place), 10**9))
    assert decision.claim is None
    assert decision.line.endswith("cannot be reached; trained here without a claim")


@pytest.mark.parametrize(
    ("fails", "path", "kind"),
    [
        ("get-artifact", "dvc.json", NotStoredError),  # not listed: S3 has it not
        ("get-artifact", "run.json", RestError),  # listed
        ("", "dvc.json", RestError),  # S3 is down: it lists nothing
    ],
)
def test_an_error_of_the_store_is_not_an_absent_file(
    tmp_path: Path, fails: str, path: str, kind: type[RegistryError]
) -> None:
    record = make_run(tmp_path, KEY)
    with OddServer(OddAnswer("fails", body("", status="500 Oops"), fails)) as server:
        library = ServerLibrary(server.address, tmp_path)
        with pytest.raises(kind):
            library.open_file(record, path)
