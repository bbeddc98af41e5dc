"""docs/troubleshooting.md quotes messages that the code has, word for word.

Every quoted message is held against the strings of the sources; those about data must be among
the ones that tests/data provokes; some more are provoked in test_provoked.py.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest

from runkey.params import Checks, load_params
from tests.support.bad_data.cases import CASES
from tests.support.messages import Templates, flat

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
PACKAGES = Path(sys.prefix) / f"lib/python3.{sys.version_info.minor}/site-packages"
OTHERS = (
    *(f"dvc/{name}.py" for name in ("exceptions", "lock", "rwlock", "stage/exceptions")),
    *(f"dvc/{name}.py" for name in ("repo/checkout", "repo/reproduce", "utils/hydra")),
    *("dvc/commands/data_sync.py", "dvc_data/index/checkout.py", "omegaconf/dictconfig.py"),
    *("hydra/_internal/config_loader_impl.py", "mlflow/store/db/utils.py"),
)
"""Of the locked packages: what their messages are quoted from."""
BESIDE = ("tests/support/chromium.py", "tests/environment/test_lock.py", "benchmarks/run_table.py")
VALUES = set(
    """error warning hint note ERROR WARNING
    F photos ball balls cube cone Platelets gone val/mAP lrr vm nothing fast target following many
    fix drop or is true id key image images file annotation categories process best data train val
    gpu cuda cpu auto GiB SIGTERM blood-cells sample detection source torch venv runkey MLflow
    Connection refused Errno Address already in use No module named space left on device
    Name or service not known rank ranks
    OperationalError database locked expected but found line document block mapping start
    ModuleNotFoundError psycopg2 no such table runs onnx HTTP INTERNAL SERVER
    Expecting property name enclosed in double quotes Linux Darwin check such directory uv
    """.split()  # noqa: SIM905
)
"""Words that fill holes: names, short words, texts of the system, of sqlite, YAML and JSON."""
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[str]:
    """The fenced texts of the page."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def known() -> Templates:
    templates = Templates()
    templates.add_python(*(ROOT / "runkey").rglob("*.py"), *(ROOT / "stages").glob("*.py"))
    templates.add_python(*(PACKAGES / name for name in OTHERS), *(ROOT / name for name in BESIDE))
    templates.add_shell(ROOT / "environment/setup.sh")
    return templates


@cache
def names_of_parameters() -> set[str]:
    names = load_params(ROOT / "params.yaml").flat(runtime=True)
    return {part for name in names for part in name.split(".")}


def strange(block: str, known: Templates) -> list[str]:
    """Words of a text that are neither the code's nor values."""
    # Lines that are not indented begin a message, save in some of DVC's.
    alone = [w for one in re.split(r"\n(?=\S)", block) for w in known.unexplained(one)]
    words = min(alone, known.unexplained(block), key=len)
    plain = (word.strip("`'\"()[]<>,;:!?.") for word in words)
    values = names_of_parameters() | VALUES
    return [w for w in plain if w and w not in values and not re.search(r"[\d/._]", w)]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: flat(block)[:60])
def test_the_code_says_so(block: str, known: Templates) -> None:
    assert strange(block, known) == []


@pytest.mark.parametrize("block", blocks(), ids=lambda block: flat(block)[:60])
def test_a_message_that_is_reworded_is_noticed(block: str, known: Templates) -> None:
    """Some words of the code's own, changed: the message is no longer the code's."""
    text = re.sub(r"\n\s+", " ", block)
    own = list(re.finditer(r"(?<![\w./`'-])[a-z]{5,}(?![\w./:`'-])", text))
    for word in own[:: max(1, len(own) // 3)]:
        if word[0] not in names_of_parameters() | VALUES:
            changed = f"{text[: word.start()]}{word[0][::-1]}{text[word.end() :]}"
            assert strange(changed, known), f"not noticed: {word[0]} in {changed}"


def test_faults_of_data_are_those_that_are_provoked() -> None:
    """And the checks that the section names exist."""
    lines = {f"error: {case.line}" for case in CASES}
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("## The data are refused")[1].split("\n## ")[0]
    for block in BLOCK.findall(section):
        for message in re.split(r"\n(?=error: )", block.strip()):
            assert flat(message) in lines or "no such folder" in message, message
    assert set(re.findall(r"data\.checks\.(\w+)", section)) <= set(Checks.model_fields)
