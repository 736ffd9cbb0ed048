"""The global 2-norm of a model's parameters or gradients, however they are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_stability import parallel


class GlobalNorm:
    """Measures parameters and gradients without changing a bit of either.

    Args:
        model: With its wrappers (none, DDP, FSDP1, FSDP2, HSDP); says which ranks hold the same elements.
        parameters: What the optimizer owns.

    Collectives: one all-reduce of one number over the default group, in each method; every rank calls it. Each waits
    for the device.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Look up where the parameters lie; enters no collective."""
        self._distributed = dist.is_available() and dist.is_initialized()
        layout = parallel.Layout(model, dist.get_world_size() if self._distributed else 1)
        self._model, self._parameters = model, list(parameters)
        self._replicas = [layout.residence(parameter).replicas for parameter in self._parameters]

    def of_parameters(self) -> float:
        """Norm of the weights; at a step boundary. FSDP modules are put back to their sharded state."""
        parallel.reshard(self._model)
        return self._norm(self._parameters)

    def of_gradients(self) -> float:
        """Norm of the gradients, after backward; a parameter without one counts as 0. NaN or inf when a gradient is."""
        return self._norm([parameter.grad for parameter in self._parameters])

    @torch.no_grad()
    def _norm(self, tensors: Sequence[Tensor | None]) -> float:
        device = parallel.local(self._parameters[0]).device
        square_sum = torch.zeros((), dtype=torch.float64, device=device)
        there = [(parallel.local(t), n) for t, n in zip(tensors, self._replicas, strict=True) if t is not None]
        if there:
            # In float64 the square of every finite fp32 or bf16 number is finite.
            norms = torch._foreach_norm([tensor for tensor, _ in there], 2, dtype=torch.float64)
            square_sum = torch.stack(
                [norm.square() / count for norm, (_, count) in zip(norms, there, strict=True)]
            ).sum()
        if self._distributed:
            dist.all_reduce(square_sum)
        return float(square_sum.sqrt())
