"""The sample data, made once for all tests of this folder."""

from __future__ import annotations

import pytest

from runkey.data.sample import make_sample


@pytest.fixture(scope="session")
def remade(tmp_path_factory):
    """A fresh set and what was said while it was made."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    said: list[str] = []
    make_sample(folder, said.append)
    return folder, said
