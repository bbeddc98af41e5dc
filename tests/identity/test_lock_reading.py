"""The lock is read as YAML, whoever wrote it and however it was changed by hand."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.errors import LockError
from runkey.identity.environment import read_lock

REPOSITORY = Path(__file__).parents[2]
LOCK = (REPOSITORY / "conda-lock.yml").read_text()
SMALL = LOCK[: LOCK.index("- name: aiobotocore")]
LINES = SMALL.splitlines(keepends=True)
WORDS = [*"'\"#:-{}[]|>%@~?=,<", "&a ", "*a", "!!str ", "''", "<<"]
BREAKS = ["", " ", "\n", ": ", " #", "- ", "  ", "\t", "\r", "\x85", "\u2028"]
WHOLE_LINES = [
    "---\n",
    "...\n",
    "package:\n",
    "# x\n",
    "    sha256: 00\n",
    "    a: b\n",
    "  x: 1\n",
]
PIECES = st.sampled_from([*LINES, *WORDS, *BREAKS, *WHOLE_LINES])
SETTINGS = settings(max_examples=60, derandomize=True, database=None, deadline=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("lock") / "conda-lock.yml"


def read(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return read_lock(path)


@pytest.mark.parametrize("name", ["conda-lock.yml", "environment/tools/conda-lock.yml"])
def test_the_locks_of_this_repository_are_read_whole(name):
    text = (REPOSITORY / name).read_text()
    assert len(read_lock(REPOSITORY / name)) == text.count("\n- name: ")


def is_read_or_refused(path, text):
    """Whether packages or a line about the lock come back, and no other error."""
    try:
        return bool(read(path, text))
    except LockError as error:
        return str(error).startswith("conda-lock.yml: ")


@SETTINGS
@given(st.data())
def test_a_changed_lock_is_read_or_refused(path, data):
    text = SMALL
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        characters = st.characters(exclude_categories=["Cs"])
        text = text[:start] + data.draw(PIECES | characters) + text[end:]
    assert is_read_or_refused(path, text)


@SETTINGS
@given(st.lists(st.integers(0, len(LINES) - 1), max_size=3), st.lists(PIECES, max_size=3))
def test_lines_that_are_lost_or_doubled(path, lost, more):
    lines = [line for number, line in enumerate(LINES) if number not in lost]
    for piece in more:
        lines.insert(len(piece) * 7 % (len(lines) + 1), piece)
    assert is_read_or_refused(path, "".join(lines))


@SETTINGS
@given(st.text("aZ09_.+!~<>=*|,/%@:-#' ", max_size=6))
def test_a_value_of_any_letters(path, value):
    """In quotes, as conda-lock writes what is no plain text."""
    quoted = "'" + value.replace("'", "''") + "'"
    assert read(path, SMALL.replace("'4.5'", quoted))[0].version == value


OTHERWISE = {
    "a comment between entries": ("- name: adwaita", "# by hand\n- name: adwaita"),
    "a field more": ("  optional: false\n- name: ad", "  optional: false\n  x: 1\n- name: ad"),
    "fields in another order": (
        "  category: main\n  optional: false\n",
        "  optional: false\n  category: main\n",
    ),
    "an anchor": ("version: '4.5'", "version: &v '4.5'"),
    "double quotes": ("version: '4.5'", 'version: "4.5"'),
    "a comment after a value": ("manager: conda\n", "manager: conda # x\n"),
    "package twice": ("metadata:\n", "package: []\nmetadata:\n"),
}
REFUSED = {
    "two documents": ("version: 1\n", "--- {}\n---\nversion: 1\n"),
    "a quote left open in the head": ("- url: conda-forge\n", "- url: 'conda-forge\n"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_conda_lock_does_not_write_is_read_by_its_meaning(path, name):
    old, new = OTHERWISE[name]
    assert old in SMALL
    assert read(path, SMALL.replace(old, new, 1)) == read(path, SMALL)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lock_is_refused(path, name):
    old, new = REFUSED[name]
    assert old in SMALL
    with pytest.raises(LockError, match="not YAML"):
        read(path, SMALL.replace(old, new, 1))


def test_a_changed_value_is_seen(path):
    first = read(path, SMALL.replace("'4.5'", "4.50"))[0]
    assert (first.version, first.name) == ("4.50", read(path, SMALL)[0].name)
