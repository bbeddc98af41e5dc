"""What the guard's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    """`set_up` switches the whole process; leave it as the other tests expect it."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


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
