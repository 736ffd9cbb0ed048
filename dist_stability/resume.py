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

**Resuming.** All ranks list what they have; the newest moment that every one of them has is tried, then older ones. A
record is compared with the model and checked against its digests on every rank before anything is written, and the
restored state against them afterwards.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import Phases, one_line
from .errors import LockstepError, SnapshotError
from .recovery import Recovery
from .snapshot import Digests, EntryState, ForwardState, RandomState, Slot, SlotState, StatePlan
from .snapshot.tiers.form import Rebuilt, differing, facts, trees
from .snapshot.tiers.record import Head, Unusable, dumps, fitted, loads
from .snapshot.tiers.shared_memory import Record, SharedMemory, Shelf
from .vote import Ballot, Vote

Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Resumed:
    """What :meth:`StabilityController.resume` found; false if there was nothing to go on from.

    Attributes:
        attempt: Attempts that had been made: the loop goes on with attempt number ``attempt``; 0 for nothing.
        batches: Batches that had been taken from ``controller.batches(loader)`` for them and are not to be fetched
            again; what a refusal would show again is remembered. Equal to ``attempt`` for other loops.
        source: Where the state came from; "" for nothing.
        line: What was chosen and why, or why nothing was, in one line.
    """

    attempt: int
    batches: int
    source: str
    line: str

    def __bool__(self) -> bool:
        """Whether anything was restored."""
        return bool(self.source)


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


@dataclass(slots=True)
class _Candidate:
    """A record that fits and is sound on this rank: its slot, and optimizer state of its form in place."""

    record: Record
    body: dict[str, Any]
    slot: Slot
    rebuilt: Rebuilt
    entry: EntryState


