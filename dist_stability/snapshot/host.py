"""State that is not in tensors of the plan: what a forward moves, and what is set around the optimizer step.

The two are captured at different moments (docs/guarded-step.md), so they are two classes:

* :class:`ForwardState` at the first training forward after a verdict: random streams, buffers, and objects that a
  forward moves. Draws that the data loader made before it stay, those of a refused forward are undone.
* :class:`EntryState` on entry of ``step()``, before the optimizer runs: per-group values, GradScaler, schedulers and
  other objects. What the loop stepped after an accepted verdict belongs to the committed state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import SnapshotError
from .buffers import BufferCopies
from .rng import RandomState

# What a GradScaler changes as it runs, and what its setters change.
_SCALER_VALUES = (
    "_init_scale",
    "_init_growth_tracker",
    "_growth_factor",
    "_backoff_factor",
    "_growth_interval",
    "_scale",
    "_growth_tracker",
)


class ForwardState:
    """Random streams, buffers and ``moved_by_forward`` objects before a forward.

    Its clones of the buffers are made once and used again.

    Args:
        model: Whose buffers they are.
        extra_state: Of the controller. Objects in it with a true attribute ``moved_by_forward`` change when the loss is
            computed (a count of calls, a schedule of the loss), so a refusal takes them back to before that.

    Attributes:
        moved: Their states as captured, by name.
    """

    def __init__(self, model: nn.Module, extra_state: Mapping[str, Any] | None = None) -> None:
        """Nothing is captured yet."""
        self._buffers = BufferCopies(model)
        self._random: RandomState | None = None
        self._movable = {
            name: each for name, each in (extra_state or {}).items() if getattr(each, "moved_by_forward", False)
        }
        self.moved: dict[str, Any] = {}

    @property
    def captured(self) -> bool:
        """Whether there is something to restore."""
        return self._random is not None

    def capture(self) -> None:
        """Copy the random streams, buffers and objects, over what was captured before. No host sync."""
        self._buffers.capture()
        self._random = RandomState.capture()
        self.moved = {name: copy.deepcopy(each.state_dict()) for name, each in self._movable.items()}

    def restore(self) -> None:
        """Put them back; may be called repeatedly. Does nothing if no forward was captured: none has moved them."""
        if self._random is not None:
            self._buffers.restore()
            self._random.restore()
            for name, state in self.moved.items():
                self._movable[name].load_state_dict(copy.deepcopy(state))

    def export(self) -> dict[str, Any]:
        """The capture as plain data, for another process. Waits for buffers on a device."""
        assert self._random is not None, "nothing was captured"
        return {"buffers": self._buffers.export(), "random": self._random.export()}

    def check_buffers(self, saved: Mapping[str, Any]) -> None:
        """Raise SnapshotError if :meth:`load_buffers` would. Changes nothing."""
        self._buffers.check(saved["buffers"])

    def load_buffers(self, saved: Mapping[str, Any]) -> None:
        """Write the buffers of what another process exported into the model.

        Raises:
            SnapshotError: The model has other buffers; nothing was changed then.
        """
        self._buffers.load(saved["buffers"])

    def clear(self) -> None:
        """Forget the capture, keep the memory."""
        self._random = None
        self.moved = {}


@dataclass(frozen=True, slots=True, eq=False)
class EntryState:
    """Per-group values of the optimizers, loss scale, and the state of the objects in ``extra_state``."""

    groups: tuple[tuple[dict[str, Any], ...], ...]
    scaler: dict[str, Any] | None
    extra: dict[str, Any]

    @classmethod
    def capture(
        cls, optimizers: Sequence[Optimizer], scaler: Any = None, extra_state: Mapping[str, Any] | None = None
    ) -> EntryState:
        """Copy everything. No host sync of ours (an object's own ``state_dict`` may have one).

        Args:
            optimizers: In any fixed order.
            scaler: ``torch.amp.GradScaler`` or None.
            extra_state: Objects with ``state_dict`` and ``load_state_dict``, by name.
        """
        return cls(
            groups=tuple(
                tuple(
                    {key: _copied(value) for key, value in group.items() if key != "params"}
                    for group in optimizer.param_groups
                )
                for optimizer in optimizers
            ),
            # Not its state_dict(): that reads the scale on the host, and on CUDA waits for it.
            scaler={name: _copied(getattr(scaler, name)) for name in _SCALER_VALUES}
            if scaler is not None and scaler.is_enabled()
            else None,
            extra={name: copy.deepcopy(stateful.state_dict()) for name, stateful in (extra_state or {}).items()},
        )

    def restore(
        self, optimizers: Sequence[Optimizer], scaler: Any = None, extra_state: Mapping[str, Any] | None = None
    ) -> None:
        """Put everything back; may be called repeatedly.

        Objects of ``extra_state`` get a deep copy through ``load_state_dict``. Per-group values are written last:
        loading a scheduler's state leaves the learning rate as it is, and some schedulers write into the groups.

        Args:
            optimizers: Those of the capture, in the same order.
            scaler: That of the capture.
            extra_state: The objects of the capture.

        Raises:
            SnapshotError: An optimizer has another number of groups than at the capture.
        """
        for number, (optimizer, groups) in enumerate(zip(optimizers, self.groups, strict=True)):
            if len(optimizer.param_groups) != len(groups):
                raise SnapshotError(
                    f"rank {parallel.this_rank()}: optimizer {number} has {len(optimizer.param_groups)} parameter "
                    f"groups, {len(groups)} at the snapshot"
                )
        for name, state in self.extra.items():
            (extra_state or {})[name].load_state_dict(copy.deepcopy(state))
        if scaler is not None and self.scaler is not None:
            _restore_scaler(scaler, self.scaler)
        for optimizer, groups in zip(optimizers, self.groups, strict=True):
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                _restore_group(group, saved)


def _copied(value: Any) -> Any:
    # A deep copy of a tensor that is part of a graph fails, and one of a plain tensor is a clone anyway.
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _written(live: Any, saved: Any) -> Any:
    """``live`` with the content of ``saved`` where that is possible in place, else a copy of ``saved``.

    A compiled optimizer holds on to the tensor that is its learning rate, so the object must stay.
    """
    if (
        isinstance(live, torch.Tensor)
        and isinstance(saved, torch.Tensor)
        and live.shape == saved.shape
        and live.dtype == saved.dtype
    ):
        with torch.no_grad():
            parallel.local(live).copy_(parallel.local(saved))
        return live
    return _copied(saved)


def _restore_group(group: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in [key for key in group if key != "params" and key not in saved]:
        del group[key]
    for key, value in saved.items():
        group[key] = _written(group.get(key), value)


def _restore_scaler(scaler: Any, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        setattr(scaler, name, _written(getattr(scaler, name), value))
    # As update() leaves it: each optimizer READY, no infinity found. Left at UNSCALED or STEPPED, the unscale_() of the
    # next batch would raise. The dict makes a fresh state for an optimizer when it is asked for one.
    scaler._per_optimizer_states.clear()
