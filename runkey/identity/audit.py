"""Refuse files of the repository that a stage opens or imports, and that its key does not cover.

    watch_reads(root, "train")    # in the stage's process, and in each loader process

Python's audit events name every file that Python code opens.  What a library opens in C (a
safetensors file, a sqlite database) and what lies outside the repository is not seen.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import FrameType

from runkey.errors import RecipeError
from runkey.identity.code import EXCLUDED, imported_files, is_excluded, undeclared
from runkey.identity.dvc_yaml import chain, covers, pointer_of, read_pipeline, tracked_files
from runkey.identity.initial_weights import used_files
from runkey.identity.key import DATA_PATH, make_recipe
from runkey.params import load_params
from runkey.paths import DATABASE, LOCK, MEMORY, PARAMS, STATE_FOLDERS

_MEASURED = (MEMORY / "measured.json").as_posix()
"""What this machine measured; it chooses the micro-batch, which the run environment holds."""
_TELLING = tuple(e for e in EXCLUDED if e.endswith("/") or e.startswith("runkey/pipeline/"))
"""Code that reads what it likes, since it does not change a result."""
_COMPILED = re.compile(r"(.*?)__pycache__/([^/.]+)\.[^/]*\.pyc")
_IMPORTER = "<frozen importlib._bootstrap_external>"


def watch_reads(root: Path, stage: str) -> None:
    """Raise RecipeError in this process from now on when the stage opens such a file.

    Raises:
        RecipeError: the process has imported one already.
    """
    watch = _Watch(root.resolve(), stage)
    watch.check_imported()
    sys.addaudithook(watch.on_event)


def watch_loader(root: Path, stage: str) -> None:
    """Watch a loader process, which imported what the stage's process did."""
    sys.addaudithook(_Watch(root.resolve(), stage).on_event)


class _Watch:
    def __init__(self, root: Path, stage: str) -> None:
        self._root, self._stage, self._start = root, stage, f"{root}/"
        # An environment may be a link, such as a .venv that clones share.
        named = [Path(home) for home in (sys.prefix, sys.base_prefix)]
        homes = {f"{path}/" for home in named for path in (home, home.resolve())}
        self._homes = tuple(home for home in homes if home.startswith(self._start))
        self._allowed: set[str] = set()
        self._local = threading.local()

    def on_event(self, event: str, args: tuple[object, ...]) -> None:
        """Look at an audit event, of which there are thousands a second."""
        if event != "open" or isinstance(args[0], int):
            return
        path = os.path.abspath(os.fsdecode(args[0]))  # type: ignore[arg-type]  # noqa: PTH100 - fast
        if not path.startswith(self._start) or path in self._allowed:
            return
        flags = args[2] if isinstance(args[2], int) else 0
        written = flags & os.O_ACCMODE == os.O_WRONLY or flags & (os.O_TRUNC | os.O_EXCL)
        if written or getattr(self._local, "busy", False) or not Path(path).is_file():
            return
        self._local.busy = True
        try:
            self._check(path, sys._getframe(1))
        finally:
            self._local.busy = False
        self._allowed.add(path)

    def check_imported(self) -> None:
        """Raise RecipeError if a file that was imported until now is not covered."""
        own, _ = imported_files(self._root)
        files = [path for path in own if path not in self._files]
        for path in undeclared(files, self._files, self._root):
            raise self._refusal(path, imported=True)

    def _check(self, path: str, frame: FrameType | None) -> None:
        if path.startswith(self._homes):
            return
        name, imported = path.removeprefix(self._start), False
        while frame:
            file = frame.f_code.co_filename
            imported = imported or file == _IMPORTER
            if is_excluded(file.removeprefix(self._start), _TELLING):
                return
            frame = frame.f_back
        if compiled := _COMPILED.fullmatch(name):
            name = f"{compiled[1]}{compiled[2]}.py"
        if not self._covers(name):
            raise self._refusal(name, imported=imported and name.endswith(".py"))

    def _covers(self, name: str) -> bool:
        if name.split("/")[0] in STATE_FOLDERS or name.startswith(DATABASE) or name == _MEASURED:
            return True
        if any(covers(out, name) for out in self._outs):
            return True
        for path, files in self._tracked.items():
            if covers(path, name):
                return files is None or name.removeprefix(path).lstrip("/") in files
        return name in self._files or is_excluded(name)

    def _refusal(self, name: str, *, imported: bool) -> RecipeError:
        if imported:
            return RecipeError(
                f"{name}: imported by the stage {self._stage}, and no part of its key; import it by"
                " an `import` statement or add it to the deps of the stage in dvc.yaml; if it hides"
                " an installed package, rename it"
            )
        for path in self._tracked:
            if covers(path, name):
                pointer = pointer_of(path, self._root)
                return RecipeError(
                    f"{name}: read by the stage {self._stage}, and not in the list of {pointer}"
                    " (DVC leaves out what .dvcignore names, and folders that are links); put the"
                    f" file itself there, then `dvc add {path}`"
                )
        return RecipeError(
            f"{name}: read by the stage {self._stage}, and no part of its key; add it to the deps"
            f" of the stage in dvc.yaml, or put it into the data folder"
        )

    # Read when the first file is judged: a loader process, which opens images alone, needs no key.

    @cached_property
    def _flat(self) -> dict[str, object]:
        return dict(load_params(self._root / PARAMS).flat())

    @cached_property
    def _outs(self) -> tuple[str, ...]:
        stages = chain(read_pipeline(self._root, self._flat), self._stage)
        return tuple(out for stage in stages for out in stage.outs)

    @cached_property
    def _tracked(self) -> dict[str, dict[str, str] | None]:
        stages = chain(read_pipeline(self._root, self._flat), self._stage)
        data = str(PurePosixPath(str(self._flat[DATA_PATH])))
        paths = dict.fromkeys((data, *(dep for stage in stages for dep in stage.deps)))
        tracked = [path for path in paths if pointer_of(path, self._root)]
        return {path: tracked_files(path, self._root) for path in tracked}

    @cached_property
    def _files(self) -> set[str]:
        code = make_recipe(self._stage, self._root).preimages["code"]["files"]
        weights = used_files(self._flat, self._root)
        read = {str(file).removeprefix(self._start) for file in weights}
        return {*code, *read, str(LOCK), str(PARAMS)}
