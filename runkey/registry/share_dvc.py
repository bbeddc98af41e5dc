"""The DVC part of a shared run: the run-cache entries of its pipeline, and the objects they name.

With these in its cache, another checkout's `dvc repro` restores every stage instead of running it.
`dvc push --run-cache` does not do that: it sends all entries, but only the workspace's objects.

A part that comes from elsewhere is checked before DVC sees it: DVC believes an entry's name and
runs whatever the entry says.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from runkey.errors import RegistryError
from runkey.hashing import sha256_bytes, sha256_file
from runkey.identity.record import Details
from runkey.progress import each
from runkey.registry.archive import check_weights, safe_path
from runkey.registry.dvc_cache import DIR, MD5, DvcCache, md5_file
from runkey.units import MIB

SCHEMA = "dvc1"
FILE = "dvc.json"
"""Artifact of a published run that holds the `DvcPart`."""

_PATH = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})/([0-9a-f]{64})")
_LARGEST_ENTRY = 4 * MIB
_FIELDS = {"cmd", "deps", "params", "outs"}
_ITEM_FIELDS = {"path", "hash", "md5", "size", "nfiles", "isexec"}
_NOT_HASHED = ("size", "nfiles")
_ANCHOR = re.compile(r"(^|[\s\[{,:-])[&*!][\w!]", re.MULTILINE)


@dataclass(frozen=True)
class DvcPart:
    """Entries, and names and sizes of objects; their bytes lie in a cache, a remote or an archive.

    `path_of` arguments below give the place where the bytes of an md5 lie.
    """

    entries: dict[str, str]
    """YAML text by path below the cache's runs/, the stages in order."""
    objects: dict[str, int]
    """Bytes by md5; a folder's md5 ends with `.dir`."""
    names: dict[str, str]
    """Path in the repository by md5, for messages."""
    schema: str = SCHEMA

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(self.objects.values())

    def as_json(self) -> str:
        """Format as the content of `FILE`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Read the output of `as_json` and check its entries.

        Args:
            text: the JSON.
            where: named in errors.

        Raises:
            RegistryError: it is of another schema or malformed, or holds what DVC would not write.
        """
        try:
            stored = json.loads(text)
        except ValueError:
            raise RegistryError(f"{where}: not JSON") from None
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            raise RegistryError(f"{where}: not of the schema {SCHEMA} that this runkey reads")
        entries, objects, names = (
            _table(stored, name, where) for name in ("entries", "objects", "names")
        )
        for md5, size in objects.items():
            if not MD5.fullmatch(md5) or type(size) is not int or size < 0:
                raise RegistryError(f"{where}: {md5[:40]!r}: {size!r} is no object; refused")
        needed = {md5 for entry in entries.items() for md5 in _check_entry(*entry).values()}
        if missing := needed - objects.keys():
            raise RegistryError(f"{where}: object {min(missing)} of an entry is not listed")
        return cls(entries, objects, names)

    def missing_from(self, cache: DvcCache) -> list[str]:
        """List the objects that a cache does not have."""
        return [md5 for md5 in self.objects if not cache.object_path(md5).is_file()]

    def check_objects(self, path_of: Callable[[str], Path]) -> None:
        """Refuse objects that are not what their names say, or outputs that could do harm.

        Raises:
            RegistryError: an object is missing, has another md5 or size, lists a file outside its
                folder or one that is not among the objects, or could run code when it is loaded.
        """
        for md5, size in each("hash objects", list(self.objects.items()), "objects"):
            path = path_of(md5)
            if not path.is_file() or path.stat().st_size != size:
                raise RegistryError(f"DVC object {md5}: missing, or not of {size} bytes")
            if md5_file(path) != md5.removesuffix(DIR):
                raise RegistryError(f"DVC object {md5}: its contents have another md5; damaged")
            if md5.endswith(DIR):
                _check_listing(md5, path.read_bytes())
        for entry in self.entries.items():
            for name, md5 in self._files(_check_entry(*entry), path_of).items():
                check_weights(path_of(md5), name)

    def check_outputs(self, path_of: Callable[[str], Path], details: Details) -> None:
        """Refuse outputs that differ from the run's files in MLflow.

        Args:
            path_of: places of objects that `check_objects` has checked.
            details: of the run.

        Raises:
            RegistryError: no entry is the run's, or an output of the run is missing or differs.
        """
        outs = (_check_entry(*entry) for entry in self.entries.items())
        own = next((one for one in outs if details.pointer_md5 in one.values()), None)
        if own is None:
            raise RegistryError(f"{FILE}: not of this run: no entry has its run.json")
        files = self._files(own, path_of)
        for name in details.outputs:
            stored, md5 = details.files.get(name), files.get(name)
            if stored is None or md5 is None:
                raise RegistryError(
                    f"{name}: an output of the run, and not among its files or DVC's"
                )
            if sha256_file(path_of(md5)) != stored.sha256:
                raise RegistryError(
                    f"{name}: DVC object {md5} is not the file that the run recorded"
                )

    def install(self, path_of: Callable[[str], Path], cache: DvcCache) -> None:
        """Copy what was checked into a cache: files, then folder listings, then entries."""
        for md5 in sorted(self.missing_from(cache), key=lambda md5: md5.endswith(DIR)):
            _place(cache.object_path(md5), path_of(md5))
            cache.object_path(md5).chmod(0o444)  # as DVC leaves its objects
        for path, text in self.entries.items():
            if not (cache.runs / path).exists():
                _place(cache.runs / path, text)

    def _files(self, outs: Mapping[str, str], path_of: Callable[[str], Path]) -> dict[str, str]:
        """md5 by path of every file of some outputs."""
        found: dict[str, str] = {}
        for out, md5 in outs.items():
            if not md5.endswith(DIR):
                found[out] = md5
                continue
            for path, inner in _check_listing(md5, path_of(md5).read_bytes()).items():
                if inner not in self.objects:
                    raise RegistryError(f"DVC object {md5}: lists {inner}, which is not there")
                found[f"{out}/{path}"] = inner
        return found


