"""A small run that can be handed on: a real git repository, a real DVC cache, a real package.

Nothing is trained: its files are made here, with the hashes that DVC, git and runkey give them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.utils import dict_sha256
from ruamel.yaml import YAML

from runkey.hashing import sha256_bytes
from runkey.identity.code import RULE, hash_code
from runkey.identity.key import Recipe
from runkey.identity.record import ARTIFACTS, CONTENT, DETAILS, Details, StoredFile
from runkey.registry.archive import pack
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.package import BUNDLE, FILE, RUN, collect, object_path
from runkey.registry.snapshot import bundle_snapshot, ref_of
from runkey.tracking.store import Store

CODE = b"print('training')\n"
"""stages/train.py."""
CODE_MD5 = hashlib.md5(CODE).hexdigest()
DATA = "0" * 32 + ".dir"
_FILES = {"stages/train.py": hash_code("stages/train.py", CODE, RULE)}
RECIPE = Recipe(
    "train",
    {"prepare": "python -m stages.prepare", "train": "python -m stages.train"},
    {
        "code": {"rule": RULE, "files": _FILES, "excluded": []},
        "params": {"lr": 0.1, "model.init_from": None},
        "data": {"data": f"md5:{DATA}"},
        "environment": [],
    },
)
DEPS = {"data": DATA, "stages/train.py": CODE_MD5}
LR = {"params.yaml": {"lr": 0.1, "data.path": "data", "model": {"init_from": None}}}
MANIFEST = {"key": RECIPE.key, "parts": RECIPE.parts, "run_id": "1"}


@dataclass
class Ready:
    """A checkout with a finished run, and that run's package."""

    root: Path
    key: str
    folder: Path
    """Of the package; tests change copies of it."""
    pointer_md5: str
    snapshot: str


def weights(value: int = 0) -> bytes:
    """Return a safetensors file with one tensor of one byte."""
    tensor = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({"weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value])


def torch_weights(named: object = None) -> bytes:
    """Return weights as older runs have them; `named`: something more that the pickle names."""
    state = {"weight": torch.zeros(1), "more": named} if named else {"weight": torch.zeros(1)}
    content = io.BytesIO()
    torch.save({"model": state}, content)
    return content.getvalue()


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)
    return done.stdout.decode().strip()


def new_checkout(root: Path) -> Path:
    """A git repository with DVC's folder, as a colleague has it."""
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / "stages").mkdir()
    (root / "stages" / "train.py").write_bytes(CODE)
    (root / "params.yaml").write_text("lr: 0.1\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")
    return root


def add_object(root: Path, content: bytes, suffix: str = "") -> str:
    """Put an object in the cache of a checkout; its md5."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    path = DvcCache(root).object_path(md5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def add_folder(root: Path, files: dict[str, bytes]) -> str:
    """Put a folder's objects in the cache; the md5 of its list."""
    listed = [{"md5": add_object(root, data), "relpath": path} for path, data in files.items()]
    return add_object(root, json.dumps(listed).encode(), ".dir")


def entry_text(deps: dict[str, str], outs: dict[str, str], **more: Any) -> tuple[str, str]:
    """Path and contents of a run-cache entry, named by DVC's own hash."""
    items = {
        name: [{"path": path, "hash": "md5", "md5": md5, "size": 1} for path, md5 in table.items()]
        for name, table in (("deps", deps), ("outs", outs))
    }
    tree: dict[str, Any] = {"cmd": "python -m stages.train", **items, **more}
    key = dict_sha256({**tree, "outs": list(outs)}, exclude=["size", "nfiles"])
    value = dict_sha256(tree, exclude=["size", "nfiles"])
    text = io.StringIO()
    YAML().dump(tree, text)
    return f"{key[:2]}/{key}/{value}", text.getvalue()


def add_entry(root: Path, path: str, text: str) -> None:
    place = DvcCache(root).runs / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return make_ready(tmp_path_factory.mktemp("ready"))


def make_ready(folder: Path) -> Ready:
    """Make a run with one stage, `train`, whose outputs are model/ and run.json."""
    root = new_checkout(folder / "checkout")
    files = {
        "model/weights.safetensors": weights(),
        "model/key.json": json.dumps(RECIPE.as_dict()).encode(),
        "run.json": json.dumps(MANIFEST).encode(),
    }
    model = {path.removeprefix("model/"): files[path] for path in files if "model/" in path}
    pointer = add_object(root, files["run.json"])
    outs = {"model": add_folder(root, model), "run.json": pointer}
    add_entry(root, *entry_text(DEPS, outs, params=LR))
    oid = git(root, "rev-parse", "HEAD")
    git(root, "update-ref", ref_of(RECIPE.key, oid), oid)
    folder = root.parent / "package"
    _write_run(folder / RUN, files, pointer, oid)
    part = collect(DvcCache(root), pointer, "rk2-test")
    (folder / FILE).write_text(part.as_json())
    for md5 in part.objects:
        place = object_path(folder, md5)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DvcCache(root).object_path(md5), place)
    bundle_snapshot(root, RECIPE.key, oid, folder / BUNDLE)
    return Ready(root, RECIPE.key, folder, pointer, oid)


def _write_run(folder: Path, files: dict[str, bytes], pointer: str, oid: str) -> None:
    for path, content in files.items():
        (folder / ARTIFACTS / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / ARTIFACTS / path).write_bytes(content)
    stored = {p: StoredFile(sha256=sha256_bytes(c), size=len(c)) for p, c in files.items()}
    details = Details(
        stage="train",
        files=stored,
        outputs=sorted(stored),
        witness={},
        host="there",
        snapshot=oid,
        pointer_md5=pointer,
        decision="no run of this key: trained",
    )
    (folder / ARTIFACTS / DETAILS).write_text(details.as_json())
    content = {
        "schema": "run1",
        "run_id": "a" * 32,
        "name": "lr=0.1",
        "status": "FINISHED",
        "started_ms": 1_700_000_000_000,
        "ended_ms": 1_700_000_060_000,
        "params": {"key": RECIPE.key, "lr": "0.1"},
        "tags": {"key": RECIPE.key, "device": "cpu"},
        "metrics": {"loss": [[0, 1_700_000_000_000, 2.0], [1, 1_700_000_001_000, "nan"]]},
        "datasets": [],
    }
    (folder / CONTENT).write_text(json.dumps(content))


@pytest.fixture
def package(ready: Ready, tmp_path: Path) -> Path:
    """A copy of the package's folder, to be tampered with."""
    return Path(shutil.copytree(ready.folder, tmp_path / "package"))


@pytest.fixture
def archive(ready: Ready, tmp_path: Path) -> Path:
    """The run's archive, untouched."""
    pack(ready.folder, ready.key, tmp_path / "run.zip")
    return tmp_path / "run.zip"


@pytest.fixture
def colleague(tmp_path: Path) -> Path:
    """Another checkout, with nothing in its cache."""
    return new_checkout(tmp_path / "colleague")


@pytest.fixture
def store(colleague: Path, empty_database: Path) -> Store:
    """The colleague's MLflow store, real and empty."""
    shutil.copy(empty_database, colleague / "mlflow.db")
    uri = f"sqlite:///{colleague / 'mlflow.db'}"
    return Store(uri, colleague / "mlartifacts", colleague / ".runkey")
