"""How the runs of an experiment have ended so far, which of the others can be started, and how long they will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from dist_stability.experiments.paper.folders import FINISHED, STOPPED, ended
from dist_stability.experiments.paper.plan import Grid, NotReady, Run, arm_of, needs

LEFT_OUT = "left out: "


class Outcomes:
    """Keeps count over one call of the experiment.

    Args:
        grid: The experiment.
        runs: All its runs.
        workers: Processes at a time, for the estimate.

    Attributes:
        grid: The experiment.
        ended: By run: "finished", "stopped", "left out: why", or what went wrong.
        started: Number of runs that were run in this call.
    """

    def __init__(self, grid: Grid, runs: Sequence[Run], workers: int) -> None:
        """Nothing has been looked at yet."""
        self.grid, self._runs, self._workers = grid, runs, workers
        self.ended: dict[Run, str] = {}
        self.started = 0
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def is_ready(self, run: Run) -> bool:
        """Whether all runs it needs have ended, however they did."""
        return all(need in self.ended for need in needs(self.grid, run))

    def must_run(self, run: Run) -> bool:
        """Whether a run that is ready has to be started; otherwise how it ended is known from now on."""
        lacking = [need for need in needs(self.grid, run) if self.ended[need] not in (FINISHED, STOPPED)]
        if lacking:
            self.ended[run] = f"not run: it needs {lacking[0]}"
            return False
        try:
            found = ended(arm_of(self.grid, run), self.grid.folder(run))
        except NotReady as error:
            self.ended[run] = f"{LEFT_OUT}{error}"
            return False
        if found is not None:
            self.ended[run] = found
        return found is None

    def ran(self, run: Run, seconds: float, problem: str = "") -> None:
        """A run that was started is over, after so much wall time; ``problem`` says why it has no result."""
        self.started += 1
        self._seconds[run.task, run.parallel].append(seconds)
        self.ended[run] = problem or ended(arm_of(self.grid, run), self.grid.folder(run)) or "no result"

    def is_failed(self, run: Run) -> bool:
        """Whether it ended without a result it should have had."""
        how = self.ended[run]
        return how not in (FINISHED, STOPPED) and not how.startswith(LEFT_OUT)

    def failed(self) -> dict[str, str]:
        """Runs without a result, by name, and why."""
        return {str(run): how for run, how in self.ended.items() if self.is_failed(run)}

    def seconds_left(self) -> float | None:
        """Estimate for all runs that are not over, from the mean time of those run now; None before the first."""
        known = {key: fmean(values) for key, values in self._seconds.items()}
        if not known:
            return None
        other = fmean(known.values())
        left = [run for run in self._runs if run not in self.ended]
        work = sum(known.get((run.task, run.parallel), other) * run.world_size for run in left)
        return work / self._workers

    def left(self) -> str:
        """The estimate, for a progress bar."""
        seconds = self.seconds_left()
        if seconds is None:
            return "time left: not known yet"
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
