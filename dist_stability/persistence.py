"""Going on where a process that died left off: a record of every commit outlives it, and all ranks agree on one.

**Sealing.** A slot of the ring (snapshot/) holds parameters and optimizer state of a commit. It becomes a record when
it is sealed, on entry of the next ``step()``: by then the loop has stepped its schedulers, the random streams and
buffers before that step's forward are known, and no verdict is pending. Together with the random streams of the
moment before its batch was fetched, that is all the run depends on from there. After a refusal the same slot is sealed
again: random streams and the number of attempts have moved on.

A run that is about to be left (``finish()``) is sealed between two steps: the moment is the same, but its forward has
not begun, so there are the random streams and buffers that stand, and those before the forward follow by themselves. A
later seal of the same moment takes the place of the earlier one.

**No gap.** Between two seals of a rank all ranks vote, so no rank is further ahead than one seal. A rank keeps its last
two seals: two of one slot, or of two slots, of which the older is not filled again before the newer is sealed. With a
deferred verdict the vote is read one step late, so there is one slot more. Whenever the ranks die, they have one moment
in common.

**Slower tiers.** At some attempts the sealed slot is given to the courier, which brings it to them beside the training;
and when the run is left, whatever was sealed last.

How it is found again is in resume.py.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import Phases, one_line
from .errors import SnapshotError
from .recovery import Recovery
from .resume import Load, Resumed, Resuming, kinds
from .snapshot import EntryState, ForwardState, Memory, RandomState, Slot, SlotState, StatePlan
from .snapshot.catalogue import Catalogue
from .snapshot.tiers.checkpoints import CheckpointFolder, Checkpoints
from .snapshot.tiers.courier import Broken, Courier
from .snapshot.tiers.form import facts, trees
from .snapshot.tiers.peers import PeerCopies, Peers
from .snapshot.tiers.record import Head, dumps
from .snapshot.tiers.shared_memory import SharedMemory, Shelf
from .snapshot.tiers.tier import Delivery, SlowTier, Tier
from .startup import world_of
from .vote import Vote

T = TypeVar("T")
Setting = SharedMemory | Checkpoints | PeerCopies


@dataclass(frozen=True, slots=True)
class Between:
    """A seal between two steps.

    Attributes:
        scaler: The GradScaler of the last step, or None.
        unfetched: The next batch is known not to have been fetched: the random streams are where they are to be then.
            Otherwise they were at the end of the last step.
    """

    scaler: Any
    unfetched: bool


class Persistence:
    """Seals what a controller commits, and finds it again.

    Args:
        settings: Of the controller.
        extra_state: Of the controller.
        group: Of the controller.

    Attributes:
        shelf: The files in shared memory, if that is among the settings.
        tiers: All of them, in the order in which they are asked.
        vote: Of the controller.

    Raises:
        ValueError: See :class:`Shelf` and :class:`CheckpointFolder`.
        TypeError: Something in ``extra_state`` cannot be written down.
    """

    vote: Vote

    def __init__(
        self, settings: Sequence[Setting], extra_state: Mapping[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        """Look at the folders; enters no collective."""
        count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        rank, ranks = parallel.this_rank(), world_of(group)
        self._extra_state, self._group = extra_state, group
        self.shelf: Shelf | None = None
        self.tiers: list[Tier] = []
        self._slow: list[SlowTier] = []
        for setting in settings:
            if isinstance(setting, SharedMemory):
                self.shelf = Shelf(setting, rank, count)
                self.tiers.insert(0, self.shelf)
            elif isinstance(setting, Checkpoints):
                folder = CheckpointFolder(setting, rank, ranks)
                self.tiers.append(folder)
                self._slow.append(folder)
        copies = next((setting for setting in settings if isinstance(setting, PeerCopies)), None)
        self._peers: Peers | None = None
        if copies is not None and self.shelf is not None:
            self._peers = Peers(copies, self.shelf)
            self.tiers.insert(1, self._peers)
            self._slow.insert(0, self._peers)
        self._job = next((setting.job for setting in settings if isinstance(setting, SharedMemory)), "")
        self._courier: Courier | None = None
        self._began = False
        self._leaving = False
        self._sealed: Delivery | None = None  # what was sealed last
        self._form: tuple[StatePlan | None, tuple[bytes, bytes]] = (None, (b"", b""))
        self._said_full = False
        self._before_fetch = RandomState.capture()
        for name, stateful in extra_state.items():
            try:
                dumps(stateful.state_dict())
            except Exception as error:
                raise TypeError(
                    f"extra_state[{name!r}]: its state cannot be written down for another process ({one_line(error)}); "
                    "give it a state_dict() of plain data and tensors, or leave out persist="
                ) from error

    @property
    def memory(self) -> Memory | None:
        """Where the slots are to have their memory from; None for anonymous memory."""
        return self.shelf

    def described(self) -> list[str]:
        """The settings that must be equal on all ranks."""
        slow = [f"{tier.name.split(' in ')[0]}, every {tier.every}" for tier in self._slow]
        return [*([] if self.shelf is None else ["shared memory"]), *slow]

    @property
    def slots(self) -> int:
        """How many slots the ring needs for the tiers beside its own."""
        return Courier.slots(self._slow)

    def join(self, model: nn.Module, optimizers: Sequence[Optimizer], recovery: Recovery, phases: Phases) -> None:
        """The parts of the controller this works with; :meth:`connect` follows.

        Raises:
            SnapshotError: The folder has no room for copies of the parameters alone. What the optimizers will add is
                known, and compared, when they have made it.
            ValueError: State of this kind cannot be written as a checkpoint.
        """
        self._model, self._optimizers, self._recovery, self._phases = model, optimizers, recovery, phases
        written = any(isinstance(tier, CheckpointFolder) for tier in self.tiers)
        problem = parallel.without_boxes(model, optimizers) if written else ""
        if problem:
            raise ValueError(
                f"rank {parallel.this_rank()}: persist=Checkpoints(...): this state cannot be written as whole "
                f"tensors: {problem}; or use SharedMemory() alone"
            )
        if self.shelf is not None:
            self.shelf.check(recovery.plan.bytes_kept * recovery.ring.size, recovery.ring.size)

    def connect(self, vote: Vote) -> None:
        """Meet the other ranks, which have the same settings.

        Collectives: with slower tiers, one process group is made; with peer copies, two all-gathers.
        """
        self.vote = vote
        if self._slow:
            self._courier = Courier(self._slow, self._recovery.ring, self._group, vote.ranks, vote.rank)
            self._courier.silent, self._courier.timeout = vote.silent, vote.timeout
        if self._peers is not None:
            self._peers.join(vote.gather(self._peers.host, -1))

    def stop(self, wait: bool) -> None:
        """End what goes on in the background, before the slots are given back. Idempotent; enters no collective.

        Args:
            wait: For what is under way; otherwise it is given up.
        """
        if self._courier is not None:
            self._courier.close(wait)

    def close(self, keep: bool) -> None:
        """See Tier."""
        for tier in self.tiers:
            tier.close(keep)

    def discard(self) -> None:
        """This process has nothing to keep."""
        if self.shelf is not None:
            self.shelf.discard()

    # ------------------------------------------------------------------ sealing

    def mark(self) -> None:
        """An attempt is over: note where the random streams are before the loop fetches what comes next."""
        self._before_fetch = RandomState.capture()

    def seal(
        self,
        made: int,
        history: int,
        memory: Mapping[str, Any],
        replay: Mapping[str, Any] | None,
        between: Between | None = None,
    ) -> None:
        """Make the safe state findable, with everything else the present attempt began with. Local.

        Called with nothing pending: on entry of ``step()``, when the captures of this attempt are there, or between two
        steps. Waits for the copy of the safe state.

        Args:
            made: Attempts made, which is the index of the present one.
            history: Digest of all verdicts.
            memory: The controller's own state.
            replay: Which batches it has seen and which it will show again; None for a loop that does not ask it.
            between: No forward has begun since the last step; None on entry of ``step()``.

        Raises:
            SnapshotError: The copy failed, or the state is of a kind that no other process could make again.
        """
        slot, courier = self._recovery.ring.safe, self._courier
        if not self._began:
            self._begin(made)
        if courier is not None:
            courier.poll()
        due = [] if courier is None else courier.due(made)
        leaving = courier is not None and (self._leaving or self.vote.stopping)
        if not (due or leaving) and self.shelf is None:
            return
        slot.wait()
        sound = slot.state is SlotState.VALID and not slot.spoilt
        if not (due or leaving) and not sound:
            return
        tell = self._phases.chunk("seal")
        tell()
        head = Head(
            self._job,
            self.vote.rank,
            self.vote.world,
            slot.plan.signature,
            made,
            slot.attempt,
            history,
            slot.memory.fill,
            slot.payload,
            time.time(),
        )
        body = self._body(slot, memory, replay, between) if sound else b""
        if self.shelf is not None and sound:
            self._put(self.shelf, slot, head, body, tell)
        self._sealed = Delivery(head, body, slot if sound else None, self._phases.chunk("delivery"))
        if courier is not None and due:
            courier.offer(self._sealed)

    def leave(self, finish: Callable[[], T]) -> T:
        """Seal what stands, bring what was sealed last to every slower tier, and wait for that. All ranks together.

        Args:
            finish: Seals it, if it can be.
        """
        self._leaving = True
        finished = finish()
        if self._courier is not None and self._sealed is not None:
            self._courier.offer(self._sealed, now=True)
            self._courier.flush()
        return finished

    @staticmethod
    def _captured(slot: Slot) -> tuple[dict[str, Any], EntryState | None]:
        assert slot.forward is not None
        entry = slot.entry
        if entry is not None:  # a restart repeats the forward, so it begins with what was before it
            entry = replace(entry, extra={**entry.extra, **slot.forward.moved})
        return slot.forward.export(), entry

    def _standing(self, between: Between) -> tuple[dict[str, Any], EntryState]:
        """What would be captured of the next attempt if it began now."""
        if between.unfetched:
            self.mark()
        forward = ForwardState(self._model)
        forward.capture()
        entry = EntryState.capture(self._optimizers, between.scaler, self._extra_state)
        return {**forward.export(), "random": None}, entry

    def _body(
        self, slot: Slot, memory: Mapping[str, Any], replay: Mapping[str, Any] | None, between: Between | None
    ) -> bytes:
        try:
            forward, entry = self._captured(slot) if between is None else self._standing(between)
            form, where = self._form_of(slot)
            return dumps(
                {
                    "optimizers": kinds(self._optimizers),
                    "form": form,
                    "starts": slot.starts,
                    "where": where,
                    "kind": parallel.describe(self._model),
                    "trees": trees(slot),
                    "sums": slot.sums,
                    "digests": {ranks: int(digest) for ranks, digest in slot.digests.items()},
                    "measurement": slot.measurement,
                    "before fetch": self._before_fetch.export(),
                    "forward": forward,
                    "entry": entry,
                    "controller": dict(memory),
                    "replay": replay,
                }
            )
        except Exception as error:
            raise SnapshotError(
                f"rank {self.vote.rank}: persist=: the state of attempt {slot.attempt} cannot be written down for "
                f"another process ({one_line(error)}). Leave out persist=, or what it names"
            ) from error

    def _put(self, shelf: Shelf, slot: Slot, head: Head, body: bytes, tell: Callable[[], object]) -> None:
        try:
            shelf.seal(slot.memory, head, body, tell)
        except OSError as error:
            if not self._said_full:
                self._said_full = True
                warnings.warn(
                    f"rank {self.vote.rank}: attempt {head.made}: the state could not be sealed in {shelf.folder} "
                    f"({error}); a process that is restarted finds an older one, or none. Free some room there",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        slot.sealed = head.made
        tell()

    def _begin(self, made: int) -> None:
        """The run goes on from here, and did not resume from anything."""
        self._began = True
        for tier in self._slow:
            tier.begin(made, None)

    def _form_of(self, slot: Slot) -> tuple[bytes, bytes]:
        """The form of a slot's plan and its catalogue, each pickled once."""
        plan, first = slot.plan, self.vote.ranks[0]
        if self._form[0] is not plan:
            catalogue = Catalogue.of(self._model, plan, slot.held, slot.starts, first)
            self._form = plan, (dumps(facts(plan)), dumps(catalogue))
        return self._form[1]

    # ------------------------------------------------------------------ resuming

    def resume(self, load: Load, scaler: Any) -> Resumed:
        """Restore the newest moment that every rank has. All ranks together; see :class:`Resuming`."""
        resuming = Resuming(
            self.tiers, self._model, self._optimizers, self._extra_state, self._recovery, self._phases, self.vote
        )
        notes: list[str] = []
        if self._peers is not None and self._courier is not None:
            try:
                notes = self._peers.collect(self._courier.channel, self._recovery.plan.signature)
            except Broken as error:
                raise self.vote.lost(-1, error) from error
        resumed = resuming.run(load, scaler, notes)
        if resumed:
            self._began = True
            self.mark()
            if self._courier is not None:
                self._courier.start_at(resumed.attempt)
        return resumed
