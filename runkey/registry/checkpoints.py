"""Checkpoints on the team's server, from which another machine goes on with a training.

They are artifacts of the MLflow run that is being trained, in the store that the server keeps for
all of them (a folder, S3):

    checkpoints/g2/000003-step-00000412.ckpt    a file that generation 2 of the key's claim sent
    checkpoints/g2/000003.json                  its third sending's `Manifest`, which comes last

Every sending has names of its own, so that nothing which a manifest names is written again, and one
without a manifest is not used. A run that has any has the tag `checkpoints`. What comes from a
server is checked: names, sizes, hashes; what is in the files is checked by who loads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from runkey.errors import RegistryError
from runkey.files import parse_json
from runkey.identity.key import ANY_SCHEMA
from runkey.identity.record import LoggedRun, Record
from runkey.registry.library import ServerLibrary
from runkey.registry.query import Condition, Field, Query
from runkey.registry.rest import RestClient
from runkey.units import MIB, counted, format_bytes

logger = logging.getLogger(__name__)

FOLDER = TAG = "checkpoints"
_LARGEST_MANIFEST = MIB
_LEFT_FREE = 256 * MIB
"""Bytes that receiving leaves on the disk."""
_MOST_FILES = 8
_MOST_READ = 3
"""Manifests of one run that are read, the newest ones."""
_NAME = re.compile(r"(?:step|anchor)-\d{8,12}\.ckpt|best-\d{8,12}-[0-9a-f]{12}\.pt|train\.jsonl")
_KEY = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}")
_GENERATION = re.compile(r"g([1-9]\d{0,8})")
_MANIFEST = re.compile(r"(\d{6,12})\.json")


@dataclass(frozen=True)
class SharedFile:
    """A file as it was sent."""

    path: str
    """Below the folder of shared checkpoints."""
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was sent at one time: all that another machine needs to go on."""

    key: str
    generation: int
    """Of the claim."""
    number: int
    """Of the sending, from 1."""
    step: int
    files: dict[str, SharedFile]
    """By name in the training's folder."""

    def __post_init__(self) -> None:
        """Raise ValueError for names that lead elsewhere, and numbers that are none."""
        prefix = f"g{self.generation}/"
        for name, file in self.files.items():
            number, dash, rest = file.path.removeprefix(prefix).partition("-")
            fits = file.path.startswith(prefix) and number.isdecimal() and dash and rest == name
            if not (fits and _NAME.fullmatch(name) and len(file.path) < 100):
                raise ValueError(f"{ascii(file.path)[:100]}: no file of a checkpoint")
            if file.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
                raise ValueError(f"{name}: no size or no hash")
        if len(self.files) > _MOST_FILES:
            raise ValueError(counted(len(self.files), "file"))
        if self.checkpoint not in self.files and self.anchor not in self.files:
            raise ValueError(f"no checkpoint of step {self.step}")
        if not _KEY.fullmatch(self.key) or min(self.generation, self.number) < 1:
            raise ValueError("no key, generation or number")

    @property
    def checkpoint(self) -> str:
        """The name that its newest checkpoint has."""
        return f"step-{self.step:08d}.ckpt"

    @property
    def anchor(self) -> str:
        """The name that its newest checkpoint has if it is an anchor."""
        return f"anchor-{self.step:08d}.ckpt"

    @property
    def path(self) -> str:
        """Where it is, below the folder of shared checkpoints."""
        return f"g{self.generation}/{self.number:06d}.json"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def label(self) -> str:
        """For messages, and the run's tag."""
        return f"step {self.step} of generation {self.generation}"


