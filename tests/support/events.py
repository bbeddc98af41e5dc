"""A tracker that keeps what a training tells it, for tests to look at."""

from __future__ import annotations

import pytest


class Events:
    """A tracker that keeps events and metrics."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values, step: int) -> None:
        self.logged.append((step, dict(values)))

    def event(self, kind: str, **fields) -> None:
        self.events.append((kind, fields))

    def position(self) -> dict[str, int | str]:
        return {}

    def resume(self, position) -> None:
        pass

    def of(self, kind: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.events if name == kind]


@pytest.fixture
def events() -> Events:
    return Events()
