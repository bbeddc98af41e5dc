"""A search by Optuna's TPE, whose points and results are in the record of the sweep.

A proposal is a function of the points before it, their states then, its number and the seed; so a
search that is started again goes on from its record, without a database of Optuna's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runkey.errors import LockError
from runkey.sweep.driver import Entry
from runkey.sweep.space import Choices, Point, Range, Space, rounded

_STARTUP = 5
"""Points that are drawn at random before the others are proposed, and before any is pruned."""


class TpeSearch:
    """Points that Optuna proposes by the AP of those before them (higher is better)."""

    def __init__(
        self, space: Space, count: int, seed: int, begun: Sequence[Point], root: Path
    ) -> None:
        """Args: begun: points that an earlier process proposed.  root: of the checkout."""
        self.count = count
        self._space, self._seed, self._begun = space, seed, begun
        self._optuna = _import_optuna(root)
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)

    def propose(self, entries: Sequence[Entry]) -> Point | None:
        """See `runkey.sweep.driver.Source`."""
        number = len(entries)
        if number >= self.count:
            return None
        if number < len(self._begun):
            return self._begun[number]
        sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=_STARTUP,
            seed=self._seed + number,
            multivariate=True,
            constant_liar=True,  # what runs counts as bad, so that no two run side by side
        )
        asked = self._study(entries, sampler).ask(self._distributions())
        return {name: self._value(name, value) for name, value in asked.params.items()}

    def is_hopeless(self, entry: Entry, entries: Sequence[Entry]) -> bool:
        """Return True if its best val AP is below the median of the others' at the same epoch."""
        curves = [one.curve for one in entries if one is not entry and one.is_over and one.curve]
        if len(curves) < _STARTUP or not entry.curve:
            return False
        epoch = max(entry.curve)
        best = sorted(
            max(score for at, score in curve.items() if at <= epoch)
            for curve in curves
            if min(curve) <= epoch
        )
        return bool(best) and max(entry.curve.values()) < best[len(best) // 2]

    def _study(self, entries: Sequence[Entry], sampler: Any) -> Any:
        """Return a study in memory that holds the points so far."""
        states, trial = self._optuna.trial.TrialState, self._optuna.trial.create_trial
        study = self._optuna.create_study(direction="maximize", sampler=sampler)
        for one in entries:
            score = one.ap if one.ap is not None else one.val_ap
            state = states.RUNNING
            if one.is_over:
                # An ended one is judged by its last evaluation; a failed one says nothing.
                state = states.FAIL if score is None else states.COMPLETE
            study.add_trial(
                trial(
                    state=state,
                    value=score if state == states.COMPLETE else None,
                    params=one.point,
                    distributions=self._distributions(),
                )
            )
        return study

    def _distributions(self) -> dict[str, Any]:
        return {name: self._distribution(one) for name, one in self._space.items()}

    def _distribution(self, allowed: Choices | Range) -> Any:
        kinds = self._optuna.distributions
        if isinstance(allowed, Choices):
            return kinds.CategoricalDistribution(allowed.values)
        if allowed.kind == "int":
            return kinds.IntDistribution(int(allowed.low), int(allowed.high))
        return kinds.FloatDistribution(allowed.low, allowed.high, log=allowed.kind == "log")

    def _value(self, name: str, value: Any) -> Any:
        allowed = self._space[name]
        if isinstance(allowed, Choices) or allowed.kind == "int":
            return value
        return min(max(rounded(value), allowed.low), allowed.high)


def _import_optuna(root: Path) -> Any:
    """Return Optuna, from .venv-search if this environment has none; its folder goes last."""
    folders = map(str, root.glob(".venv-search/lib/python3*/site-packages"))
    path = sys.path
    try:
        sys.path = [*path, *folders]
        import optuna
    except ImportError:
        text = "`runkey sweep --tpe` needs Optuna, which is not installed; run `make env-search`"
        raise LockError(text) from None
    finally:
        sys.path = path
    return optuna
