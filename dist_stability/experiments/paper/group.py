"""The runs of an experiment one after the other inside the processes that ``torchrun`` has started."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch.distributed as dist

from dist_stability.experiments import training
from dist_stability.experiments.options import parse_options
from dist_stability.experiments.paper.inside import inside
from dist_stability.experiments.paper.outcomes import Outcomes
from dist_stability.experiments.paper.plan import Grid, Run, words
from dist_stability.experiments.paper.protocol import RANKS
from dist_stability.experiments.progress import Progress
from dist_stability.experiments.tasks import make_task
from dist_stability.experiments.wrapping import Processes, processes


def run_in_group(grid: Grid, runs: Sequence[Run], device: str) -> Outcomes | None:
    """Run what is missing, with one process group for all of it.

    Args:
        grid: The experiment; its parallel modes are distributed.
        runs: All its runs, equal on all ranks; a run comes after those it needs.
        device: "cpu" or "cuda".

    Returns:
        On rank 0 how the runs ended, on other ranks None.

    Raises:
        Exception: Whatever a run raises on a rank: the group cannot be used any more.

    Collectives: all ranks call it together. Rank 0, whose files count, decides what is run and broadcasts it.
    """
    outcomes = Outcomes(grid, runs, RANKS)
    with processes(grid.parallels[0], device, int(os.environ.get("LOCAL_RANK", "0"))) as here:
        first = here.rank == 0
        title = f"{grid.protocol.experiment}: {len(runs)} runs on {here.world_size} processes"
        with Progress(len(runs), title, shown=first, terminal=False) as progress:
            for number, run in enumerate(runs, 1):
                arguments = _decide(outcomes, run, first)
                if arguments is not None:
                    begin = time.monotonic()
                    status = _train(grid, run, arguments, here)
                    if first:
                        outcomes.ran(run, time.monotonic() - begin)
                        if outcomes.is_failed(run):
                            progress.note(f"  failed: {run}: exit status {status}")
                progress.advance(number, outcomes.left())
    return outcomes if first else None


def _decide(outcomes: Outcomes, run: Run, first: bool) -> tuple[str, ...] | None:
    """The command line of a run that is missing, else None; equal on all ranks."""
    said: list[tuple[str, ...] | None] = [None]
    if first and outcomes.must_run(run):
        said[0] = words(outcomes.grid, run)
    dist.broadcast_object_list(said)
    return said[0]


def _train(grid: Grid, run: Run, arguments: tuple[str, ...], here: Processes) -> int:
    def body(complete: list[str]) -> int:
        options = parse_options(complete, here.world_size)
        task = make_task(
            options.task, data=options.data, dropout=options.dropout, width=options.width, layers=options.layers
        )
        return training.run(options, task, here)

    log = "log.txt" if here.rank == 0 else f"log-rank{here.rank}.txt"
    return inside(arguments, grid.folder(run), log, body)
