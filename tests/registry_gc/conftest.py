import pytest

from tests.support.repository import make_repository


@pytest.fixture
def repository(tmp_path, monkeypatch):
    return make_repository(tmp_path / "Werk statt", monkeypatch)
