"""The packages of the lock, and what is really installed beside them."""

from pathlib import Path

import pytest

from runkey.errors import LockError
from runkey.identity.environment import (
    LockedPackage,
    differences,
    environment_preimage,
    installed_packages,
    normalise_name,
    python_pins,
    read_lock,
    read_requirements,
)

REPOSITORY = Path(__file__).parents[2]


def test_the_repositorys_lock_is_read_whole():
    packages = read_lock(REPOSITORY / "conda-lock.yml")
    assert len(packages) == (REPOSITORY / "conda-lock.yml").read_text().count("\n- name: ")
    assert all(p.version and p.build and ":" in p.hash for p in packages)
    torch = next(p for p in packages if p.name == "pytorch")
    assert torch.version.startswith("2.10.")
    assert torch.build.startswith("cuda129_")
    assert environment_preimage(REPOSITORY / "conda-lock.yml")["packages"] == sorted(
        p.row() for p in packages
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "conda-lock.yml: not found; `git checkout conda-lock.yml` restores it"),
        ("a: ]", "conda-lock.yml: not YAML at line 1; `git checkout conda-lock.yml` restores it"),
        ("version: 1\n", "conda-lock.yml: holds no packages; `make lock` writes it anew"),
        ("package: []\n", "conda-lock.yml: holds no packages for linux-64"),
        ("package: [{name: a}]\n", "conda-lock.yml: a package entry lacks 'platform'"),
    ],
)
def test_a_wrong_lock_is_named(tmp_path, text, message):
    path = tmp_path / "conda-lock.yml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LockError) as caught:
        read_lock(path)
    assert str(caught.value).startswith(message)


def test_requirements_are_read_without_their_hashes(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# a==0\nRuamel.YAML==0.18.16 \\\n    --hash=sha256:00\nb==2.0.post1\n")
    assert read_requirements(path) == {"ruamel-yaml": "0.18.16", "b": "2.0.post1"}
    path.write_text("numpy\n")
    with pytest.raises(LockError, match="pins no package"):
        read_requirements(path)
    with pytest.raises(LockError, match="not found"):
        read_requirements(tmp_path / "gone.txt")


def test_differences_name_both_versions():
    locked = {"a": "1", "b": "2", "c": "3"}
    assert differences(locked, {"a": "1", "b": "1", "extra": "9"}) == [
        "b: locked 2, installed 1",
        "c: locked 3, installed none",
    ]


def test_installed_packages_are_this_interpreters():
    assert installed_packages()["pytest"] == pytest.__version__


def test_pins_follow_the_tables():
    packages = [
        LockedPackage("pytorch", "2.10.0", "b", "sha256:0", needs_python=True),
        LockedPackage("mlflow-skinny", "3.16.0", "b", "sha256:0", needs_python=True),
        LockedPackage("triton", "3.5.1", "b", "sha256:0", needs_python=True),
        LockedPackage("uv", "0.12.1", "b", "sha256:0"),
        LockedPackage("zlib", "1.3", "b", "sha256:0"),
        LockedPackage("ruamel.yaml", "0.18", "b", "sha256:0", needs_python=True),
    ]
    assert python_pins(packages) == {
        "mlflow-skinny": "3.16.0",
        "mlflow-tracing": "3.16.0",
        "ruamel-yaml": "0.18",
        "torch": "2.10.0",
        "uv": "0.12.1",
    }
    assert normalise_name("A_b.-c") == "a-b-c"
