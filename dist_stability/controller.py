"""The guarded step: propose, measure, vote, then commit or restore.

One attempt runs like this on every rank (* marks what involves the other ranks)::

    first training forward          RNG and buffers are copied                                        (recovery.py)
    entry of step()                 per-group values, schedulers, GradScaler, extra_state are copied
                                    guards look at the gradients, *vote on a veto                     (veto.py)
    optimizer.step()                the proposal
    after it                        *probe, *vote, the rule judges                                    (judging.py)
                                    commit: parameters and optimizer state are copied                 (settlement.py)
                                    refusal: *everything above is restored, in place, and the ladder
                                    says what else is done about it                                   (escalation.py)

With ``decision="deferred"`` the vote is only begun after the proposal and the copy goes into a slot that is not safe
yet; both are settled on entry of the next ``step()``, before anything of that attempt. The host then waits for nothing
in a healthy run; a refusal costs the batch after the refused one as well.

Every rank enters the same collectives in the same order whatever it measured. So a rank can only be late or gone, or
hold a number that should be equal on all ranks and is not; the first is found by a timeout, the second by the vote,
and both end in an error that names the rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import Attempt, Decision, PhaseListener, Phases, event_of, one_line
from .cadence import Cadence, FixedCadence
from .collapse import StepCollapse
from .errors import LockstepError, StabilityError, StabilityStop
from .escalation import Ladder
from .guards import Guard
from .hooks import FirstForward, OptimizerHooks
from .judging import Judging, Question
from .learning_rate import RateCut, announced
from .ledger import Ledger
from .measured_cadence import MeasuredCadence
from .measuring import Measuring
from .persistence import Between, Persistence, Setting
from .recovery import Recovery
from .replay import Replay
from .resume import Resumed
from .rules import Guarantees, PredictiveInnovation, Rule, settings_of
from .rules.panel import Panel, Trend
from .rules.trend import SlowDivergence
from .rungs import Escalation, Rung
from .settlement import Outcome, Settlement
from .signals import Gradients, JudgedPeriod, LossProbe, Monitor, Signal, SignalValues, StepContext, host_values
from .startup import agree_on_replicas, agree_on_settings, make_vote, world_of
from .validation import (
    check_not_fused_into_backward,
    check_optimizers,
    check_parts,
    check_persist,
    check_scaler,
    check_settings,
)
from .verdict import Action, Verdict
from .veto import VetoStage
from .vote import bits
from .watch import is_transport_error
from .window import BatchWindow

_DEFAULT_TREND: Any = object()


class StabilityController:
    """Guards the optimizer steps of a training loop.

    Args:
        model: What the loop calls: a plain module, DDP, FSDP1, ``fully_shard``, HSDP or tensor parallel.
        optimizer: Made after the model was wrapped; or several, in the order in which they step. Together they make
            one proposal.
        probe: Measures a proposal on held-out batches. Every rank gives batches equal in number and shape.
        rule: Judges the measurements; default :class:`PredictiveInnovation`.
        guards: Look at the gradients before the step; their "no" is a veto.
        extra_state: By name, what else belongs to the state: schedulers, an EMA, anything with ``state_dict`` and
            ``load_state_dict``. Deep-copied on entry of every step, so keep it small.
        every: Judge attempts t with (t + 1) % every == 0, or when an :class:`AdaptiveCadence` says so, or "auto": as
            often as costs at most 2 % of the training time, measured (:class:`MeasuredCadence` for another bound). The
            others are accepted as ``unjudged``; a refusal takes them back (:meth:`batches` gives back what was good in
            them).
        mode: "enforce", or "observe": probe, vote and log what would be done, but always accept.
        decision: "immediate", or "deferred": ``step()`` begins the vote and returns a provisional verdict, and the next
            ``step()`` reads it, so that the host waits for nothing. A refusal then takes back the step before, whatever
            the loop did after it included, and drops the present batch. Call :meth:`finish` after the last step.
        probe_on: "rank0" measures with rank 0's batches; "mean" gives each data replica its own part of them.
        process_group: Ranks that train this model; default all.
        timeout: Seconds after which a wait for other ranks ends with :class:`LockstepError`.
        replica_check_every: Compare the bits of replicated state at every this many judged attempts; 0 never.
        split_replicas: Where ranks hold the same state (DDP, HSDP), each keeps its share of the snapshot, and a restore
            gathers them; by default if replicas are compared.
        shadow: Keep a copy of the safe state on the device as well (two with ``decision="deferred"``), if its memory
            allows: a refusal is then taken back without the link, and without gathering shares.
        signals: What else to measure and log at judged attempts, beside what is free: ``UpdateRms()``, ``GroupNorms()``
            and others of :mod:`dist_stability.signals`. They ride in the vote. A collapse of the effective step (free
            with Adam, with ``UpdateRatio()`` for any optimizer) is refused, too: an optimizer whose second moment is
            poisoned stands still and harms nothing.
        confirm: A second probe, disjoint from the first: a step is then refused only if both refuse it.
        trend: Watches committed measurements for slow divergence; None for not at all.
        escalation: When to do more about refusals than to skip, and when to stop.
        anchors: Older states kept for deep rollbacks, 8 commits apart (a host copy each); none are kept for a rule that
            cannot continue from them.
        reload: Loads the last persisted state in place (model, optimizer and everything else the loop resumes from),
            on all ranks together; returns the attempt it belongs to, or None. The ladder's last rung before a stop.
        persist: Keep states where they outlive the process: :meth:`resume` of a restarted one finds them. The snapshots
            themselves in ``SharedMemory(...)``, some of them also on another host (``PeerCopies(...)``) or on disk
            (``Checkpoints(...)``), or several of these in a list.
        asked_to_stop: Whether this rank was told to end (a signal of the cluster). Asked at every vote, in which the
            answer rides: :attr:`stopping` is true on all ranks once it was yes on any.
        on_event: Called on every rank with one dict for each attempt; deferred ones follow at the next step.

    Use it as a context manager around the loop: an exception in the loop then leaves the other ranks a note that says
    why this one stopped, and a collective of the loop's own that loses its peers becomes a :class:`LockstepError` that
    names them.

    A change that somebody else makes to the weights between two steps belongs to the next proposal: it is measured
    with it, and undone with it if it is refused.

    Collectives: construction gathers the settings, probes once (y(theta_0)) and votes once. All ranks construct
    together.

    Raises:
        TypeError, ValueError: A bad argument; before any collective.
        StabilityError: The optimizer does not own the model's parameters, or the probe fails or is not finite on the
            initial weights.
        LockstepError: The ranks were given different settings, models or replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        probe: LossProbe,
        rule: Rule | None = None,
        guards: Sequence[Guard] = (),
        extra_state: Mapping[str, Any] | None = None,
        *,
        every: int | Cadence | Literal["auto"] = 1,
        mode: str = "enforce",
        decision: str = "immediate",
        probe_on: str = "rank0",
        signals: Sequence[Signal] = (),
        confirm: LossProbe | None = None,
        trend: Trend | None = _DEFAULT_TREND,
        escalation: Escalation | None = None,
        anchors: int = 2,
        reload: Callable[[], int | None] | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        replica_check_every: int = 1,
        split_replicas: bool | None = None,
        shadow: bool = False,
        persist: Setting | Sequence[Setting] | None = None,
        asked_to_stop: Callable[[], bool] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Check the arguments, agree on them with the other ranks, measure y(theta_0), take the first snapshot."""
        rule = PredictiveInnovation() if rule is None else rule
        trend = SlowDivergence() if trend is _DEFAULT_TREND else trend
        optimizers = check_optimizers(optimizer)
        guards, self._extra_state = check_parts(
            model, probe, rule, guards, extra_state, confirm, trend, reload, asked_to_stop
        )
        check_settings(
            every, mode, probe_on, timeout, replica_check_every, anchors, escalation, decision, split_replicas, shadow
        )
        kept_in = check_persist(persist, mode)
        self.model, self.rule, self.mode, self.decision = model, rule, mode, decision
        self._deferred = decision == "deferred"
        self.cadence = _cadence(every)
        self._enforced = mode == "enforce"
        self._optimizers = optimizers
        self._timeout, self._probe_on, self._replica_check_every = float(timeout), probe_on, replica_check_every
        self._shadow = shadow
        self._split = replica_check_every > 0 if split_replicas is None else split_replicas
        self._on_event = on_event
        self._ladder = Ladder(escalation)
        clock = (JudgedPeriod(),) if isinstance(self.cadence, MeasuredCadence) else ()
        self._monitor = Monitor((*signals, *clock))
        self._panel = Panel(rule, confirm is not None, trend, StepCollapse())
        self._guarantees = Guarantees()
        self._ledger = Ledger()
        self._phases = Phases(None)
        self._anchors, self._reloadable = anchors, reload is not None
        kept = anchors if self._panel.supports_deep else 0
        world = len(world_of(process_group))
        shadows = (2 if self._deferred else 1) if shadow and self._enforced else 0
        self._persistence = Persistence(kept_in, self._extra_state, process_group) if kept_in else None
        self._recovery = Recovery(
            model,
            optimizers,
            self._extra_state,
            world,
            kept,
            self._phases,
            self._split,
            shadows,
            source=None if self._persistence is None else self._persistence.memory,
            spare=0 if self._persistence is None else self._persistence.slots + self._deferred,
        )
        if self._persistence is not None:
            self._persistence.join(model, optimizers, self._recovery, self._phases)
        self._measuring = Measuring(model, probe, probe_on, confirm)
        self._rates = RateCut(optimizers)
        self._said_rate: float | None = None

        self._open: Attempt | None = None
        self._pending: Question | None = None
        self._dropped: Verdict | None = None
        self._verdict: Verdict | None = None
        self._scaler: Any = None
        self._hooks: OptimizerHooks | None = None
        self._withheld: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._replay: Replay | None = None
        self._replayed: Mapping[str, Any] | None = None
        self._closed = False

        # From here on other ranks are involved.
        device = parallel.local(optimizers[0].param_groups[0]["params"][0]).device
        self._vote, self._phases.watch = make_vote(process_group, device, self._timeout)
        self._vote.asked_to_stop = asked_to_stop
        self._veto = VetoStage(guards, optimizers, self._vote, self._phases)
        # In observe mode nothing is ever restored, so nothing needs to be captured.
        heard = (model, parallel.forward_module(model)) if self._enforced else ()
        self._first_forward = FirstForward(heard, self._capture_forward)
        self._measuring.join(self._vote, self._phases, self._first_forward)
        self._judging = Judging(
            self._measuring,
            self._panel,
            self._ladder,
            self._veto,
            self._recovery,
            self._vote,
            self._phases,
            self._monitor,
            self._enforced,
        )
        self._settlement = Settlement(
            self._recovery,
            self._judging,
            self._panel,
            self._ladder,
            self._guarantees,
            self._ledger,
            self._veto,
            self._vote,
            replica_check_every > 0,
            reload,
            self._identify_batch,
        )
        try:
            with self._noted():
                agree_on_settings(self._vote, self._settings())
                if self._persistence is not None:
                    self._persistence.connect(self._vote)
                self._start()
        except BaseException:
            if self._persistence is not None:
                self._persistence.stop(wait=False)
                self._persistence.discard()
            self.close()
            raise

    # ------------------------------------------------------------------ what a loop calls

    def step(
        self,
        grad_norm: float | torch.Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        closure: Callable[[], Any] | None = None,
        loss: float | torch.Tensor | None = None,
    ) -> Verdict:
        """Step the optimizer(s), judge the proposal, and commit or undo it on every rank. Call it after backward.

        Args:
            grad_norm: Global gradient norm before clipping, equal on all ranks; computed from the shards if not given.
            scaler: The GradScaler that scaled the loss. It is unscaled, stepped and **updated** here: do not call its
                ``update()``.
            closure: Runs forward and backward; called once, with autograd on.
            loss: Training loss of this step on this rank, not multiplied by a loss scale; what the closure returns if
                not given. Logged, and evidence for the rule: a far outlying one lowers its bar.

        Returns:
            The verdict, equal on every rank. With ``decision="deferred"``, on a judged attempt, a provisional commit
            (``final`` is False, nothing measured), or the refusal of the attempt before, which is then in ``undone``:
            the present batch is dropped.

        Collectives: on a judged attempt the probe's forward and one all-reduce, and one all-reduce before the step if
        a guard or the scaler needs agreement; a few more on a refusal or veto. On an unjudged attempt at most the
        latter. Deferred, the flags of guards ride in the one all-reduce of a judged attempt.

        Raises:
            LockstepError: The ranks can no longer act as one.
            StabilityStop: The budget of refusals is spent.
            TypeError, ValueError: A bad argument, or an optimizer fused into backward; before any collective.
        """
        if self._hooks is not None:
            raise RuntimeError(
                "step(): this controller is attached; the loop's own optimizer.step() is the guarded one"
            )
        with self._noted():
            if closure is not None:
                with torch.enable_grad():
                    returned = closure()
                loss = returned if loss is None else loss
            if (refusal := self._settle_pending()) is not None:
                return refusal
            attempt = self._open_attempt(grad_norm, scaler, loss)
            self._propose(attempt)
            return self._close_attempt()

    def attach(self) -> StabilityController:
        """Guard a loop that calls ``optimizer.step()`` itself, through the optimizers' step hooks.

        The verdict is in :attr:`verdict` after the last optimizer's step. Schedulers among ``extra_state`` have the one
        call that follows a refusal made a no-op. At a step, an optimizer that calls its closure more than once or is
        fused into backward raises TypeError.
        """
        if self._closed:
            raise RuntimeError("attach(): the controller is closed")
        if self._hooks is None:
            self._hooks = OptimizerHooks(self._optimizers, self._extra_state, self._hooked_open, self._hooked_close)
        return self

    @property
    def verdict(self) -> Verdict | None:
        """The last verdict."""
        return self._verdict

    @property
    def stopping(self) -> bool:
        """Whether ``asked_to_stop`` was yes on some rank by the last vote that was read: the same on every rank.

        Votes are on judged attempts, in :meth:`resume` and at construction. Enters no collective.
        """
        return self._vote.stopping

    def finish(self) -> Verdict | None:
        """Read the verdict that is still pending (``decision="deferred"``); afterwards the state is the committed one.

        Call it on all ranks between a ``step()`` and the next forward: after the last step, before anything is saved,
        and before the process ends to come back. A refusal takes back the last step and what the loop did after it; no
        other batch is dropped.

        With ``persist`` the safe state is sealed here as well, without another copy of it: :meth:`resume` goes on with
        the attempt after the last one (after unjudged attempts: with the first of them). Step the schedulers before.

        Returns:
            The final verdict of the last attempt; None if nothing is pending.

        Collectives: none if the step is accepted, those of a refusal otherwise.

        Raises:
            RuntimeError: A training forward was seen since the last step.
            LockstepError, StabilityStop: See :meth:`step`.
        """
        verdict = self._finish_pending()
        self._seal_between()
        return verdict

    def _finish_pending(self) -> Verdict | None:
        if self._pending is None:
            return None
        if self._first_forward.captured:
            raise RuntimeError(
                f"the verdict of attempt {self._pending.attempt.index} is pending and the next forward has begun, "
                f"whose gradients a refusal would make worthless: call finish() (or state_dict()) right after step()"
            )
        with self._noted():
            return self._settle_pending(last=True)

    def leave(self) -> Verdict | None:
        """:meth:`finish`, for a process that ends to come back: also what ``persist`` has beside memory gets the state.

        Call it on all ranks between a ``step()`` and the next forward, as when :attr:`stopping`; then end the process
        with an exception or ``SystemExit`` through the context manager, or without unwinding. It waits until the state
        is on disk; that it could not be brought there is a warning, and what was there before stays.

        Returns:
            See :meth:`finish`.

        Collectives: those of :meth:`finish`; others in the background.
        """
        if self._persistence is None:
            return self.finish()
        return self._persistence.leave(self.finish)

    def _seal_between(self) -> None:
        """Seal the safe state between two steps, if it is what stands and this process has made it."""
        begun = self._first_forward.captured
        stands = not (begun or self._ledger.pending or self._recovery.stale or self._closed)
        if self._persistence is not None and stands and self._verdict is not None:
            unfetched = self._replay is not None and self._replay.queue.current is None
            self._seal(Between(self._scaler, unfetched))

    def _seal(self, between: Between | None = None) -> None:
        assert self._persistence is not None
        seen = None if self._replay is None else self._replay.export()
        self._persistence.seal(self._ledger.attempt, self._ledger.history, self._memory(), seen, between)

    def resume(self, scaler: torch.amp.GradScaler | None = None) -> Resumed:
        """Go on from where an earlier process of this job stopped, if it died. Needs ``persist``.

        Call it on all ranks after construction and before the first batch is fetched, with model, optimizers and the
        rest made as in the first start. It restores the newest moment that every rank has and whose digests are right
        everywhere: parameters, optimizer state, buffers, learning rates, ``extra_state``, the scaler, and the
        controller's own counters and memory; the random streams follow at the first training forward. A loader with
        ``state_dict`` that is given to :meth:`batches` is put to its place there; other loops skip what was trained on.

        Args:
            scaler: The GradScaler of the loop, if there is one.

        Returns:
            Where the loop goes on, and one line that says what was chosen and why; false if there was nothing.

        Collectives: a few gathers, two votes, and the broadcasts of the shares if ranks share state.

        Raises:
            RuntimeError: Without ``persist``, or too late.
            LockstepError: The restore failed half-way on some rank.
        """
        if self._persistence is None:
            raise RuntimeError("resume(): nothing was kept; give the controller persist= in every start")
        if self._closed or self._ledger.attempt or self._first_forward.captured:
            raise RuntimeError("resume(): call it right after construction, before the first training forward")
        with self._noted():
            return self._persistence.resume(self._continue, check_scaler(scaler))

    def add_phase_listener(self, listener: PhaseListener) -> None:
        """Call ``listener(attempt, phase)`` at each phase of an attempt; for fault injection and tracing.

        "copy" and "restore" come once for each chunk as well; "seal", and "delivery" from another thread, between the
        parts of what ``persist`` writes. What a listener raises stops the job like any error; in "delivery" it is an
        error of that delivery.
        """
        self._phases.listeners.append(listener)

    def close(self) -> None:
        """Remove every hook, stop the background thread, give the process group back. Enters no collective. Idempotent.

        Without it, thread and group end with the process (an NCCL group as torch ends it).
        A verdict that is pending is given up, with a warning: call :meth:`finish` first.
        What shared memory kept is removed, unless an exception is being handled: then it is left for :meth:`resume`. A
        checkpoint that is being written is waited for, or with an exception given up.
        """
        self._close(failed=False)

    def _close(self, failed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pending is not None:
            index, self._pending = self._pending.attempt.index, None
            warnings.warn(f"close(): nobody read the verdict of attempt {index}; call finish() first", stacklevel=2)
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None
        self._first_forward.close()
        # With an exception under way this is no clean end: what was sealed is for the process that comes after.
        keep = failed or sys.exc_info()[1] is not None
        if self._persistence is not None:
            self._persistence.stop(wait=not keep)
        self._recovery.close()
        if self._persistence is not None:
            self._persistence.close(keep)
        self._vote.close()

    def __enter__(self) -> StabilityController:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lost = None
        if isinstance(error, Exception) and not isinstance(error, LockstepError):
            if self._phases.watch is not None and is_transport_error(error):
                # A collective of the loop's own lost its peers; it names nobody, the watch does.
                lost = self._vote.lost(self._ledger.attempt, error)
            else:
                self._note(error)
        if error is None:
            try:
                with self._noted():
                    self._settle_pending(last=True)
            finally:
                self.close()
        self._pending = None  # an exception: the other ranks may be anywhere
        self._close(failed=error is not None)
        if lost is not None:
            raise lost from error

    def batches(self, loader: Iterable[Any], *, accumulate: int = 1, max_bytes: int = 1 << 30) -> Iterator[Any]:
        """The loader's batches; after a refusal, those that were taken back, again.

        Between two judged attempts the batches are kept on the host. A refusal then costs only the guilty one: the
        others are replayed one by one, each with a probe, and the run equals the one that never saw it, bit for bit.
        After a cut of the learning rate the refused batch is tried once more.

        Args:
            loader: Gives batches: tensors, or trees of them; on all ranks equally many.
            accumulate: Micro-batches in an attempt: how many batches the loop takes from one ``step()`` to the next.
            max_bytes: Host memory for the kept batches.

        Not promised: a loader that draws from the global random streams does not draw again for a replayed batch. A
        checkpoint does not hold kept batches: one that is written during a replay loses what was to be shown again.

        Raises:
            TypeError, ValueError: A bad argument, or ``max_bytes`` is too small for the batches between two probes.
        """
        if not self._enforced:
            return iter(loader)
        if self._replay is None:
            finish = self.finish if self._deferred else None
            self._replay = Replay(BatchWindow(max_bytes), self.cadence.most, finish, self._persistence is not None)
            self._replay.load(self._replayed)
        elif self._replay.window.max_bytes != max_bytes:
            raise ValueError(
                f"batches(max_bytes={max_bytes}): an earlier loop of this controller was given "
                f"{self._replay.window.max_bytes}, and its batches may be kept still; give every loop the same"
            )
        return self._replay.batches(loader, accumulate)

    def announce(self, learning_rate: float | None) -> None:
        """Vouch for a learning rate that the loop sets by itself, without a scheduler in ``extra_state``.

        A jump of the learning rate moves the probe, and one that was announced is no fault. Call it on every rank
        before ``step()``, with the largest learning rate over the groups; it holds until the next call.
        """
        self._said_rate = None if learning_rate is None else float(learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimizer: counters, the memory of rule and guards, budgets.

        A verdict that is pending is settled first, as by :meth:`finish`, on all ranks together: call that before
        anything is saved, because a refusal changes the model that is saved beside this.
        """
        verdict = self._finish_pending()
        if verdict is not None and verdict.action is not Action.COMMIT:
            warnings.warn(
                f"state_dict(): attempt {verdict.step} was refused only now ({verdict.action}); what was saved of the "
                f"model before this call is the refused state. Call finish() before saving anything.",
                stacklevel=2,
            )
        return self._memory()

    def _memory(self) -> dict[str, Any]:
        return {
            **self._ledger.state_dict(),
            "panel": self._panel.state_dict(),
            "guards": [guard.state_dict() for guard in self._veto.guards],
            "ladder": self._ladder.state_dict(),
            "cadence": self.cadence.state_dict(),
            "signals": self._monitor.state_dict(),
            "guarantees": self._guarantees.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Load model, optimizer and schedulers too, before the next training forward.

        What they hold at that forward becomes the committed state; anchors start anew. A verdict that is pending is
        given up: what it is about is no longer there.
        """
        question, self._pending = self._pending, None
        if question is not None:
            self._vote.finish(question.reduction, question.attempt.index)
            self._recovery.drop()
        self._take_memory(state)
        self._recovery.mark_stale()
        self._first_forward.arm()

    def _continue(self, memory: Mapping[str, Any], replay: Mapping[str, Any] | None, key: tuple[int, int, int]) -> None:
        """Take over what an earlier process knew; ``key`` is the moment, equal on all ranks."""
        self._take_memory(memory)
        self._ledger.loaded = hash(key)
        self._replayed = replay
        if self._replay is not None:
            self._replay.load(replay)

    def _take_memory(self, state: Mapping[str, Any]) -> None:
        guards = self._veto.guards
        if len(state["guards"]) != len(guards):
            raise ValueError(f"guards: the checkpoint has {len(state['guards'])}, this controller {len(guards)}")
        self._panel.load_state_dict(state["panel"])
        for guard, saved in zip(guards, state["guards"], strict=True):
            guard.load_state_dict(saved)
        self._ladder.load_state_dict(state["ladder"])
        self.cadence.load_state_dict(state["cadence"])
        self._monitor.load_state_dict(state["signals"])
        self._guarantees.load_state_dict(state["guarantees"])
        self._ledger.load_state_dict(state)
        self._phases.attempt = self._ledger.attempt
        if self._replay is not None:
            self._replay.forget()

    # ------------------------------------------------------------------ construction

    def _settings(self) -> dict[str, Any]:
        probes = [probe.describe() for probe in (self._measuring.probe, self._measuring.confirm) if probe is not None]
        return {
            "every": self.cadence.settings(),
            "mode": self.mode,
            "decision": self.decision,
            "probe_on": self._probe_on,
            "timeout": self._timeout,
            "replica_check_every": self._replica_check_every,
            "escalation": str(self._ladder.settings),
            "anchors": self._anchors,
            "split_replicas": self._split,
            "shadow": self._shadow,
            "persist": [] if self._persistence is None else self._persistence.described(),
            "reload": self._reloadable,
            **self._panel.settings(),
            "guards": [settings_of(guard) for guard in self._veto.guards],
            "probe": probes,
            "signals": self._monitor.settings(),
            "extra_state": sorted(self._extra_state),
            "model and optimizer": self._recovery.plan.signature,
        }

    def _start(self) -> None:
        """Measure y(theta_0), check that replicas start equal, and take the first snapshot."""
        plan = self._recovery.plan
        compare = self._replica_check_every > 0
        if compare:
            self._vote.replica_groups = agree_on_replicas(self._vote, plan.residences)
        tally, second = self._judging.start(plan, compare)
        if tally.split_replicas:
            raise LockstepError(
                f"ranks {tally.split_replicas} should hold the same weights and optimizer state, but their bits differ "
                f"from the start: wrap the model in DDP or broadcast it; or, if they differ on purpose, set "
                f"replica_check_every=0",
                ranks=sorted({rank for ranks in tally.split_replicas for rank in ranks}),
            )
        for name, value in (("probe", tally.measurement), ("second probe", second)):
            if value is not None and not math.isfinite(value):
                raise StabilityError(
                    f"the {name} measures {value} on the initial weights, so there is nothing to compare a proposal "
                    f"with: check loss_fn, the probe batches and the initialization"
                )
        self._guarantees.committed(tally.measurement)
        self._panel.start(tally.measurement, second)
        if self._enforced:
            self._recovery.commit(plan, -1, tally.measurement)
        if self._persistence is not None:
            self._persistence.mark()
        self._phases.enter("training")

    # ------------------------------------------------------------------ one attempt

    def _capture_forward(self) -> None:
        self._recovery.capture_forward(self._ledger.attempt, bool(self._ledger.pending))

    def _await_forward(self) -> None:
        """The attempt is over, and the loop goes on to fetch what comes next."""
        self._first_forward.arm()
        if self._persistence is not None:
            self._persistence.mark()

    def _open_attempt(self, grad_norm: Any = None, scaler: Any = None, loss: Any = None) -> Attempt:
        """Everything before the optimizer runs."""
        index = self._ledger.attempt
        if self._closed:
            raise RuntimeError("step(): the controller is closed")
        if self._open is not None:
            raise RuntimeError(f"attempt {self._open.index} is still open: an optimizer step did not complete")
        check_not_fused_into_backward(self._optimizers)
        if self._enforced and not self._first_forward.captured:
            raise StabilityError(
                f"attempt {index}: no training forward of the model was seen since the last verdict, so RNG "
                f"and buffers could not be restored. Call the model that the controller was given (not a method of it, "
                f"nor a copy), or give the controller the module that you call."
            )
        self._scaler = scaler = check_scaler(scaler)
        self._phases.enter("gradients")
        gradients = Gradients(self._recovery.plan.parameters, grad_norm)
        judged = self.cadence.judged(index) or (self._replay is not None and self._replay.queue.must_judge)
        attempt = Attempt(index, judged, gradients, self._agreement(gradients, judged), scaler)
        self._look_at_rates(attempt)
        if self._enforced:
            self._recovery.capture_entry(scaler, bool(self._ledger.pending))
            if self._persistence is not None and not self._ledger.pending:
                self._seal()
        with attempt.timed("guards"):
            self._veto.look(attempt)
            if self._enforced:
                deferred, pending = self._deferred and judged, bool(self._ledger.pending)
                # A late "no" takes back the unjudged attempts before, too; then it is better to know in time.
                self._veto.agree(attempt, later=deferred and not pending, now=deferred and pending)
            else:
                attempt.vetoed = False
        self._recovery.before_step()
        self._open = attempt
        self._phases.enter("step")
        if not attempt.vetoed:
            self._rates.apply(attempt.rate_factor)
        context = StepContext(gradients, self._optimizers, loss, scaler)
        if judged:
            attempt.context = context
            with attempt.timed("signals"):
                self._monitor.before_step(context)
        else:
            attempt.signals = SignalValues(host_values(context))
        return attempt

    def _look_at_rates(self, attempt: Attempt) -> None:
        attempt.rate_factor = self._ladder.learning_rate_factor if self._enforced else 1.0
        rate = self._said_rate
        if rate is None:
            rate = announced(self._optimizers, self._extra_state.values())
        attempt.learning_rate = None if rate is None else rate * attempt.rate_factor

    def _propose(self, attempt: Attempt) -> None:
        """Step the optimizers, unless the host knows of a veto."""
        if attempt.vetoed:
            return
        with attempt.timed("step"):
            try:
                for optimizer in self._optimizers:
                    if attempt.scaler is not None:
                        attempt.scaler.step(optimizer)
                    else:
                        optimizer.step()
            except Exception as error:
                # Judged, it is a vote: the other ranks have stepped, and all go back together.
                if not attempt.judged or not self._enforced:
                    self._rates.undo()
                    self._open = None
                    raise
                attempt.step_error = error

    def _close_attempt(self) -> Verdict:
        """Everything after the optimizers ran: decide, then do it."""
        attempt = self._open
        if attempt is None:
            raise RuntimeError("an optimizer step ended that never began: was the controller attached inside a step?")
        self._open = None
        if attempt.context is not None and not attempt.vetoed:
            with attempt.timed("signals"):
                self._monitor.after_step(attempt.context)
        self._rates.undo()
        self._veto.stepped()
        if self._deferred and attempt.judged and not attempt.vetoed and not attempt.overflow:
            return self._defer(attempt)
        decision = self._decide(attempt)
        outcome = self._settle(attempt, decision)
        # After a refusal the scaler is as it was before; a shorter step is taken from that state, too.
        if attempt.scaler is not None and outcome.action in (Action.COMMIT, Action.UNJUDGED, Action.SCALER_SKIP):
            attempt.scaler.update()
        return self._finish(attempt, decision, outcome)

    def _defer(self, attempt: Attempt) -> Verdict:
        """Begin the vote and the copy of the proposal; the next step reads the verdict."""
        self._phases.enter("after step")
        self._ledger.judged += 1
        self._pending = self._judging.ask(attempt, len(self._ledger.pending) + 1, self._compares_replicas())
        if self._enforced:
            assert attempt.plan is not None
            with attempt.timed("copy"):
                self._recovery.hold(attempt.plan, attempt.index, attempt.digests)
        if attempt.scaler is not None:
            attempt.scaler.update()
        attempt.defer()
        self._ledger.provisional()
        verdict = Verdict(Action.COMMIT, attempt.index, final=False, reason="provisional: read at the next step")
        self._verdict = verdict
        self._await_forward()
        self._phases.enter("done")
        if self._replay is not None:
            self._replay.settle(verdict)
        self._phases.attempt = self._ledger.attempt
        self._phases.enter("training")
        return verdict

    def _settle_pending(self, last: bool = False) -> Verdict | None:
        """Read the verdict of the attempt before, if it is pending.

        Args:
            last: No attempt has begun since: settle that one as itself. Otherwise a refusal is the verdict of the
                present attempt, whose gradients came from refused weights.

        Returns:
            The verdict, if it is of the last attempt or takes the place of the present one; else None.
        """
        question, self._pending = self._pending, None
        if question is None:
            return None
        attempt = question.attempt
        decision = self._judging.answer(question)
        replaces = not last and decision.action.refused and self._enforced
        if replaces:
            # One event for each attempt: this one was accepted as far as the loop knows.
            self._tell(attempt, Verdict(Action.COMMIT, attempt.index, final=False), Decision(Action.COMMIT))
        else:
            self._ledger.withdraw()
        outcome = self._settle(attempt, decision)
        verdict = self._finish(attempt, decision, outcome, begun=not last and not replaces)
        if replaces:
            # To a cadence the present attempt is one more that does not stand.
            self.cadence.record(attempt=verdict.step, judged=False, accepted=False)
        return verdict if last or replaces else None

    def _settle(self, attempt: Attempt, decision: Decision) -> Outcome:
        return (self._settlement.settle if self._enforced else self._settlement.observe)(attempt, decision)

    def _decide(self, attempt: Attempt) -> Decision:
        if attempt.overflow:
            return self._look_behind(attempt)
        if attempt.vetoed and not attempt.judged:
            return self._veto.explain(attempt)
        self._phases.enter("after step")
        if not attempt.judged:
            return self._judging.unjudged(attempt)
        return self._judge(attempt, len(self._ledger.pending) + 1)

    def _judge(self, attempt: Attempt, steps: int) -> Decision:
        self._ledger.judged += 1
        return self._judging.judge(attempt, steps, self._compares_replicas())

    def _look_behind(self, attempt: Attempt) -> Decision:
        """An overflow: no step was taken. But unjudged ones before it may be its cause, and then would never be judged.

        Weights that are not finite make every later gradient overflow, and the scaler would skip for ever.
        """
        skipped = Decision(Action.SCALER_SKIP, "scaler", "the scaled gradients overflowed")
        if not (attempt.judged and self._ledger.pending and self._enforced):
            return skipped
        self._phases.enter("after step")
        decision = self._judge(attempt, len(self._ledger.pending))
        return decision if decision.action.refused else skipped

    def _finish(self, attempt: Attempt, decision: Decision, outcome: Outcome, begun: bool = False) -> Verdict:
        """Remember the attempt, and tell whoever listens.

        Args:
            attempt: What is settled.
            decision: What was decided.
            outcome: What was done.
            begun: The next attempt has begun already: its forward was captured.
        """
        judgement = outcome.judgement
        verdict = Verdict(
            action=outcome.action,
            step=self._ledger.attempt,
            undone=outcome.undone,
            would=None if self._enforced else decision.action,
            signal=decision.signal,
            measurement=outcome.measurement,
            innovation=None if judgement is None else judgement.innovation,
            bound=None if judgement is None else judgement.bound,
            reason=outcome.reason,
            rung=outcome.rung,
            pattern=outcome.pattern,
            warning=outcome.warning,
        )
        self._verdict = verdict
        if not begun:
            self._await_forward()
            self._phases.enter("done")
        chosen = self._record_cadence(attempt, verdict, decision)
        if self._replay is not None and attempt.provisional:
            self._replay.settle_late(verdict, attempt.index)
        elif self._replay is not None:
            self._replay.settle(verdict)
        self._tell(attempt, verdict, decision, chosen)
        self._ledger.close(verdict, attempt.norm)
        if not begun:
            self._phases.attempt = self._ledger.attempt
            self._phases.enter("training")
        if verdict.rung == Rung.STOP:
            self._stop(verdict)
        return verdict

    def _tell(self, attempt: Attempt, verdict: Verdict, decision: Decision, cadence: str | None = None) -> None:
        if self._on_event is not None:
            self._on_event({**event_of(attempt, verdict, decision, self._ledger.steps), "cadence": cadence})

    def _record_cadence(self, attempt: Attempt, verdict: Verdict, decision: Decision) -> str | None:
        innovation, bound, fraction = verdict.innovation, verdict.bound, None
        if innovation is not None and bound is not None and math.isfinite(innovation) and 0 < bound < math.inf:
            fraction = innovation / bound
        return self.cadence.record(
            attempt=attempt.index,
            judged=attempt.judged,
            accepted=verdict.accepted,
            fraction=fraction,
            evidence=0.0 if decision.judgement is None else decision.judgement.evidence,
            learning_rate=attempt.learning_rate,
            seconds=attempt.signals.values.get(JudgedPeriod.name),
        )

    def _stop(self, verdict: Verdict) -> None:
        report = self._ladder.report()
        tried = ", ".join(f"{rung} x{count}" for rung, count in report["tried"].items())
        raise StabilityStop(
            f"stopped at attempt {verdict.step}: {report['refusals_in_a_row']} refusals in a row, "
            f"{report['refusals_in_window']} in the last {self._ladder.settings.window} attempts; tried {tried}. The "
            f"pattern is {report['pattern']}: {report['advice']} The last refusal: {verdict.reason}. The model is in "
            f"its last committed state.",
            report,
        )

    # ------------------------------------------------------------------ measuring and agreeing

    def _agreement(self, gradients: Gradients, judged: bool) -> dict[str, int | torch.Tensor]:
        """Numbers that must be equal on all ranks in every vote of this attempt."""
        fields: dict[str, int | torch.Tensor] = {
            "step": self._ledger.attempt,
            "judged": int(judged),
            "use of batches()": int(self._replay is not None),
            "plan": self._recovery.plan.signature,
            "history of verdicts": self._ledger.history,
            "loaded checkpoint": self._ledger.loaded,
        }
        if gradients.caller_norm is not None:
            fields["gradient norm"] = bits(gradients.caller_norm)
        return fields

    def _identify_batch(self, attempt: Attempt) -> int | None:
        """Content digest of what all ranks trained on in this attempt; None if that is not known.

        Collectives: two all-gathers, if the loop uses :meth:`batches`.
        """
        if self._replay is None:
            return None
        everyone = self._vote.gather(self._replay.digest(attempt.provisional), attempt.index)
        if None in everyone.values():
            return None
        said = ",".join(str(everyone[rank]) for rank in sorted(everyone))
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "little")

    def _compares_replicas(self) -> bool:
        every = self._replica_check_every
        return every > 0 and bool(self._vote.replica_groups) and self._ledger.judged % every == 0

    # ------------------------------------------------------------------ hooks and notes

    def _hooked_open(self) -> None:
        with self._noted():
            self._dropped = self._settle_pending()
            withheld = self._dropped is not None or bool(self._open_attempt().vetoed)
        if withheld:
            # The loop's optimizers step anyway; without gradients that is an exact no-op.
            for optimizer in self._optimizers:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None

    def _hooked_close(self) -> bool:
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []
        dropped, self._dropped = self._dropped, None
        if dropped is not None:
            return dropped.accepted
        with self._noted():
            return self._close_attempt().accepted

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._note(error)
            raise

    def _note(self, error: Exception) -> None:
        """Tell the other ranks why this one stops: they may be waiting for it inside a collective.

        A LockstepError needs no note: its origin is known to all, or was noted where it was found out.
        """
        if self._phases.watch is not None and not isinstance(error, LockstepError):
            self._phases.watch.fail(self._ledger.attempt, one_line(error) or "")


def _cadence(every: int | Cadence | str) -> Cadence:
    if isinstance(every, int):
        return FixedCadence(every)
    return MeasuredCadence() if isinstance(every, str) else every
