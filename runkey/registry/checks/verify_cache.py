"""Part of `runkey verify`: the result as DVC's cache has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from runkey.hashing import sha256_file
from runkey.identity.record import Details, Record
from runkey.registry.checks.findings import Finding, State
from runkey.registry.dvc_cache import DIR, DvcCache, Entry, md5_file


class CacheCheck:
    """Looks runs up in one checkout's cache."""

    def __init__(self, root: Path, pointers: Iterable[str]) -> None:
        """Nothing is read yet.

        Args:
            root: the main checkout.
            pointers: md5s of the run.json of all runs that will be asked for: 10,000 entries are
                searched for them once, not once each.
        """
        self._root = root
        self._pointers = frozenset(pointers)

    @cached_property
    def cache(self) -> DvcCache:
        """The cache; RegistryError if DVC's settings cannot be read."""
        return DvcCache(self._root)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return self.cache.entries_of(self._pointers)

    def check(
        self, record: Record, details: Details, *, away: bool, quick: bool
    ) -> Iterator[Finding]:
        """The run-cache entry, and each object of its outputs.

        Args:
            record: the run.
            details: its own.
            away: another machine ran it, so that its entry need not be here.
            quick: do not hash the objects.
        """
        if details.pointer_md5 is None or record.reproduction_of:
            # `runkey reproduce` keeps its run out of DVC's cache, where the newest entry wins.
            why = "a repeat is kept in MLflow only" if record.reproduction_of else "not run by DVC"
            yield Finding("dvc cache", "ok", f"none: {why}")
            return
        entry = self._entries.get(details.pointer_md5)
        fetch = f"`runkey fetch {record.label}`, or `dvc repro`, which takes the run's files"
        if entry is None:
            state: State = "warning" if away else "fault"
            where = f" (it ran on {details.host})" if away else ""
            text = f"no entry in {self.cache.runs} gave this run.json ({details.pointer_md5})"
            yield Finding("dvc cache", state, f"{text}{where}", fetch)
            return
        files = self.cache.files(entry.outs)
        wrong = {name: why for name, md5 in files.items() if (why := self._wrong(md5, quick))}
        for name, why in wrong.items():
            yield Finding("dvc cache", "fault", f"{name}: {why} (entry {entry.path})", fetch)
        if not wrong:
            how = "are there" if quick else "hash to their md5"
            yield Finding("dvc cache", "ok", f"its {len(files)} objects {how}")

    def copy_of(self, details: Details, path: str) -> Path | None:
        """The object that holds an artifact as it was recorded, if the cache has it whole."""
        entry = self._entries.get(details.pointer_md5 or "")
        md5 = self.cache.files(entry.outs).get(path) if entry else None
        place = self.cache.object_path(md5) if md5 else None
        if place and place.is_file() and sha256_file(place) == details.files[path].sha256:
            return place
        return None

    def _wrong(self, md5: str, quick: bool) -> str:
        """What is wrong with an object, in words; empty if nothing."""
        place = self.cache.object_path(md5)
        if not place.is_file():
            return f"{place} is not there"
        if not quick and (now := md5_file(place)) != md5.removesuffix(DIR):
            return f"{place} is damaged (md5 {now})"
        return ""
