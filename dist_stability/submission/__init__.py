"""Jobs on a cluster: told to stop, they save at a step boundary and come back by themselves.

:class:`Preemption` is for the training loop and needs nothing but torch. ``launch/submit.py`` submits a script through
submitit (``pip install 'dist-stability[slurm]'``); see docs/slurm.md.
"""

from dist_stability.submission.preemption import Preemption

__all__ = ["Preemption"]
