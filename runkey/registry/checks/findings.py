"""What `runkey verify` finds: one finding a check, or one a thing that is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """files, key, mlflow, snapshot, dvc cache or environment."""
    state: State
    """A warning is worth knowing and no fault: the run is what it says it is."""
    text: str
    """Names the file and the run where something is wrong."""
    way_out: str = ""
    """A command, or what to do."""


@dataclass(frozen=True)
class Report:
    """All findings about one run."""

    label: str
    """The short key."""
    run_id: str
    """MLflow's."""
    name: str
    status: str
    """MLflow's; only a FINISHED run has anything to verify."""
    findings: tuple[Finding, ...]

    def of(self, state: State) -> list[Finding]:
        """The findings of one state."""
        return [finding for finding in self.findings if finding.state == state]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.of("fault")

    @property
    def summary(self) -> str:
        """Such as `2 faults, 1 warning`."""
        return counted(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"right": self.is_right, "summary": self.summary, **asdict(self)}


def counted(findings: Iterable[Finding]) -> str:
    """How many faults and warnings there are, in words."""
    states = [finding.state for finding in findings]
    faults, warnings = states.count("fault"), states.count("warning")
    told = f"{faults or 'no'} fault{'' if faults == 1 else 's'}"
    return f"{told}, {warnings} warning{'' if warnings == 1 else 's'}" if warnings else told


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
