"""Packages that are tampered with, and what import says to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.hashing import sha256_bytes
from runkey.identity.record import ARTIFACTS, DETAILS
from runkey.registry.archive import pack
from runkey.registry.library import LocalLibrary
from runkey.registry.package import FILE, RUN, object_path
from runkey.registry.share import Checkout, import_run
from tests.support.run_package import RECIPE, entry_text, git


class Untouched:
    """MLflow's part of a store that nothing may reach."""

    def read(self, run_id: str, folder: Path) -> object:
        raise AssertionError("read")

    def write(self, folder: Path) -> Any:
        raise AssertionError("the MLflow run was written")

    def add(self, run_id: str, file: Path) -> None:
        raise AssertionError("added")


def refused(file: Path, colleague: Path) -> str:
    """What import says; fails if it takes the archive, or leaves anything anywhere."""
    outside = sorted(colleague.parent.rglob("*"))
    before = git(colleague, "for-each-ref"), sorted(colleague.rglob("*"))
    home = colleague / ".runkey"
    with pytest.raises(RegistryError) as caught:
        import_run(file, Checkout(colleague, home, LocalLibrary(home), Untouched()))
    assert list(home.iterdir()) == []
    home.rmdir()
    after = git(colleague, "for-each-ref"), sorted(colleague.rglob("*"))
    new = {p for p in set(after[1]) - set(before[1]) if ".git" not in p.parts}
    assert (after[0], new) == (before[0], set())
    assert [p for p in sorted(colleague.parent.rglob("*")) if ".git" not in p.parts] == [
        p for p in outside if ".git" not in p.parts
    ]
    text = str(caught.value)
    assert "\n" not in text
    return text


def packed(package: Path, key: str = RECIPE.key) -> Path:
    """Packed by runkey itself: the index is right, whatever the contents are."""
    pack(package, key, package.parent / "bad.zip")
    return package.parent / "bad.zip"


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add_bad_object(package: Path, content: bytes, name: str, suffix: str = "") -> str:
    """An object with its right md5, under the name of an output of an entry of its own."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    path = object_path(package, md5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    entry, text = entry_text({"stages/train.py": "2" * 32}, {name: md5})

    def change(part: Any) -> None:
        part["objects"][md5] = len(content)
        part["entries"][entry] = text

    change_json(package / FILE, change)
    return md5


def record_weights(package: Path, content: bytes, name: str = "model/weights.safetensors") -> None:
    """Put a file into the run, recorded with its right hash."""
    path = package / RUN / ARTIFACTS / name
    path.write_bytes(content)
    stored = {"size": len(content), "sha256": sha256_bytes(content)}
    change_json(
        package / RUN / ARTIFACTS / DETAILS, lambda details: details["files"].update({name: stored})
    )
