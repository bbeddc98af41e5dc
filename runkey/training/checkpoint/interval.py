"""When the next checkpoint is due: so often that all together cost at most 1% of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

SHARE = 0.01
"""Part of the time that checkpoints may cost."""
SHORTEST_SECONDS = 15.0
"""Between two of them, however cheap: nobody minds to lose so little."""


class Interval:
    """The time between checkpoints; with `auto` it follows from what the last one cost."""

    def __init__(
        self,
        seconds: float | Literal["auto"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start now.

        Args:
            seconds: a fixed time, 0: after every step; auto: the first one at once, so that its
                cost is known, the next ones as seldom as the cost asks for.
            clock: in seconds.
        """
        self._clock = clock
        self._is_fixed = seconds != "auto"
        self.seconds = 0.0 if seconds == "auto" else float(seconds)
        self._last = clock()

    @property
    def is_each_step(self) -> bool:
        """Whether every step is to have one."""
        return self._is_fixed and self.seconds == 0

    def is_over(self) -> bool:
        """Whether the next one is due."""
        return self._clock() - self._last >= self.seconds

    def restart(self) -> None:
        """One is begun now."""
        self._last = self._clock()

    def set_cost(self, seconds: float) -> None:
        """What one cost: time that training waited, or could not use."""
        if not self._is_fixed:
            self.seconds = max(SHORTEST_SECONDS, seconds / SHARE)
