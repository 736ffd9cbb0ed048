"""Safe state: what is captured when, and how every rank gets back to it together.

* Parameters and optimizer state: at a commit, into a slot of the ring. Where the verdict is deferred, at the proposal:
  the copy is held, and becomes the safe state or is dropped when the verdict is read. The captures below that are made
  meanwhile belong to what is held.
* RNG and buffers: at the first training forward after a verdict, so that what the loader drew before it stays and what
  a refused forward drew or moved is undone.
* Per-group values, schedulers, GradScaler, ``extra_state``: on entry of ``step()``, before the optimizer runs, so that
  a scheduler or EMA stepped after an accepted verdict belongs to the committed state.

Captured one moment earlier or later, the run is no longer its golden twin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import Attempt, Phases, one_line
from .errors import LockstepError, SnapshotError
from .rules import Guarantees
from .snapshot import (
    Copier,
    Digests,
    EntryState,
    ForwardState,
    Image,
    Memory,
    RandomState,
    Shadow,
    Slot,
    SlotRing,
    StatePlan,
)
from .vote import Ballot, Tally, Vote


class Recovery:
    """Owns the plan, the ring of slots and the copies of everything else.

    Args:
        model: As the loop calls it.
        optimizers: All that make the proposal.
        extra_state: Objects with ``state_dict`` and ``load_state_dict``, by name.
        world: Number of ranks.
        anchors: How many older states to keep for deep restores.
        phases: Of this controller.
        split: Keep a share of what other ranks hold as well.
        shadows: How many copies to keep on the device: 2 where one may be of a state that is not safe yet.
        source: Where the memory of the slots comes from.
        spare: Slots beyond the safe one, the anchors and the one that is filled.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        extra_state: Mapping[str, Any],
        world: int,
        anchors: int,
        phases: Phases,
        split: bool = False,
        shadows: int = 0,
        source: Memory | None = None,
        spare: int = 0,
    ) -> None:
        """Make the plan; copies nothing yet.

        Raises:
            StabilityError: The optimizers do not own the model's parameters.
        """
        self._model = model
        self._optimizers = tuple(optimizers)
        self._extra_state = dict(extra_state)
        self._world = world
        self._phases = phases
        self._split = split
        self.plan = self.build_plan()
        self.ring = SlotRing(anchors, Copier(), spare, source)
        self._shadows = [Shadow() for _ in range(shadows)]
        # What an attempt that follows unjudged ones would be undone to by a veto; a rollback goes further back.
        self._scratch = ForwardState(model, self._extra_state)
        self._forward = self._scratch
        self._entry: EntryState | None = None
        self._held: Slot | None = None
        self._stale = False
        self._resumed: RandomState | None = None

    def build_plan(self) -> StatePlan:
        """A plan of the state as it is now."""
        parallel.reshard(self._model)
        return StatePlan.build(self._model, self._optimizers, self._world, split=self._split)

    # ------------------------------------------------------------------ capture

    def mark_stale(self) -> None:
        """The weights are about to be loaded from elsewhere: take them as committed at the next training forward."""
        self._stale = True

    @property
    def stale(self) -> bool:
        """The weights were loaded from elsewhere, and are not the safe state yet."""
        return self._stale

    def capture_forward(self, attempt: int, pending: bool) -> None:
        """At the first training forward after a verdict. Local, because other ranks may be anywhere.

        Args:
            attempt: The attempt this forward belongs to.
            pending: Unjudged attempts were accepted since the last judged commit.
        """
        if self._stale:
            self.adopt(attempt - 1)
            self._stale = False
        if self._resumed is not None:
            self._resumed.restore()
        if pending and self._held is None:
            self._forward = self._scratch
        else:
            slot = self.ring.safe if self._held is None else self._held
            if slot.forward is None:
                slot.forward = ForwardState(self._model, self._extra_state)
            self._forward = slot.forward
        self._forward.capture()

    def capture_entry(self, scaler: Any, pending: bool) -> None:
        """On entry of ``step()``."""
        self._resumed = None
        self._entry = EntryState.capture(self._optimizers, scaler, self._extra_state)
        if not pending:
            self.ring.safe.entry = self._entry

    def adopt(self, attempt: int) -> None:
        """Take what stands, however it came about, as committed; older states are given up."""
        self.before_step()
        self.plan = self.build_plan()
        self.ring.reset()
        self.commit(self.plan, attempt)

    def resumed(
        self,
        plan: StatePlan,
        attempt: int,
        made: int,
        measurement: float | None,
        live: Digests,
        random: RandomState | None,
        found: Slot | None,
    ) -> None:
        """The state of an earlier process stands: it is the committed one.

        Args:
            plan: Of what stands.
            attempt: Index of the attempt that was committed.
            made: Attempts that had been made.
            measurement: What the probe measured of it then.
            live: Digests of what stands.
            random: Where the random streams are to be when the next training forward begins; None if they get there by
                themselves.
            found: The slot of the ring that it was read from, if it has all that this process would copy into one.
        """
        self._phases.enter("copy")
        if found is not None and found.keep(live, made, self._phases.chunk("copy")):
            found.measurement, self.plan = measurement, plan
            found.publish()
            self.ring.adopt(found)
            self._shade(found)
        else:
            if found is not None:
                found.close()
            self.ring.reset()
            self.commit(plan, attempt, measurement, digests=live)
        self._stale, self._resumed = False, random

    def proposal(self) -> tuple[StatePlan, Image]:
        """The plan that fits the proposal (a new one if state tensors appeared or vanished), and its image."""
        parallel.reshard(self._model)
        image = self.plan.look()
        if image is not None:
            return self.plan, image
        plan = self.build_plan()
        return plan, plan.image()

    def commit(
        self,
        plan: StatePlan,
        attempt: int,
        measurement: float | None = None,
        rule_anchor: dict[str, Any] | None = None,
        digests: Digests | None = None,
    ) -> None:
        """Start to copy the committed state into a free slot; the one before goes when the bytes are there.

        Args:
            plan: From :meth:`proposal`.
            attempt: The committed attempt.
            measurement: What the probe measured of it; None if it was loaded from elsewhere.
            rule_anchor: The rule's statistics, if this commit is an anchor.
            digests: Of the live state under this plan, if they were computed for the vote already.
        """
        self._phases.enter("copy")
        self.plan = plan
        slot = self.ring.begin()
        slot.fill(plan, attempt, digests, on_chunk=self._phases.chunk("copy"))
        self._shade(slot)
        slot.rule_anchor, slot.measurement = rule_anchor, measurement
        slot.publish()
        self.ring.commit(slot, as_anchor=rule_anchor is not None)

    def _shade(self, slot: Slot) -> None:
        """Copy the live state on the device, too: over the copy that is not of the safe state, if there are two."""
        if self._shadows:
            self._shadows.sort(key=lambda shadow: self.ring.has_safe and shadow.holds(self.ring.safe))
            self._shadows[0].fill(slot, slot.plan)

    # ------------------------------------------------------------------ a copy that is not safe yet

    @property
    def holding(self) -> bool:
        """Whether a proposal was copied whose verdict is not known yet."""
        return self._held is not None

    def hold(self, plan: StatePlan, attempt: int, digests: Digests | None = None) -> None:
        """Copy a proposal into a free slot without making it safe; the forward that follows is captured with it.

        Args:
            plan: From :meth:`proposal`.
            attempt: Index of the attempt that made the proposal.
            digests: Of the live state under this plan, if they were computed for the vote already.
        """
        self._phases.enter("copy")
        slot = self.ring.begin()
        slot.fill(plan, attempt, digests, on_chunk=self._phases.chunk("copy"))
        self._shade(slot)
        self._held = slot

    def keep(self, measurement: float, rule_anchor: dict[str, Any] | None = None) -> None:
        """The held proposal is accepted: it is the committed state. See :meth:`commit` for the arguments."""
        slot, self._held = self._held, None
        assert slot is not None, "nothing is held"
        self.plan = slot.plan
        slot.rule_anchor, slot.measurement = rule_anchor, measurement
        slot.publish()
        self.ring.commit(slot, as_anchor=rule_anchor is not None)

    def drop(self) -> None:
        """Give up what is held, if anything is."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def before_step(self) -> None:
        """The barrier between a commit and the next change of the state: the copy comes first.

        To be called before the optimizers run, and before anything else that writes to parameters or optimizer state.
        On an accelerator the device waits and the host does not.

        Raises:
            SnapshotError: A copy failed on this rank. The state is still the committed one, and the snapshot before it
                is sound.
        """
        self.ring.order()

    def close(self) -> None:
        """Give the host memory back. Nothing can be undone afterwards."""
        self.ring.close()
        for shadow in self._shadows:
            shadow.close()

    # ------------------------------------------------------------------ undo

    def undo_forward(self, scaler: Any) -> None:
        """A veto: the step was a no-op; take back what the forward has moved, and the scaler's unscaling."""
        if scaler is not None and self._entry is not None:
            self._entry.restore(self._optimizers, scaler, self._extra_state)
        self._forward.restore()  # last: what a forward moves was captured before it, the entry after it

    def restore(self, attempt: Attempt, wanted: Slot, vote: Vote, guarantees: Guarantees, replicas: bool) -> Slot:
        """Bring every rank back to ``wanted``, or to the newest older slot that is sound on all of them.

        Args:
            attempt: The refused attempt.
            wanted: The last committed state, or an anchor.
            vote: Of this controller.
            guarantees: Checks Proposition 7.4 on the restored bits.
            replicas: Compare the restored bits over replicas as well.

        Returns:
            The slot that was restored, equal on all ranks.

        Collectives: two votes for each copy tried; one more vote and the broadcasts of the shares if ranks share state.

        Raises:
            SnapshotError: On every rank: no slot is sound everywhere.
            LockstepError: On every rank: a restore failed half-way on some rank.
        """
        self._phases.enter("restore")
        self.before_step()
        trouble: list[str] = []
        for slot, shadow in self._copies(wanted):
            damaged = slot.verify() if shadow is None else shadow.verify()
            ballot = Ballot(no=bool(damaged), agree={**attempt.agree, "point of the protocol": 3})
            if vote.cast(ballot, attempt.index).no:
                for rank, names in vote.gather(damaged[:3], attempt.index).items():
                    trouble += [f"rank {rank}: snapshot of attempt {slot.attempt}: damaged {n}" for n in names]
                continue
            failure = self._write_back(slot, shadow)
            if slot.plan.shared and shadow is None:
                # A share can only be sent if everybody is there to send and to take it.
                self._agreed(failure, Ballot(agree={**attempt.agree, "point of the protocol": 4}), attempt, vote)
                send = partial(vote.broadcast, attempt.index)
                slot.gather(send, vote.device, on_chunk=self._phases.chunk("restore"))
            if failure is None:
                failure = self._finish(slot, attempt.scaler, guarantees)
            ballot = Ballot(
                agree={**attempt.agree, "point of the protocol": 5}, checksums=slot.digests if replicas else {}
            )
            tally = self._agreed(failure, ballot, attempt, vote)
            if not tally.split_replicas:
                return slot
            trouble.append(f"snapshot of attempt {slot.attempt}: replicas differ on ranks {tally.split_replicas}")
        raise SnapshotError(
            f"attempt {attempt.index}: refused, and no snapshot is sound on every rank ({'; '.join(trouble)}). "
            f"Restart the job from its last checkpoint."
        )

    def _copies(self, wanted: Slot) -> Iterator[tuple[Slot, Shadow | None]]:
        """Where to look for a state, alike on all ranks: (slot, its copy on the device, or None for its own bytes)."""
        for shadow in self._shadows:
            if shadow.holds(wanted):
                yield wanted, shadow
        for slot in self.ring.no_newer_than(wanted):
            yield slot, None

    def _write_back(self, slot: Slot, shadow: Shadow | None) -> BaseException | None:
        """Write what one copy has into the live state, in place; what went wrong, if anything did."""
        try:
            parallel.reshard(self._model)
            if shadow is not None:
                self._phases.chunk("restore")()
                shadow.restore()
            else:
                slot.restore(on_chunk=self._phases.chunk("restore"))
        except Exception as error:
            return error
        return None

    def _finish(self, slot: Slot, scaler: Any, guarantees: Guarantees) -> BaseException | None:
        """Put back all else that belongs to a slot, and check what stands; what went wrong, if anything did."""
        try:
            if slot.entry is not None:
                slot.entry.restore(self._optimizers, scaler, self._extra_state)
            if slot.forward is not None:
                slot.forward.restore()
            # Unsharded or autocast copies of the refused weights would be used instead of the restored ones.
            parallel.reshard(self._model)
            torch.clear_autocast_cache()
            self.plan = slot.plan
            live = slot.plan.digests(slot.plan.tensors())
            guarantees.restored([int(d) for d in slot.digests.values()], [int(live[key]) for key in slot.digests])
        except Exception as error:
            return error
        return None

    def _agreed(self, failure: BaseException | None, ballot: Ballot, attempt: Attempt, vote: Vote) -> Tally:
        """Vote that nothing went wrong; LockstepError on every rank if it did on any."""
        tally = vote.cast(replace(ballot, no=failure is not None), attempt.index)
        if tally.no:
            self._raise_half_restored(vote.gather(one_line(failure), attempt.index), attempt.index, failure)
        return tally

    @staticmethod
    def _raise_half_restored(said: Mapping[int, str | None], attempt: int, failure: BaseException | None) -> None:
        failed = {rank: text for rank, text in said.items() if text is not None}
        raise LockstepError(
            f"attempt {attempt}: the restore failed on "
            + "; ".join(f"rank {rank} ({text})" for rank, text in failed.items())
            + ". Its state is neither the old nor the new one: restart the job from its last checkpoint.",
            ranks=failed,
            step=attempt,
        ) from failure
