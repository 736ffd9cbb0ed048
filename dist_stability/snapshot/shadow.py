"""A second copy of the safe state, on the device itself: a refusal is taken back in the time of one pass over memory.

It costs as many bytes as the state, on the device, and a copy within it at every commit. On the way back nothing
crosses the link, and nothing is gathered from other ranks. It stands beside a slot and is never the only copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .. import parallel
from .arena import limits
from .plan import StatePlan
from .slot import Slot

_RESERVE = 0.1
"""Part of the free memory of the device that is left alone."""


class Shadow:
    """The tensors of one slot's state, whole and where they live.

    Attributes:
        slot: Whose state it is, if any.
        attempt: Attempt of that state.
    """

    def __init__(self) -> None:
        """Without memory."""
        self.slot: Slot | None = None
        self.attempt = -1
        self._plan: StatePlan | None = None
        self._tensors: list[torch.Tensor] = []
        self._refused = False

    @torch.no_grad()
    def fill(self, slot: Slot, plan: StatePlan) -> None:
        """Copy the live state, of which ``slot`` is being filled. Queued on the current stream; waits for nothing.

        Where the device has not enough free memory this warns once, and nothing is copied then or later.
        """
        self.slot, self.attempt = None, slot.attempt
        live = plan.tensors()
        if plan is not self._plan or any(a.device != b.device for a, b in zip(live, self._tensors, strict=False)):
            self._tensors, self._plan = [], plan
            if not self._refused and self._fits(live):
                self._tensors = [torch.empty_like(tensor) for tensor in live]
        for device in {tensor.device for tensor in self._tensors}:
            here = [index for index, tensor in enumerate(live) if tensor.device == device]
            torch._foreach_copy_([self._tensors[index] for index in here], [live[index] for index in here])
        self.slot = slot

    def holds(self, slot: Slot) -> bool:
        """Whether this is for the state of a slot as it is now. The same on all ranks, also where memory is missing."""
        return self.slot is slot and self.attempt == slot.attempt

    def verify(self) -> list[str]:
        """What differs from the digests of the slot; empty for a sound copy."""
        assert self.slot is not None, "of no state"
        if len(self._tensors) < len(self.slot.plan.entries):
            return ["the copy on the device, for which there was no memory"]
        found, expected = self.slot.plan.digests(self._tensors), self.slot.digests
        return [
            f"the copy on the device of what ranks {list(ranks)} hold"
            for ranks in expected
            if int(found[ranks]) != int(expected[ranks])
        ]

    def restore(self) -> None:
        """Write it back, as :meth:`Slot.restore` does with its own copy."""
        assert self.slot is not None, "of no state"
        self.slot.restore(source=self._tensors)

    def close(self) -> None:
        """Give the memory back."""
        self.slot, self._plan, self._tensors = None, None, []

    def _fits(self, live: Sequence[torch.Tensor]) -> bool:
        for device in {tensor.device for tensor in live}:
            need = sum(tensor.numel() * tensor.element_size() for tensor in live if tensor.device == device)
            free = _free(device)
            if need > (1 - _RESERVE) * free:
                self._refused = True
                warnings.warn(
                    f"rank {parallel.this_rank()}: no copy of the state is kept on {device}: it takes "
                    f"{need / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free. Refusals are taken back from host "
                    "memory; set shadow=False, or shard the state over more ranks",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
        return True


def _free(device: torch.device) -> float:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min((limit.available for limit in limits()), default=float("inf")) if device.type == "cpu" else float("inf")
