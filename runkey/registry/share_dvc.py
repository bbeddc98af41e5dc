"""What DVC has of a run: the run-cache entries of its pipeline, and the objects that they name.

With these in its cache, another checkout's `dvc repro` restores every stage instead of running it.
(`dvc push --run-cache` sends all entries, and the objects of the workspace alone.)
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TextIO, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import runkey
from runkey.errors import RegistryError
from runkey.hashing import sha256_bytes, sha256_file
from runkey.identity.record import Details
from runkey.progress import QUIET, each, progress
from runkey.registry.archive import safe_path
from runkey.registry.dvc_cache import DIR, DvcCache, md5_file

# Weights from elsewhere: what their pickle would call, read without running it.


_LARGEST_PICKLE = 64 << 20
"""Bytes; a state dict's own part is some 100 bytes a tensor, the numbers lie beside it."""

_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_TORCH_DTYPES = (
    *("bfloat16", "bool", "float16", "float32", "float64"),
    *("int16", "int32", "int64", "int8", "uint8"),
)
ALLOWED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch.storage UntypedStorage",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch {name}" for name in _TORCH_DTYPES),
    }
)
"""`module name` of all that a state dict may name."""

_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "LONG1"),
        *("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT"),
        *("SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE"),
        *("TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET"),
        *("LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    }
)
_RAW = (".pkl", ".pickle", ".joblib", ".dill")
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin")


def check_pickles(path: Path, name: str) -> None:
    """Refuse a file that could run code when it is loaded.

    Args:
        path: the file.
        name: what it will be called; said in errors.

    Raises:
        RegistryError: it is a raw pickle, weights in another form than torch's zip, or weights
            whose pickle names something that a state dict does not need.
    """
    lower = name.lower()
    if lower.endswith(_RAW):
        raise RegistryError(f"{name}: a pickle can run any code when it is loaded; refused")
    is_zip = zipfile.is_zipfile(path)
    if lower.endswith(_WEIGHTS) and not is_zip:
        raise RegistryError(f"{name}: not weights in torch's zip format; refused")
    if is_zip:
        _check_zip(path, name)


def _check_zip(path: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise RegistryError(f"{name}: holds a member twice; refused")
            for member in members:
                if member.filename.lower().endswith(_RAW):
                    _check_member(archive, member, name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise RegistryError(f"{name}: a damaged zip ({error}); refused") from None


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> None:
    folder, _, file = member.filename.rpartition("/")
    if file != "data.pkl" or "/" in folder:
        raise RegistryError(f"{name}: holds the pickle {member.filename!r}; refused")
    with archive.open(member) as opened:
        content = opened.read(_LARGEST_PICKLE + 1)
    if len(content) > _LARGEST_PICKLE:
        raise RegistryError(f"{name}: its pickle is larger than 64 MiB; refused")
    for found in forbidden(content):
        raise RegistryError(f"{name}: loading it would use {found}; no state dict does; refused")


def forbidden(content: bytes) -> list[str]:
    """What a pickle names or does that no state dict needs, in the order it stands there."""
    found = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                if argument not in ALLOWED:
                    found.append(str(argument).replace(" ", "."))
            elif opcode.name not in _OPCODES:
                found.append(f"the pickle instruction {opcode.name}")
    # pickletools raises whatever its readers of arguments do: struct.error, UnicodeDecodeError, ...
    except Exception as error:  # noqa: BLE001
        found.append(f"a broken pickle ({type(error).__name__})")
    return found


# Entries of DVC's run-cache that come from elsewhere: checked before DVC sees them.


MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
_PATH = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})/([0-9a-f]{64})")
_LARGEST = 4 << 20
_FIELDS = {"cmd", "deps", "params", "outs"}
_ITEM_FIELDS = {"path", "hash", "md5", "size", "nfiles", "isexec"}
_NOT_HASHED = ("size", "nfiles")


def check_entry(path: object, text: object) -> dict[str, str]:
    """Refuse what is no entry of DVC's, or lies under another name than its own.

    Args:
        path: of its file, below the cache's runs/.
        text: its contents.

    Returns:
        md5 by path of its outputs.

    Raises:
        RegistryError: the text names the entry and what is wrong.
    """
    where = f"DVC entry {str(path)[:24]}"
    match = _PATH.fullmatch(path) if isinstance(path, str) else None
    if not match:
        raise RegistryError(f"{where}: not the name of a run-cache entry; refused")
    tree = _parse(text, where)
    command = tree.get("cmd")
    if not isinstance(command, str) or set(tree) - _FIELDS:
        raise RegistryError(f"{where}: not of DVC's form; refused")
    if not isinstance(tree.get("params", {}), dict):
        raise RegistryError(f"{where}: its params are no table; refused")
    _items(tree.get("deps"), f"{where}, deps")
    outs = _items(tree.get("outs"), f"{where}, outs")
    by_path = {**tree, "outs": [item["path"] for item in tree["outs"]]}
    if (match[2], match[3]) != (_dvc_hash(by_path, where), _dvc_hash(tree, where)):
        raise RegistryError(f"{where}: its contents do not hash to its name; refused")
    return outs


def check_listing(md5: str, content: bytes) -> dict[str, str]:
    """The files of a folder's object, md5 by path.

    Args:
        md5: of the folder, for errors.
        content: of its `.dir` object.

    Raises:
        RegistryError: it is no list of files, or a name leads out of the folder.
    """
    where = f"DVC object {md5}"
    try:
        items = [(item["relpath"], item["md5"]) for item in json.loads(content)]
    except (ValueError, KeyError, TypeError):
        raise RegistryError(f"{where}: not a list of files; refused") from None
    found: dict[str, str] = {}
    for path, inner in items:
        if not isinstance(inner, str) or not MD5.fullmatch(inner) or inner.endswith(".dir"):
            raise RegistryError(f"{where}: {str(path)[:60]!r} has no md5; refused")
        found[safe_path(path, where)] = inner
    return found


def _parse(text: object, where: str) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > _LARGEST:
        raise RegistryError(f"{where}: no text, or too long; refused")
    if "&" in text or "!" in text:
        # DVC writes no anchors and no tags; aliases of aliases can fill the memory.
        text = _without_anchors(text, where)
    try:
        tree = YAML(typ="safe", pure=True).load(io.StringIO(text))
    # ruamel raises ValueError and others for odd scalars.
    except (YAMLError, ValueError, TypeError, RecursionError):
        raise RegistryError(f"{where}: not YAML; refused") from None
    if not isinstance(tree, dict):
        raise RegistryError(f"{where}: not of DVC's form; refused")
    return tree


def _without_anchors(text: str, where: str) -> str:
    if re.search(r"(^|[\s\[{,:-])[&*!][\w!]", text, re.MULTILINE):
        raise RegistryError(f"{where}: YAML with anchors or tags; refused")
    return text


def _items(items: object, where: str) -> dict[str, str]:
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
    """DVC's own hash: sha256 over JSON with sorted keys, sizes left out at every depth."""
    try:
        return sha256_bytes(json.dumps(_hashed(tree), sort_keys=True).encode())
    except (TypeError, ValueError):
        raise RegistryError(f"{where}: holds values that DVC does not write; refused") from None


def _hashed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hashed(v) for name, v in value.items() if name not in _NOT_HASHED}
    return [_hashed(v) for v in value] if isinstance(value, list) else value


# A DVC remote, asked through a process of DVC's own (`runkey.dvc_transfer`).


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
