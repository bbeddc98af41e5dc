"""The maker of the sample data, and the sample data, made once for all tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

MAKER = Path(__file__).parents[2] / "sample-data/make_sample.py"


@cache
def load_maker() -> ModuleType:
    """The module, which is in no package."""
    spec = importlib.util.spec_from_file_location("make_sample", MAKER)
    assert spec
    assert spec.loader
    module = sys.modules["make_sample"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def remade(tmp_path_factory):
    """A fresh set, and its numbers of images and balls."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    return folder, load_maker().make_sample(folder)
