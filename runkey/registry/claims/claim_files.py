"""Claims as files beside a local store: `<home>/claims/<key>.g<N>.json`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.registry.claims.claims import STATES, Claim, in_order, split_name
from runkey.registry.claims.owner import Owner

_END = ".json"


class FileClaims:
    """The claims in a folder.

    A file is written under another name and then linked to its own, which fails if that is taken:
    whoever reads it finds it whole, and of several who make it one succeeds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self._folder)

    def of(self, key: str) -> list[Claim]:
        """See `Claims`."""
        return self._read(f"{key}.g*{_END}")

    def all(self) -> list[Claim]:
        """See `Claims`."""
        return self._read(f"*{_END}")

    def make(self, claim: Claim) -> bool:
        """See `Claims`."""
        temporary = self._write(claim)
        try:
            os.link(temporary, self._path(claim))
        except FileExistsError:
            return False
        except OSError as error:
            raise RegistryError(f"{self._path(claim)}: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def update(self, claim: Claim) -> bool:
        """See `Claims`."""
        path = self._path(claim)
        if not path.exists():
            return False
        temporary = self._write(claim)
        try:
            temporary.replace(path)
        except OSError as error:
            raise RegistryError(f"{path}: {error.strerror}") from None
        return True

    def remove(self, claim: Claim) -> None:
        """See `Claims`."""
        if not any(other.generation > claim.generation for other in self.of(claim.key)):
            raise RegistryError(f"{claim.name}: the newest claim of its key stays")
        self._path(claim).unlink(missing_ok=True)

    def _path(self, claim: Claim) -> Path:
        return self._folder / f"{claim.name}{_END}"

    def _write(self, claim: Claim) -> Path:
        """The claim under a name that only this claim's owner uses, on disk as a whole."""
        assert claim.owner, "only the owner writes a claim"
        temporary = self._folder / f".{claim.name}.{claim.owner.nonce}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(claim), file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RegistryError(f"{temporary}: {error.strerror}") from None
        return temporary

    def _read(self, pattern: str) -> list[Claim]:
        found = []
        for path in self._folder.glob(pattern):
            named = split_name(path.name.removesuffix(_END))
            if named is None:
                continue
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                continue  # removed since the folder was listed
            except OSError as error:
                raise RegistryError(f"{path}: {error.strerror}") from None
            found.append(_parse(text, *named))
        return in_order(found)


def _parse(text: str, key: str, generation: int) -> Claim:
    """The claim in a file; the file's name says which one it is, even if the rest is unreadable."""
    unreadable = Claim(
        key=key, generation=generation, owner=None, state="running", run_id=None, beat=0, since_ms=0
    )
    try:
        stored: dict[str, Any] = json.loads(text)
        owner = Owner.from_dict(stored.pop("owner"))
        claim = Claim(**{**stored, "key": key, "generation": generation, "owner": owner})
    except (ValueError, TypeError, KeyError, AttributeError):
        return unreadable
    whole = claim.state in STATES and isinstance(claim.beat, int)
    return claim if whole else replace(unreadable, owner=owner)
