"""Addresses with a login: what prints or stores one hides it, what connects has it whole."""

from __future__ import annotations

import copy
import json
import random
import string
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest

from runkey.errors import ParamsError
from runkey.params import parse_params
from runkey.paths import Address, records
from runkey.progress import without_logins
from runkey.tracking.store import Store, in_one_line

MINIMAL = {"lr": 1e-4, "seed": 0}


@pytest.mark.parametrize(
    ("given", "shown", "login"),
    [
        ("http://host:5000", "http://host:5000", ("", "")),
        ("http://host:5000/prefix/", "http://host:5000/prefix", ("", "")),
        ("http://host/@team", "http://host/@team", ("", "")),
        ("http://[::1]:5000", "http://[::1]:5000", ("", "")),
        ("https://u:p@host:5000/", "https://host:5000", ("u", "p")),
        ("https://u:p%40ss%2F@host/x", "https://host/x", ("u", "p@ss/")),
        ("https://u:p@ss@host", "https://host", ("u", "p@ss")),
        ("https://u:p/s@host", "https://host", ("u", "p/s")),
        ("https://u:p@s/s@host", "https://host", ("u", "p@s/s")),
        ("https://u:p#s@host:1", "https://host:1", ("u", "p#s")),
        ("https://token@host", "https://host", ("token", "")),
        ("postgresql+psycopg://u:p@h:5432/db", "postgresql+psycopg://h:5432/db", ("u", "p")),
        ("postgresql://h/db?user=u&password=p", "postgresql://h/db?user=u&password=...", ("", "")),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db", ("", "")),
        ("none", "none", ("", "")),
    ],
)
def test_what_is_shown_and_what_is_not(given: str, shown: str, login: tuple[str, str]) -> None:
    address = Address(given)
    assert (address, address.login) == (shown, login)
    parts = urlsplit(address.full)
    assert (unquote(parts.username or ""), unquote(parts.password or "")) == login
    assert urlsplit(address).path == parts.path


def test_no_way_of_printing_or_storing_one_shows_the_password(tmp_path: Path) -> None:
    letters = string.ascii_letters + string.digits + "@/#?:%&= äß[]"
    pick = random.Random(0)
    for number in range(400):
        word = "secret" + "".join(pick.choices(letters, k=pick.randint(0, 12))).strip() + "WORD"
        written = quote(word, safe="") if number % 2 else word
        address = Address(f"http://user:{written}@host:5000/prefix")
        store = Store(address, None, tmp_path)
        ways = [
            *(str(address), repr(address), f"{address}", json.dumps({"uri": address})),
            *(repr(store), str(asdict(store)), repr(replace(store, home=tmp_path)), store.uri),
            str(records(tmp_path, address)),
        ]
        if not any(c.isspace() for c in word):
            ways.append(without_logins(f"Max retries with url: http://user:{written}@host:5000/x"))
            ways.append(in_one_line(OSError(f"http://user:{written}@host:5000: gone")))
        for way in ways:
            assert "secret" not in way, way
            assert "WORD" not in way, way
        for same in (copy.deepcopy(address), copy.copy(address), Address(address)):
            assert same.full == address.full == store.full_uri
        assert records(tmp_path, address) == records(tmp_path, "http://host:5000/prefix")


def test_a_token_that_git_prints_is_not_shown() -> None:
    text = "git push: unable to access 'https://ghp_abc@host/team/x.git/': 403"
    assert without_logins(text) == "git push: unable to access 'https://host/team/x.git/': 403"


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/runs?x=a@b",
        "git@host:team/repo",
        "ssh://git@host/x",
        "see http://h:1 or mail a@b.org",
    ],
)
def test_what_is_no_login_stays(text: str) -> None:
    assert without_logins(text) == text


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("runtime", "team_server", "http://anna:geheim@host:5000"),
        ("runtime", "team_server", "postgresql://host/db?user=u&password=geheim"),
        ("runtime", "team_server", "https://host:5000/?token=geheim"),
        ("runtime", "experiment", "https://token@host/x"),
        ("data", "path", "s3://id:geheim@bucket/data"),
        ("model", "init_from", "https://anna:geheim@host/weights.safetensors"),
    ],
)
def test_parameters_that_hold_a_login_are_refused(section: str, name: str, value: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_params(MINIMAL | {section: {name: value}})
    text = str(caught.value)
    assert text.startswith(f"params.yaml: {section}.{name} holds a login")
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in text
    assert str(Address(value)) in text
    assert not {"geheim", "token@"} & set(text.split())
    assert "geheim" not in text
    parse_params(MINIMAL | {"runtime": {"team_server": "http://host:5000"}})
