"""list, show, get and open, as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runkey import paths
from runkey.hashing import sha256_bytes
from runkey.registry.claims import Claim, FileClaims, this_owner
from runkey.registry.library import LocalLibrary
from runkey.tracking.store import free_port
from tests.support.command_line import Run
from tests.support.records import key_of, make_run, write_record

REPOSITORY = Path(__file__).parents[2]
A, B, C = key_of("a"), key_of("b"), key_of("c")


@pytest.fixture
def runs(root: Path) -> Path:
    """Three keys; b was reproduced, c goes on."""
    make_run(
        root, A, "a" * 32, started_ms=1_700_000_000_000, name="baseline",
        tags={"key": A, "resumed": "2", "resumed.after": "step 40 at noon; step 80 at midnight"},
    )  # fmt: skip
    changed = {"lr": "5e-05", "seed": "1", "training.epochs": "12", "key": B}
    make_run(
        root, B, "b" * 32, started_ms=1_700_000_100_000, params=changed, name="lr=5e-05",
        metrics={"eval/AP": 0.625, "eval/AP_low": 0.5996, "eval/AP_high": 0.65,
                 "eval/AP50": 0.8, "train/loss": 1.0},
        tags={"key": B, "host": "big", "device": "cuda H200", "decision": "no run: trained",
              "event.hint.loader": '{"seen": "it waits", "change": "raise runtime.workers"}',
              "reused": "today on small: finished run bbbbbbbb of big is reused"},
    )  # fmt: skip
    make_run(
        root, B, "d" * 32, started_ms=1_700_000_300_000, params=changed, name="lr=5e-05",
        tags={"key": B, "reproduction_of": "b" * 32},
    )  # fmt: skip
    make_run(
        root, C, "c" * 32, started_ms=1_700_000_200_000, status="RUNNING", with_details=False,
        params={"key": C}, metrics={"val/AP": 0.25}, name="seed=9",
    )  # fmt: skip
    return root


def test_list(runs: Path, run: Run) -> None:
    code, out, err = run("list")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["key", "when", "status", "AP", "took", "name", "data", "where"]
    assert [line.split()[0] for line in lines[1:] if line.startswith("rk2-")] == [
        f"{B[:16]}:dddd", C[:16], f"{B[:16]}:bbbb", A[:16],
    ]  # fmt: skip
    assert "(reproduction)" in out
    assert "(resumed 2x)" in out
    assert "(0.250)" in out
    assert "  0.625 ±.03  " in out
    assert "big cuda H200" in out
    assert f" {sha256_bytes(f'data{A}'.encode())[:6]}" in out
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--where", "lr=5e-5", "--where", "AP>0.6"), "b"),
        (("--where", "epochs=12"), "db"),
        (("--sort", "AP"), "bdac"),
        (("--sort", "AP", "--ascending"), "dabc"),
        (("--sort", "started", "--ascending", "--limit", "2"), "ab"),
        (("--where", "status=running"), "c"),
        (("--where", "host=big"), "b"),
        (("--limit", "0"), "dcba"),
    ],
)
def test_questions(runs: Path, run: Run, arguments: tuple[str, ...], names: str) -> None:
    code, out, err = run("list", "--json", *arguments)
    assert (code, err) == (0, "")
    assert "".join(record["run"]["run_id"][0] for record in json.loads(out)) == names


def test_columns(runs: Path, run: Run) -> None:
    _, out, _ = run("list", "--columns", "key,lr,eval/AP50", "--where", "lr=5e-05", "--limit", "1")
    assert out.splitlines()[0].split() == ["key", "lr", "eval/AP50"]
    _, out, _ = run("list", "--columns", "+epochs", "--limit", "1")
    assert out.splitlines()[0].split()[-2:] == ["where", "epochs"]
    assert out.splitlines()[1].split()[-1] == "12"
    _, out, _ = run("list", "--columns", "+AP,epochs,epochs", "--limit", "1")
    assert out.splitlines()[0].split()[-3:] == ["data", "where", "epochs"], "each column once"


def test_mistakes_are_one_line(runs: Path, run: Run) -> None:
    for arguments in (
        ("list", "--where", "epoch12"),
        ("list", "--sort", "nothing"),
        ("show", "rk2-0000"),
        ("show", "main"),
        ("get", C),
        ("get", A, "--only", "nothing"),
        ("open", "rk2-0000"),
    ):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), arguments
        assert err.startswith("error: ")


@pytest.mark.parametrize("run_id", ["c" * 32, None])  # None: killed just after it took over
def test_a_run_whose_process_is_gone_does_not_look_alive(
    runs: Path, run: Run, run_id: str | None
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _OWNER], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    claims = FileClaims(runs / ".runkey" / "claims")
    owner = type(this_owner()).from_dict(json.loads(ended.stdout))
    claim = Claim(
        key=C, generation=1, owner=owner, state="running", run_id=run_id, beat=1, since_ms=0
    )
    assert claims.make(claim)
    _, out, _ = run("list", "--where", "status=RUNNING")
    assert "DEAD" in out
    assert "RUNNING" not in out
    _, out, _ = run("show", C, "--json")
    assert json.loads(out)["status_now"] == "DEAD"


_OWNER = """
import json
from runkey.registry.claims import this_owner
print(json.dumps(vars(this_owner())))
"""


def test_show(runs: Path, run: Run) -> None:
    code, out, err = run("show", B[4:12])
    assert (code, err) == (0, "")
    for part in (
        B,
        "FINISHED",
        "AP 0.625 (95%: 0.600 to 0.650), AP50 0.800\n",
        "lr=5e-05",
        "b" * 32,
        "as locked",
    ):
        assert part in out, part
    assert "hints        it waits; raise runtime.workers" in out
    assert f"{B[:16]}:dddd reproduction, FINISHED" in out
    assert "weights.pt 7 B" in out
    assert max(len(line) for line in out.splitlines() if "file://" not in line) <= 100
    assert "\ndecision     no run: trained\n" in out
    assert "\nlast reuse   today on small: finished run bbbbbbbb of big is reused\n" in out
    _, everything, _ = run("show", B, "--all")
    assert "training.epochs = 12" in everything
    _, as_json, _ = run("show", f"{B[:16]}:dddd", "--json")
    shown = json.loads(as_json)
    assert shown["run"]["run_id"] == "d" * 32
    assert [other["run_id"] for other in shown["same_key"]] == ["b" * 32]
    _, interrupted, _ = run("show", A)
    assert "\nresumed      2 times, after step 40 at noon; step 80 at midnight\n" in interrupted
    code, out, _ = run("show", C)
    assert code == 0
    assert "none yet" in out


def test_show_lists_exports(root: Path, run: Run) -> None:
    exports = {
        "openvino-int8": {"passed": False, "ap": 0.62, "ap_lost": 0.513},
        "onnx-fp32": {"passed": True, "ap": 0.625, "ap_lost": 0.0, "size_mb": 2.6},
        "torch-fp32": {"passed": True, "ap": None, "ap_lost": None},
    }
    make_run(root, B, exports=exports, metrics={"export/onnx-fp32/AP": 0.625})
    _, out, _ = run("show", B)
    assert "exports      onnx fp32, AP 0.625 (+0.00 points), 2.6 MB\n" in out
    assert "onnx-fp32" not in out
    assert "             openvino int8, AP 0.620 (-0.51 points), refused\n" in out
    assert "             torch fp32, AP not measured\n" in out


def test_show_says_what_reproducing_it_gave(root: Path, run: Run) -> None:
    whole = {"when_ms": 0, "run_id": "e" * 32, "host": "big", "identical": True, "reproduced": True}
    near = {"identical": False, "reproduced": True, "class_differences": ["threads 1 | 2"]}
    far = {"identical": False, "reproduced": False}
    make_run(root, A, outcomes=[whole, {**whole, **near}, {**whole, **far}])
    _, out, _ = run("show", A)
    assert out.count("reproduced") == 1, "one heading for all of them"
    assert f"on big: bit-identical (run {'e' * 32})" in out
    assert "within tolerance on another kind of machine (threads 1 | 2)" in out
    assert "NOT the same result" in out


def test_get(runs: Path, run: Run) -> None:
    code, out, _ = run("get", A, "--only", "model")
    assert code == 0
    assert "hashes verified" in out
    folder = runs / A[:16]
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["key.json", "weights.pt"]
    (folder / "model/key.json").write_text("mine")
    code, out, err = run("get", A)
    assert (code, out) == (1, "")
    assert "key.json" in err
    assert "--force" in err
    assert (folder / "model/key.json").read_text() == "mine"
    code, out, _ = run("get", A, "--force", "--json", "--to", str(folder))
    assert code == 0
    assert sorted(json.loads(out)["files"]) == sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    )


def test_get_into_something_that_is_no_folder(runs: Path, run: Run) -> None:
    (runs / "file").write_text("mine")
    (runs / "link").symlink_to("nowhere")
    for to in ("file", "file/inside", "link"):
        for force in ([], ["--force"]):
            code, out, err = run("get", A, "--to", to, *force)
            assert (code, out, err.count("\n")) == (1, "", 1), err
            assert err.startswith(f"error: {to}: "), err
    assert (runs / "file").read_text() == "mine"


def test_open(runs: Path, run: Run) -> None:
    code, out, err = run("open", A, "--port", "1")
    kind = "workflowType=machine_learning"
    assert (code, out) == (0, f"http://127.0.0.1:1/#/experiments/1/runs/{'a' * 32}?{kind}\n")
    assert "make ui PORT=1" in err
    _, out, _ = run("open", A, B, "--json", "--port", "1")
    opened = json.loads(out)
    assert opened["served"] is False
    ids = f"%5B%22{'a' * 32}%22%2C+%22{'b' * 32}%22%5D"
    assert opened["page"].endswith(f"/#/compare-runs?runs={ids}&experiments=%5B%221%22%5D&{kind}")


def test_an_empty_place_says_so(root: Path, run: Run) -> None:
    assert run("list")[:2] == (0, f"no run in {root / '.runkey' / 'runs.sqlite'}\n")
    assert json.loads(run("list", "--json")[1]) == []


def test_of_a_server_that_is_down_the_cache_answers(
    runs: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    for record in LocalLibrary(runs / ".runkey").matching("rk2-"):
        write_record(paths.records(runs / ".runkey", f"{address}/"), record)
    shown = [run(*command, "--json") for command in (("show", B), ("show", C), ("list",))]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for (code, out, _), command in zip(shown, (("show", B), ("show", C), ("list",)), strict=True):
        away = run(*command, "--json")
        assert away[:2] == (code, out)
        assert away[2].startswith(f"warning: {address}: cannot be reached")
        assert f"{paths.records(runs / '.runkey', address)}" in away[2]
    assert "none yet" in run("show", C)[1]
    assert run("diff", A, B)[0] == 0
    assert run("verify", B)[0] == 1, "the cache is no proof"


@pytest.mark.parametrize("command", [("list",), ("show", A), ("open", A), ("get", A)])
def test_reading_imports_nothing_slow(runs: Path, command: tuple[str, ...]) -> None:
    code = (
        "import sys; from runkey.cli import main\n"
        f"sys.argv = ['runkey', *{command!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "slow = {'torch', 'mlflow', 'numpy', 'dvc', 'sqlalchemy', 'requests'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], cwd=runs, env=environment, check=True, timeout=60)


def test_runs_of_the_older_rule_are_found_and_say_so(runs: Path, run: Run) -> None:
    key = f"rk1-{'5' * 64}"
    make_run(runs, key, "e" * 32, started_ms=1_600_000_000_000)
    _, out, _ = run("list")
    assert f"{key[:16]}  " in out
    assert out.endswith("1 of these: key by the older rule rk1 (bytes of the code)\n")
    assert key in run("list", "--where", f"key~{key[:8]}", "--json")[1]
    for address in (key, "rk1-5555", "5555"):
        _, out, _ = run("show", address)
        first, second, *_ = out.splitlines()
        assert first.split() == ["key", key]
        assert second.strip() == "key by the older rule rk1 (bytes of the code)"
    assert "older rule" not in run("show", A)[1]
    assert "no run of that key" in run("show", "rk2-5555")[2]


def test_a_run_outside_git_says_that_it_has_no_snapshot(runs: Path, run: Run) -> None:
    key = key_of("outside git")
    make_run(runs, key, snapshot=None, witness={})
    assert "\nsnapshot     none: it did not run in a git repository\n" in run("show", key)[1]


def test_watch_takes_a_key_of_at_least_four_digits(runs: Path, run: Run) -> None:
    for word in ("r", "0", "rk2-a"):
        code, out, err = run("watch", word)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {word}: not a key; ")
