"""R9 on one rank: the sharpness of a small transformer, the same whatever wraps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_stability import parallel
from dist_stability.diagnostics.sharpness import Sharpness
from dist_stability.experiments.spectral.models import SmallGPT
from dist_stability.experiments.spectral.tasks import loss_fn, task
from dist_stability.experiments.wrapping import Processes, wrap
from dist_stability.testing import capture_state, compare

STEPS, BATCH, TOLERANCE, PRODUCTS = 20, 16, 1e-4, 100


def sharpness(here: Processes, mode: str, quick: bool) -> dict[str, Any]:
    """Train a few steps, measure, and look whether everything is as before.

    Returns:
        "eigenvalue", by finite differences; "exact", by double backward, in one process; "changed", what the
        measurement left behind.
    """
    data = task("english")
    model: nn.Module = SmallGPT(data.vocabulary, data.context, width=16, layers=2, norm="pre", init="paper", seed=1)
    model = wrap(model, list(model.get_submodule("blocks").children()), mode, dtype=torch.float32, here=here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = data.batch(1, 0, BATCH)
    replica, replicas = parallel.data_replica(model)
    batch = inputs[replica::replicas], targets[replica::replicas]
    for _ in range(3 if quick else STEPS):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    products = 2 if quick else PRODUCTS
    before, gradients = capture_state(model, optimizer), _gradients(model)
    reading = Sharpness(model, optimizer, loss_fn, [batch]).converge(TOLERANCE, products)
    changed = compare(before, capture_state(model, optimizer))
    kept = zip(gradients, _gradients(model), strict=True)
    changed += [name for (name, old), (_, new) in kept if (old is None) != (new is None) or not _equal(old, new)]
    found: dict[str, Any] = {"eigenvalue": reading.eigenvalue, "changed": changed, "exact": None}
    if mode == "single":
        exact = Sharpness(model, optimizer, _twice, [batch], exact=True)
        found["exact"] = exact.converge(TOLERANCE, products).eigenvalue
    return found


def _twice(model: nn.Module, batch: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return loss_fn(model, batch)


def _gradients(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [
        (name, None if parameter.grad is None else parallel.local(parameter.grad).clone())
        for name, parameter in model.named_parameters()
    ]


def _equal(old: Tensor | None, new: Tensor | None) -> bool:
    return old is None or new is None or torch.equal(old, new)
