"""The faults that `prepare` finds and what it does about them.

    prepared/report.json   {"passed": ..., "counts": {kind: {policy: n}}, "items": [...], ...}

The report is also written if `prepare` fails. Its bytes depend on the data only.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from runkey.errors import DataError
from runkey.files import write_atomically
from runkey.units import counted

if TYPE_CHECKING:
    from runkey.params import Checks
from runkey.progress import escaped

LINES_PER_KIND = 20
_LONGEST_TEXT = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of one item of the data set."""

    kind: str
    """The check's name in `data.checks`, or "structure" for faults without a policy."""
    policy: str
    """fix, drop or fail."""
    file: str
    """The JSON or the image, as a path from the repository's root."""
    image_id: int | None
    annotation_id: int | None
    what: str
    """The item and its fault."""
    done: str
    """What was done, or what the user can do."""

    @property
    def line(self) -> str:
        """Return one line: file, item, fault, and what was done or can be done."""
        return f"{self.file}: {self.what}; {self.done}"


@dataclass(slots=True)
class Findings:
    """Collects findings under the policies of `data.checks`, and what remains of the data."""

    checks: Checks
    report: str
    """Name of report.json in messages."""
    items: list[Finding] = field(default_factory=list)
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each split, the numbers of images, objects and crowd regions that remain."""
    notes: list[str] = field(default_factory=list)
    """Observations that are no faults, one line each."""

    @property
    def failures(self) -> list[Finding]:
        """Return the faults that the data cannot be used with."""
        return [item for item in self.items if item.policy == "fail"]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of items of each kind and policy, sorted by kind."""
        pairs = Counter((item.kind, item.policy) for item in self.items)
        counts: dict[str, dict[str, int]] = {}
        for (kind, policy), number in sorted(pairs.items()):
            counts.setdefault(kind, {})[policy] = number
        return counts

    def add(
        self,
        kind: str,
        file: str,
        what: str,
        *,
        image_id: int | None = None,
        annotation_id: int | None = None,
        fixed: str = "",
        dropped: str = "left out",
        way_out: str = "",
    ) -> bool:
        """Record a fault.

        `kind` is the name of its check, `file` the JSON or the image, `what` the item and its
        fault; `fixed` and `dropped` say what these policies do, `way_out` what the user can do
        in place of choosing one. A fault without `fixed` has no fix: that policy is `fail` for it.

        Returns:
            True if the item stays, repaired. False under `drop`, and under `fail` too: checking
            continues without the item, so that all faults are known before the data is refused.
        """
        policy: str = getattr(self.checks, kind)
        options = get_args(type(self.checks).model_fields[kind].annotation)
        if not fixed:
            policy = "fail" if policy == "fix" else policy
            options = tuple(option for option in options if option != "fix")
        ways = " or ".join(option for option in options if option != "fail")
        way_out = way_out or f"set data.checks.{kind}: {ways} in params.yaml or mend the file"
        done = {"fix": fixed, "drop": dropped}.get(policy) or way_out
        self.items.append(Finding(kind, policy, file, image_id, annotation_id, what, done))
        return policy == "fix"

    def refuse(self, file: str, what: str, done: str) -> None:
        """Record a fault without a policy: the data set cannot be used with it."""
        self.items.append(Finding("structure", "fail", file, None, None, what, done))

    def stop_if_failed(self) -> None:
        """Raise a DataError that names the first fault with policy `fail`, and the report."""
        if self.failures:
            first, *others = self.failures
            faults = f"{counted(len(others), 'more such fault')}"
            raise DataError(first.line + (f" ({faults} in {self.report})" if others else ""))

    def write(self, path: Path) -> None:
        """Write report.json, one item a line."""
        head = {
            "passed": not self.failures,
            "kept": self.kept,
            "counts": self.counts,
            "notes": self.notes,
        }
        text = json.dumps(head, indent=2, ensure_ascii=False)[:-2]
        items = ",\n".join("    " + json.dumps(asdict(i), ensure_ascii=False) for i in self.items)
        body = f"[\n{items}\n  ]" if items else "[]"
        write_atomically(path, f'{text},\n  "items": {body}\n}}\n')

    def lines(self) -> list[str]:
        """Format the report for the terminal: every kind with its count and its first items."""
        lines: list[str] = []
        for kind, policies in self.counts.items():
            totals = ", ".join(f"{policy} {number}" for policy, number in policies.items())
            lines.append(f"  {kind:<22}{totals}")
            items = [item for item in self.items if item.kind == kind]
            lines += [f"    {item.line}" for item in items[:LINES_PER_KIND]]
            if len(items) > LINES_PER_KIND:
                lines.append(f"    ... and {len(items) - LINES_PER_KIND} more in report.json")
        lines += [f"  note: {note}" for note in self.notes]
        return lines or ["  nothing found wrong"]


def shortened(text: str) -> str:
    """Return a text from a data set for a message: one line, escaped, of limited length."""
    shown = escaped(text, newlines=True)
    return shown if len(shown) <= _LONGEST_TEXT else shown[:_LONGEST_TEXT] + "..."
