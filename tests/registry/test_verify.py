"""Whatever is changed, deleted or torn is named, and nothing crashes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.hashing import sha256_bytes
from runkey.identity import pinned_weights
from runkey.identity.pinned_weights import IMAGENET
from runkey.identity.record import DETAILS, StartedFrom
from runkey.registry.dvc_cache import DvcCache, files_of
from runkey.registry.library import LocalLibrary
from runkey.registry.verify import Report, Sources, _check_initial_weights
from tests.support.recorded_checkout import FILES, Checkout
from tests.support.records import write_record


def faults(checkout: Checkout, **options: bool) -> list[tuple[str, str]]:
    """Check and text of every fault."""
    return [(f.check, f.text) for f in checkout.verify(**options).of("fault")]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(path.stat().st_mode | stat.S_IWUSR)
    path.write_bytes(bytes(content))


def write(checkout: Checkout, statement: str, *values: object) -> None:
    """Change MLflow's database behind its back."""
    with closing(sqlite3.connect(checkout.root / "mlflow.db")) as database, database:
        assert database.execute(statement, values).rowcount


def test_a_whole_run_is_right(checkout: Checkout) -> None:
    report = checkout.verify()
    assert report.is_right
    assert [(f.check, f.state) for f in report.findings] == [
        (check, "ok")
        for check in ("files", "key", "mlflow", "snapshot", "dvc cache", "environment")
    ]
    assert report.summary == "no faults"


@pytest.mark.parametrize("place", [0, 0.5, 1])
@pytest.mark.parametrize("name", [*FILES, DETAILS])
def test_a_flipped_byte_names_the_file(checkout: Checkout, name: str, place: float) -> None:
    path = checkout.artifacts / name
    flip(path, round(place * (path.stat().st_size - 1)))
    found = faults(checkout)
    assert found
    assert found[0][0] == "files"
    assert found[0][1].startswith(f"{name}: ")
    assert checkout.record.run.run_id in found[0][1]
    # Only what is read for another check is named there too.
    assert {text.split(":")[0] for _, text in found} == {name}


def test_every_single_bit_of_a_file(checkout: Checkout) -> None:
    path = checkout.artifacts / "metrics/train.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        assert [text.split(":")[0] for _, text in faults(checkout)] == ["metrics/train.json"]
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*FILES, DETAILS])
def test_a_missing_file_is_named(checkout: Checkout, name: str) -> None:
    (checkout.artifacts / name).unlink()
    assert any(c == "files" and t.startswith(f"{name}: ") for c, t in faults(checkout))


def test_the_way_out_of_a_damaged_output_is_dvcs_copy(checkout: Checkout) -> None:
    path = checkout.artifacts / "model/weights.pt"
    flip(path, 7)
    (fault,) = checkout.verify().of("fault")
    source = fault.way_out.split()[-3]
    shutil.copyfile(source, path)
    assert checkout.verify().is_right


def test_all_artifacts_gone(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / "mlartifacts")
    found = dict(faults(checkout))
    assert "none of its 6 files can be read" in found["files"]
    assert set(found) == {"files", "key"}


def test_quick_looks_at_sizes_only(checkout: Checkout) -> None:
    path = checkout.artifacts / "model/weights.pt"
    flip(path, 7)
    assert faults(checkout, quick=True) == []
    path.write_bytes(path.read_bytes()[:-1])
    assert [text.split(":")[0] for _, text in faults(checkout, quick=True)] == ["model/weights.pt"]


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DELETE FROM runs", "is not in MLflow"),
        ("UPDATE runs SET lifecycle_stage = 'deleted'", "is not in MLflow"),
        ("UPDATE runs SET status = 'RUNNING'", "status RUNNING, recorded FINISHED"),
        ("UPDATE params SET value = 'x' WHERE key = 'lr'", "param lr is x, recorded 0.001"),
        ("DELETE FROM params WHERE key = 'key'", "param key is missing"),
        ("DELETE FROM params WHERE key = 'key.code'", "param key.code is missing"),
        ("DELETE FROM tags WHERE key = 'key'", "tag key is missing"),
        ("DELETE FROM latest_metrics WHERE key = 'eval/AP'", "metrics of its evaluation are missi"),
        ("UPDATE latest_metrics SET value = 1 WHERE key = 'eval/AP'", "metric eval/AP is 1.0"),
    ],
)
def test_what_is_gone_from_mlflow_is_named(checkout: Checkout, statement: str, named: str) -> None:
    write(checkout, statement)
    found = faults(checkout)
    assert {check for check, _ in found} == {"mlflow"}
    assert any(named in text and checkout.record.run.run_id in text for _, text in found), found


