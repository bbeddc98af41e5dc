"""A held claim: kept alive, given up, lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.progress import movement_watched, note_movement
from runkey.registry.claims import Claim, FileClaims, newest
from runkey.registry.once import HeldClaim, Rhythm
from tests.support.claims import FAST, KEY, a_claim


def held_claim(claims: FileClaims, rhythm: Rhythm = FAST, generation: int = 1) -> HeldClaim:
    claim = a_claim(generation)
    assert claims.make(claim)
    return HeldClaim(claims, claim, rhythm)


def stored(claims: FileClaims) -> Claim:
    found = newest(claims, KEY)
    assert found
    return found


def until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_beat_goes_on_and_the_run_is_told(claims: FileClaims, said: list[str]) -> None:
    with held_claim(claims) as held:
        held.set_run("ab")
        assert stored(claims).run_id == "ab"
        first = stored(claims).beat
        until(lambda: stored(claims).beat > first + 3)
        held.check()
        held.finish()
    assert (stored(claims).state, stored(claims).run_id) == ("finished", "ab")
    beat = stored(claims).beat
    time.sleep(0.2)
    assert stored(claims).beat == beat
    assert said == []


def test_the_beat_stops_while_training_takes_no_step(claims: FileClaims, said: list[str]) -> None:
    with movement_watched(), held_claim(claims, replace(FAST, stuck_after=0.5)) as held:
        until(lambda: any("no step for" in line for line in said))
        beat = stored(claims).beat
        time.sleep(4 * FAST.beat_seconds)
        assert stored(claims).beat == beat
        note_movement()
        until(lambda: stored(claims).beat > beat)
        held.finish()
    assert said[-1].endswith(": training moves, beats again")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_training_that_ends_early_has_failed(
    claims: FileClaims, said: list[str], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        _train_until(error, held_claim(claims))
    assert (stored(claims).state, stored(claims).run_id) == ("failed", "ab")


def test_a_block_left_without_a_result_has_failed(claims: FileClaims, said: list[str]) -> None:
    with held_claim(claims):
        pass
    assert stored(claims).state == "failed"


def test_a_claim_that_was_taken_over_is_lost(claims: FileClaims, said: list[str]) -> None:
    with held_claim(claims) as held:
        held.check()
        other = a_claim(2)
        claims.make(other)
        until(lambda: _is_lost(held))
        with pytest.raises(RegistryError, match=r"took over as generation 2"):
            held.finish("ab")
        held.set_run("cd")
    first, second = claims.of(KEY)
    assert second == other
    assert (first.state, first.run_id) == ("running", None)  # it wrote nothing more


def test_finish_looks_itself(claims: FileClaims, said: list[str]) -> None:
    slow = replace(FAST, beat_seconds=60, dead_after=360)
    with held_claim(claims, slow) as held:
        claims.make(a_claim(2))
        held.check()  # nothing was looked at yet
        with pytest.raises(RegistryError, match="took over"):
            held.finish("ab")


def test_a_claim_deleted_by_hand_is_made_again(claims: FileClaims, said: list[str]) -> None:
    with held_claim(claims) as held:
        path = Path(claims.place, f"{held.claim.name}.json")
        path.unlink()
        until(path.exists)
        held.check()
        held.finish("ab")
    assert stored(claims).state == "finished"


def test_a_claim_deleted_by_hand_and_made_by_another_is_lost(
    claims: FileClaims, said: list[str]
) -> None:
    with held_claim(claims, replace(FAST, beat_seconds=60)) as held:
        Path(claims.place, f"{held.claim.name}.json").unlink()
        claims.make(a_claim())
        with pytest.raises(RegistryError, match="took over as generation 1"):
            held.finish("ab")


def test_claims_that_cannot_be_reached_do_not_stop_a_training(
    claims: FileClaims, said: list[str]
) -> None:
    folder, aside = Path(claims.place), Path(claims.place).with_name("aside")
    with held_claim(claims) as held:
        folder.rename(aside)
        folder.write_text("a file where the folder was", encoding="utf-8")
        until(lambda: said)
        time.sleep(0.3)
        held.check()
        assert len(said) == 1
        assert "training goes on" in said[0]
        folder.unlink()
        aside.rename(folder)
        until(lambda: len(said) == 2)
        assert said[1].endswith("kept again")
        held.finish("ab")
    assert stored(claims).state == "finished"


def _is_lost(held: HeldClaim) -> bool:
    try:
        held.check()
    except RegistryError:
        return True
    return False


def _train_until(error: type[BaseException], held: HeldClaim) -> None:
    with held:
        held.set_run("ab")
        raise error