def collect(cache: DvcCache, pointer_md5: str, label: str, *, with_data: bool = False) -> DvcPart:
    """Find what a checkout's cache holds of a run.

    Args:
        cache: of the checkout where its pipeline ran.
        pointer_md5: `Details.pointer_md5`.
        label: the short key, for errors.
        with_data: also take the raw data, which `data.dvc` has a remote for.

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
    tops = {md5: path for one in chain for path, md5 in one.outs.items()}
    if with_data:
        inputs = {md5: path for one in chain for path, md5 in one.deps.items()}
        here = {md5: path for md5, path in inputs.items() if cache.object_path(md5).is_file()}
        tops = here | tops
    names: dict[str, str] = {}
    for path, md5 in cache.files({path: md5 for md5, path in tops.items()}).items():
        names.setdefault(md5, path)
    for md5, name in names.items():
        if not cache.object_path(md5).is_file():
            raise RegistryError(
                f"{label}: DVC's cache lacks {name} ({cache.object_path(md5)}); `dvc fetch`, or"
                " `dvc repro --force`, gets it back"
            )
    return DvcPart(
        {one.path: (cache.runs / one.path).read_text(encoding="utf-8") for one in chain},
        {md5: cache.object_path(md5).stat().st_size for md5 in names},
        names,
    )


def _place(target: Path, data: Path | str) -> None:
    """Write a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not beside the target: DVC takes any file in a folder of entries for an entry.
    temporary = target.parents[1] / f".{target.name}.{os.getpid()}"
    if isinstance(data, Path):
        shutil.copyfile(data, temporary)
    else:
        temporary.write_text(data, encoding="utf-8")
    temporary.replace(target)


