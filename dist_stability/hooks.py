"""The two places where a controller listens to somebody else's loop: the model's forward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class FirstForward:
    """Calls ``capture`` at the first training forward after :meth:`arm`, before anything in that forward has run.

    This is the moment at which the random streams and buffers are what the committed run left behind: the loader has
    drawn its batch, the model has not yet drawn its dropout masks nor moved its BatchNorm statistics.

    A forward in training mode is the one that counts. A model that is trained in eval mode (frozen BatchNorm) never
    has one, so a forward with autograd on is taken provisionally, and replaced if one in training mode follows.

    Args:
        modules: Modules whose forward is the model's forward (a DDP wrapper and the module inside it).
        capture: Called without arguments; must be local, a forward may be inside other ranks' collectives.
    """

    def __init__(self, modules: Iterable[nn.Module], capture: Callable[[], None]) -> None:
        """Register the hooks."""
        self._capture = capture
        self.captured = False
        self.paused = False
        self._settled = False
        # Before FSDP's own hooks: those already start moving shards.
        self._handles = [m.register_forward_pre_hook(self._hook, prepend=True) for m in dict.fromkeys(modules)]

    def arm(self) -> None:
        """Wait for the next training forward."""
        self.captured = False
        self._settled = False

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.compiler.disable
    def _hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.paused or self._settled:
            return
        if module.training:
            self._settled = True
        elif self.captured or not torch.is_grad_enabled():
            return
        self._capture()
        self.captured = True


class OptimizerHooks:
    """The guarded step for a loop that calls ``optimizer.step()`` itself.

    The first optimizer's pre-step hook opens the attempt, the last one's post-step hook closes it with the verdict. A
    closure runs forward and backward inside ``step()``, after the pre-step hook, so it is wrapped: the guards look at
    the gradients when it has returned. Schedulers among ``extra_state`` have the one ``step()`` after a refusal, before
    the next optimizer step, made a no-op: their owner does not know that the attempt was refused.

    Args:
        optimizers: In the order in which the loop steps them.
        extra_state: The controller's; LR schedulers are found here.
        before: Opens the attempt: the gradients are complete, no optimizer has stepped. Returns whether the step that
            follows must change nothing: the loop's optimizers step anyway, so the gradients are withheld from them.
        after: Closes it, after the last optimizer; returns whether the proposal stands.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        extra_state: Mapping[str, Any],
        before: Callable[[], bool],
        after: Callable[[], bool],
    ) -> None:
        """Register the hooks. They run outside of compiled code: ``torch.compile(optimizer.step)`` has them inside."""
        self._begin = before
        self._close = after
        self._optimizers = list(optimizers)
        self._stepped: list[int] = []
        self._opened = False
        self._withheld: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._handles: list[Any] = []
        for index, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before(index)))
            self._handles.append(optimizer.register_step_post_hook(self._after(index)))
        self._schedulers = [s for s in extra_state.values() if isinstance(s, torch.optim.lr_scheduler.LRScheduler)]
        self._skip: set[int] = set()
        for scheduler in self._schedulers:
            scheduler.__class__ = self._quiet(type(scheduler))

    def close(self) -> None:
        """Remove the hooks and give the schedulers their own ``step`` back. Idempotent."""
        for handle in self._handles:
            handle.remove()
        for scheduler in self._schedulers:
            scheduler.__class__ = type(scheduler).__bases__[0]
        self._handles, self._schedulers = [], []

    def _open(self, optimizer: Optimizer) -> None:
        if self._opened:
            _check_hooked_once(optimizer)
        self._opened = True
        if not self._begin():
            return
        for optimizer in self._optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                self._withheld.append((parameter, parameter.grad))
                parameter.grad = None

    def _before(self, index: int) -> Callable[..., Any]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index in self._stepped:
                missing = [i for i in range(len(self._optimizers)) if i not in self._stepped]
                raise RuntimeError(
                    f"optimizer {index} stepped twice before optimizer(s) {missing}: one attempt is one step of each "
                    f"optimizer given to the controller. Give a controller only the optimizers that step together."
                )
            self._skip.clear()
            first = not self._stepped
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                if first:
                    self._open(optimizer)
                return None
            wrapped = self._wrap(closure, optimizer if first else None)
            # `args` holds the optimizer itself first: a step hook sees the unbound call.
            if len(args) > 1:
                return (args[0], wrapped, *args[2:]), kwargs
            return args, {**kwargs, "closure": wrapped}

        return torch.compiler.disable(hook)

    def _wrap(self, closure: Callable[[], Any], first: Optimizer | None) -> Callable[[], Any]:
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise TypeError(
                    "this optimizer calls its closure more than once in a step (as LBFGS does): the proposal and its "
                    "gradients are not one pair, so the step cannot be guarded. Use an optimizer that calls it once."
                )
            loss = closure()
            if first is not None:
                self._open(first)
            return loss

        return wrapped

    def _after(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stepped.append(index)
            if len(self._stepped) < len(self._optimizers):
                return
            self._stepped.clear()
            self._opened = False
            for parameter, gradient in self._withheld:
                parameter.grad = gradient
            self._withheld = []
            if not self._close():
                self._skip.update(id(scheduler) for scheduler in self._schedulers)

        return torch.compiler.disable(hook)

    def _quiet(self, kind: type) -> type:
        """A subclass of the scheduler's class whose ``step`` can be skipped once.

        Not an attribute on the instance: ``LRScheduler.state_dict`` would save it with everything else.
        """
        skip = self._skip

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if id(scheduler) in skip:
                skip.discard(id(scheduler))
                return None
            return kind.step(scheduler, *args, **kwargs)  # type: ignore[attr-defined]

        return type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})


def _check_hooked_once(optimizer: Optimizer) -> None:
    """Torch runs an optimizer's step hooks in each class whose ``step`` it has wrapped: those that have instances.

    Raises:
        RuntimeError: It has wrapped several of this optimizer's, so a step that calls its parent's has begun twice.
    """
    kinds = [kind.__name__ for kind in type(optimizer).__mro__ if hasattr(vars(kind).get("step"), "hooked")]
    if len(kinds) > 1:
        raise RuntimeError(
            f"{kinds[0]}.step() began again before it had ended: if it calls {kinds[1]}.step(), torch runs the step "
            f"hooks in both, because {kinds[1]} has instances of its own. Do not attach() the controller; call its "
            f"step() in place of optimizer.step()."
        )
