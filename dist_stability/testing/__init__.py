"""For test-suites, ours and yours: faults on purpose, and the golden-twin oracle that judges the recovery."""

from .fault import BITS, KINDS, LOSS_PHASES, PHASES, Fault
from .faults import FaultInjector, InjectedFault, flip_largest
from .oracle import NotTheTwin, Outcome, StateImage, assert_golden_twin, capture_state, compare

__all__ = [
    "BITS",
    "KINDS",
    "LOSS_PHASES",
    "PHASES",
    "Fault",
    "FaultInjector",
    "InjectedFault",
    "NotTheTwin",
    "Outcome",
    "StateImage",
    "assert_golden_twin",
    "capture_state",
    "compare",
    "flip_largest",
]