def _table(stored: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    table = stored.get(name)
    if not isinstance(table, dict):
        raise RegistryError(f"{where}: {name} is no table; refused")
    return table


def _check_entry(path: object, text: object) -> dict[str, str]:
    """md5 by path of an entry's outputs; its name must be the hash of its content."""
    where = f"DVC entry {str(path)[:24]}"
    match = _PATH.fullmatch(path) if isinstance(path, str) else None
    if not match:
        raise RegistryError(f"{where}: not the name of a run-cache entry; refused")
    tree = _parse_entry(text, where)
    if not isinstance(tree.get("cmd"), str) or set(tree) - _FIELDS:
        raise RegistryError(f"{where}: not of DVC's form; refused")
    if not isinstance(tree.get("params", {}), dict):
        raise RegistryError(f"{where}: its params are no table; refused")
    _check_items(tree.get("deps"), f"{where}, deps")
    outs = _check_items(tree.get("outs"), f"{where}, outs")
    by_path = {**tree, "outs": [item["path"] for item in tree["outs"]]}
    if (match[2], match[3]) != (_dvc_hash(by_path, where), _dvc_hash(tree, where)):
        raise RegistryError(f"{where}: its contents do not hash to its name; refused")
    return outs


def _parse_entry(text: object, where: str) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > _LARGEST_ENTRY:
        raise RegistryError(f"{where}: no text, or too long; refused")
    # DVC writes no anchors and no tags; aliases of aliases can fill the memory.
    if _ANCHOR.search(text):
        raise RegistryError(f"{where}: YAML with anchors or tags; refused")
    try:
        tree = YAML(typ="safe", pure=True).load(io.StringIO(text))
    # ruamel raises ValueError and others for odd scalars.
    except (YAMLError, ValueError, TypeError, RecursionError):
        raise RegistryError(f"{where}: not YAML; refused") from None
    if not isinstance(tree, dict):
        raise RegistryError(f"{where}: not of DVC's form; refused")
    return tree


def _check_items(items: object, where: str) -> dict[str, str]:
    """md5 by path of an entry's deps or outs."""
    if not isinstance(items, list) or not items:
        raise RegistryError(f"{where}: not of DVC's form; refused")
    found: dict[str, str] = {}
    for item in items:
        if not isinstance(item, dict) or set(item) - _ITEM_FIELDS or item.get("hash") != "md5":
            raise RegistryError(f"{where}: not of DVC's form; refused")
        md5 = item.get("md5")
        if not isinstance(md5, str) or not MD5.fullmatch(md5):
            raise RegistryError(f"{where}: {item.get('path')} has no md5; refused")
        found[safe_path(item.get("path"), where)] = md5
    return found


def _dvc_hash(tree: Mapping[str, Any], where: str) -> str:
    """DVC's own hash: sha256 of JSON with sorted keys, sizes left out at every depth."""
    try:
        return sha256_bytes(json.dumps(_without_sizes(tree), sort_keys=True).encode())
    except (TypeError, ValueError):
        raise RegistryError(f"{where}: holds values that DVC does not write; refused") from None


def _without_sizes(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_sizes(v) for name, v in value.items() if name not in _NOT_HASHED}
    return [_without_sizes(v) for v in value] if isinstance(value, list) else value


def _check_listing(md5: str, data: bytes) -> dict[str, str]:
    """md5 by path of the files in a folder's object."""
    where = f"DVC object {md5}"
    try:
        items = [(item["relpath"], item["md5"]) for item in json.loads(data)]
    except (ValueError, KeyError, TypeError):
        raise RegistryError(f"{where}: not a list of files; refused") from None
    found: dict[str, str] = {}
    for path, inner in items:
        if not isinstance(inner, str) or not MD5.fullmatch(inner) or inner.endswith(".dir"):
            raise RegistryError(f"{where}: {str(path)[:60]!r} has no md5; refused")
        found[safe_path(path, where)] = inner
    return found
