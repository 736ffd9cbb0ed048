"""What can be said about a run before it, beside it, or from two that differ by a rounding error.

Each module is imported by its own name, for example ``from dist_stability.diagnostics import rksp``. Nothing here knows
the controller.
"""
