"""When to stop trying: budgets of refusals. A pure state machine, never rolled back, kept in checkpoints."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from .errors import StabilityStop
from .verdict import Verdict

_REMEMBERED = 64


class RefusalBudget:
    """Counts refusals; stops the run when too many follow each other without a commit.

    A single refusal costs one batch. A run that refuses everything makes no progress, however exact each restore is,
    and must say so instead of burning its allocation.

    Args:
        in_a_row: Refusals (vetoes and rollbacks) without an accepted step between them after which the run stops.
    """

    def __init__(self, in_a_row: int) -> None:
        """Start with nothing spent."""
        self.limit = in_a_row
        self.in_a_row = 0
        self.total = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)

    def record(self, verdict: Verdict) -> None:
        """Count one final verdict.

        Raises:
            StabilityStop: The budget is spent. The state is the last committed one.
        """
        if verdict.accepted:
            self.in_a_row = 0
            return
        if not verdict.action.refused:
            return
        self.in_a_row += 1
        self.total += 1
        self._recent.append(
            {
                "attempt": verdict.step,
                "action": str(verdict.action),
                "signal": verdict.signal,
                "measurement": verdict.measurement,
                "reason": verdict.reason,
            }
        )
        if self.in_a_row >= self.limit:
            signals = Counter(entry["signal"] for entry in self._recent)
            raise StabilityStop(
                f"stopped at attempt {verdict.step}: {self.in_a_row} refusals in a row (max_refusals_in_row="
                f"{self.limit}), last one: {verdict.reason}. The model is in its last committed state. Skipping "
                f"batches does not help here: lower the learning rate, or look at the data, the model or the probe.",
                {"refusals_in_a_row": self.in_a_row, "total": self.total, "signals": signals, "last": [*self._recent]},
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"in_a_row": self.in_a_row, "total": self.total, "recent": [*self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])
        self._recent = deque(state["recent"], maxlen=_REMEMBERED)
