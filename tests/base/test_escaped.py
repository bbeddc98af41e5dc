"""Control characters that others wrote: none reaches the terminal, whatever prints the text."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from runkey.progress import escaped
from tests.support.command_line import Run
from tests.support.records import key_of, make_run
from tests.support.terminal import on_terminal

REPOSITORY = Path(__file__).parents[2]
HOSTILE = "\x1b[31m\x1b]0;title\x07\x9b2J\x00\x08\r\x7f\x85\u202e\u2066\u2028\ufeff\U000e0041"
HALF = "\udc80"
"""Half a character, as file names that are not UTF-8 have; MLflow and sqlite cannot store one."""


def harmful(text: str) -> set[str]:
    """Control characters but tab and newline, and what changes direction or is invisible."""
    kept = set("\t\n\u200b\u200c\u200d\u00ad")
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - kept | {
        c for c in text if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF")
    }


def test_every_control_character_is_escaped_and_json_stays_what_it_is() -> None:
    every = "".join(chr(code) for code in range(0x3000)) + HOSTILE + HALF
    shown = escaped(every)
    assert harmful(shown) == set()
    assert shown.isprintable() or set("\t\n") & set(shown)
    assert "äé中\u200c\u00a0" in escaped("äé中\u200c\u00a0")
    value = {f"name {HOSTILE}": [HOSTILE, "a\nb\t"]}
    assert json.loads(escaped(json.dumps(value, ensure_ascii=False))) == value
    assert escaped("a\nb", newlines=True) == "a\\nb"


PRINT = f"""
import logging, sys
from runkey.errors import RunkeyError, report_errors
from runkey.progress import log_to_terminal, progress, say
from runkey.cli import output
text = {HOSTILE + HALF!r} + "\\nerror: a line of mine"
log_to_terminal(stderr=True)
logging.getLogger("runkey.x").warning("file %s", text)
say(text)
output.print_json({{text: text}})
output.print_table(("name", "value"), [("a", text)])
output.print_beside("label ", text)
output.print_answer({{}}, text, ("label ", text), as_json=False)
with progress("step [bold]" + text, 2, "files") as steps:
    steps.advance(1, text)
    import time; time.sleep(0.3)
with report_errors():
    raise RunkeyError("file " + text)
"""


def test_everything_that_prints_escapes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINT], cwd=REPOSITORY, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1, done.stderr
    assert harmful(done.stdout + done.stderr) == set()
    assert (done.stdout + done.stderr).count("\\u001b[31m") >= 7
    # A name cannot look like a line of ours.
    assert done.stderr.splitlines()[-1].startswith("error: file \\u001b")


def test_bars_on_a_terminal_escape_too() -> None:
    code, written = on_terminal([sys.executable, "-c", PRINT], cwd=REPOSITORY)
    assert code == 1
    assert "[bold]" in written  # no markup of rich's
    for harm in ("\x1b[31m", "\x1b]0;", "\x07", "\x9b", "\u202e", "\x08", "\x7f"):
        assert harm not in written


@pytest.mark.parametrize(
    "arguments",
    [
        *(("list",), ("list", "--json"), ("list", "-c", "+bad"), ("show", "KEY"), ("get", "KEY")),
        *(("show", "KEY", "--all"), ("show", "KEY", "--json"), ("verify", "KEY"), ("open", "KEY")),
        *(("verify", "--all"), ("diff", "KEY", "OTHER"), ("diff", "KEY", "OTHER", "--json")),
        *(("list", "-w", f"name={HOSTILE}"), ("gc",), ("report", "KEY")),
    ],
)
def test_a_record_of_others_on_the_command_line(
    root: Path, run: Run, arguments: tuple[str, ...]
) -> None:
    key, other = key_of("a"), key_of("b")
    make_run(
        root, key, name=f"run {HOSTILE}\nerror: mine", host=HOSTILE, decision=HOSTILE,
        params={"key": key, f"lr{HOSTILE}": HOSTILE, "data.path": HOSTILE},
        metrics={f"eval/AP {HOSTILE}": 0.5}, tags={"key": key, "bad": HOSTILE, "host": HOSTILE},
        files={"run.json": b"{}", "model/\x1b[31m.txt": b"x", "model/key.json": b"{}"},
    )  # fmt: skip
    make_run(root, other, name=HOSTILE)
    given = [{"KEY": key, "OTHER": other}.get(one, one) for one in arguments]
    _, out, err = run(*given)
    assert out + err
    assert harmful(out + err) == set()
