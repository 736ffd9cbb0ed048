"""Placeholder until the trend rule arrives."""

from __future__ import annotations

from typing import Any


class SlowDivergence:
    """Never alarms."""

    def commit(self, measurement: float, steps: int = 1) -> str | None:
        """None."""
        return None

    def restart(self) -> None:
        """Nothing."""

    def settings(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing."""
