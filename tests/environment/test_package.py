"""The package `runkey`: what it declares, what its wheel holds, and that the wheel works."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import runkey
from runkey.identity.environment import normalise_name, python_pins, read_lock
from tests.support.records import key_of, make_run
from tests.support.small_model import photograph

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
UV = (sys.executable, "-m", "uv")
OFFLINE = ("--offline", "--quiet")
SOURCES = ("runkey", "pyproject.toml", "README.md", "LICENSE")
FIRST_PARTY = {"runkey", "stages"}
# Needed without an import: remotes on S3, a GPU's numbers in MLflow.
NOT_IMPORTED = {"dvc-s3", "nvidia-ml-py"}
# mlflow's own HTTP client, which `runkey.tracking.mlflow_http` limits; `make env-convert`.
PROVIDED = {"requests": "mlflow-skinny", "urllib3": "requests"}
OPTIONAL = {"globox": "convert", "onnxruntime": "export", "optuna": "search"}
"""The folder in environment/ that pins each."""
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def declared():
    """Range by name of the dependencies in pyproject.toml."""
    found = [re.match(r"[\w.-]+", text) for text in PYPROJECT["project"]["dependencies"]]
    return {normalise_name(m[0]): m.string[m.end() :] for m in found}


def runtime_imports():
    """Top-level names that commands and stages import, without standard library and first party."""
    names = set()
    for folder in (*FIRST_PARTY, "sample-data"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - FIRST_PARTY


def test_what_is_imported_is_what_is_declared():
    providers = importlib.metadata.packages_distributions()
    unknown, used = set(), set()
    for name in runtime_imports():
        packages = {normalise_name(package) for package in providers.get(name, ())}
        used |= packages & set(declared())
        if not packages & set(declared()):
            unknown.add(name)
    assert unknown == {*PROVIDED, *OPTIONAL}, "not declared in pyproject.toml"
    for name, package in PROVIDED.items():
        assert any(re.match(rf"{name}\b", one) for one in importlib.metadata.requires(package))
    for name, folder in OPTIONAL.items():
        pins = REPOSITORY / "environment" / folder / "requirements.txt"
        assert f"{name}==" in pins.read_text()
    assert set(declared()) - used <= NOT_IMPORTED, "declared and not imported"


def test_environment_yml_names_the_declared_packages_in_the_same_ranges_and_the_lock_has_them():
    listed = {}
    for line in YAML(typ="safe").load(REPOSITORY / "environment.yml")["dependencies"]:
        name = re.match(r"[\w.-]+?(?=[<>=]|$)", line)[0]
        listed[name] = line.removeprefix(name)
    for name, bounds in declared().items():
        conda = next(n for n in listed if normalise_name(n) == CONDA_NAMES.get(name, name))
        # `=2.10.*=cuda*`: conda's single = and the build beside the version
        wanted = re.sub(r"^=(?!=)", "==", listed[conda].removesuffix("=cuda*"))
        assert bounds == wanted, name
    assert set(declared()) <= set(python_pins(read_lock(REPOSITORY / "conda-lock.yml")))
    assert PYPROJECT["project"]["requires-python"] == ">=3.12,<3.13"
    assert listed["python"] == "=3.12"


def outside(*command, cwd, **environment):
    """Run a command as someone would in another project's folder."""
    strange = ("PYTHONPATH", "DVC_ROOT", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in strange}
    return subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the working tree by the locked setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SOURCES],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in listed:
        if (REPOSITORY / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes((REPOSITORY / name).read_bytes())
    into = ("--python", sys.executable, "--out-dir", folder)
    done = subprocess.run(
        [*UV, "build", "--wheel", *OFFLINE, "--no-build-isolation", *into, folder / "copy"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_with_its_templates_and_nothing_else(wheel):
    assert wheel.name == f"runkey-{runkey.__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "runkey"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert names == {name for name in listed if (REPOSITORY / name).is_file()}
    assert any(not name.endswith(".py") for name in names)


def install(wheel, folder):
    """An environment with the wheel; what it needs comes from the one that runs the tests."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    # Its .pth files are not read: a project installed there in editable form is not seen.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*UV, "pip", "install", *OFFLINE, "--no-deps", "--python", folder / "bin/python", wheel],
        check=True,
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("installed") / "environment")


IMPORTED = """\
import sys, runkey, runkey.registry.library, runkey.identity.key
print(runkey.__version__, runkey.__file__)
print([name for name in ("torch", "mlflow", "dvc", "stages") if name in sys.modules])
"""


def test_the_wheel_works_in_another_projects_folder_and_imports_neither_torch_nor_mlflow(
    programs, tmp_path
):
    done = outside(programs / "python", "-c", IMPORTED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, none = done.stdout.splitlines()
    assert version.startswith(f"{runkey.__version__} {programs.parent}")
    assert none == "[]"
    said = outside(programs / "runkey", "--version", cwd=tmp_path)
    assert said.stdout == f"runkey {runkey.__version__}\n"


def test_import_runkey_imports_nothing_else(programs, tmp_path):
    code = "import sys; before = set(sys.modules); import runkey; print(set(sys.modules) - before)"
    done = outside(programs / "python", "-c", code, cwd=tmp_path)
    assert ast.literal_eval(done.stdout) == {"runkey", "runkey.version"}


def test_runkey_list_outside_of_any_repository(programs, tmp_path):
    command = (programs / "runkey", "list")
    done = outside(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: no folder with params.yaml and stages/ at or above {tmp_path}; change to a folder"
        " of the repository, or set MLFLOW_TRACKING_URI to a server's address or"
        " sqlite:////full/path/mlflow.db\n"
    )
    store = tmp_path / "store"
    done = outside(*command, cwd=tmp_path, MLFLOW_TRACKING_URI=f"sqlite:///{store}/mlflow.db")
    assert (done.returncode, done.stdout) == (0, f"no run in {store}/.runkey/runs.sqlite\n")
    done = outside(*command, cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.stderr.startswith("error: http://127.0.0.1:9: cannot be reached")
    relative = outside(*command, cwd=tmp_path, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    assert relative.stderr.startswith("error: no folder with params.yaml")
    assert list(tmp_path.iterdir()) == []


LOADED = """\
import sys, runkey
model = runkey.load(sys.argv[1])
found = model([sys.argv[2], open(sys.argv[2], "rb").read()], score=0)
print(runkey.__file__)
print([len(one) for one in found], found[0].image_size, "ball" in found[0].names)
print((found[0].boxes_xyxy == found[1].boxes_xyxy).all())
"""


def test_a_model_is_loaded_by_its_key_in_an_empty_folder(programs, small_model_folder, tmp_path):
    key, store, here = key_of("a"), tmp_path / "store", tmp_path / "empty"
    files = {f"model/{path.name}": path.read_bytes() for path in small_model_folder.iterdir()}
    make_run(store, key, files=files)
    here.mkdir()
    photograph(1).save(tmp_path / "a.png")
    address = f"sqlite:///{store}/mlflow.db"
    command = (programs / "python", "-c", LOADED, key[:12], tmp_path / "a.png")
    done = outside(*command, cwd=here, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stderr
    place, *answers = done.stdout.splitlines()
    assert place.startswith(str(programs.parent))
    assert answers == ["[24, 24] (60, 80) True", "True"]
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_the_types_of_the_package_are_seen_by_mypy(programs, tmp_path):
    mypy = REPOSITORY / ".venv-tools/bin/mypy"
    if not mypy.exists():
        pytest.skip("`make env-tools` installs mypy")
    (tmp_path / "use.py").write_text(
        "import runkey\nmodel = runkey.load('model')\nreveal_type(model('a.jpg'))\n"
        "reveal_type(model(['a.jpg']))\n"
    )
    command = (mypy, "--python-executable", programs / "python", "use.py")
    done = outside(*command, cwd=tmp_path)
    shown = re.findall(r'Revealed type is "(.*)"', done.stdout)
    name = "runkey.inference.detections.Detections"
    assert shown == [name, f"list[{name}]"], done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_in_an_empty_environment_with_the_locked_requirements(wheel, tmp_path):
    """As someone would: dependencies are resolved, by what requirements.txt has installed alone."""
    folder = tmp_path / "environment"
    python = folder / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    locked = ["--require-hashes", "--python", python, REPOSITORY / "requirements.txt"]
    subprocess.run([*UV, "pip", "sync", "--quiet", *locked], check=True)
    alone = ["--offline", "--no-index", "--python", python, wheel]
    subprocess.run([*UV, "pip", "install", "--quiet", *alone], check=True)
    subprocess.run([*UV, "pip", "check", "--quiet", "--python", python], check=True)
    done = outside(folder / "bin/runkey", "--version", cwd=tmp_path)
    assert done.stdout == f"runkey {runkey.__version__}\n"
    done = outside(folder / "bin/runkey", "env", "check", cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
    address = f"sqlite:///{tmp_path}/mlflow.db"
    done = outside(folder / "bin/runkey", "list", cwd=tmp_path, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stderr
