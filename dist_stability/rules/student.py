"""Student's t: the quantiles the predictive rule needs, without scipy."""

from __future__ import annotations

import math


def student_quantile(tail: float, freedom: int) -> float:
    """Upper quantile of Student's t: the value exceeded with probability ``tail``.

    Two and four degrees of freedom have closed forms (Shaw, "Sampling Student's T distribution", J. Comp. Finance 9,
    2006). For three, with ``t = sqrt(3) / tan(phi / 2)``, the tail is ``(phi - sin phi) / (2 pi)``: bisection.

    Args:
        tail: Probability, 1e-12 <= tail < 0.5 (below it, phi - sin phi cancels).
        freedom: Degrees of freedom: 2, 3 or 4.

    Raises:
        ValueError: Other degrees of freedom.
    """
    product = 4 * tail * (1 - tail)
    if freedom == 2:
        return (1 - 2 * tail) * math.sqrt(2 / product)
    if freedom == 4:
        root = math.sqrt(product)
        return 2 * math.sqrt(max(0.0, math.cos(math.acos(root) / 3) / root - 1))
    if freedom != 3:
        raise ValueError(f"student_quantile knows 2, 3 and 4 degrees of freedom, got {freedom!r}")
    low, high = 0.0, math.pi
    while low < (middle := (low + high) / 2) < high:
        if middle - math.sin(middle) < 2 * math.pi * tail:
            low = middle
        else:
            high = middle
    return math.sqrt(3) / math.tan(high / 2)
