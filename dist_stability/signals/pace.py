"""Which steps a signal measures at, where it does not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Pace:
    """Every so many steps, the first one included; the same on every rank.

    Attributes:
        every: Steps from one measurement to the next.
    """

    def __init__(self, every: int, whose: str) -> None:
        """Begin anew.

        Args:
            every: >= 1.
            whose: Class of the signal, for the error.

        Raises:
            ValueError: ``every`` is no positive whole number.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"{whose} every: expected a whole number >= 1, got {every!r}")
        self.every, self._count = every, 0

    def due(self) -> bool:
        """Whether to measure at this step. Call it once per step."""
        self._count += 1
        return (self._count - 1) % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """When the next measurement is due."""
        return {"count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back; a state from before there was a pace begins anew."""
        self._count = int(state.get("count", 0))
