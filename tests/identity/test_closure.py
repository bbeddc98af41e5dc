"""Which files a stage can reach by import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RecipeError
from runkey.identity.code import (
    EXCLUDED,
    hash_files,
    import_closure,
    imported_files,
    undeclared,
)

REPOSITORY = Path(__file__).parents[2]


def test_every_way_of_importing_is_followed(project):
    assert import_closure("stages.train", project) == (
        "runkey/__init__.py",
        "runkey/late.py",
        "runkey/model/__init__.py",
        "runkey/model/deep/__init__.py",
        "runkey/model/deep/layer.py",
        "runkey/model/net.py",
        "stages/__init__.py",
        "stages/train.py",
    )


def test_relative_imports_go_up_by_their_dots(project):
    closure = import_closure("stages.prepare", project)
    assert {"runkey/data/coco.py", "runkey/data/boxes.py", "runkey/late.py"} <= set(closure)


def test_an_excluded_file_brings_in_nothing(project):
    assert "runkey/unused.py" not in import_closure("stages.train", project)
    everything = import_closure("stages.train", project, excluded=())
    assert {"runkey/tracking/log.py", "runkey/unused.py"} <= set(everything)


def test_a_circle_of_imports_ends(project):
    (project / "runkey/late.py").write_text("import runkey.model.net\n")
    (project / "runkey/model/deep/layer.py").write_text("import runkey.late\nwidth = 3\n")
    assert "runkey/late.py" in import_closure("stages.train", project)


def test_a_package_without_init_file_is_followed(project):
    (project / "runkey/plain").mkdir()
    (project / "runkey/plain/part.py").touch()
    (project / "stages/train.py").write_text("import runkey.plain.part as part\n")
    assert "runkey/plain/part.py" in import_closure("stages.train", project)


def test_hashes_are_of_what_python_does_and_not_of_bytes(project):
    before = hash_files(["runkey/data/coco.py"], project)
    (project / "runkey/data/coco.py").write_bytes(b"from . import boxes\r\n")
    assert hash_files(["runkey/data/coco.py"], project) == before
    (project / "runkey/data/coco.py").write_bytes(b"from . import boxes  # why\n")
    assert hash_files(["runkey/data/coco.py"], project) == before
    (project / "runkey/data/coco.py").write_bytes(b"from . import box\n")
    assert hash_files(["runkey/data/coco.py"], project) != before


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("stages.gone", "", "stages.gone: no such module in the repository; see `cmd` in dvc.yaml"),
        ("stages.train", "def f(:\n", "stages/train.py, line 1: invalid syntax"),
    ],
)
def test_faults_are_named(project, module, text, message):
    (project / "stages/train.py").write_text(text)
    with pytest.raises(RecipeError) as caught:
        import_closure(module, project)
    assert str(caught.value) == message


def test_what_was_really_imported_is_found_and_compared(project):
    """A real process that imports a module by a name made at run time: only this way is it seen."""
    (project / "stages/train.py").write_text(
        "import importlib, sys\n"
        "from pathlib import Path\n"
        f"sys.path.append({str(REPOSITORY)!r})\n"
        "import runkey.model.net\n"
        "importlib.import_module('runkey.' + 'unused')\n"
        "import runkey.tracking\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'runkey']:\n"
        "    sys.modules['kept.' + name] = sys.modules.pop(name)\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from runkey.identity.code import import_closure, imported_files, undeclared\n"
        "root = Path.cwd()\n"
        "files, _ = imported_files(root)\n"
        "print(*undeclared(files, import_closure('stages.train', root), root))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "stages.train"],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["runkey/unused.py"]


def test_the_exclude_list_names_what_exists_or_is_planned():
    """A renamed telemetry folder would silently enter the key."""
    planned = {"runkey/registry/"}
    missing = {entry for entry in EXCLUDED if not (REPOSITORY / entry).exists()}
    assert missing <= planned


def test_this_very_process_is_listed():
    files, _ = imported_files(REPOSITORY)
    assert "runkey/identity/code.py" in files
    assert not any(path.startswith(".venv") for path in files)
    assert all((REPOSITORY / path).is_file() for path in files)
    assert undeclared(["a.py", "runkey/cli/x.py"], ["b.py"], REPOSITORY) == ("a.py",)


def test_what_only_excluded_files_import_is_not_undeclared():
    files = ["runkey/identity/key.py", "runkey/hashing.py", "runkey/model/detr.py"]
    assert undeclared(files, [], REPOSITORY) == ("runkey/model/detr.py",)
    assert undeclared(files[1:], [], REPOSITORY) == tuple(files[1:])


@pytest.mark.parametrize(
    "call",
    [
        "importlib.import_module('runkey.unused')",
        "import_module('.unused', 'runkey')",
        "__import__('runkey.unused')",
        "from importlib import import_module as im\nim('runkey.unused')",
        "load = getattr(importlib, 'import_module')\nload('runkey.unused')",
        "import_module(name='.unused', package='runkey')",
        "for name in ('json', 'runkey.unused'):\n    import_module(name)",
        "import runpy\nrunpy.run_module('runkey.unused')",
        "from runkey.model.net import im\nim('runkey.unused')",
        "import pkgutil\npkgutil.resolve_name('runkey.unused')",
    ],
)
def test_a_module_that_a_literal_names_is_followed(project, call):
    (project / "runkey/late.py").write_text(
        f"import importlib\nfrom importlib import import_module\n{call}\n"
    )
    assert "runkey/unused.py" in import_closure("stages.train", project)


def test_a_text_that_names_a_module_counts_without_any_import_function(project):
    (project / "runkey/late.py").write_text(
        "from runkey.model.net import im\nim('runkey.unused')\n"
    )
    assert "runkey/unused.py" in import_closure("stages.train", project)
    (project / "runkey/late.py").write_text("'runkey.unused'  # 'runkey.unused'\n")
    assert "runkey/unused.py" not in import_closure("stages.train", project)


@pytest.mark.parametrize(
    "name", ["fast.cpython-312-x86_64-linux-gnu.so", "fast.abi3.so", "fast.pyc"]
)
def test_a_module_that_is_no_source_is_followed(project, name):
    """Python takes `fast.so` before `fast.py`."""
    (project / "runkey/late.py").write_text("import fast\n")
    (project / "fast.py").touch()
    (project / name).write_bytes(b"\x7fELF\r\n\xff")
    closure = import_closure("stages.train", project)
    assert {"fast.py", name} <= set(closure)
    before = hash_files(closure, project)
    (project / name).write_bytes(b"\x7fELF\r\n\xfe")
    assert [n for n, h in hash_files(closure, project).items() if h != before[n]] == [name]


def test_an_import_inside_any_statement_is_followed(project):
    (project / "stages/train.py").write_text(
        "async def f(x):\n"
        "    async with x:\n"
        "        match x:\n"
        "            case 1:\n"
        "                try:\n"
        "                    pass\n"
        "                except* ValueError:\n"
        "                    for _ in x:\n"
        "                        pass\n"
        "                    else:\n"
        "                        class A:\n"
        "                            import runkey.unused\n"
    )
    assert "runkey/unused.py" in import_closure("stages.train", project)


def test_a_package_put_before_the_locked_one_is_reported(project, tmp_path_factory):
    """As PYTHONPATH can: in the process itself, for only there it is seen."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "sortedcontainers.py").touch()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sortedcontainers\n"
            "from pathlib import Path\n"
            "from runkey.identity.code import imported_files\n"
            "print(*imported_files(Path.cwd())[1], sep='\\n')",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(elsewhere)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(elsewhere.resolve() / "sortedcontainers.py")]
