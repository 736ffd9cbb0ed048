"""What a run is prone to: measured before training, beside it, or on two runs that differ by a rounding error.

Each module is imported by its own name, for example ``from dist_stability.diagnostics import sharpness``.
"""
