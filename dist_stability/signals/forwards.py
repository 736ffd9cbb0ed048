"""Which forwards of a model a loss function makes, seen from outside.

A forward of a sharded model is a collective: when a rank fails between two forwards, its peers wait in the next one
until it comes, too. So the inputs of every outermost forward are written down once, and a rank that failed can run
the forwards it still owes.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one forward, as the caller passed them. References, not copies."""


class ForwardCountError(RuntimeError):
    """The loss function made another number of forwards than in its first measurement."""


class RootForwards:
    """Counts, and records, the outermost forwards of one module while it is entered as a context.

    Two hooks, one before and one after the forward. Ours runs before those of FSDP (which start to move shards) and
    after them, so "inside" covers all that FSDP does. No ``always_call`` hook, though it would tell more about a
    forward that raised: torch.compile guards on its id, and would compile a compiled loss function anew each time.

    Attributes:
        calls: The outermost forwards begun, in order; without ``keep`` their inputs are left out.
    """

    def __init__(self, module: nn.Module, *, keep: bool, at_most: int | None) -> None:
        """Prepare; nothing is hooked yet.

        Args:
            module: The module whose forwards count.
            keep: Keep the inputs.
            at_most: Number of outermost forwards after which one more raises instead of entering a collective in
                which no peer will ever arrive; None for no limit.
        """
        self.calls: list[Call] = []
        self._module, self._keep, self._at_most = module, keep, at_most
        self._begun = self._completed = 0
        self._handles: tuple[Any, ...] = ()

    @property
    def unfinished(self) -> bool:
        """A forward was begun (by this context) and has not returned: it raised, or is still running."""
        return self._begun > self._completed

    def __enter__(self) -> RootForwards:
        self._handles = (
            self._module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            self._module.register_forward_hook(self._after),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.unfinished:  # a forward inside a forward is run by whoever runs the outer one
            if self._at_most is not None and len(self.calls) >= self._at_most:
                raise ForwardCountError(
                    f"loss_fn calls the model more often than in its first measurement ({self._at_most} times over "
                    "all batches). The number of forwards must not depend on the weights or on chance: the other ranks "
                    "would not be in the extra one."
                )
            self.calls.append((args, kwargs) if self._keep else ((), {}))
        self._begun += 1

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._completed += 1
