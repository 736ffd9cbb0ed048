"""The state of every random number generator a training step may draw from."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class RandomState:
    """The random streams of this process at one moment.

    Covers python's ``random``, numpy's global generator when numpy is imported, torch's CPU generator, the default
    generator of every initialized accelerator, and DTensor's own tracker where it keeps states. Generators that the
    program made itself are not known here; give them to the controller as ``extra_state``.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: tuple[tuple[torch.Generator, torch.Tensor], ...]
    dtensor: dict[str, torch.Tensor]

    @classmethod
    def capture(cls) -> RandomState:
        """Copy every state. Initializes no device and waits for none: generator states lie on the host."""
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
            cpu=torch.default_generator.get_state(),
            devices=tuple((generator, generator.get_state()) for generator in _device_generators()),
            dtensor={tag: state.clone() for tag, state in _dtensor_states().items()},
        )

    def restore(self) -> None:
        """Put every captured stream back to where it was; may be called any number of times."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.default_generator.set_state(self.cpu)
        for generator, state in self.devices:
            generator.set_state(state)
        live = _dtensor_states()
        live.clear()
        live.update((tag, state.clone()) for tag, state in self.dtensor.items())

    def export(self) -> dict[str, Any]:
        """The same as plain data, for another process."""
        devices = [(str(generator.device), state) for generator, state in self.devices]
        return {
            "python": self.python,
            "numpy": self.numpy,
            "cpu": self.cpu,
            "devices": devices,
            "dtensor": self.dtensor,
        }

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> RandomState:
        """Undo :meth:`export`. Devices that this process does not use are left out: nobody draws from them."""
        here = {str(generator.device): generator for generator in _device_generators()}
        if saved["numpy"] is not None:
            importlib.import_module("numpy")
        return cls(
            python=saved["python"],
            numpy=saved["numpy"],
            cpu=saved["cpu"],
            devices=tuple((here[name], state) for name, state in saved["devices"] if name in here),
            dtensor=saved["dtensor"],
        )


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Run the body with every stream started from ``seed``; afterwards all are where they were.

    Args:
        seed: Any integer >= 0. The same seed gives the body the same draws each time.
    """
    before = RandomState.capture()
    try:
        _seed_all(seed)
        yield
    finally:
        before.restore()


def _seed_all(seed: int) -> None:
    # Not torch.manual_seed: for a device that is not initialized yet it leaves a call behind that seeds it later.
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    for generator in _device_generators():
        generator.manual_seed(seed)
    if _dtensor_states():
        _dtensor_tracker()._manual_seed(seed)


def _device_generators() -> list[torch.Generator]:
    """Default generators of the accelerators in use. Asking an unused one for its state would initialize it."""
    generators: list[torch.Generator] = []
    for kind in (torch.cuda, torch.xpu):
        if kind.is_initialized():
            generators.extend(kind.default_generators)
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    return generators


def _dtensor_tracker() -> Any:
    module = sys.modules.get("torch.distributed.tensor._random")
    return None if module is None else module._rng_tracker


def _dtensor_states() -> dict[str, torch.Tensor]:
    """The states DTensor's tracker keeps beside the device's generator: up to torch 2.8 or so, none later."""
    return getattr(_dtensor_tracker(), "rng_states", {})
