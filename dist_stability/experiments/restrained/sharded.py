"""R9: the sharpness of a transformer under DDP and FSDP2, on 2 and 4 processes over gloo, against double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_stability.bench.engine.ranks import run_job
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, every, within

KINDS = (("single", 1), ("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("fsdp2", 4))


def settings(quick: bool) -> list[Settings]:
    """One job for each mode and number of processes."""
    kinds = KINDS[:2] if quick else KINDS
    return [{"name": f"{mode}-{ranks}", "mode": mode, "ranks": ranks, "quick": quick} for mode, ranks in kinds]


def work(settings: Settings) -> Result:
    """Start the processes and take what rank 0 measured."""
    return run_job("sharpness", settings["mode"], settings["ranks"], torch.device("cpu"), settings["quick"])


def conclude(results: Sequence[Result]) -> Outcome:
    """Against double backward, against each other, and whether everything was put back."""
    exact = next((result["exact"] for result in results if result["exact"] is not None), None)
    one = next((result["eigenvalue"] for result in results if result["settings"]["mode"] == "single"), None)
    checks = [every("modes that leave every bit as it was", [not result["changed"] for result in results])]
    if exact is not None and one is not None:
        errors = [abs(result["eigenvalue"] / exact - 1.0) for result in results]
        checks.append(within("finite difference against double backward, relative", errors, high=0.02))
        apart = [abs(result["eigenvalue"] / one - 1.0) for result in results]
        checks.append(within("against one process, relative", apart, high=0.01))
    rows = [[r["settings"]["mode"], r["settings"]["ranks"], r["eigenvalue"], r["exact"]] for r in results]
    head = ("mode", "processes", "scaled eigenvalue", "double backward")
    return Outcome(checks, head, rows, "AdamW; two blocks with fused attention; one global batch.")


PART = Part("R9", "Sharpness under DDP and FSDP2", settings, work, conclude, parallel=False)