@pytest.mark.parametrize(
    "content", [None, b"", b"no database at all" * 100], ids=["missing", "empty", "torn"]
)
def test_a_lost_database(checkout: Checkout, content: bytes | None) -> None:
    database = checkout.root / "mlflow.db"
    database.unlink()
    if content is not None:
        database.write_bytes(content)
    ((check, text),) = faults(checkout)
    assert check == "mlflow"
    assert str(database) in text


def test_a_deleted_snapshot_ref_is_named_and_mended(checkout: Checkout) -> None:
    ref = checkout.git("for-each-ref", "--format=%(refname)", "refs/runkey")
    checkout.git("update-ref", "-d", ref)
    (fault,) = checkout.verify().of("fault")
    assert fault.check == "snapshot"
    assert ref in fault.text
    checkout.git(*fault.way_out.strip("`").split()[1:])
    assert checkout.verify().is_right


def test_a_lost_snapshot_is_named(checkout: Checkout) -> None:
    oid = "1" * 40
    checkout.change_details(snapshot=oid)
    ((check, text),) = faults(checkout)
    assert (check, text) == ("snapshot", f"commit {oid[:12]} is not in git here")
    # On a team's server it may be another machine's.
    checkout.change_details(host="elsewhere")
    report = checkout.verify(is_shared=True)
    assert report.is_right
    assert [f.check for f in report.of("warning")] == ["snapshot"]


def test_a_snapshot_of_other_code_is_named_by_file(checkout: Checkout) -> None:
    (checkout.root / "stages" / "train.py").write_text("print('other')\n")
    (checkout.root / "stages" / "__init__.py").unlink()
    checkout.git("commit", "-q", "-a", "-m", "other", "--author", "T <t@example.org>")
    oid = checkout.git("rev-parse", "HEAD")
    checkout.git("update-ref", f"refs/runkey/{checkout.record.key}/{oid[:12]}", oid)
    checkout.change_details(snapshot=oid)
    assert faults(checkout) == [
        ("snapshot", f"commit {oid[:12]}: stages/__init__.py is not in it"),
        ("snapshot", f"commit {oid[:12]}: stages/train.py is another one in it"),
    ]


def test_a_torn_git_object_is_a_fault_of_the_snapshot(checkout: Checkout) -> None:
    blob = checkout.git("rev-parse", f"{checkout.details.snapshot}:stages/train.py")
    path = checkout.root / ".git" / "objects" / blob[:2] / blob[2:]
    path.chmod(0o600)
    path.write_bytes(b"torn")
    assert [check for check, _ in faults(checkout)] == ["snapshot"]


def test_a_repository_without_git(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".git")
    report = checkout.verify()
    assert report.is_right
    assert [f.check for f in report.of("warning")] == ["snapshot"]


def test_a_deleted_dvc_entry_is_named(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".dvc" / "cache" / "runs")
    ((check, text),) = faults(checkout)
    assert check == "dvc cache"
    assert str(checkout.details.pointer_md5) in text


def test_a_torn_dvc_entry_counts_as_none(checkout: Checkout) -> None:
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(checkout.details.pointer_md5 or "")
    assert entry
    path = cache.runs / entry.path
    path.write_bytes(path.read_bytes().replace(b"cmd:", b"}{"))
    assert [check for check, _ in faults(checkout)] == ["dvc cache"]


@pytest.mark.parametrize("deed", ["delete", "flip"])
def test_each_object_of_dvcs_cache(checkout: Checkout, deed: str) -> None:
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(checkout.details.pointer_md5 or "")
    assert entry
    files = files_of(entry.outs, cache.listing)
    assert set(files) == {*OUTPUT_OBJECTS}
    for name, md5 in files.items():
        place = cache.object_path(md5)
        content = place.read_bytes()
        place.chmod(0o600)
        if deed == "delete":
            place.unlink()
        else:
            flip(place, 3)
        found = [text for check, text in faults(checkout) if check == "dvc cache"]
        assert [text.split(":")[0] for text in found] == [name]
        place.write_bytes(content)
    assert checkout.verify().is_right


