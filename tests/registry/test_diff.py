"""`runkey diff`: which parts of two keys differ, and how, from real snapshots and records."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.data.image_list import ListedImage
from runkey.errors import RegistryError
from runkey.identity.code import BYTES, RULE, hash_code
from runkey.identity.dvc_yaml import folder_md5
from runkey.identity.key import Recipe, make_recipe
from runkey.registry.diff import compare, compare_images, run_side, tree_side
from runkey.registry.library import LocalLibrary
from runkey.registry.snapshot import changed_files, take_snapshot
from tests.support.records import make_run

IMAGES = {
    "train": {"a.jpg": [1, "aa", "01"], "b.jpg": [2, "bb", "02"], "c.jpg": [0, "cc", "03"]},
    "val": {"d.jpg": [1, "dd", "04"]},
}


def images_json(images):
    return json.dumps({"schema": "images1", "splits": images}).encode()


def record(repository, run_id, images=IMAGES, **changes):
    """The run of the tree as it stands."""
    recipe = make_recipe("train", repository.root)
    files = {
        "model/key.json": json.dumps(recipe.as_dict()).encode(),
        "run.json": json.dumps({"witness": {"packages": {"numpy": "2.10"}}}).encode(),
        "model/weights.pt": run_id.encode(),
    }
    if images is not None:
        files["prepared/images.json"] = images_json(images)
    snapshot = take_snapshot(repository.root, repository.root, recipe)
    fields = {"snapshot": snapshot, "files": files, **changes}
    return make_run(repository.root, recipe.key, run_id * 32, **fields)


@pytest.fixture
def two(repository, monkeypatch):
    """The repository with two runs: `first`, and `second` after a change of everything."""
    monkeypatch.chdir(repository.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    repository.first = record(repository, "a", metrics={"eval/AP": 0.5, "val/loss": 1.0})
    repository.write("params.yaml", "lr: 5e-5\nseed: 1\nmodel:\n  num_queries: 20\n")
    repository.write("runkey/net.py", "import runkey.extra\nwidth = 4\n")
    repository.write("runkey/extra.py", "a = 1\nb = 2\n")
    repository.write("data.dvc", "outs:\n- md5: 4567cdef.dir\n  path: data\n")
    lock = (repository.root / "conda-lock.yml").read_text()
    repository.write("conda-lock.yml", lock.replace("2.10", "2.11"))
    images = {
        "train": {"a.jpg": [1, "xx", "01"], "b.jpg": [2, "bb", "99"], "d.jpg": [1, "dd", "04"]},
        "val": {"e.jpg": [1, "ee", "05"]},
    }
    repository.second = record(
        repository, "b", images, metrics={"eval/AP": 0.625, "val/loss": 1.0}, host="there"
    )
    return repository


def sides(repository, a=None, b=None):
    library = LocalLibrary(repository.root / ".runkey")
    addresses = (a or repository.first.key, b or repository.second.key)
    return [run_side(library, address, repository.root) for address in addresses]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["diff", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_every_part_and_how_it_differs(two):
    diff = compare(*sides(two), two.root)
    assert not diff.same_key
    assert all(pair.a != pair.b for pair in diff.parts.values())
    assert [(p.name, p.a, p.b) for p in diff.params] == [("lr", 1e-4, 5e-5)]
    assert [(f.path, f.change, f.insertions, f.deletions) for f in diff.code.files] == [
        ("runkey/extra.py", "added", 2, 0),
        ("runkey/net.py", "changed", 2, 1),
    ]
    assert "-width = 3\n+import runkey.extra\n+width = 4" in diff.code.patch
    assert "--- a/runkey/net.py\n+++ b/runkey/net.py\n" in diff.code.patch
    assert [(p.name, p.a, p.b) for p in diff.data] == [
        ("data", "md5:0123abcd.dir", "md5:4567cdef.dir")
    ]
    assert diff.images.by_kind() == {
        "added": ["e.jpg"],
        "removed": ["c.jpg"],
        "relabelled": ["a.jpg"],
        "replaced": ["b.jpg"],
        "moved": ["d.jpg"],
    }
    assert [(p.name, p.a, p.b) for p in diff.packages] == [
        ("numpy", "2.10 py312_0", "2.11 py312_0")
    ]
    assert [(p.name, p.b - p.a) for p in diff.metrics] == [("eval/AP", 0.125)]
    assert diff.equal_metrics == 1
    assert {p.name: (p.a, p.b) for p in diff.witness}["host"] == ("here", "there")
    assert not diff.artifacts  # two keys: their files are two


def test_as_text_it_is_read_in_100_columns(two):
    said = run(two.first.key[:12], two.second.key[:12], "--patch")
    assert max(map(len, said.splitlines())) <= 100
    for line in (
        "params: 1 differs",
        "code: 2 differ",
        "images: 4 in A, 4 in B",
        "  1 relabelled\n    a.jpg",
        "environment: 1 differs",
        "metrics: 1 the same, 1 not",
        "+width = 4",
    ):
        assert line in said
    assert "\x1b" not in said


def test_as_json_and_by_exit_code(two):
    told = json.loads(run(two.first.key, two.second.key, "--json", "--exit-code", code=3))
    assert told["a"]["run_id"] == "a" * 32
    assert told["metrics"] == [{"name": "eval/AP", "a": 0.5, "b": 0.625, "difference": 0.125}]
    assert "patch" not in told["code"]
    assert json.loads(run(two.first.key, two.second.key, "--json"))["same_key"] is False
    run(two.first.key, two.first.key, "--exit-code")


def test_the_tree_as_it_stands(two):
    told = json.loads(run(two.second.key, ".", "--json", "--exit-code"))
    assert told["same_key"] is True
    two.write("runkey/extra.py", "a = 1\nb = 3\n")
    told = json.loads(run(two.second.key, ".", "--json", "--patch", "--exit-code", code=3))
    assert [f["path"] for f in told["code"]["files"]] == ["runkey/extra.py"]
    assert "-b = 2\n+b = 3\n" in told["code"]["patch"]
    assert told["b"]["run_id"] is None
    assert told["metrics"] == []


def test_the_tree_s_images_count_only_if_they_are_of_its_data(two):
    two.write("prepared/images.json", images_json(IMAGES))
    assert tree_side(two.root).images is None
    lock = "stages:\n  prepare:\n    deps:\n    - path: data\n      md5: 4567cdef.dir\n"
    two.write("dvc.lock", lock)
    side = tree_side(two.root)
    assert list(side.images["val"]) == ["d.jpg"]
    assert not side.notes


def test_without_a_snapshot_the_hashes_are_compared(two):
    for ref in two.git("for-each-ref", "--format=%(refname)", "refs/runkey").splitlines():
        two.git("update-ref", "-d", ref)
    two.git("gc", "-q", "--prune=now")
    old, new = sides(two)
    diff = compare(old, new, two.root)
    # The first tree is HEAD, which a branch keeps; the second is nowhere any more.
    assert "of its code only the hashes are known" in new.notes[0]
    assert not old.notes
    assert diff.code.unknown == ["runkey/extra.py", "runkey/net.py"]
    assert diff.code.patch == ""
    assert " -> " in run(two.first.key, two.second.key)


def test_a_snapshot_of_something_else_is_not_taken_for_the_code(two):
    changed = make_run(
        two.root,
        two.second.key,
        "b" * 32,
        files={"model/key.json": json.dumps(make_recipe("train", two.root).as_dict()).encode()},
        snapshot=two.first.details.snapshot,
    )
    diff = compare(*sides(two, b=changed.key), two.root)
    assert diff.code.unknown == ["runkey/extra.py", "runkey/net.py"]


def test_two_runs_of_one_key(two):
    again = record(two, "c", metrics={"eval/AP": 0.625, "val/loss": 1.5})
    assert again.key == two.second.key
    diff = compare(*sides(two, f"{again.key}:bbbb", f"{again.key}:cccc"), two.root)
    assert diff.same_key
    assert [p.name for p in diff.artifacts] == ["model/weights.pt", "prepared/images.json"]
    assert diff.equal_artifacts == 2
    said = run(f"{again.key}:bbbb", f"{again.key}:cccc", "--exit-code")
    assert "the same key" in said
    assert "files: 2 the same, 2 not" in said
    assert "val/loss" in said
    assert "the same run" in run(f"{again.key}:bbbb", f"{again.key}:bbbb")


def test_a_run_that_failed_is_compared_by_what_is_known(two):
    key = "rk2-" + "5" * 64
    make_run(two.root, key, status="FAILED", with_details=False, files={})
    told = json.loads(run(two.first.key, key, "--json"))
    assert told["same_key"] is False
    assert told["parts"]["code"]["a"] != told["parts"]["code"]["b"]
    assert told["code"]["files"] == []
    assert "model/key.json" in "".join(told["b"]["notes"])


def test_a_key_json_of_another_run_is_an_error(two):
    key = "rk2-" + "6" * 64
    recipe = make_recipe("train", two.root)
    make_run(two.root, key, files={"model/key.json": json.dumps(recipe.as_dict()).encode()})
    with pytest.raises(RegistryError, match="holds another key"):
        sides(two, b=key)


def test_long_lists_are_cut(two):
    images = {"train": {f"{n:03}.jpg": [1, "aa", f"{n}"] for n in range(50)}, "val": {}}
    two.write("params.yaml", "lr: 0.5\nseed: 1\nmodel:\n  num_queries: 20\n")
    many = record(two, "d", images)
    said = run(two.second.key, many.key)
    assert "50 added" in said
    assert "... and 40 more (--all)" in said
    assert "049.jpg" not in said
    assert "(of the same data" in said
    assert "049.jpg" in run(two.second.key, many.key, "--all")


def test_without_lists_of_images_dvc_s_cache_names_files(two):
    keys = []
    for run_id, files in (
        ("e", {"a.jpg": "1" * 32, "b.jpg": "2" * 32}),
        ("f", {"b.jpg": "3" * 32, "c.jpg": "4" * 32}),
    ):
        md5 = folder_md5(files)
        listed = [{"md5": files[name], "relpath": name} for name in sorted(files)]
        two.write(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}", json.dumps(listed))
        two.write("data.dvc", f"outs:\n- md5: {md5}\n  path: data\n")
        keys.append(record(two, run_id, None).key)
    diff = compare(*sides(two, *keys), two.root)
    assert diff.images is None
    assert diff.files == {
        "added": ["data/c.jpg"],
        "removed": ["data/a.jpg"],
        "changed": ["data/b.jpg"],
    }


def test_a_command_and_the_list_of_what_is_left_out(two):
    text = (two.root / "dvc.yaml").read_text()
    two.write("dvc.yaml", text.replace("python -m stages.train", "python -O -m stages.train"))
    told = json.loads(run(two.second.key, ".", "--json"))
    assert told["commands"] == [
        {"name": "train", "a": "python -m stages.train", "b": "python -O -m stages.train"}
    ]
    assert all(pair["a"] == pair["b"] for pair in told["parts"].values())
    assert "commands: 1 differs" in run(two.second.key, ".")


def test_images_of_equal_lists():
    one = {"train": {"a.jpg": ListedImage(1, "aa", "01")}, "val": {}}
    assert compare_images(one, one).by_kind() == {}


def record_older(repository, run_id, **changes):
    """The run of the tree as it stands, as the rule `rk1` named it."""
    recipe = make_recipe("train", repository.root)
    code = recipe.preimages["code"]
    files = {
        path: hash_code(path, (repository.root / path).read_bytes(), BYTES)
        for path in code["files"]
    }
    bytes_of = {**recipe.preimages, "code": {"files": files, "excluded": code["excluded"]}}
    older = Recipe("train", recipe.cmd, bytes_of, "rk1")
    snapshot = take_snapshot(repository.root, repository.root, recipe)
    stored = {"model/key.json": json.dumps(older.as_dict()).encode()}
    fields = {"snapshot": snapshot, "files": stored, **changes}
    return make_run(repository.root, older.key, run_id * 32, **fields)


def test_a_run_of_the_older_rule_is_compared_by_the_text_of_its_files(two):
    older = record_older(two, "e")
    assert older.key.startswith("rk1-")
    two.write("runkey/net.py", "# why\nimport runkey.extra\nwidth = (4)\n")
    commented = compare(*sides(two, older.key, record(two, "f").key), two.root)
    assert not commented.same_key
    assert (commented.code.files, commented.code.incomparable) == ([], [])
    two.write("runkey/net.py", "# why\nimport runkey.extra\nwidth = 5\n")
    for addresses in ((older.key, "."), (".", older.key)):
        told = json.loads(run(*addresses, "--json"))
        assert [file["path"] for file in told["code"]["files"]] == ["runkey/net.py"]
    said = run(older.key, ".", "--patch")
    assert "-width = 4\n" in said
    assert "note on A: key by the older rule rk1 (bytes of the code)" in said


def test_hashes_by_two_rules_are_not_compared_where_the_text_is_not_at_hand(two):
    older = record_older(two, "e", snapshot=None)
    diff = compare(*sides(two, older.key, two.second.key), two.root)
    assert diff.code.files == []
    files = make_recipe("train", two.root).preimages["code"]["files"]
    assert diff.code.incomparable == list(files)
    said = run(older.key, two.second.key)
    assert "code: 5 files not comparable: hashes made by different rules" in said
    assert "  runkey/net.py\n" in said


def test_two_runs_of_the_older_rule_are_compared_by_bytes(two):
    older = record_older(two, "e")
    two.write("runkey/net.py", "# why\nimport runkey.extra\nwidth = 4\n")
    diff = compare(*sides(two, older.key, record_older(two, "f").key), two.root)
    assert [(f.path, f.insertions, f.deletions) for f in diff.code.files] == [
        ("runkey/net.py", 1, 0)
    ]


def test_a_snapshot_is_verified_by_the_rule_of_its_key(two):
    two.write("runkey/net.py", "# why\nimport runkey.extra\nwidth = 4\n")
    older, newer = record_older(two, "e"), record(two, "f")
    for run, rule in ((older, BYTES), (newer, RULE)):
        side = run_side(LocalLibrary(two.root / ".runkey"), run.key, two.root)
        code = side.recipe.preimages["code"]
        assert changed_files(two.root, run.details.snapshot, code) == {}
        # An earlier snapshot lacks the comment, which only the older rule counts.
        wrong = changed_files(two.root, two.second.details.snapshot, code)
        assert list(wrong) == (["runkey/net.py"] if rule == BYTES else [])


def test_a_difference_within_noise_is_called_so(two):
    scores = {"eval/AP": 0.5, "eval/AP_low": 0.4, "eval/AP_high": 0.6}
    better = {"eval/AP": 0.55, "eval/AP_low": 0.45, "eval/AP_high": 0.65}

    def files(truth, *values):
        content = {"truth": truth, "deviations": {"AP": 2.0, "AP50": 2.0}}
        content |= {"AP": list(values), "AP50": list(values)}
        return {"evaluation/resampled.json": json.dumps(content).encode()}

    addresses = []
    for digit, metrics, stored in (
        ("5", scores, files("t", 0.4, 0.5, 0.6)),
        ("6", better, files("t", 0.44, 0.55, 0.66)),
        ("7", better, files("other images", 0.45, 0.55, 0.65)),
        ("8", better, {"evaluation/resampled.json": b'{"truth": 1}'}),
    ):
        key = "rk2-" + digit * 64
        make_run(two.root, key, digit * 32, files=stored, metrics=metrics)
        addresses.append(key)
    told = json.loads(run(addresses[0], addresses[1], "--json"))
    (ap,) = told["scores"]
    assert ap["is_paired"]
    assert not ap["is_noise"]
    assert ap["interval"]["low"] == pytest.approx(0.05 - 2 * np.std([0.04, 0.05, 0.06]), abs=1e-6)
    assert "AP: +0.050 (95%: +0.034 to +0.066, paired by image): more than noise" in run(
        addresses[0], addresses[1]
    )
    for other in addresses[2:]:
        said = " ".join(run(addresses[0], other).split())
        assert "AP: +0.050; the 95% intervals of the two, on different images, overlap" in said
    assert "evaluation/resampled.json: truth: Input should be a valid string" in said
