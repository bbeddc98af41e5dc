"""What is known of a recorded run: MLflow's part of it, and the details that the run wrote itself.

    record.json     the `Details`, an artifact of the MLflow run
    run.json        the `RunManifest`, an output of the stage: key, MLflow run, environment
    run_id          the `RunPointer`, in the training's folder: which MLflow run it logs to

`runkey.identity.record_cache` keeps both parts of every run, so that they are read without MLflow.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from runkey.errors import LockError, RecipeError
from runkey.files import FormatError, expect, parse_json, read_json, read_text, write_atomically
from runkey.hashing import sha256_file
from runkey.identity.code import imported_files, undeclared
from runkey.identity.environment import differences, installed_packages, read_requirements
from runkey.identity.key import ANY_SCHEMA, FILE_PARAMS, PARTS, SHORT, Recipe, short_key
from runkey.identity.pinned_weights import pinned_of
from runkey.paths import REQUIREMENTS

logger = logging.getLogger(__name__)

SCHEMA, MANIFEST_SCHEMA = "record1", "run1"
DETAILS = "record.json"
"""Artifact of the MLflow run that holds the `Details`."""
KEY_JSON = "model/key.json"
"""Artifact, and output of the train stage, that holds the recipe."""
REPRODUCES = "RUNKEY_REPRODUCES"
"""Environment variable: MLflow id of a finished run that the train stage repeats."""
REPRODUCES_SINCE = "RUNKEY_REPRODUCES_SINCE"
"""Environment variable: when an interrupted reproduction began, in ms since 1970; its training may
have been recorded since then."""
REPRODUCTION_OF = "reproduction_of"
"""Tag of such a repeat: the MLflow id of the run that it repeats."""
STARTED_FROM, STARTED_WEIGHTS = "started_from", "started_from.weights"
STARTED_PARAM = "started_from.param"
"""Tags: the fields of `StartedFrom`, key first."""
RESUMED, RESUMED_AFTER = "resumed", "resumed.after"
"""Tags: how often the training was resumed; after which steps, and when."""
HINT = "event.hint."
"""Prefix of the tags that hold hints; those of older runs are JSON with `seen` and `change`."""
CLASS_AP = "class_AP"
"""What stands before `/` in the metrics that hold the AP of a class each."""
SPLIT = "split"
"""Tag that names the split that the result is of, test or val; of older runs it is val."""
KEY = "key"
"""Name of the MLflow tag and param that hold the key; each part is the param `key.<part>`."""
NOT_KEPT = ("system/",)
"""Prefixes of metrics that are left out of records: samples of the machine."""

# The folder that carries a run from one store to another.
CONTENT = "run.json"
ARTIFACTS = "artifacts"
ORIGIN = "origin_run_id"
"""Tag of a copy: MLflow id of the original run, however often it was copied on."""

TAKEN = "taken"
"""Tag of a copy: how this store got it."""

POINTER = "run_id"
"""File name of the `RunPointer`."""
TOKEN = "mlflow.runkey.training"
"""Tag of an MLflow run that holds its training's token; MLflow's pages hide it."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class RunPointer:
    """The MLflow run of a training, and how much of the log it has."""

    uri: str
    """Of the store that the run was made in."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Chosen before the run is made, to find one whose id never arrived here."""
    run_id: str | None = None
    """None: not made yet, as far as is known."""
    sent: dict[str, int] = field(default_factory=dict)
    """By log name the bytes, all whole lines, that are certainly in MLflow."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the pointer in a training's folder, or None if there is no readable one."""
        with suppress(FileNotFoundError):
            try:
                found: Self = read_json(folder / POINTER, cls)
                if min(found.sent.values(), default=0) >= 0:
                    return found
                raise FormatError("sent: a negative number of bytes")
            except FormatError as error:
                logger.warning(
                    f"{folder / POINTER}: {error}; training goes on in the MLflow run that its"
                    " claim names, or else in a new one"
                )
        return None

    @classmethod
    def restore(cls, folder: Path, uri: str, run_id: str) -> Self | None:
        """Replace an unreadable pointer by one to a run of the store at `uri`; None without one.

        The whole log is sent again: MLflow keeps a value that arrives twice once.
        """
        if not (folder / POINTER).is_file():
            return None
        pointer = cls(uri, run_id=run_id)
        with suppress(OSError):  # the sender warns
            pointer.write(folder)
        return pointer

    def write(self, folder: Path) -> None:
        """Write it atomically to a training's folder."""
        write_atomically(folder / POINTER, json.dumps(asdict(self), sort_keys=True) + "\n")


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run as MLflow has it."""

    run_id: str
    experiment_id: str
    name: str
    """What differs from the baseline, such as `lr=5e-05`."""
    status: Status
    started_ms: int
    ended_ms: int | None
    artifact_uri: str
    params: dict[str, str]
    """Resolved parameters under dotted names, the key and its parts."""
    metrics: dict[str, float]
    """The last value of each, without those that are `NOT_KEPT`."""
    tags: dict[str, str]
    """Without MLflow's own (`mlflow.*`)."""

    @classmethod
    def from_mlflow(
        cls,
        info: Mapping[str, Any],
        params: Mapping[str, str],
        metrics: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> Self:
        """Return the run of MLflow's answer; numbers may come as text, such as NaN.

        The fields of `info` have the names of MLflow's REST interface.
        """
        status: Any = "RUNNING" if info["status"] == "SCHEDULED" else info["status"]
        ended = info.get("end_time")
        return cls(
            run_id=str(info["run_id"]),
            experiment_id=str(info["experiment_id"]),
            name=str(info.get("run_name") or tags.get("mlflow.runName", "")),
            status=status,
            started_ms=int(info["start_time"]),
            # MLflow keeps the time of the end when a run is resumed.
            ended_ms=int(ended) if ended and status != "RUNNING" else None,
            artifact_uri=str(info["artifact_uri"]),
            params=dict(sorted(params.items())),
            metrics={n: float(v) for n, v in sorted(metrics.items()) if not n.startswith(NOT_KEPT)},
            tags={n: v for n, v in sorted(tags.items()) if not n.startswith("mlflow.")},
        )

    @property
    def key(self) -> str:
        """`rk2-<64 hex digits>`; of older runs `rk1-`."""
        return self.params.get(KEY) or self.tags[KEY]

    @property
    def split(self) -> str:
        """The split that the result (`eval/AP`, the AP of classes) is of: test or val."""
        return self.tags.get(SPLIT, "val")

    @property
    def resumed(self) -> int:
        """How often the training was resumed."""
        times = self.tags.get(RESUMED, "")
        return int(times) if times.isdecimal() else 0

    @property
    def parts(self) -> dict[str, str]:
        """Hash of each part of the key."""
        return {part: self.params.get(f"{KEY}.{part}", "") for part in PARTS}


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that is kept with a run."""

    sha256: str
    size: int
    """In bytes."""


_WHOLE_KEY, _SHA256 = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class StartedFrom:
    """The weights that a training began with."""

    param: str
    """The parameter that names them: `model.init_from` or `model.backbone_weights`."""
    weights: str
    """sha256 of the weights file."""
    key: str | None
    """Of the run that wrote them, the parent; None: no such run was recorded where it trained."""

    def __post_init__(self) -> None:
        """Raise ValueError for a hash or a key that is none."""
        if not _SHA256.fullmatch(self.weights):
            raise ValueError(f"{self.weights[:80]!r} is no sha256")
        if self.key is not None and not _WHOLE_KEY.fullmatch(self.key):
            raise ValueError(f"{self.key[:80]!r} is no key")
        if self.param not in FILE_PARAMS:
            raise ValueError(f"{self.param[:80]!r} is none of {', '.join(FILE_PARAMS)}")

    @property
    def label(self) -> str:
        """The parent's short key, or the name or hash of the weights, for messages."""
        if self.key is None and (row := pinned_of(self.weights)):
            return row.name
        return short_key(self.key) if self.key else f"weights {self.weights[:SHORT]}"

    @property
    def about(self) -> str:
        """One line about the weights: published ones with their licence, others by their hash."""
        if row := pinned_of(self.weights):
            return row.about
        return f"sha256 {self.weights}{f' of {short_key(self.key)}' if self.key else ''}"

    @property
    def tags(self) -> dict[str, str | None]:
        """MLflow tags."""
        return {STARTED_FROM: self.key, STARTED_WEIGHTS: self.weights, STARTED_PARAM: self.param}


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a run records beside what MLflow has."""

    stage: str
    files: dict[str, StoredFile]
    """Every artifact but record.json by its path, which is that of a stage's output in the
    repository: `model/weights.pt`, `logs/train.jsonl`, `run.json`, `evaluation/metrics.json`."""
    outputs: list[str]
    """The files that the stage itself writes: what a reused run gives back."""
    witness: dict[str, Any]
    """`RunEnvironment` without its two long lists, packages and files."""
    host: str
    snapshot: str | None
    """Git commit that holds the tree that ran; None outside git."""
    pointer_md5: str | None
    """md5 of run.json, by which DVC's cache knows this run; None if DVC did not run it."""
    decision: str
    """Why it was trained, in one line."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics by the key of the stage `evaluate`."""
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """Results of `runkey reproduce`, oldest first; see `runkey.registry.reproduce`."""
    started_from: StartedFrom | None = None
    """None: from random or ImageNet weights, or a run of before this was recorded."""
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How far each exported model is from this one, by format and precision: `onnx-fp32`; see
    `runkey.pipeline.export.Parity`."""
    schema: str = SCHEMA

    def as_json(self) -> str:
        """Return the contents of record.json."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: str) -> Self:
        """Return what `as_json` wrote; RecipeError, which names `where`, if it is not whole."""
        if not isinstance(stored, Mapping):
            raise RecipeError(f"{where}: not a run's record (no JSON object)")
        _check_schema(stored.get("schema"), SCHEMA, where)
        try:
            made: Self = expect(cls, stored)
            json.dumps([made.witness, made.evaluations, made.exports], allow_nan=False)
        except ValueError as error:
            raise RecipeError(f"{where}: not a run's record ({error})") from None
        return made

    @classmethod
    def parse(cls, data: str | bytes, where: str) -> Self:
        """Return those in JSON text; see `from_dict`."""
        try:
            stored = parse_json(data)
        except FormatError as error:
            raise RecipeError(f"{where}: {error}") from None
        return cls.from_dict(stored, where)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return those in a file; see `from_dict`. RecipeError also if it cannot be read."""
        try:
            return cls.parse(read_text(path), str(path))
        except (FileNotFoundError, FormatError) as error:
            raise RecipeError(f"{path}: not readable ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A recorded run."""

    run: LoggedRun
    details: Details | None
    """None while it runs, or if it ended before it could write them."""

    @property
    def key(self) -> str:
        """`rk2-<64 hex digits>`; of older runs `rk1-`."""
        return self.run.key

    @property
    def is_whole(self) -> bool:
        """Whether it finished with all its files recorded, so that it can be reused."""
        return self.run.status == "FINISHED" and self.details is not None

    @property
    def reproduction_of(self) -> str | None:
        """MLflow id of the run that this one repeated."""
        return self.run.tags.get(REPRODUCTION_OF)

    @property
    def started_from(self) -> StartedFrom | None:
        """The weights that it began with; see `runkey.registry.lineage.origin` for older runs."""
        if self.details and self.details.started_from:
            return self.details.started_from
        tags = self.run.tags
        names = (STARTED_PARAM, STARTED_WEIGHTS)
        with suppress(ValueError):  # anybody may edit tags
            param, weights = (tags.get(name, "") for name in names)
            return StartedFrom(param=param, weights=weights, key=tags.get(STARTED_FROM))
        return None

    @property
    def label(self) -> str:
        """The short key, for messages."""
        return short_key(self.key)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON; the key first, for scripts."""
        return {"key": self.key, **asdict(self)}


def age(record: Record) -> tuple[int, str]:
    """Return a sort key: oldest first, in the same order everywhere."""
    return record.run.started_ms, record.run.run_id


def this_host() -> str:
    """Return this machine's name."""
    return platform.node() or "unknown"


def hashed_files(root: Path, places: Iterable[Path]) -> dict[str, StoredFile]:
    """Return hash and size by path of all files at some places of a workspace."""
    files: dict[str, StoredFile] = {}
    for place in places:
        top = root / place
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                name = path.relative_to(root).as_posix()
                files[name] = StoredFile(sha256=sha256_file(path), size=path.stat().st_size)
    return files


# --- run.json

_VARIABLES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONPATH")
KERNEL_VARIABLES = ("ATEN_", "DNNL_", "MKL_", "NPY_", "ONEDNN_", "OPENBLAS_")
"""Prefixes: choice of kernels, so of the order in which numbers are added."""
_ONLY_THREADS = re.compile("NUM_THREADS|VERBOSE")
_VECTOR_FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16"),
)
_FAMILIES = (
    *KERNEL_VARIABLES,
    *("OMP_", "GOMP_", "KMP_"),
    *("TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVIDIA_", "TORCHINDUCTOR_"),
)
"""Prefixes: threads, kernels and precision of arithmetic, search paths of libraries."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run computes on, and how."""

    device: str
    """Kind and name, such as `cpu x86_64` or `cuda NVIDIA H200`."""
    micro_batch: int
    """Images per forward pass."""
    world_size: int
    """Training processes."""
    threads: int
    """Threads of one process's operators."""
    precision: str = "off"
    """Mixed precision that was used: off, bf16 or fp16."""
    cpu: str = ""
    """See `describe_cpu`; empty in older runs."""


