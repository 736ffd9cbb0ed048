"""Runnable experiments: real data and models, the training program, and the demo."""
