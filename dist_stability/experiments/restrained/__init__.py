"""The experiments on restrained instabilities and the edge of stability, and the calibration of the monitor."""
