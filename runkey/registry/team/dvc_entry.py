"""Entries of DVC's run-cache that come from elsewhere: checked before DVC sees them.

An entry says what a stage with given inputs gave.  DVC finds it by its folder's name, a hash of the
command, the inputs and the paths of the outputs, and believes the rest.  Here that name is computed
again, so an entry can only ever answer for a stage of dvc.yaml with the same command and the same
output paths.  DVC never runs an entry's command: it runs dvc.yaml's.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from runkey.errors import RegistryError
from runkey.hashing import sha256_bytes
from runkey.registry.team.safe_names import safe_path

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
