"""Benchmarks: what the parts of this package are worth, measured. ``dist-stability bench NAME --out DIR``."""
