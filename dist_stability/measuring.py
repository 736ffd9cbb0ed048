"""Who runs the probe, whose value counts, and what to do when it fails on one rank."""

from __future__ import annotations

from torch import nn

from . import parallel
from .attempt import Phases, one_line
from .errors import LockstepError
from .hooks import FirstForward
from .signals import LossProbe, Reading
from .vote import Vote
from .watch import bounded, is_transport_error


class Measuring:
    """This rank's part in measuring a proposal.

    A forward that contains collectives (FSDP, TP) is run by every rank. Otherwise ``probe_on="rank0"`` runs it on the
    first rank alone, on the module inside DDP: DDP's own forward would broadcast buffers to ranks that are not there.

    Args:
        model: As the loop calls it.
        probe: The user's.
        probe_on: "rank0" or "mean".
        confirm: A second, disjoint one, or None.

    Raises:
        ValueError: A probe cannot be shared equally over the data replicas (``probe_on="mean"``).
        TypeError: See :meth:`LossProbe.check`.
    """

    def __init__(self, model: nn.Module, probe: LossProbe, probe_on: str, confirm: LossProbe | None = None) -> None:
        """Take this rank's share of the probes; no collective."""
        self._model = model
        self._module = parallel.forward_module(model)
        self._collective = parallel.has_collectives(model)
        self._mean = probe_on == "mean"
        self.probe = self._share(probe)
        self.confirm = None if confirm is None else self._share(confirm)

    def _share(self, probe: LossProbe) -> LossProbe:
        probe.check(self._module)
        return probe.share(*parallel.data_replica(self._model)) if self._mean else probe

    def join(self, vote: Vote, phases: Phases, first_forward: FirstForward) -> None:
        """Meet the other ranks. The hook on the model's forward must not take a probe's forward for a training one."""
        self._vote, self._phases, self._first_forward = vote, phases, first_forward

    @property
    def weight(self) -> float:
        """Weight of this rank's value in the measurement."""
        return 1.0 if self._mean or self._vote.rank == self._vote.ranks[0] else 0.0

    def measure(self, attempt: int) -> tuple[Reading, Reading]:
        """Run this rank's share of the probe, and of the second one if there is one.

        An error outside the forward is part of the reading, and will be a vote.

        Collectives: those of the model's forward.

        Raises:
            LockstepError: The forward failed while other ranks are in it, or they left this one alone in it.
        """
        self._first_forward.paused = True
        try:
            return self._run(self.probe, attempt), self._run(self.confirm, attempt)
        finally:
            self._first_forward.paused = False

    def _run(self, probe: LossProbe | None, attempt: int) -> Reading:
        if probe is None or not (self._collective or self.weight):
            return Reading(None)
        with bounded(parallel.forward_groups(self._model), self._vote.timeout * 0.75):
            reading = probe.measure(self._module)
        if reading.error is not None and self._collective and (reading.inside_forward or reading.owed):
            raise self._stopped(reading, attempt) from reading.error
        return reading

    def _stopped(self, reading: Reading, attempt: int) -> LockstepError:
        watch, error = self._phases.watch, reading.error
        assert error is not None
        if watch is not None and (is_transport_error(error) or watch.failure() is not None):
            return self._vote.lost(attempt, error)
        if reading.inside_forward:
            reason = f"the probe's forward, which contains collectives, raised {one_line(error)}"
        else:
            reason = f"the probe raised {one_line(error)} and its forwards are not known well enough to be made up for"
        if watch is not None:
            watch.fail(attempt, reason)
        return LockstepError(
            f"rank {self._vote.rank} stopped at attempt {attempt}: {reason}. The other ranks are inside a forward and "
            f"cannot be called back; restart the job from its last checkpoint.",
            ranks=[self._vote.rank],
            step=attempt,
        )
