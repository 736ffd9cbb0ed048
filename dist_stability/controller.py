"""The guarded step: propose, measure, vote, then commit or restore.

One attempt runs like this on every rank (* marks what involves the other ranks)::

    first training forward          RNG and buffers are copied
    entry of step()                 per-group values, schedulers, GradScaler, extra_state are copied
                                    guards look at the gradients, *vote on a veto       (veto.py)
    optimizer.step()                the proposal
    after it                        *probe, *vote, the rule judges
                                    commit: parameters and optimizer state are copied   (recovery.py)
                                    refusal: *everything above is restored, in place

Every rank enters the same collectives in the same order whatever it measured. So a rank can only be late or gone, or
hold a number that should be equal on all ranks and is not; the first is found by a timeout, the second by the vote,
and both end in an error that names the rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import Attempt, Decision, PhaseListener, Phases, event_of, one_line
from .errors import LockstepError, StabilityError
from .escalation import RefusalBudget
from .guards import Guard
from .hooks import FirstForward, OptimizerHooks
from .measuring import Measuring
from .recovery import Recovery
from .rules import Guarantees, PredictiveInnovation, Rule, settings_of, supports_deep
from .signals import Gradients, LossProbe, Reading
from .snapshot import StatePlan
from .startup import agree_on_replicas, agree_on_settings, make_vote, world_of
from .validation import check_not_fused_into_backward, check_optimizers, check_parts, check_scaler, check_settings
from .verdict import Action, Verdict
from .veto import VetoStage
from .vote import Ballot, Tally, bits, from_bits
from .watch import is_transport_error

ANCHOR_EVERY = 8
"""Commits between two anchors. Two are kept, so a deep restore goes 8 to 16 commits back."""


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
        every: Judge attempts t with (t + 1) % every == 0. The others are accepted as ``unjudged``; a refusal takes
            them back.
        mode: "enforce", or "observe": probe, vote and log what would be done, but always accept.
        probe_on: "rank0" measures with rank 0's batches; "mean" gives each data replica its own part of them.
        process_group: Ranks that train this model; default all.
        timeout: Seconds after which a wait for other ranks ends with :class:`LockstepError`.
        replica_check_every: Compare the bits of replicated state at every this many judged attempts; 0 never.
        max_refusals_in_row: Stop with :class:`StabilityStop` after this many refusals without an accepted step.
        on_event: Called on every rank with one dict for each verdict.

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
        every: int = 1,
        mode: str = "enforce",
        probe_on: str = "rank0",
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        replica_check_every: int = 1,
        max_refusals_in_row: int = 256,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Check the arguments, agree on them with the other ranks, measure y(theta_0), take the first snapshot."""
        rule = PredictiveInnovation() if rule is None else rule
        optimizers = check_optimizers(optimizer)
        guards, self._extra_state = check_parts(model, probe, rule, guards, extra_state)
        check_settings(every, mode, probe_on, timeout, replica_check_every, max_refusals_in_row)
        self.model, self.rule, self.every, self.mode = model, rule, every, mode
        self._optimizers = optimizers
        self._timeout, self._probe_on, self._replica_check_every = float(timeout), probe_on, replica_check_every
        self._on_event = on_event
        self._budget = RefusalBudget(max_refusals_in_row)
        self._guarantees = Guarantees()
        self._phases = Phases(None)
        anchors = 2 if supports_deep(rule) else 0
        self._recovery = Recovery(
            model, optimizers, self._extra_state, len(world_of(process_group)), anchors, self._phases
        )
        self._measuring = Measuring(model, probe, probe_on)

        self._attempt = 0
        self._steps = 0
        self._commits = 0
        self._pending: list[int] = []
        self._accepted: list[int] = []
        self._history = 0
        self._open: Attempt | None = None
        self._verdict: Verdict | None = None
        self._hooks: OptimizerHooks | None = None
        self._withheld: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._closed = False

        # From here on other ranks are involved.
        device = parallel.local(optimizers[0].param_groups[0]["params"][0]).device
        self._vote, self._phases.watch = make_vote(process_group, device, self._timeout)
        self._veto = VetoStage(guards, optimizers, self._vote, self._phases)
        # In observe mode nothing is ever restored, so nothing needs to be captured.
        heard = (model, parallel.forward_module(model)) if mode == "enforce" else ()
        self._first_forward = FirstForward(heard, self._capture_forward)
        try:
            with self._noted():
                agree_on_settings(self._vote, self._settings())
                self._start()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ what a loop calls

    def step(
        self,
        grad_norm: float | torch.Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Verdict:
        """Step the optimizer(s), judge the proposal, and commit or undo it on every rank. Call it after backward.

        Args:
            grad_norm: Global gradient norm before clipping, equal on all ranks; computed from the shards if not given.
            scaler: The GradScaler that scaled the loss. It is unscaled, stepped and **updated** here: do not call its
                ``update()``.
            closure: Runs forward and backward; called once, with autograd on.

        Returns:
            The verdict, equal on every rank.

        Collectives: on a judged attempt the probe's forward and one all-reduce, and one all-reduce before the step if
        a guard or the scaler needs agreement; a few more on a refusal or veto. On an unjudged attempt at most the
        first.

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
                    closure()
            attempt = self._open_attempt(grad_norm, scaler)
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

    def add_phase_listener(self, listener: PhaseListener) -> None:
        """Call ``listener(attempt, phase)`` at each phase of an attempt; for fault injection and tracing.

        "copy" and "restore" come once for each chunk as well. What a listener raises stops the job like any error.
        """
        self._phases.listeners.append(listener)

    def close(self) -> None:
        """Remove every hook and stop the background thread. Enters no collective. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None
        self._first_forward.close()
        if self._phases.watch is not None:
            self._phases.watch.close()
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
                lost = self._vote.lost(self._attempt, error)
            else:
                self._note(error)
        self.close()
        if lost is not None:
            raise lost from error

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimizer: counters, the rule's and guards' memory, budgets."""
        return {
            "attempt": self._attempt,
            "steps": self._steps,
            "commits": self._commits,
            "history": self._history,
            "rule": self.rule.state_dict(),
            "guards": [guard.state_dict() for guard in self._veto.guards],
            "budget": self._budget.state_dict(),
            "guarantees": self._guarantees.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Load model, optimizer and schedulers too, before the next training forward.

        What they hold at that forward becomes the committed state; anchors start anew.
        """
        guards = self._veto.guards
        if len(state["guards"]) != len(guards):
            raise ValueError(f"guards: the checkpoint has {len(state['guards'])}, this controller {len(guards)}")
        self.rule.load_state_dict(state["rule"])
        for guard, saved in zip(guards, state["guards"], strict=True):
            guard.load_state_dict(saved)
        self._budget.load_state_dict(state["budget"])
        self._guarantees.load_state_dict(state["guarantees"])
        self._attempt, self._steps, self._commits = (int(state[name]) for name in ("attempt", "steps", "commits"))
        self._history = int(state["history"])
        self._phases.attempt = self._attempt
        self._pending, self._accepted = [], []
        self._recovery.mark_stale()
        self._first_forward.arm()

    # ------------------------------------------------------------------ construction

    def _settings(self) -> dict[str, Any]:
        return {
            "every": self.every,
            "mode": self.mode,
            "probe_on": self._probe_on,
            "timeout": self._timeout,
            "replica_check_every": self._replica_check_every,
            "max_refusals_in_row": self._budget.limit,
            "rule": settings_of(self.rule),
            "guards": [settings_of(guard) for guard in self._veto.guards],
            "probe": self._measuring.probe.describe(),
            "extra_state": sorted(self._extra_state),
            "model and optimizer": self._recovery.plan.signature,
        }

    def _start(self) -> None:
        """Measure y(theta_0), check that replicas start equal, and take the first snapshot."""
        plan = self._recovery.plan
        checksums: Mapping[tuple[int, ...], torch.Tensor] = {}
        if self._replica_check_every:
            self._vote.replica_groups = agree_on_replicas(self._vote, plan.residences)
            checksums = plan.digests(plan.tensors())
        reading = self._measure(-1)
        ballot = Ballot(
            no=reading.error is not None,
            measurement=reading.value,
            weight=self._measuring.weight(self._vote),
            agree={"point of the protocol": 0},
            checksums=checksums,
        )
        tally = self._vote.cast(ballot, -1)
        if tally.no:
            said = self._vote.gather(one_line(reading.error), -1)
            text = "; ".join(f"rank {rank}: {reason}" for rank, reason in said.items() if reason is not None)
            raise StabilityError(f"the probe failed on the initial weights: {text}") from reading.error
        if tally.split_replicas:
            raise LockstepError(
                f"ranks {tally.split_replicas} should hold the same weights and optimizer state, but their bits differ "
                f"from the start: wrap the model in DDP or broadcast it; or, if they differ on purpose, set "
                f"replica_check_every=0",
                ranks=sorted({rank for ranks in tally.split_replicas for rank in ranks}),
            )
        if not math.isfinite(tally.measurement):
            raise StabilityError(
                f"the probe measures {tally.measurement} on the initial weights, so there is nothing to compare a "
                f"proposal with: check loss_fn, the probe batches and the initialization"
            )
        self._guarantees.committed(tally.measurement)
        self.rule.commit(tally.measurement)
        if self.mode == "enforce":
            self._recovery.commit(plan, -1, None)
        self._phases.enter("training")

    # ------------------------------------------------------------------ one attempt

    def _capture_forward(self) -> None:
        self._recovery.capture_forward(self._attempt, bool(self._pending))

    def _open_attempt(self, grad_norm: Any = None, scaler: Any = None) -> Attempt:
        """Everything before the optimizer runs."""
        if self._closed:
            raise RuntimeError("step(): the controller is closed")
        if self._open is not None:
            raise RuntimeError(f"attempt {self._open.index} is still open: an optimizer step did not complete")
        check_not_fused_into_backward(self._optimizers)
        enforced = self.mode == "enforce"
        if enforced and not self._first_forward.captured:
            raise StabilityError(
                f"attempt {self._attempt}: no training forward of the model was seen since the last verdict, so RNG "
                f"and buffers could not be restored. Call the model that the controller was given (not a method of it, "
                f"nor a copy), or give the controller the module that you call."
            )
        scaler = check_scaler(scaler)
        self._phases.enter("gradients")
        gradients = Gradients(self._recovery.plan.parameters, grad_norm)
        judged = (self._attempt + 1) % self.every == 0
        attempt = Attempt(self._attempt, judged, gradients, self._agreement(gradients), scaler)
        if enforced:
            self._recovery.capture_entry(scaler, bool(self._pending))
        with attempt.timed("guards"):
            self._veto.look(attempt)
            if enforced:
                self._veto.agree(attempt)
            else:
                attempt.vetoed = False
        self._open = attempt
        self._phases.enter("step")
        return attempt

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
                if not attempt.judged or self.mode != "enforce":
                    self._open = None
                    raise
                attempt.step_error = error

    def _close_attempt(self) -> Verdict:
        """Everything after the optimizers ran: decide, then do it."""
        attempt = self._open
        if attempt is None:
            raise RuntimeError("an optimizer step ended that never began: was the controller attached inside a step?")
        self._open = None
        self._veto.stepped()
        if attempt.overflow:
            decision = Decision(Action.SCALER_SKIP, "scaler", "the scaled gradients overflowed")
        elif attempt.vetoed and not attempt.judged:
            decision = self._veto.explain(attempt)
        else:
            self._phases.enter("after step")
            decision = self._judge(attempt) if attempt.judged else self._leave_unjudged(attempt)
        return self._carry_out(attempt, decision)

    def _leave_unjudged(self, attempt: Attempt) -> Decision:
        if attempt.error is not None and self.mode == "enforce":
            raise attempt.error
        if attempt.vetoed is None:
            self._veto.read(attempt)
            attempt.vetoed = bool(attempt.flag)
        return self._veto.explain(attempt) if attempt.vetoed else Decision(Action.UNJUDGED)

    def _judge(self, attempt: Attempt) -> Decision:
        """Probe, vote, and let the rule judge."""
        with attempt.timed("probe"):
            attempt.plan = plan = self._recovery.proposal_plan()
            replan = plan is not self._recovery.plan
            if self._checks_replicas(attempt.index):
                attempt.digests = plan.digests(plan.tensors())
            reading = self._measure(attempt.index)
        first = attempt.pre_vote is None
        error = (attempt.error if first else None) or attempt.step_error or reading.error
        with attempt.timed("vote"):
            self._phases.enter("vote")
            ballot = Ballot(
                no=error is not None,
                veto=attempt.flag if first else False,
                replan=replan,
                measurement=reading.value,
                weight=self._measuring.weight(self._vote),
                square_sum=attempt.gradients.square_sum if first and attempt.gradients.caller_norm is None else None,
                agree={**attempt.agree, "point of the protocol": 2},
                checksums=attempt.digests or {},
            )
            vector = self._vote.reduce(self._vote.pack(ballot), attempt.index)
            if attempt.vetoed is None and self._veto.read(attempt) is not None:
                attempt.vetoed = bool(attempt.flag)
            tally = self._vote.read(vector, ballot, attempt.index)
        if "gradient norm" in tally.agreed:
            attempt.norm = from_bits(tally.agreed["gradient norm"])
        elif tally.gradient_norm is not None:
            attempt.norm = tally.gradient_norm
        if tally.replan and not replan:
            attempt.plan = StatePlan.build(self.model, self._optimizers, self._vote.world)
            attempt.digests = None
        attempt.vetoed = bool(attempt.vetoed) or (tally.veto > 0 and tally.no == 0)
        if not attempt.vetoed:
            return self._decide(attempt, tally, error, attempt.norm)
        # Nothing was proposed now; what was measured is what stands. If that is refused (a fault in unjudged attempts,
        # or weights that somebody else damaged), it is restored, or the guards would veto everything for ever.
        standing = self._decide(attempt, tally, error, None)
        if standing.action.refused and self.mode == "enforce":
            return standing
        veto = self._veto.explain(attempt)
        return replace(veto, measurement=tally.measurement) if self.mode == "observe" else veto

    def _decide(self, attempt: Attempt, tally: Tally, error: BaseException | None, norm: float | None) -> Decision:
        if tally.no:
            said = self._vote.gather(one_line(error), attempt.index)
            failed = {rank: text for rank, text in said.items() if text is not None}
            if attempt.step_error is not None and len(failed) == self._vote.world and self.mode == "enforce":
                # The optimizer fails everywhere: a fault of the program, not of one rank. Nothing is lost by it.
                self._restore(attempt, deep=False)
                raise attempt.step_error
            reason = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
            return Decision(Action.ROLLBACK, "error", reason, min(failed, default=0))
        if tally.split_replicas:
            ranks = self._vote.name_split(tally, attempt.digests or {}, attempt.index)
            reason = f"replicas of the same state differ in their bits: ranks {ranks}"
            return Decision(Action.ROLLBACK, "replica", reason, ranks[0], None, tally.measurement)
        judgement = self.rule.judge(tally.measurement, norm)
        if judgement.accepted:
            action = Action.COMMIT
        else:
            deep = judgement.deep and len(self._recovery.ring.anchors) == 2
            action = Action.DEEP_ROLLBACK if deep else Action.ROLLBACK
        return Decision(action, "probe", judgement.reason, self._vote.ranks[0], judgement, tally.measurement)

    def _carry_out(self, attempt: Attempt, decision: Decision) -> Verdict:
        """Do what was decided, remember it, and tell whoever listens."""
        action, would = decision.action, None
        undone: tuple[int, ...] = ()
        if self.mode == "observe":
            would = action
            action = action if action is Action.SCALER_SKIP else Action.COMMIT if attempt.judged else Action.UNJUDGED
            self._observe(attempt, decision)
        elif action is Action.COMMIT:
            self._commit(attempt, decision)
        elif action is Action.UNJUDGED:
            self._accept(attempt)
            self._pending.append(attempt.index)
        elif action is Action.VETO:
            self._recovery.undo_forward(attempt.scaler)
        elif action.refused:
            action, undone = self._roll_back(attempt, decision)
        if attempt.vetoed and action.refused:
            for guard in self._veto.guards:
                guard.reject(attempt.norm)
        if attempt.scaler is not None and not action.refused:
            attempt.scaler.update()
        verdict = Verdict(
            action=action,
            step=attempt.index,
            undone=undone,
            would=would,
            signal=decision.signal,
            measurement=decision.measurement,
            innovation=None if decision.judgement is None else decision.judgement.innovation,
            bound=None if decision.judgement is None else decision.judgement.bound,
            reason=decision.reason,
        )
        self._finish(attempt, verdict, decision)
        return verdict

    def _accept(self, attempt: Attempt) -> None:
        self._accepted.append(attempt.index)
        self._steps += 1
        for guard in self._veto.guards:
            guard.commit(attempt.norm)

    def _commit(self, attempt: Attempt, decision: Decision) -> None:
        measurement = decision.measurement
        assert attempt.plan is not None and decision.judgement is not None and measurement is not None
        self._guarantees.committed(measurement, decision.judgement)
        self.rule.commit(measurement, attempt.norm)
        self._accept(attempt)
        self._commits += 1
        self._pending = []
        anchor = None
        if self._commits % ANCHOR_EVERY == 0 and supports_deep(self.rule):
            anchor = self.rule.anchor()  # type: ignore[attr-defined]
        with attempt.timed("copy"):
            self._recovery.commit(attempt.plan, attempt.index, anchor, attempt.digests)
        oldest = min(slot.attempt for slot in (self._recovery.ring.safe, *self._recovery.ring.anchors))
        self._accepted = [index for index in self._accepted if index > oldest]

    def _observe(self, attempt: Attempt, decision: Decision) -> None:
        if decision.action is Action.SCALER_SKIP:
            return
        if decision.measurement is not None and math.isfinite(decision.measurement):
            self.rule.commit(decision.measurement, attempt.norm)
            self._guarantees.committed(decision.measurement)
        self._accept(attempt)
        self._accepted = []
        self._commits += attempt.judged
        if attempt.plan is not None:
            self._recovery.plan = attempt.plan

    def _roll_back(self, attempt: Attempt, decision: Decision) -> tuple[Action, tuple[int, ...]]:
        """Restore, and settle what was taken back: (what was done, earlier attempts undone by it)."""
        if decision.judgement is not None and decision.measurement is not None:
            self.rule.reject(decision.measurement, None if attempt.vetoed else attempt.norm)
        with attempt.timed("restore"):
            return self._restore(attempt, deep=decision.action is Action.DEEP_ROLLBACK)

    def _restore(self, attempt: Attempt, deep: bool) -> tuple[Action, tuple[int, ...]]:
        ring, safe = self._recovery.ring, self._recovery.ring.safe
        wanted = ring.anchors[0] if deep else safe
        replicas = self._replica_check_every > 0
        slot = self._recovery.restore(attempt, wanted, self._vote, self._guarantees, replicas)
        undone = tuple(index for index in self._accepted if index > slot.attempt)
        self._accepted = [index for index in self._accepted if index <= slot.attempt]
        self._steps -= len(undone)
        self._pending = []
        if slot is safe and not deep:
            return Action.ROLLBACK, undone
        ring.fall_back(slot)
        if slot.rule_anchor is not None:
            self.rule.deep(slot.rule_anchor)  # type: ignore[attr-defined]
        return Action.DEEP_ROLLBACK, undone

    def _finish(self, attempt: Attempt, verdict: Verdict, decision: Decision) -> None:
        self._verdict = verdict
        norm = "" if attempt.norm is None else attempt.norm.hex()
        entry = f"{self._history} {verdict.step} {verdict.action} {verdict.would} {norm}"
        self._history = int.from_bytes(hashlib.blake2b(entry.encode(), digest_size=8).digest(), "little")
        self._first_forward.arm()
        self._phases.enter("done")
        if self._on_event is not None:
            self._on_event(event_of(attempt, verdict, decision, self._steps))
        self._attempt += 1
        self._phases.attempt = self._attempt
        self._phases.enter("training")
        self._budget.record(verdict)

    # ------------------------------------------------------------------ measuring and agreeing

    def _measure(self, attempt: int) -> Reading:
        self._first_forward.paused = True
        try:
            return self._measuring.measure(attempt, self._vote, self._phases)
        finally:
            self._first_forward.paused = False

    def _agreement(self, gradients: Gradients) -> dict[str, int | torch.Tensor]:
        """Numbers that must be equal on all ranks in every vote of this attempt."""
        fields: dict[str, int | torch.Tensor] = {
            "step": self._attempt,
            "plan": self._recovery.plan.signature,
            "history of verdicts": self._history,
        }
        if gradients.caller_norm is not None:
            fields["gradient norm"] = bits(gradients.caller_norm)
        return fields

    def _checks_replicas(self, index: int) -> bool:
        every = self._replica_check_every * self.every
        return every > 0 and bool(self._vote.replica_groups) and (index + 1) % every == 0

    # ------------------------------------------------------------------ hooks and notes

    def _hooked_open(self) -> None:
        with self._noted():
            attempt = self._open_attempt()
        if attempt.vetoed:
            # The loop's optimizers step anyway; without gradients that is an exact no-op.
            for optimizer in self._optimizers:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None

    def _hooked_close(self) -> bool:
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []
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
            self._phases.watch.fail(self._attempt, one_line(error) or "")