class SharedFolder:
    """The shared checkpoints of one MLflow run. All methods raise RegistryError."""

    def __init__(self, client: RestClient, run: LoggedRun) -> None:
        """Send nothing yet; refuse a run whose artifacts the server does not keep itself."""
        address = urlsplit(run.artifact_uri)
        if address.scheme != "mlflow-artifacts":
            raise RegistryError(
                f"{client.address}: it leaves artifacts to its clients ({run.artifact_uri}), and"
                " checkpoints are shared by a server that keeps them: --artifacts-destination"
            )
        self.run_id = run.run_id
        self._client = client
        self._root = f"{address.path.strip('/')}/{FOLDER}"

    def send(self, path: str, pieces: Iterable[bytes], size: int) -> None:
        """Send a file of `size` bytes."""
        self._client.store_file(f"{self._root}/{path}", pieces, size)

    def finish(self, manifest: Manifest) -> None:
        """Send the list of what was sent, which makes it one that can be used."""
        data = json.dumps(asdict(manifest), sort_keys=True).encode()
        self.send(manifest.path, [data], len(data))

    def tag(self, text: str) -> None:
        """Say on the run what there is."""
        tag = {"run_id": self.run_id, "key": TAG, "value": text}
        self._client.post("runs/set-tag", tag, repeat=True)

    def remove(self, path: str) -> None:
        """Delete a file or a generation."""
        self._client.remove_file(f"{self._root}/{path}")

    def clear(self) -> None:
        """Delete all of them, and the tag."""
        self._client.remove_file(self._root)
        self._client.post("runs/delete-tag", {"run_id": self.run_id, "key": TAG})

    def size(self) -> int:
        """Return the bytes of all their files."""
        folders = [f"{FOLDER}/g{one}" for one in self.generations()]
        files = (f for one in folders for f in self._client.artifact_files(self.run_id, one))
        return sum(file.file_size or 0 for file in files)

    def generations(self) -> list[int]:
        """List the generations that have sent something, the newest first."""
        names = self._names("")
        return sorted((int(m[1]) for n in names if (m := _GENERATION.fullmatch(n))), reverse=True)

    def manifests(self, key: str) -> Iterator[Manifest]:
        """Yield the newest complete ones, the newest first; a warning names those that are none."""
        left = _MOST_READ
        for generation in self.generations():
            names = [n for n in self._names(f"g{generation}") if _MANIFEST.fullmatch(n)]
            for name in sorted(names, key=lambda one: int(one.split(".")[0]), reverse=True)[:left]:
                left -= 1
                path = f"{FOLDER}/g{generation}/{name}"
                try:
                    found = self._manifest(path)
                    if (found.key, f"{FOLDER}/{found.path}") != (key, path):
                        raise ValueError("of another key, or in another place")
                except ValueError as error:
                    logger.warning(f"run {self.run_id[:8]}: {path}: {error}; not used")
                else:
                    yield found

    def receive(self, manifest: Manifest, folder: Path, largest: Mapping[str, int]) -> None:
        """Copy the files of a manifest to a folder, each checked by its size and hash.

        Args:
            manifest: one of `manifests`.
            folder: where to; it exists.
            largest: most bytes of a file, by the ending of its name.
        """
        for name, file in manifest.files.items():
            if file.size > (most := largest[Path(name).suffix]):
                had = f"{format_bytes(file.size)}, more than the {format_bytes(most)}"
                raise RegistryError(f"{file.path}: has {had} that it can have here; refused")
        free = shutil.disk_usage(folder).free - _LEFT_FREE
        if manifest.size > free:
            wanted = f"{format_bytes(manifest.size)} are wanted"
            raise RegistryError(f"{folder}: {wanted}, {format_bytes(max(free, 0))} may be used")
        for name, file in manifest.files.items():
            digest, left = hashlib.sha256(), file.size
            path = f"{FOLDER}/{file.path}"
            with (
                self._client.artifact(self.run_id, path, file.size) as source,
                (folder / name).open("xb") as target,
            ):
                while piece := source.read(MIB):
                    digest.update(piece)
                    left -= len(piece)
                    target.write(piece)
            if left or digest.hexdigest() != file.sha256:
                raise RegistryError(f"{path}: not what was sent; it was cut short or changed")

    def _names(self, folder: str) -> list[str]:
        inner = f"{FOLDER}/{folder}".rstrip("/")
        files = self._client.artifact_files(self.run_id, inner)
        return [file.path.rpartition("/")[2] for file in files]

    def _manifest(self, path: str) -> Manifest:
        with self._client.artifact(self.run_id, path, _LARGEST_MANIFEST) as file:
            found: Manifest = parse_json(file.readall(), Manifest)
        return found


def all_shared(library: ServerLibrary) -> Iterator[tuple[Record, SharedFolder]]:
    """Yield the runs of a server that have shared checkpoints."""
    tagged = library.find(Query(conditions=(Condition(Field("tags", TAG), "~", "step"),)))
    yield from _with_folders(library, tagged)


def shared_runs(library: ServerLibrary, key: str) -> Iterator[tuple[Record, SharedFolder]]:
    """Yield the runs of a key that have shared checkpoints."""
    yield from _with_folders(library, library.matching(key))


def _with_folders(
    library: ServerLibrary, records: Iterable[Record]
) -> Iterator[tuple[Record, SharedFolder]]:
    for record in records:
        if TAG in record.run.tags:
            with suppress(RegistryError):  # artifacts that the server does not keep are not ours
                yield record, SharedFolder(library.client, record.run)


def newest_shared(library: ServerLibrary, key: str) -> list[tuple[Manifest, SharedFolder]]:
    """Return the complete shared checkpoints of a key, the one of the latest step first."""
    found = [(m, place) for _, place in shared_runs(library, key) for m in place.manifests(key)]
    return sorted(found, key=lambda one: (one[0].step, one[0].generation), reverse=True)


def remove_earlier(library: ServerLibrary, key: str, generation: int) -> None:
    """Delete what earlier generations have sent; the caller has sent a checkpoint of its own."""
    for _, place in shared_runs(library, key):
        sent = place.generations()
        for one in sent:
            if one < generation:
                place.remove(f"g{one}")
        if all(one < generation for one in sent):
            place.clear()


def remove_all(library: ServerLibrary, key: str) -> None:
    """Delete all shared checkpoints of a key, which has been trained."""
    for _, place in shared_runs(library, key):
        place.clear()