def describe_cpu(capability: str) -> str:
    """Describe what decides how this machine's CPU rounds: instructions, model, variables.

    Such as `AVX2: Intel(R) Xeon(R) CPU @ 2.20GHz (avx2 fma avx512f), ATEN_CPU_CAPABILITY=avx2`.

    Args:
        capability: the instruction set that torch's own kernels use. Those of oneDNN and MKL follow
            from the CPU's flags and model.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    fields = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in reversed(text.splitlines()))
    }
    flags = [flag for flag in _VECTOR_FLAGS if flag in fields.get("flags", "").split()]
    model = fields.get("model name") or platform.processor() or platform.machine()
    chosen = {n: v for n, v in sorted(os.environ.items()) if v and n.startswith(KERNEL_VARIABLES)}
    variables = (f"{n}={v}" for n, v in chosen.items() if not _ONLY_THREADS.search(n))
    return ", ".join([f"{capability}: {model} ({' '.join(flags)})", *variables])


@dataclass(frozen=True, kw_only=True)
class RunEnvironment(Hardware):
    """What a run really ran with; not part of the key."""

    interpreter: str
    """Such as `CPython 3.12.13 Linux x86_64`."""
    packages: dict[str, str]
    """Version by name of every installed package."""
    package_differences: list[str]
    """Differences from requirements.txt, such as `numpy: locked 2.5.1, installed 2.4.0`."""
    files: list[str]
    """The imported files of the repository."""
    undeclared_files: list[str]
    """Imported files that the key does not cover; files from outside the repository and the locked
    packages with their whole path."""
    commit: str | None
    """Checked-out git commit; None outside git."""
    dirty: bool
    """Whether tracked files differed from it."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that can change the last bits of a result."""


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """The contents of run.json."""

    key: str
    stage: str
    parts: dict[str, str]
    """Hash of each part of the key."""
    run_id: str | None
    """MLflow run; None if it was not logged there."""
    witness: RunEnvironment
    started_from: StartedFrom | None = None
    schema: str = field(default=MANIFEST_SCHEMA)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False)
        write_atomically(path, text + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest; RecipeError if it is missing, is not JSON, or holds other fields."""
        try:
            stored = read_json(path)
            if isinstance(stored, dict) and "schema" in stored:
                _check_schema(stored["schema"], MANIFEST_SCHEMA, str(path))
            made: Self = expect(cls, stored)
        except FileNotFoundError:
            raise RecipeError(f"{path}: not found; `dvc repro train` writes it") from None
        except FormatError as error:
            way_out = f"`dvc checkout {path.name}` restores it"
            raise RecipeError(f"{path}: not a run's manifest ({error}); {way_out}") from None
        return made


def _check_schema(found: object, schema: str, where: str) -> None:
    if found != schema:
        raise RecipeError(f"{where}: schema {found!r}; this runkey reads {schema}")


def capture_environment(root: Path, recipe: Recipe, hardware: Hardware) -> RunEnvironment:
    """Return the environment of this process; call it at the end, when all is imported."""
    packages = installed_packages()
    try:
        package_differences = differences(read_requirements(root / REQUIREMENTS), packages)
    except LockError as error:
        # A copy of the code alone, on a bare GPU machine, is no reason to stop.
        package_differences = [str(error)]
    files, foreign = imported_files(root)
    code = recipe.preimages["code"]
    return RunEnvironment(
        **asdict(hardware),
        interpreter=f"{platform.python_implementation()} {platform.python_version()}"
        f" {platform.system()} {platform.machine()}",
        packages=packages,
        package_differences=package_differences,
        files=files,
        undeclared_files=[*undeclared(files, code["files"], root, code["excluded"]), *foreign],
        commit=_git(root, "rev-parse", "HEAD"),
        dirty=bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        variables={n: value for n, value in sorted(os.environ.items()) if value and _counts(n)},
    )


def _counts(variable: str) -> bool:
    named = variable in _VARIABLES or variable.startswith(_FAMILIES)
    # The folder of compiled kernels changes no result, and torch sets it itself.
    return named and not variable.endswith("_CACHE_DIR")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
