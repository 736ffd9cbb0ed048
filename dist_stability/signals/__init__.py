"""What is measured: the probe's loss on the proposed weights, and the gradients before the step."""

from .gradients import Gradients
from .probe import LossProbe, Reading

__all__ = ["Gradients", "LossProbe", "Reading"]