OUTPUT_OBJECTS = ("model/", "model/weights.pt", "model/key.json", "run.json", "metrics/train.json")


def test_dvc_settings_that_cannot_be_read(checkout: Checkout) -> None:
    (checkout.root / ".dvc" / "config.local").write_text("no settings\n")
    assert [check for check, _ in faults(checkout)] == ["dvc cache"]


def test_a_repeat_and_a_run_without_dvc_need_no_entry(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".dvc")
    checkout.change_details(pointer_md5=None)
    assert checkout.verify().is_right


def test_what_was_otherwise_when_it_ran_is_a_warning(checkout: Checkout) -> None:
    told = {"package_differences": ["numpy: locked 2, installed 1"], "undeclared_files": ["a.py"]}
    checkout.change_details(witness=checkout.details.witness | told)
    report = checkout.verify()
    assert report.is_right
    texts = [f.text for f in report.of("warning")]
    assert "numpy: locked 2, installed 1" in texts[0]
    assert texts[1] == "a.py was imported, and is no part of the key"
    assert report.summary == "no faults, 2 warnings"


def test_a_record_without_what_it_should_hold(checkout: Checkout) -> None:
    checkout.change_details(witness={}, snapshot="0" * 40)
    assert {check for check, _ in faults(checkout)} == {"snapshot", "environment"}


def test_a_record_of_other_types_is_left_out_and_named(
    checkout: Checkout, caplog: pytest.LogCaptureFixture
) -> None:
    checkout.change_details(snapshot=5)
    assert LocalLibrary(checkout.records.parent).matching("rk2-") == []
    assert "`runkey index` writes it again" in caplog.text


def test_runs_that_did_not_finish(checkout: Checkout) -> None:
    run = replace(checkout.record.run, status="FAILED")
    write_record(checkout.records, replace(checkout.record, run=run, details=None))
    report = checkout.verify()
    assert report.is_right
    assert "is FAILED" in report.findings[0].text
    finished = replace(run, status="FINISHED")
    write_record(checkout.records, replace(checkout.record, run=finished))
    ((check, text),) = faults(checkout)
    assert check == "files"
    assert DETAILS in text


def test_reports_are_plain_json(checkout: Checkout) -> None:
    told = json.loads(json.dumps(checkout.verify().as_dict()))
    assert told["right"] is True
    assert len(told["findings"]) == 6


def test_the_weights_that_a_run_began_with_are_named_and_hashed(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made with a small file in the place of a published one."""
    data = b"published"
    row = replace(IMAGENET["resnet18"], sha256=sha256_bytes(data))
    monkeypatch.setitem(pinned_weights._BY_HASH, row.sha256, row)
    for digest, about in (
        (row.sha256, f"resnet18: {row.file} of {row.address}, sha256 {row.sha256}, BSD-3-Clause"),
        ("0" * 64, f"sha256 {'0' * 64}"),
    ):
        began = StartedFrom(param="model.backbone_weights", weights=digest, key=None)
        tags = {name: tag for name, tag in began.tags.items() if tag}
        run = checkout.record.run
        record = replace(checkout.record, run=replace(run, tags=run.tags | tags))
        sources = Sources(
            library=LocalLibrary(checkout.root / ".runkey"),
            stored=None,
            root=checkout.root,
            is_shared=False,
        )
        report = Report(record, sources)
        assert _check_initial_weights(report).startswith(about)
        assert report.findings == []
        if digest != row.sha256:
            continue
        path = checkout.root / ".weights" / row.file
        path.parent.mkdir()
        path.write_bytes(data)
        assert _check_initial_weights(report).endswith("in .weights/")
        path.write_bytes(data[:-1])
        assert _check_initial_weights(report) == ""
        assert [(f.state, f.way_out) for f in report.findings] == [
            ("warning", "`runkey weights resnet18` downloads it again")
        ]
