"""The lock is read line by line, and that says what YAML says or nothing at all."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.identity.dvc_yaml import parse_yaml_text
from runkey.identity.environment import lock_entries

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
SETTINGS = settings(max_examples=200, derandomize=True, database=None, deadline=None)


@pytest.mark.parametrize("name", ["conda-lock.yml", "environment/tools/conda-lock.yml"])
def test_the_locks_of_this_repository_are_read_without_yaml(name):
    text = (REPOSITORY / name).read_text()
    entries = lock_entries(text)
    assert entries == parse_yaml_text(text)["package"]
    assert len(entries) == text.count("\n- name: ")


def agrees(text):
    """Whether the fast reading has no answer, or YAML's."""
    entries = lock_entries(text)
    if entries is None:
        return True
    try:
        return parse_yaml_text(text)["package"] == entries
    except yaml.YAMLError:
        return False


@SETTINGS
@given(st.data())
def test_a_changed_lock_is_read_as_yaml_reads_it_or_not_at_all(data):
    text = SMALL
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        text = text[:start] + data.draw(PIECES | st.characters()) + text[end:]
    assert agrees(text)


@SETTINGS
@given(st.lists(st.integers(0, len(LINES) - 1), max_size=3), st.lists(PIECES, max_size=3))
def test_lines_that_are_lost_or_doubled(lost, more):
    lines = [line for number, line in enumerate(LINES) if number not in lost]
    for piece in more:
        lines.insert(len(piece) * 7 % (len(lines) + 1), piece)
    assert agrees("".join(lines))


@SETTINGS
@given(st.text("aZ09_.+!~<>=*|,/%@:-#' ", max_size=6), st.sampled_from(["4.5", ">=9.0.1", "conda"]))
def test_a_value_of_any_letters(value, place):
    """Most of these are read: plain, or in quotes as conda-lock would write them."""
    quoted = "'" + value.replace("'", "''") + "'"
    for written in (value, quoted):
        text = SMALL.replace(f"'{place}'", written).replace(f": {place}\n", f": {written}\n")
        assert agrees(text)
    assert lock_entries(SMALL.replace("'4.5'", quoted))[0]["version"] == value


DECLINED = {
    "a comment between entries": ("- name: adwaita", "# by hand\n- name: adwaita"),
    "a field more": ("  optional: false\n- name: ad", "  optional: false\n  x: 1\n- name: ad"),
    "fields in another order": (
        "  category: main\n  optional: false\n",
        "  optional: false\n  category: main\n",
    ),
    "an anchor": ("version: '4.5'", "version: &v '4.5'"),
    "double quotes": ("version: '4.5'", 'version: "4.5"'),
    "a comment after a value": ("manager: conda\n", "manager: conda # x\n"),
    "two documents": ("version: 1\n", "--- {}\n---\nversion: 1\n"),
    "a quote left open in the head": ("- url: conda-forge\n", "- url: 'conda-forge\n"),
    "package twice": ("metadata:\n", "package: []\nmetadata:\n"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_conda_lock_does_not_write_is_left_to_yaml(name):
    old, new = DECLINED[name]
    assert old in SMALL
    assert lock_entries(SMALL.replace(old, new, 1)) is None
    assert lock_entries(SMALL) is not None


def test_a_changed_value_is_seen():
    changed = SMALL.replace("'4.5'", "4.50").replace("'>=9.0.1'", "'it''s'")
    entries = lock_entries(changed)
    assert entries == parse_yaml_text(changed)["package"]
    assert entries[0]["version"] == "4.50"
    assert entries[0]["dependencies"] == {"llvm-openmp": "it's"}
