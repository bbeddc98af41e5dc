"""A DVC remote, asked through a process of DVC's own (`runkey.dvc_transfer`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import runkey
from runkey.errors import RegistryError
from runkey.progress import QUIET, progress

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

    def push(self, objects: Mapping[str, int], entries: Iterable[str]) -> tuple[int, int]:
        """Copy objects and entries from the checkout's cache.

        Args:
            objects: bytes by md5.
            entries: paths below the cache's runs/.

        Returns:
            How many of each were not there yet.

        Raises:
            RegistryError: it cannot be reached or refuses, or the cache lacks an object.
        """
        answer = self._ask("push", objects=dict(objects), entries=list(entries))
        return int(answer["objects"]), int(answer["entries"])

    def pull(self, objects: Mapping[str, int], folder: Path) -> None:
        """Copy objects to `<folder>/<2 digits>/<the rest>`; their contents are not checked.

        Args:
            objects: bytes by md5.
            folder: where to.

        Raises:
            RegistryError: it cannot be reached, or lacks an object.
        """
        self._ask("pull", objects=dict(objects), to=str(folder))

    def _ask(self, action: str, **more: Any) -> dict[str, Any]:
        question: dict[str, Any] = {"action": action, "root": str(self.root), "remote": self.name}
        question |= {"objects": {}, "entries": []} | more
        answer: dict[str, Any] = {}
        with ExitStack() as stack:
            steps = QUIET
            for told in _answers(question):
                if "total" in told:
                    what = "objects to DVC" if action == "push" else "objects from DVC"
                    steps = stack.enter_context(progress(what, told["total"], "bytes"))
                elif "moved" in told:
                    steps.advance(told["moved"])
                else:
                    answer = told
        if "error" in answer:
            raise RegistryError(answer["error"])
        return answer


def _answers(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of the process, as they come; it ends with us.

    Raises:
        RegistryError: it ends with something else than an answer.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OUTER}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(
            [sys.executable, "-m", "runkey.dvc_transfer"],
            cwd=Path(runkey.__file__).parents[1],
            env=kept | {"DVC_NO_ANALYTICS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,  # DVC's own bars would be drawn over ours
            encoding="utf-8",
        ) as process,
    ):
        told: dict[str, Any] = {}
        try:
            stdin, stdout = cast("TextIO", process.stdin), cast("TextIO", process.stdout)
            with suppress(BrokenPipeError), stdin:  # it ended at once; its last words are told
                json.dump(question, stdin)
            for line in stdout:
                told = json.loads(line)
                yield told
        except ValueError:
            told = {}
            process.kill()
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        if "place" not in told and "error" not in told:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no message"])[-1]
            raise RegistryError(f"DVC ended with code {code}: {last}")