class Persistence:
    """Seals what a controller commits, and finds it again.

    Args:
        setting: Of the controller.
        extra_state: Of the controller.

    Attributes:
        shelf: The files.
        vote: Of the controller.

    Raises:
        ValueError: See :class:`Shelf`.
        TypeError: Something in ``extra_state`` cannot be written down.
    """

    vote: Vote

    def __init__(self, setting: SharedMemory, extra_state: Mapping[str, Any]) -> None:
        """Look at the folder; enters no collective."""
        count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._setting, self._extra_state = setting, extra_state
        self.shelf = Shelf(setting, parallel.this_rank(), count)
        self._form: tuple[StatePlan | None, bytes] = (None, b"")
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

    def join(self, model: nn.Module, optimizers: Sequence[Optimizer], recovery: Recovery, phases: Phases) -> None:
        """The parts of the controller this works with; ``vote`` follows when it is made.

        Raises:
            SnapshotError: The folder has no room for copies of the parameters alone. What the optimizers will add is
                known, and compared, when they have made it.
        """
        self._model, self._optimizers, self._recovery, self._phases = model, optimizers, recovery, phases
        self.shelf.check(recovery.plan.bytes_kept * recovery.ring.size, recovery.ring.size)

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
        slot, tell = self._recovery.ring.safe, self._phases.chunk("seal")
        tell()
        slot.wait()
        if slot.state is not SlotState.VALID or slot.spoilt:
            return
        try:
            forward, entry = self._captured(slot) if between is None else self._standing(between)
            data = {
                "optimizers": self._kinds(),
                "form": self._form_of(slot.plan),
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
            head = Head(
                self._setting.job,
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
            self.shelf.seal(slot.memory, head, data, tell)
        except OSError as error:
            if not self._said_full:
                self._said_full = True
                warnings.warn(
                    f"rank {self.vote.rank}: attempt {made}: the state could not be sealed in {self._setting.folder} "
                    f"({error}); a process that is restarted finds an older one, or none. Free some room there",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        except Exception as error:
            raise SnapshotError(
                f"rank {self.vote.rank}: persist=SharedMemory(): the state of attempt {slot.attempt} cannot be written "
                f"down for another process ({one_line(error)}). Leave out persist=, or what it names"
            ) from error
        slot.sealed = made
        tell()

    @staticmethod
    def _captured(slot: Slot) -> tuple[dict[str, Any], EntryState | None]:
        assert slot.forward is not None
        return slot.forward.export(), slot.entry

    def _standing(self, between: Between) -> tuple[dict[str, Any], EntryState]:
        """What would be captured of the next attempt if it began now."""
        if between.unfetched:
            self.mark()
        forward = ForwardState(self._model)
        forward.capture()
        entry = EntryState.capture(self._optimizers, between.scaler, self._extra_state)
        return {**forward.export(), "random": None}, entry

    def _kinds(self) -> list[str]:
        return [type(optimizer).__qualname__ for optimizer in self._optimizers]

    def _form_of(self, plan: StatePlan) -> bytes:
        """The form of a plan, pickled once."""
        if self._form[0] is not plan:
            self._form = plan, dumps(facts(plan))
        return self._form[1]

    # ------------------------------------------------------------------ resuming

    def resume(self, load: Callable[[Mapping[str, Any], Mapping[str, Any] | None, Key], None], scaler: Any) -> Resumed:
        """Restore the newest moment that every rank has. All ranks together; see the controller.

        Args:
            load: Takes the controller's own state, what the replay remembers, and the key of the moment.
            scaler: The GradScaler of the loop, or None.
        """
        own, said = self.shelf.records(self.vote.world, self._recovery.plan.signature)
        mine = {record.head.key: record for record in reversed(own)}
        told = self.vote.gather({"keys": sorted(mine, reverse=True), "said": said[:4]}, -1)
        everyone = {rank: [tuple(key) for key in one["keys"]] for rank, one in told.items()}
        notes = [f"rank {rank}: {text}" for rank, one in told.items() for text in one["said"]]
        common = sorted(set(mine).intersection(*everyone.values()), reverse=True)
        notes += _missing(everyone, common[0] if common else None)
        for key in common:
            candidate, failure = self._prepare(mine[key], scaler)
            failed = {rank: text for rank, text in self.vote.gather(_why(failure), -1).items() if text is not None}
            if not failed:
                assert candidate is not None
                return self._restore(candidate, load, scaler, notes)
            if candidate is not None:
                candidate.rebuilt.undo()
                candidate.slot.close()
            notes += [f"attempt {key[0]} on rank {rank}: {text}" for rank, text in failed.items()]
        self._recovery.plan = self._recovery.build_plan()
        why = "; ".join(notes) if notes else "no earlier process left anything"
        return Resumed(0, 0, "", f"nothing to resume from in {self.shelf.name} (job {self._setting.job}): {why}")

    def _prepare(self, record: Record, scaler: Any) -> tuple[_Candidate | None, Exception | None]:
        """Check a record against the model and its digests; make optimizer state of its form. Or say why not."""
        rebuilt = None
        slot = Slot()
        try:
            memory, body = record.open(), loads(record.body)
            form, entry = loads(body["form"]), body["entry"]
            if body["optimizers"] != self._kinds():
                raise Unusable(f"is of the optimizers {body['optimizers']}, and they are {self._kinds()}")
            self._check_entry(entry, scaler)
            entry = replace(entry, extra=self._fit(entry.extra))
            ForwardState(self._model).check_buffers(body["forward"])
            rebuilt = Rebuilt(self._optimizers, body["trees"], form)
            plan = self._recovery.build_plan()
            other = differing(form, plan)
            if other is not None:
                raise Unusable(other)
            digests = Digests({ranks: torch.tensor(value) for ranks, value in body["digests"].items()}, body["sums"])
            slot.take(plan, memory, record.head.attempt, digests, body["sums"])
            damaged = slot.verify()
            if damaged:
                raise Unusable(f"is damaged: {', '.join(damaged[:3])}")
            return _Candidate(record, body, slot, rebuilt, entry), None
        except Exception as error:
            if rebuilt is not None:
                rebuilt.undo()
            slot.close()
            return None, error

    def _check_entry(self, entry: EntryState, scaler: Any) -> None:
        groups = [len(one) for one in entry.groups]
        now = [len(optimizer.param_groups) for optimizer in self._optimizers]
        if groups != now:
            raise Unusable(f"has {groups} parameter groups by optimizer, and there are {now}")
        if set(entry.extra) != set(self._extra_state):
            raise Unusable(f"has extra_state {sorted(entry.extra)}, and it is {sorted(self._extra_state)} now")
        if (entry.scaler is None) != (scaler is None):
            raise Unusable(
                "has no GradScaler, and resume() was given one"
                if entry.scaler is None
                else "has a GradScaler: call resume(scaler=...) with that of the loop"
            )

    def _fit(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {name: fitted(saved, self._extra_state[name].state_dict()) for name, saved in extra.items()}

    def _restore(
        self,
        candidate: _Candidate,
        load: Callable[[Mapping[str, Any], Mapping[str, Any] | None, Key], None],
        scaler: Any,
        notes: list[str],
    ) -> Resumed:
        """Write a record that is sound on all ranks into the live state, and declare it resumed when all have it."""
        head, body, slot = candidate.record.head, candidate.body, candidate.slot
        self._phases.attempt = head.made
        self._phases.enter("restore")
        failure = None
        try:
            self._recovery.before_step()
            parallel.reshard(self._model)
            slot.restore(on_chunk=self._phases.chunk("restore"))
        except Exception as error:
            failure = error
        self._agree(failure, head, {})
        if slot.plan.shared:
            send = partial(self.vote.broadcast, head.made)
            slot.gather(send, self.vote.device, on_chunk=self._phases.chunk("restore"))
        live = Digests({}, torch.empty(0))
        try:
            candidate.entry.restore(self._optimizers, scaler, self._extra_state)
            ForwardState(self._model).load_buffers(body["forward"])
            parallel.reshard(self._model)
            torch.clear_autocast_cache()
            live = slot.plan.digests(slot.plan.tensors())
            wrong = [ranks for ranks, digest in slot.digests.items() if int(live[ranks]) != int(digest)]
            if wrong:
                raise SnapshotError(f"the restored state of ranks {list(wrong[0])} is not what was committed")
            load(body["controller"], body["replay"], head.key)
        except Exception as error:
            failure = error
        self._agree(failure, head, live)
        drawn = body["forward"]["random"]
        random = None if drawn is None else RandomState.of(drawn)
        self._recovery.resumed(slot, body["measurement"], live, random)
        RandomState.of(body["before fetch"]).restore()
        self.mark()
        slot.close()
        self.shelf.forget_earlier(but=candidate.record.path)
        self._phases.enter("training")
        replay = body["replay"]
        line = (
            f"resumed at attempt {head.made} from {self.shelf.name} (job {head.job}, committed at attempt "
            f"{head.attempt}, {time.time() - head.written:.0f} s ago): the newest that all {self.vote.world} ranks have"
        )
        return Resumed(
            head.made,
            head.made if replay is None else int(replay["consumed"]),
            self.shelf.name,
            "; ".join([line, *notes]),
        )

    def _agree(self, failure: Exception | None, head: Head, live: Mapping[tuple[int, ...], torch.Tensor]) -> None:
        """Vote that nothing went wrong. LockstepError on every rank otherwise: the live state is half written."""
        agree = {"point of the protocol": 6, "attempt": head.made, "history of verdicts": head.history}
        tally = self.vote.cast(Ballot(no=failure is not None, agree=agree, checksums=live), head.made)
        failed: dict[int, str] = {}
        if tally.no:
            said = self.vote.gather(one_line(failure), head.made)
            failed = {rank: text for rank, text in said.items() if text is not None}
        for ranks in tally.split_replicas:
            failed.update({rank: "its replica has other bits" for rank in ranks})
        if failed:
            raise LockstepError(
                f"resume at attempt {head.made} failed on "
                + "; ".join(f"rank {rank} ({text})" for rank, text in failed.items())
                + ". The state is neither the old nor the new one: start the job without resume, or from a checkpoint.",
                ranks=failed,
                step=head.made,
            ) from failure


def _why(failure: Exception | None) -> str | None:
    return str(failure) if isinstance(failure, Unusable) else one_line(failure)


def _missing(everyone: Mapping[int, list[Any]], chosen: Key | None) -> list[str]:
    """Which newer moments are not used, because some ranks do not have them."""
    newest = max((keys[0] for keys in everyone.values() if keys), default=None)
    if newest is None or newest == chosen:
        return []
    without = [rank for rank, keys in everyone.items() if newest not in keys]
    return [f"attempt {newest[0]} is not on ranks {without[:8]}"]
