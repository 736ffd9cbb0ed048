"""How a measurement is judged: pure rules, and the guarantees they give."""

from __future__ import annotations

from dist_stability.rules.base import DeepRule, Rule, settings_of, supports_deep
from dist_stability.rules.fixed import FixedInnovation
from dist_stability.rules.guarantees import Guarantees, GuaranteeViolation
from dist_stability.rules.predictive import PredictiveInnovation

__all__ = [
    "DeepRule",
    "FixedInnovation",
    "Guarantees",
    "GuaranteeViolation",
    "PredictiveInnovation",
    "Rule",
    "settings_of",
    "supports_deep",
]
