"""The packages of `make env-export`: imported where they are, named where they are not."""

import sys
from pathlib import Path

import pytest

from runkey.errors import LockError
from runkey.inference import extras
from runkey.inference.extras import import_extra

REPOSITORY = Path(__file__).parents[2]
INSTALLED = next(REPOSITORY.glob(".venv-export/lib/python3*/site-packages"), None)


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.skipif(INSTALLED is None, reason="`make env-export` installs them")
def test_packages_come_from_venv_export_and_their_own_from_this_environment(monkeypatch):
    before = [*sys.path]
    runtime = import_extra("onnxruntime")
    assert Path(runtime.__file__).is_relative_to(INSTALLED)
    assert import_extra("onnxruntime") is runtime
    assert sys.path in ([*before, str(INSTALLED)], before)
    numpy = import_extra("numpy")
    assert not Path(numpy.__file__).is_relative_to(INSTALLED)


def folder_with(tmp_path, monkeypatch, **files):
    """A repository whose .venv-export holds these modules."""
    site = tmp_path / ".venv-export/lib/python3.12/site-packages"
    site.mkdir(parents=True)
    for name, text in files.items():
        (site / f"{name}.py").write_text(text)
    monkeypatch.setattr(extras, "_REPOSITORY", tmp_path)


@pytest.mark.parametrize("module", ["not_there_at_all", "not_there_at_all.part"])
def test_a_package_that_is_nowhere_is_named_with_the_way_out(module, tmp_path, monkeypatch):
    folder_with(tmp_path, monkeypatch)
    with pytest.raises(LockError) as caught:
        import_extra(module)
    assert str(caught.value) == "not_there_at_all is not installed; run `make env-export`"


def test_a_package_that_does_not_load_says_why(tmp_path, monkeypatch):
    folder_with(tmp_path, monkeypatch, half_there="import not_there_at_all")
    with pytest.raises(LockError, match=r"half_there does not load \(No module named 'not_the"):
        import_extra("half_there")


def test_a_module_of_the_folder_is_found(tmp_path, monkeypatch):
    folder_with(tmp_path, monkeypatch, whole_there="value = 7")
    assert import_extra("whole_there").value == 7
