"""Ways to keep a copy of the training state: ours, those of others, and a plain memcpy of as many bytes.

Each is used like this, by one thread: ``take`` until the call returns, ``wait`` until the copy is there, any number of
times; ``restore`` puts the last copy back; ``close`` at the end.
"""

from __future__ import annotations

import copy
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_stability.bench.engine.timing import synchronize
from dist_stability.snapshot import Slot, SlotRing, StatePlan


class Keeper(ABC):
    """See the module.

    Attributes:
        held: Bytes of one copy.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, plan: StatePlan, device: torch.device) -> None:
        """Remember what is to be copied."""
        self.model, self.optimizer, self.plan, self.device = model, optimizer, plan, device
        self.held = plan.nbytes

    @abstractmethod
    def take(self) -> None:
        """Start a copy of the state as it is now."""

    def wait(self) -> None:
        """Until the copy is there."""
        synchronize(self.device)

    @abstractmethod
    def restore(self) -> None:
        """Put the last copy back. On a device: queue it."""

    def close(self) -> None:
        """Give up memory and threads."""
        return None

    def _load(self, model: Any, optimizer: Any) -> None:
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Slots(Keeper):
    """Ours, as the guarded step uses it: fill a free slot, which checks the plan, and make it the safe one.

    A judged step checks the plan once more, before its probe; that is in ``bench step``.
    """

    def __init__(self, *args: Any) -> None:
        """A ring of two slots."""
        super().__init__(*args)
        self._ring = SlotRing(0)
        self._slot: Slot | None = None
        self._attempt = 0

    def take(self) -> None:
        """Fill the slot that is not the safe one."""
        self._slot = self._ring.begin()
        self._slot.fill(self.plan, self._attempt)
        self._attempt += 1

    def wait(self) -> None:
        """Until the slot is complete; then it is the safe one."""
        assert self._slot is not None
        self._slot.wait()
        synchronize(self.device)
        self._slot.publish()
        self._ring.commit(self._slot)
        self.held = self._slot.nbytes

    def restore(self) -> None:
        """In place."""
        self._ring.safe.restore()

    def check(self) -> None:
        """Compare the safe slot's bytes with its digests, as is done before every rollback."""
        assert not self._ring.safe.verify()


class CopyLoop(Keeper):
    """``copy_`` of one tensor after the other into memory made once."""

    def __init__(self, *args: Any) -> None:
        """Make the memory."""
        super().__init__(*args)
        self._copies = [self._host(tensor) for tensor in self.plan.tensors()]

    def take(self) -> None:
        """Copy."""
        for mine, live in zip(self._copies, self.plan.tensors(), strict=True):
            mine.copy_(live, non_blocking=True)

    def restore(self) -> None:
        """Copy back."""
        for mine, live in zip(self._copies, self.plan.tensors(), strict=True):
            live.copy_(mine, non_blocking=True)


class CloneAndDeepcopy(Keeper):
    """What the published reference controller does: clones of the model's state, a deep copy of the optimizer's."""

    def take(self) -> None:
        """Copies stay on the device."""
        self._model = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._optimizer = copy.deepcopy(self.optimizer.state_dict())

    def restore(self) -> None:
        """Through ``load_state_dict``."""
        self._load(self._model, self._optimizer)


class CoreStager(Keeper):
    """``torch.distributed.checkpoint``'s ``DefaultStager``, in its background thread as it comes."""

    def __init__(self, *args: Any) -> None:
        """Its default options on CUDA; without CUDA only what works there.

        Raises:
            ImportError: This torch has none.
        """
        super().__init__(*args)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = self.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions() if cuda else StagingOptions(False, False, True, False))
        self._staged: Any = None

    def take(self) -> None:
        """Hand the state dict to its thread."""
        self._staged = self._stager.stage(self._state())

    def wait(self) -> None:
        """Until its thread is done."""
        self._staged.result()

    def restore(self) -> None:
        """Through ``load_state_dict``."""
        state = self._staged.result()
        self._load(state["model"], state["optimizer"])

    def close(self) -> None:
        """End its thread."""
        self._stager.close()


class SaveToMemory(Keeper):
    """``torch.save`` into a ``BytesIO``."""

    def take(self) -> None:
        """Serialize."""
        self._buffer = io.BytesIO()
        torch.save(self._state(), self._buffer)
        self.held = self._buffer.getbuffer().nbytes

    def restore(self) -> None:
        """``torch.load``, then ``load_state_dict``."""
        self._buffer.seek(0)
        state = torch.load(self._buffer, map_location="cpu", weights_only=True)
        self._load(state["model"], state["optimizer"])


class Memcpy(Keeper):
    """The limit: one copy of as many bytes between two blocks of memory that were touched before."""

    def __init__(self, *args: Any) -> None:
        """Make both blocks."""
        super().__init__(*args)
        self._live = torch.zeros(self.plan.nbytes, dtype=torch.uint8, device=self.device)
        self._mine = self._host(self._live).zero_()

    def take(self) -> None:
        """To the host."""
        self._mine.copy_(self._live, non_blocking=True)

    def restore(self) -> None:
        """From the host."""
        self._live.copy_(self._mine, non_blocking=True)

    def restore_anew(self) -> None:
        """From the host, into memory that nobody has touched, as that of a new process is."""
        torch.empty_like(self._live).copy_(self._mine, non_blocking=True)


class OneCall(Keeper):
    """The limit of torch: everything in one call, between lists made once. Nothing is checked or summed up."""

    def __init__(self, *args: Any) -> None:
        """Look the state up once: what replaces its tensors is not seen."""
        super().__init__(*args)
        self._live = self.plan.tensors()
        self._copies = [self._host(tensor) for tensor in self._live]

    def take(self) -> None:
        """To the host."""
        torch._foreach_copy_(self._copies, self._live, non_blocking=True)

    def restore(self) -> None:
        """From the host."""
        torch._foreach_copy_(self._live, self._copies, non_blocking=True)


KEEPERS: dict[str, Callable[..., Keeper]] = {
    "ours": Slots,
    "memcpy": Memcpy,
    "one call": OneCall,
    "copy_ loop": CopyLoop,
    "clone + deepcopy": CloneAndDeepcopy,
    "DefaultStager": CoreStager,
    "torch.save": SaveToMemory,
}
"""By name; ``memcpy`` is the limit of the machine, ``one call`` that of torch, the last four are rivals."""

RIVALS = tuple(KEEPERS)[3:]


def make_keepers(*args: Any) -> tuple[dict[str, Keeper], dict[str, str]]:
    """All keepers of a state, and why some of them are missing, by name."""
    made: dict[str, Keeper] = {}
    missing: dict[str, str] = {}
    for name, make in KEEPERS.items():
        try:
            made[name] = make(*args)
        except ImportError as error:
            missing[name] = f"torch {torch.__version__} has none ({error})"
    return made, missing
