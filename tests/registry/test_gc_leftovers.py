"""`runkey gc`: claims that were replaced, worktrees that nobody works in, half-written files."""

import os
import subprocess
import sys
import time
import venv
from dataclasses import replace

from runkey.registry.claims import this_owner
from tests.support.collectable import KEY, held
from tests.support.records import key_of, make_run


def test_claims_that_newer_ones_replaced(house, gone):
    house.claim(generation=1, owner=gone)
    house.claim(generation=2, state="failed")
    house.claim(generation=3, owner=gone)
    far = replace(this_owner(), boot="another machine")
    house.claim(key_of("two"), generation=1, owner=far)
    house.claim(key_of("two"), generation=2)
    names = [item.name for item in house.items()]
    assert names == [f"{KEY[:16]}.g1", f"{KEY[:16]}.g2"]
    house.apply()
    assert [claim.generation for claim in house.claims.of(KEY)] == [3]


def test_the_claim_that_shows_a_run_dead_stays_with_it(house, gone):
    make_run(house.root, KEY, "b" * 32, status="RUNNING", with_details=False)
    house.claim(generation=1, owner=gone, run_id="b" * 32)
    house.claim(generation=2)
    house.folder(KEY)  # from which the run can go on, so it stays
    assert house.items() == []


def test_worktrees_nobody_works_in(house):
    ended, used, unknown = map(house.worktree, ("rk2-ended-1", "rk2-used-2", "rk2-unknown-3"))
    with held(ended):
        assert house.items() == []
    with held(used):
        assert house.offered() == {("worktree", "reproduce/rk2-ended-1")}
        later = time.time() + 7200
        assert len(house.offered(now=later)) == 2  # the unknown one has stood still for long
        command = [sys.executable, "-c", "input()"]
        child = subprocess.Popen(command, cwd=ended, stdin=subprocess.PIPE)
        try:
            assert house.items() == []  # DVC goes on when `runkey reproduce` alone is killed
        finally:
            child.communicate(b"\n", timeout=20)
        house.apply()
    assert not ended.exists()
    listed = house.repository.git("worktree", "list")
    assert "rk2-ended-1" not in listed
    assert "rk2-used-2" in listed
    assert unknown.exists()


def test_environments_that_no_trial_uses(house):
    path = house.folder("environments/0123456789ab")
    venv.create(path / "packages", symlinks=True)
    (path / "lock").touch()
    python = path / "packages/bin/python"
    assert house.items() == []  # a trial began within the hour
    os.utime(path / "lock", (0, 0))
    child = subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert house.items() == []
    finally:
        child.communicate(b"\n", timeout=20)
    assert house.offered() == {("environment", "environments/0123456789ab")}
    house.apply()
    assert not path.exists()


def test_a_worktree_that_git_does_not_know_goes_too(house):
    path = house.folder("reproduce/rk2-lost-1")
    with held(path):
        assert house.items() == []
    house.apply()
    assert not path.exists()


def test_half_written_files_of_long_ago(house, tmp_path):
    elsewhere = tmp_path / "elsewhere"  # of a database that MLFLOW_TRACKING_URI names
    house.home = elsewhere / ".runkey"
    make_run(elsewhere, KEY, "a" * 32)
    old = [
        house.home / "runs/.abc.123",
        house.home / "claims/.claim.9f",
        house.root / ".runkey-x1/0",
        house.home / ".fetch-x1/0",
        house.root / ".run.json.77",
        elsewhere / ".runkey-x1/mlflow.db",
    ]
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
        os.utime(path, (1e9, 1e9))
        if path.parent.name.endswith("-x1"):
            os.utime(path.parent, (1e9, 1e9))
    (house.home / "runs/.now.5").write_text("{")
    assert len(house.items()) == 6
    house.apply()
    assert not any(path.exists() for path in old)
    assert (house.home / "runs/.now.5").exists()


def test_what_a_killed_export_leaves_is_named_at_once(house):
    code = (
        "import os, sys; from pathlib import Path; from runkey.files import replacing\n"
        "from runkey.registry.package import staging\n"
        "root = Path(sys.argv[1])\n"
        "with staging(root / '.runkey', 'export') as folder, replacing(root / 'run.zip') as file:\n"
        "    (folder / 'part').write_bytes(bytes(1000)); file.write(b'x'); file.flush()\n"
        "    print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(house.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert house.items() == []
        process.kill()
    (item,) = house.items()
    assert (item.kind, item.size) == ("leftover", 1000)
    assert ".export-" in item.name
    (archive,) = (i for i in house.items(now=time.time() + 4000) if "run.zip" in i.name)
    archive.remove()
    item.remove()
    assert house.items(now=time.time() + 4000) == []


def test_decoded_images_that_were_not_used_lately(house):
    folder = house.home / "decoded"
    folder.mkdir(parents=True)
    for name in ("a.npy", "b.npy", ".c.npy.999999999-0123abcd"):
        (folder / name).write_bytes(bytes(1000))
    os.utime(folder / "a.npy", (1e9, 1e9))
    os.utime(folder / ".c.npy.999999999-0123abcd", (1e9, 1e9))
    assert {(item.kind, item.size) for item in house.items()} == {
        ("images", 1000),
        ("leftover", 1000),
    }
    house.apply()
    assert [path.name for path in folder.iterdir()] == ["b.npy"]


def test_copies_of_weights_that_their_run_still_has(house):
    files = {"model/weights.safetensors": b"weights"}
    record = make_run(house.root, KEY, files=files)
    digest = record.details.files["model/weights.safetensors"].sha256
    copy, lost = (house.folder(f"initial/{name}") for name in (digest[:16], "0" * 16))
    for folder in (copy, lost):
        (folder / "model").mkdir()
        (folder / "model/weights.safetensors").write_bytes(b"weights")
    assert house.items() == []  # a training may be reading it
    later = time.time() + 7200
    assert house.offered(now=later) == {("weights", f"initial/{copy.name}")}
    (
        house.root / "mlartifacts" / record.run.run_id / "artifacts/model/weights.safetensors"
    ).unlink()
    assert house.offered(now=later) == set()
