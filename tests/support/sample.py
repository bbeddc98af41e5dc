"""The sample data, made once for all tests of this folder."""

from __future__ import annotations

import pytest

from runkey.data.sample import make_sample


@pytest.fixture(scope="session")
def remade(tmp_path_factory):
    """A fresh set, and its numbers of images and balls."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    return folder, make_sample(folder)
