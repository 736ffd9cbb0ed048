"""What submitit runs in every task: a training script, as torchrun would start it."""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class ScriptFailed(RuntimeError):
    """The script ended with a status other than 0."""


@dataclass(frozen=True)
class SubmittedScript:
    """A script with its arguments. Called in a task of a submitit job, it runs there as ``__main__``.

    It runs in the task's own process, because that is where submitit's signal handler is (see
    :class:`~dist_stability.submission.Preemption`). Pickled by reference: the nodes need this package installed.

    Attributes:
        script: Absolute path.
        arguments: Those of the first start.
        on_requeue: Appended to them in every later one.
        requeued: Whether the job was requeued, so that this is a later one.
    """

    script: str
    arguments: tuple[str, ...] = ()
    on_requeue: tuple[str, ...] = ()
    requeued: bool = False

    def __call__(self) -> None:
        """Run the script with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set.

        Raises:
            ScriptFailed: The script exited with another status than 0.
        """
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        again = self.requeued or int(os.environ.get("SLURM_STEP_ID", "0")) > 0  # a second srun in the same job
        sys.argv = [self.script, *self.arguments, *(self.on_requeue if again else ())]
        sys.path.insert(0, str(Path(self.script).parent))  # as `python script.py` does
        try:
            runpy.run_path(self.script, run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise ScriptFailed(f"{self.script} ended with status {ended.code}") from ended

    def checkpoint(self) -> Any:
        """What submitit submits when it requeues the job: the same script, told to continue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, requeued=True))
