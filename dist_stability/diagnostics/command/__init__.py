"""``dist-stability diagnose NAME``: the diagnostics on a model that the command line names."""
