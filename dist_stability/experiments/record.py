"""What a training run writes down: its events as they happen, and a summary at its end."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from dist_stability import parallel
from dist_stability.errors import LockstepError, StabilityStop
from dist_stability.experiments.options import Options
from dist_stability.experiments.tasks import Task
from dist_stability.experiments.wrapping import Processes
from dist_stability.report.events import EventLog, read_events, write_json
from dist_stability.report.runs import PREFLIGHT, REFUSALS
from dist_stability.report.versions import source_digest, versions


class RunRecorder:
    """Keeps the run's history on every rank; rank 0 writes it, or, after an error, whoever is first.

    ``probe`` is the probe loss of the state the model is in: after a refusal that of the state it went back to.

    Args:
        options: Of the run.
        task: What is trained.
        here: This process.
        model: The wrapped model, described in the summary.
        parameter_norm: Norm of the parameters, for ``--parameter-norm``. Called on every rank once for each event, when
            the attempt is settled: what it measures is the state that stands, also of an attempt that ends the run.

    Collectives: those of ``parameter_norm``, in :meth:`event`.
    """

    def __init__(
        self,
        options: Options,
        task: Task,
        here: Processes,
        model: nn.Module,
        parameter_norm: Callable[[], float] | None = None,
    ) -> None:
        """Open ``events.jsonl``; what an earlier run left in the same folder is removed, unless it may be resumed."""
        self._options, self._writes, self._parameter_norm = options, here.rank == 0, parameter_norm
        self.probe = math.nan
        self._batch = -1
        self._batches: list[int] = []
        self._series: list[float] = []
        self._refused: list[int] = []
        self._undone: list[int] = []
        self._batch_of: dict[int, int] = {}
        self._standing: dict[int, int] = {}
        self._attenuated: set[int] = set()
        self._provisional: set[int] = set()
        self._rungs: Counter[str] = Counter()
        self._warnings = 0
        self._committed: list[tuple[int, float]] = []
        self._preflight: dict[str, Any] | None = None
        self._begin = time.perf_counter()
        self._first: float | None = None
        self._loop_seconds = self._writing = 0.0
        self._facts = {
            "task": task.name,
            "data": task.data,
            "parallel": options.parallel,
            "layout": parallel.describe(model),
            "world_size": here.world_size,
            "device": here.device.type,
            "settings": options.settings(),
            "command": [*_program(), *sys.argv[1:]],
            "versions": versions(),
            "source": source_digest(),
        }
        self._log: EventLog | None = None
        self._earlier: list[dict[str, Any]] = []
        if self._writes:
            path = options.out / "events.jsonl"
            resumes = options.resume != "no" and path.exists()
            self._earlier = read_events(path) if resumes else []
            self._log = EventLog(path, again=self._earlier)
            (options.out / "summary.json").unlink(missing_ok=True)

    def begin_batch(self, number: int, attempt: int | None = None) -> None:
        """Say which batch the next events are about, or those of one attempt, which may come later."""
        self._batch = number
        if attempt is not None:
            self._batch_of[attempt] = number
        if self._first is None:
            self._first = time.perf_counter()

    def resume(self, attempt: int) -> None:
        """Take over the events of an earlier start, up to an attempt; the log has them again."""
        earlier, self._earlier = self._earlier, []
        for event in earlier:
            if event["action"] == PREFLIGHT:
                self._preflight = event
            elif event["attempt"] < attempt:
                self.begin_batch(event["batch"], event["attempt"])
                self._learn(event)
        if self._log is not None:
            self._log.rewrite(event for event in earlier if event["attempt"] < attempt)

    def event(self, event: dict[str, Any]) -> None:
        """Take one event from the controller."""
        if event["action"] == PREFLIGHT:
            self._preflight = event
            if self._log is not None:
                self._log.append(event)
            return
        begin = time.perf_counter()
        batch = self._learn(event)
        written = {**event, "batch": batch, "probe": self.probe}
        if self._parameter_norm is not None:
            written["parameter_norm"] = self._parameter_norm()
        if self._log is not None:
            self._log.append(written)
        end = time.perf_counter()
        self._writing += end - begin
        self._loop_seconds = end - (begin if self._first is None else self._first) - self._writing

    def _learn(self, event: dict[str, Any]) -> int:
        """What the summary will say of it; the batch it is about."""
        batch = self._batch_of.setdefault(event["attempt"], self._batch)
        undone = event["undone"]
        if not event.get("final", True):
            self._provisional.add(event["attempt"])
        self._rungs.update([event["rung"]] if event["rung"] else [])
        self._warnings += bool(event["warning"])
        for attempt in undone:
            self._standing.pop(attempt, None)
        while self._committed and self._committed[-1][0] in undone:
            self._committed.pop()
        if event["action"] == "attenuate" and undone:
            # A deferred verdict: it is the step before that stands in part.
            batch = self._batch_of[event["attempt"]] = self._batch_of[undone[-1]]
        if event["action"] in REFUSALS:
            self._refused.append(batch)
            for attempt in undone:
                which = self._refused if attempt in self._provisional else self._undone
                which.append(self._batch_of[attempt])
        elif event["action"] != "scaler_skip":
            self._standing[event["attempt"]] = batch
        if event["action"] == "attenuate":
            self._attenuated.add(event["attempt"])
        if event["action"] in ("commit", "attenuate"):
            # Observed, a proposal that would be vetoed is accepted and not measured.
            measured = event["measurement"]
            self._committed.append((event["attempt"], math.nan if measured is None else measured))
        self.probe = self._committed[-1][1] if self._committed else math.nan
        self._batches.append(batch)
        self._series.append(self.probe)
        return batch

    def finish(self, *, evaluation: float | None = None, error: BaseException | None = None) -> None:
        """Write the summary.

        Rank 0 does. After an error another rank does if rank 0 has not: the launcher ends the remaining processes as
        soon as the first one has left, so rank 0 may not get to it, and every rank knows the same.

        Args:
            evaluation: Loss on held-out data that the probe does not use.
            error: What stopped the run before its end.
        """
        path = self._options.out / "summary.json"
        if not self._writes and (error is None or path.exists()):
            return
        standing = set(self._standing.values())
        stop: dict[str, Any] = {}
        if error is not None:
            stop = {"error": type(error).__name__, "reason": str(error)}
        if isinstance(error, LockstepError):
            stop.update(ranks=list(error.ranks), attempt=error.step)
        if isinstance(error, StabilityStop):
            stop.update(report=error.report)
        write_json(
            path,
            {
                "finished": error is None,
                **stop,
                **self._facts,
                # A batch that was taken back and stands after its replay was neither refused nor undone.
                "refused": [batch for batch in dict.fromkeys(self._refused) if batch not in standing],
                "undone": sorted(set(self._undone) - standing),
                # Committed, but only at a part of the step's length: no golden twin knows them.
                "attenuated": [batch for attempt, batch in self._standing.items() if attempt in self._attenuated],
                "rungs": dict(self._rungs),
                "warnings": self._warnings,
                "preflight": self._preflight,
                "final_probe": self.probe,
                "evaluation": evaluation,
                "seconds": time.perf_counter() - self._begin,
                # From the first batch to the last event, without what was written down here.
                "loop_seconds": self._loop_seconds,
                "probe": {"batch": self._batches, "value": self._series},
            },
        )

    def __enter__(self) -> RunRecorder:
        """Use as a context manager."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the event log."""
        if self._log is not None:
            self._log.close()


def _program() -> list[str]:
    """How this program was started, without the place it is installed in."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return ["-m", spec.name] if spec is not None else [sys.argv[0]]
