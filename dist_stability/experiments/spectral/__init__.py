"""The small runs on which spectral scores and the learning-rate probe are measured."""
