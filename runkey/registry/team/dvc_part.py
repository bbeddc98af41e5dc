"""What DVC has of a run: the run-cache entries of its pipeline, and the objects that they name.

With these in its cache, another checkout's `dvc repro` restores every stage instead of running it.
(`dvc push --run-cache` sends all entries, and the objects of the workspace alone.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.record import Details
from runkey.progress import each
from runkey.registry.dvc_cache import DIR, DvcCache, md5_file
from runkey.registry.team.dvc_entry import MD5, check_entry, check_listing
from runkey.registry.team.safe_pickle import check_pickles

SCHEMA = "dvc1"
FILE = "dvc.json"
"""Artifact of a published run that holds the `DvcPart`."""


@dataclass(frozen=True)
class DvcPart:
    """Names and sizes; the objects' bytes lie in a cache, a remote or an archive."""

    entries: dict[str, str]
    """Contents by path below the cache's runs/, the stages in order."""
    objects: dict[str, int]
    """Bytes by md5; a folder's ends with `.dir`."""
    names: dict[str, str]
    """Path in the repository by md5, for messages and to know weights from pictures."""
    schema: str = SCHEMA

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(self.objects.values())

    def as_json(self) -> str:
        """The contents of `FILE`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """The part that `as_json` gave, its entries checked.

        Args:
            text: the JSON.
            where: said in errors.

        Raises:
            RegistryError: it is of another schema or malformed, or holds what DVC would not write.
        """
        try:
            stored = json.loads(text)
        except ValueError:
            raise RegistryError(f"{where}: not JSON") from None
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            raise RegistryError(f"{where}: not of the schema {SCHEMA} that this runkey reads")
        entries, objects = (_table(stored, name, where) for name in ("entries", "objects"))
        wanted: set[str] = set()
        for path, content in entries.items():
            wanted |= set(check_entry(path, content).values())
        for md5, size in objects.items():
            if not MD5.fullmatch(md5) or type(size) is not int or size < 0:
                raise RegistryError(f"{where}: {md5[:40]!r}: {size!r} is no object; refused")
        if missing := wanted - objects.keys():
            raise RegistryError(f"{where}: object {min(missing)} of an entry is not listed")
        return cls(entries, objects, _table(stored, "names", where))


def _table(stored: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    table = stored.get(name)
    if not isinstance(table, dict):
        raise RegistryError(f"{where}: {name} is no table; refused")
    return table


def collect(cache: DvcCache, pointer_md5: str, label: str, *, with_data: bool = False) -> DvcPart:
    """What a checkout's cache holds of a run.

    Args:
        cache: where its pipeline ran.
        pointer_md5: `Details.pointer_md5`.
        label: the short key, for errors.
        with_data: also the raw data, which `data.dvc` has a remote for.

    Raises:
        RegistryError: the cache has no entry of the run, or lacks an object that one names.
    """
    entry = cache.entry_of(pointer_md5)
    if entry is None:
        raise RegistryError(
            f"{label}: DVC's cache in {cache.folder} has no entry of this run; it can be handed on"
            " only from the checkout that trained or fetched it"
        )
    chain = cache.chain(entry)
    named = {md5: path for one in chain for path, md5 in one.outs.items()}
    if with_data:
        given = {md5: path for one in chain for path, md5 in one.deps.items()}
        named |= {m: p for m, p in given.items() if m not in named and _has(cache, m)}
    names: dict[str, str] = {}
    for md5, path in named.items():
        for inner, below in cache.objects([md5]).items():
            names.setdefault(inner, f"{path}/{below}" if below else path)
    for md5, name in names.items():
        if not _has(cache, md5):
            raise RegistryError(
                f"{label}: DVC's cache lacks {name} ({cache.object_path(md5)}); `dvc fetch`, or"
                " `dvc repro --force`, gets it back"
            )
    return DvcPart(
        {one.path: (cache.runs / one.path).read_text(encoding="utf-8") for one in chain},
        {md5: cache.object_path(md5).stat().st_size for md5 in names},
        names,
    )


def check_objects(part: DvcPart, place: Callable[[str], Path]) -> None:
    """Refuse objects that are not what their names say, or outputs that could do harm.

    Args:
        part: what is expected.
        place: where the bytes of an md5 lie.

    Raises:
        RegistryError: an object is missing, has another md5 or size, lists a file outside its
            folder or one that is not among the objects, or is a pickle that could run code.
    """
    for md5, size in each("hash objects", list(part.objects.items()), "objects"):
        path = place(md5)
        if not path.is_file() or path.stat().st_size != size:
            raise RegistryError(f"DVC object {md5}: missing, or not of {size} bytes")
        if md5_file(path) != md5.removesuffix(DIR):
            raise RegistryError(f"DVC object {md5}: its contents have another md5; damaged")
        if md5.endswith(DIR):
            check_listing(md5, path.read_bytes())
    for entry, text in part.entries.items():
        for name, md5 in _paths(check_entry(entry, text), part, place).items():
            check_pickles(place(md5), name)


def check_outputs(part: DvcPart, place: Callable[[str], Path], details: Details) -> None:
    """Refuse results that are not those of the run: DVC's and MLflow's must be the same bytes.

    Args:
        part: checked by `check_objects`.
        place: where the bytes of an md5 lie.
        details: of the run.

    Raises:
        RegistryError: no entry is the run's, or an output of the run is missing or differs.
    """
    outs = (check_entry(entry, text) for entry, text in part.entries.items())
    own = next((one for one in outs if details.pointer_md5 in one.values()), None)
    if own is None:
        raise RegistryError(f"{FILE}: not of this run: no entry has its run.json")
    paths = _paths(own, part, place)
    for name in details.outputs:
        stored, md5 = details.files.get(name), paths.get(name)
        if stored is None or md5 is None:
            raise RegistryError(f"{name}: an output of the run, and not among its files or DVC's")
        if sha256_file(place(md5)) != stored.sha256:
            raise RegistryError(f"{name}: DVC object {md5} is not the file that the run recorded")


def _paths(outs: Mapping[str, str], part: DvcPart, place: Callable[[str], Path]) -> dict[str, str]:
    """md5 by path of every file of some outputs.

    Raises:
        RegistryError: see `check_listing`; or a file is not among the objects.
    """
    found: dict[str, str] = {}
    for out, md5 in outs.items():
        if not md5.endswith(DIR):
            found[out] = md5
            continue
        for path, inner in check_listing(md5, place(md5).read_bytes()).items():
            if inner not in part.objects:
                raise RegistryError(f"DVC object {md5}: lists {inner}, which is not there")
            found[f"{out}/{path}"] = inner
    return found


def install(part: DvcPart, source: Callable[[str], Path], cache: DvcCache) -> int:
    """Put what was checked into a cache: files, folders that list them, entries that name both.

    Args:
        part: what to put there.
        source: where the bytes of an md5 lie now.
        cache: where to.

    Returns:
        How many objects were not there yet.
    """
    new = sorted(lacking(part, cache), key=lambda md5: md5.endswith(DIR))
    for md5 in new:
        _place(cache.object_path(md5), source(md5))
        cache.object_path(md5).chmod(0o444)  # as DVC leaves its objects
    for path, text in part.entries.items():
        target = cache.runs / path
        if not target.exists():
            _place(target, text)
    return len(new)


def lacking(part: DvcPart, cache: DvcCache) -> list[str]:
    """The objects that a cache does not have."""
    return [md5 for md5 in part.objects if not _has(cache, md5)]


def _has(cache: DvcCache, md5: str) -> bool:
    return cache.object_path(md5).is_file()


def _place(target: Path, content: Path | str) -> None:
    """Write a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder up: DVC takes any file in a folder of entries for one of them.
    temporary = target.parents[1] / f".{target.name}.{os.getpid()}"
    if isinstance(content, Path):
        shutil.copyfile(content, temporary)
    else:
        temporary.write_text(content, encoding="utf-8")
    temporary.replace(target)
