"""The controller paper's experiments: a grid of runs of the training program, its tables and its figures."""
