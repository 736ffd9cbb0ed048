"""The guarded step: propose, measure, vote, then commit or restore.

Here is what a loop calls. One attempt runs like this on every rank (* marks what involves the other ranks)::

    first training forward          RNG and buffers are copied                                        (recovery.py)
    entry of step()                 per-group values, schedulers, GradScaler, extra_state are copied
                                    guards look at the gradients, *vote on a veto                     (veto.py)
    optimizer.step()                the proposal                                                      (guarded_step.py)
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

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import PhaseListener, Phases
from .cadence import Cadence, FixedCadence
from .collapse import StepCollapse
from .diagnostics.kss import SpectralShaping
from .diagnostics.monitor import EdgeOfStabilityMonitor
from .diagnostics.preflight import Preflight
from .errors import LockstepError
from .escalation import Ladder
from .guarded_step import GuardedStep
from .guards import Guard
from .hooks import FirstForward, OptimizerHooks
from .learning_rate import RateCut
from .ledger import Ledger
from .looking_ahead import event_of_preflight, look_ahead
from .measured_cadence import MeasuredCadence
from .measuring import Measuring
from .parts import Parts
from .persistence import Persistence, Setting
from .recovery import Recovery
from .replay import Replay
from .resume import Resumed
from .rules import Guarantees, PredictiveInnovation, Rule
from .rules.panel import Panel, Trend
from .rules.trend import SlowDivergence
from .rungs import Escalation
from .signals import JudgedPeriod, LossProbe, Monitor, Signal
from .startup import agree_on_settings, make_vote, world_of
from .validation import (
    check_edge,
    check_optimizers,
    check_parts,
    check_persist,
    check_scaler,
    check_settings,
    check_shaping,
)
from .verdict import Action, Verdict
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
            ``load_state_dict``. Deep-copied on entry of every step, so keep it small. Objects that computing the loss
            changes say so by a true attribute ``moved_by_forward``: theirs is the state before the forward.
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
        edge: Says after each judged proposal how far the run is from the edge of stability, and has the ladder cut the
            learning rate past it and go back behind what poisoned Adam's second moment (a host copy more). Not with
            ``decision="deferred"``.
        shaping: ``SpectralShaping(model)``, through which the loop takes its loss. Off until the ladder switches it
            on, for good: where :meth:`preflight` said that the risk is high, and refusals repeat.
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
        on_event: Called on every rank with one dict for each attempt (deferred ones follow at the next step), and for
            :meth:`preflight`.

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
        edge: EdgeOfStabilityMonitor | None = None,
        shaping: SpectralShaping | None = None,
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
        extra_state = check_shaping(shaping, model, extra_state, mode)
        guards, extra_state = check_parts(
            model, probe, rule, guards, extra_state, confirm, trend, reload, asked_to_stop
        )
        check_settings(
            every, mode, probe_on, timeout, replica_check_every, anchors, escalation, decision, split_replicas, shadow
        )
        check_edge(edge, model, optimizers, decision)
        kept_in = check_persist(persist, mode)
        self.model, self.rule, self.mode, self.decision = model, rule, mode, decision
        self.cadence = _cadence(every)
        self._deferred, self._enforced = decision == "deferred", mode == "enforce"
        self._optimizers, self._extra_state = optimizers, extra_state
        self._hooks: OptimizerHooks | None = None
        self._replayed: Mapping[str, Any] | None = None
        self._closed = False
        split = replica_check_every > 0 if split_replicas is None else split_replicas
        clock = (JudgedPeriod(),) if isinstance(self.cadence, MeasuredCadence) else ()
        panel, ladder = Panel(rule, confirm is not None, trend, StepCollapse()), Ladder(escalation)
        watched = () if edge is None else edge.signals
        monitor, rates = Monitor((*signals, *watched, *clock)), RateCut(optimizers)
        phases = Phases(None)
        self._persistence = Persistence(kept_in, extra_state, process_group) if kept_in else None
        self._recovery = Recovery(
            model,
            optimizers,
            extra_state,
            len(world_of(process_group)),
            anchors if panel.supports_deep else 0,
            phases,
            split,
            (2 if self._deferred else 1) if shadow and self._enforced else 0,
            source=None if self._persistence is None else self._persistence.memory,
            spare=(0 if self._persistence is None else self._persistence.slots + self._deferred) + (edge is not None),
        )
        if self._persistence is not None:
            self._persistence.join(model, optimizers, self._recovery, phases)
        measuring = Measuring(model, probe, probe_on, confirm)

        # From here on other ranks are involved.
        device = parallel.local(optimizers[0].param_groups[0]["params"][0]).device
        self._vote, phases.watch = make_vote(process_group, device, float(timeout))
        self._vote.asked_to_stop = asked_to_stop
        # In observe mode nothing is ever restored, so nothing needs to be captured.
        heard = (model, parallel.forward_module(model)) if self._enforced else ()
        self._first_forward = FirstForward(heard, self._capture_forward)
        measuring.join(self._vote, phases, self._first_forward)
        self._ledger = Ledger()
        self._parts = Parts(
            enforced=self._enforced,
            optimizers=optimizers,
            extra_state=extra_state,
            cadence=self.cadence,
            guards=guards,
            measuring=measuring,
            panel=panel,
            ladder=ladder,
            guarantees=Guarantees(),
            monitor=monitor,
            rates=rates,
            ledger=self._ledger,
            recovery=self._recovery,
            persistence=self._persistence,
            phases=phases,
            vote=self._vote,
            first_forward=self._first_forward,
            edge=edge,
            shaping=shaping,
        )
        if shaping is not None:
            shaping.follow(lambda: ladder.shaping)
        self._attempts = GuardedStep(self._parts, self._deferred, replica_check_every, reload, on_event)
        settings = {
            **self._parts.settings(),
            "mode": mode,
            "decision": decision,
            "probe_on": probe_on,
            "timeout": float(timeout),
            "replica_check_every": replica_check_every,
            "anchors": anchors,
            "split_replicas": split,
            "shadow": shadow,
            "reload": reload is not None,
        }
        try:
            with self._parts.noted():
                agree_on_settings(self._vote, settings)
                if self._persistence is not None:
                    self._persistence.connect(self._vote)
                self._attempts.start()
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
        if self._closed:
            raise RuntimeError("step(): the controller is closed")
        with self._parts.noted():
            if closure is not None:
                with torch.enable_grad():
                    returned = closure()
                loss = returned if loss is None else loss
            return self._attempts.step(grad_norm, scaler, loss)

    def attach(self) -> StabilityController:
        """Guard a loop that calls ``optimizer.step()`` itself, through the optimizers' step hooks.

        The verdict is in :attr:`verdict` after the last optimizer's step. Schedulers among ``extra_state`` have the one
        call that follows a refusal made a no-op. At a step, an optimizer that calls its closure more than once or is
        fused into backward raises TypeError; one that calls its parent class's ``step`` while that class has instances,
        too, raises RuntimeError, because torch then runs the hooks twice.
        """
        if self._closed:
            raise RuntimeError("attach(): the controller is closed")
        if self._hooks is None:
            self._hooks = OptimizerHooks(
                self._optimizers, self._extra_state, self._attempts.before_hooked, self._attempts.after_hooked
            )
        return self

    @property
    def verdict(self) -> Verdict | None:
        """The last verdict."""
        return self._attempts.verdict

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
        if not self._closed:
            self._attempts.seal_between()
        return verdict

    def _finish_pending(self) -> Verdict | None:
        pending = self._attempts.pending
        if pending is None:
            return None
        if self._first_forward.captured:
            raise RuntimeError(
                f"the verdict of attempt {pending.attempt.index} is pending and the next forward has begun, "
                f"whose gradients a refusal would make worthless: call finish() (or state_dict()) right after step()"
            )
        with self._parts.noted():
            return self._attempts.settle_pending(last=True)

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
        with self._parts.noted():
            return self._persistence.resume(self._continue, check_scaler(scaler))

    def preflight(
        self,
        batches: Sequence[Any],
        *,
        lr: float | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        blocks: Sequence[str] | None = None,
        search: bool = False,
    ) -> Preflight:
        """Before the first step: is this learning rate likely to diverge? Everything is undone, bit for bit.

        Call it on all ranks after construction and before the first training forward, each with its own training
        batches. What is found is told to ``on_event`` (``action`` "preflight", attempt -1) and to the ladder.

        Args:
            batches: As large as those of training; four are good.
            lr: The largest of the run; by default the optimizers', or what a scheduler says their largest is.
            loss_fn: ``loss_fn(model, batch)`` gives the training loss; by default the probe's.
            blocks: Names of the blocks to be profiled; by default those of ``shaping``, or all lists of like modules.
            search: Look for the largest stable rate as well, at some 15 times the cost.

        Collectives: those of :func:`dist_stability.diagnostics.preflight.preflight`, of all ranks of the job.

        Raises:
            RuntimeError: The first forward or step is over.
            NoBlocks, ValueError, LockstepError: As there.
        """
        if self._closed or self._ledger.attempt or self._first_forward.captured:
            raise RuntimeError(
                f"preflight(): attempt {self._ledger.attempt} has begun, or the controller is closed; call it right "
                "after construction, before the first training forward"
            )
        with self._parts.noted():
            found = look_ahead(self._parts, self.model, batches, lr, loss_fn, blocks, search)
        self._attempts.tell(event_of_preflight(found))
        return found

    def add_phase_listener(self, listener: PhaseListener) -> None:
        """Call ``listener(attempt, phase)`` at each phase of an attempt; for fault injection and tracing.

        "copy" and "restore" come once for each chunk as well; "seal", and "delivery" from another thread, between the
        parts of what ``persist`` writes. What a listener raises stops the job like any error; in "delivery" it is an
        error of that delivery.
        """
        self._parts.phases.listeners.append(listener)

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
        pending, self._attempts.pending = self._attempts.pending, None
        if pending is not None:
            index = pending.attempt.index
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
            if self._parts.phases.watch is not None and is_transport_error(error):
                # A collective of the loop's own lost its peers; it names nobody, the watch does.
                lost = self._vote.lost(self._ledger.attempt, error)
            else:
                self._parts.note(error)
        if error is None:
            try:
                with self._parts.noted():
                    self._attempts.settle_pending(last=True)
            finally:
                self.close()
        self._attempts.pending = None  # an exception: the other ranks may be anywhere
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
        replay = self._attempts.replay
        if replay is None:
            finish = self.finish if self._deferred else None
            replay = Replay(BatchWindow(max_bytes), self.cadence.most, finish, self._persistence is not None)
            replay.load(self._replayed)
            self._attempts.replay = replay
        elif replay.window.max_bytes != max_bytes:
            raise ValueError(
                f"batches(max_bytes={max_bytes}): an earlier loop of this controller was given "
                f"{replay.window.max_bytes}, and its batches may be kept still; give every loop the same"
            )
        return replay.batches(loader, accumulate)

    def announce(self, learning_rate: float | None) -> None:
        """Vouch for a learning rate that the loop sets by itself, without a scheduler in ``extra_state``.

        A jump of the learning rate moves the probe, and one that was announced is no fault. Call it on every rank
        before ``step()``, with the largest learning rate over the groups; it holds until the next call.
        """
        self._attempts.said_rate = None if learning_rate is None else float(learning_rate)

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
        return self._parts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Load model, optimizer and schedulers too, before the next training forward.

        What they hold at that forward becomes the committed state; anchors start anew. A verdict that is pending is
        given up: what it is about is no longer there.
        """
        question, self._attempts.pending = self._attempts.pending, None
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
        if self._attempts.replay is not None:
            self._attempts.replay.load(replay)

    def _take_memory(self, state: Mapping[str, Any]) -> None:
        self._parts.load_state_dict(state)
        if self._attempts.replay is not None:
            self._attempts.replay.forget()

    def _capture_forward(self) -> None:
        begin = time.perf_counter()
        self._recovery.capture_forward(self._ledger.attempt, bool(self._ledger.pending))
        self._attempts.captured += time.perf_counter() - begin


def _cadence(every: int | Cadence | str) -> Cadence:
    if isinstance(every, int):
        return FixedCadence(every)
    return MeasuredCadence() if isinstance(every, str) else every
