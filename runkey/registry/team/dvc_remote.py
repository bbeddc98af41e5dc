"""A DVC remote, asked through a process of DVC's own (`runkey.dvc_transfer`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runkey
from runkey.errors import RegistryError

# An outer DVC's: they would name another checkout.
_OUTER = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")


@dataclass(frozen=True)
class DvcRemote:
    """The remote of a checkout."""

    root: Path
    """The checkout."""
    name: str | None = None
    """As `dvc remote list` shows it; None: DVC's default."""

    def check(self) -> str:
        """Its address, for messages.

        Raises:
            RegistryError: there is none, or it is a folder of the checkout itself.
        """
        return str(self._ask("check")["place"])

    def push(self, objects: Iterable[str], entries: Iterable[str]) -> tuple[int, int]:
        """Copy objects and entries from the checkout's cache.

        Returns:
            How many of each were not there yet.

        Raises:
            RegistryError: it cannot be reached or refuses, or the cache lacks an object.
        """
        answer = self._ask("push", objects=list(objects), entries=list(entries))
        return int(answer["objects"]), int(answer["entries"])

    def pull(self, objects: Iterable[str], folder: Path) -> None:
        """Copy objects to `<folder>/<2 digits>/<the rest>`; their contents are not checked.

        Raises:
            RegistryError: it cannot be reached, or lacks an object.
        """
        self._ask("pull", objects=list(objects), to=str(folder))

    def _ask(self, action: str, **more: Any) -> dict[str, Any]:
        question: dict[str, Any] = {"action": action, "root": str(self.root), "remote": self.name}
        question |= {"objects": [], "entries": []} | more
        kept = {name: value for name, value in os.environ.items() if name not in _OUTER}
        done = subprocess.run(
            [sys.executable, "-m", "runkey.dvc_transfer"],
            cwd=Path(runkey.__file__).parents[1],
            env=kept | {"DVC_NO_ANALYTICS": "1"},
            input=json.dumps(question),
            stdout=subprocess.PIPE,
            # DVC's progress bars are for people.
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            said = (done.stderr or "").strip().splitlines() or ["no message"]
            raise RegistryError(f"DVC ended with code {done.returncode}: {said[-1]}") from None
        if "error" in answer:
            raise RegistryError(answer["error"])
        return answer
