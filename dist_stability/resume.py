"""Going on where a process that died left off: a record of every commit outlives it, and all ranks agree on one.

**Sealing.** A slot of the ring (snapshot/) holds parameters and optimizer state of a commit. It becomes a record when
it is sealed, on entry of the next ``step()``: by then the loop has stepped its schedulers, the random streams and
buffers before that step's forward are known, and no verdict is pending. Together with the random streams of the
moment before its batch was fetched, that is all the run depends on from there. After a refusal the same slot is sealed
again: random streams and the number of attempts have moved on.

**No gap.** Between two seals of a rank all ranks vote, so no rank is further ahead than one seal. A rank keeps its last
two seals: two of one slot, or of two slots, of which the older is not filled again before the newer is sealed. With a
deferred verdict the vote is read one step late, so there is one slot more. Whenever the ranks die, they have one moment
in common.

**Slower tiers.** At some attempts the sealed slot is given to the courier, which brings it to them beside the training.

**Resuming.** All ranks list what they have in all tiers; the newest moment that every one of them has, wherever, is
tried, then older ones. A record is compared with the model and checked against its digests on every rank before
anything is written, and the restored state against them afterwards. A checkpoint can also be taken over by another
number of ranks or another kind of parallelism: then each rank reads the parts of the whole tensors that it holds now.
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
from .snapshot import Digests, EntryState, ForwardState, Memory, RandomState, Slot, SlotState, StatePlan
from .snapshot.catalogue import Catalogue
from .snapshot.tiers.checkpoints import CheckpointFolder, Checkpoints
from .snapshot.tiers.courier import Courier
from .snapshot.tiers.form import Rebuilt, differing, facts, trees
from .snapshot.tiers.record import Head, Unusable, dumps, fitted, loads
from .snapshot.tiers.shared_memory import SharedMemory, Shelf
from .snapshot.tiers.tier import Delivery, Found, Key, SlowTier, Tier, Whole
from .startup import world_of
from .vote import Ballot, Vote

Setting = SharedMemory | Checkpoints


@dataclass(frozen=True, slots=True)
class Resumed:
    """What :meth:`StabilityController.resume` found; false if there was nothing to go on from.

    Attributes:
        attempt: Attempts that had been made: the loop goes on with attempt number ``attempt``; 0 for nothing.
        batches: Batches that had been taken from ``controller.batches(loader)`` for them and are not to be fetched
            again; what a refusal would show again is remembered. Equal to ``attempt`` for other loops.
        source: Where the state came from; "" for nothing.
        line: What was chosen and why, or why nothing was, in one line.
        exact: The run goes on bit for bit as it would have. Not so from a checkpoint of another number of ranks or
            another kind of parallelism: then the values are equal, and ``line`` says what is not.
    """

    attempt: int
    batches: int
    source: str
    line: str
    exact: bool = True

    def __bool__(self) -> bool:
        """Whether anything was restored."""
        return bool(self.source)


@dataclass(slots=True)
class _Ready:
    """A state that fits and is sound on this rank, with optimizer state of its form in place.

    Attributes:
        head: What it is known by.
        body: Of its seal.
        plan: Of the live state that it is about to be written into.
        entry: As it is to be restored.
        rebuilt: The optimizer state.
        write: Writes it, locally.
        close: Lets go of what it was read into.
        buffers: By the modules' numbers now.
        replay: For the loop.
        slot: What other ranks need a share of; None if every rank has it all.
        streams: The random streams are those of this rank.
        found: Where it is from, if it is a moment of this rank.
    """

    head: Head
    body: dict[str, Any]
    plan: StatePlan
    entry: EntryState
    rebuilt: Rebuilt
    write: Callable[[], object]
    close: Callable[[], object]
    buffers: list[tuple[int, str, torch.Tensor | None]]
    replay: Mapping[str, Any] | None
    slot: Slot | None
    streams: bool
    found: Found | None


Load = Callable[[Mapping[str, Any], Mapping[str, Any] | None, Key], None]
"""Takes the controller's own state, what the replay remembers, and the key of the moment."""


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
            else:
                folder = CheckpointFolder(setting, rank, ranks)
                self.tiers.append(folder)
                self._slow.append(folder)
        self._job = next((setting.job for setting in settings if isinstance(setting, SharedMemory)), "")
        self._courier: Courier | None = None
        self._began = False
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
        problem = parallel.without_boxes(model, optimizers) if self._slow else ""
        if problem:
            raise ValueError(
                f"rank {parallel.this_rank()}: persist=Checkpoints(...): this state cannot be written as whole "
                f"tensors: {problem}; or use SharedMemory() alone"
            )
        if self.shelf is not None:
            self.shelf.check(recovery.plan.bytes_kept * recovery.ring.size, recovery.ring.size)

    def connect(self, vote: Vote) -> None:
        """The other ranks. Collectives: with slower tiers, one process group is made."""
        self.vote = vote
        if self._slow:
            self._courier = Courier(self._slow, self._recovery.ring, self._group, vote.ranks, vote.rank)

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

    def seal(self, made: int, history: int, memory: Mapping[str, Any], replay: Mapping[str, Any] | None) -> None:
        """Make the safe state findable, with everything else the present attempt began with. Local.

        Called on entry of ``step()``, with nothing pending, when the captures of this attempt are there. Waits for the
        copy of the safe state.

        Args:
            made: Attempts made, which is the index of the present one.
            history: Digest of all verdicts.
            memory: The controller's own state.
            replay: Which batches it has seen and which it will show again; None for a loop that does not ask it.

        Raises:
            SnapshotError: The copy failed, or the state is of a kind that no other process could make again.
        """
        slot, courier = self._recovery.ring.safe, self._courier
        slot.wait()
        if not self._began:
            self._begin(made)
        if courier is not None:
            courier.poll()
        due = [] if courier is None else courier.due(made)
        sound = slot.state is SlotState.VALID and not slot.spoilt
        if not due and (self.shelf is None or not sound):
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
        body = self._body(slot, memory, replay) if sound else b""
        if self.shelf is not None and sound:
            self._put(self.shelf, slot, head, body, tell)
        if courier is not None and due:
            courier.offer(Delivery(head, body, slot if sound else None, self._phases.chunk("delivery")))

    def _body(self, slot: Slot, memory: Mapping[str, Any], replay: Mapping[str, Any] | None) -> bytes:
        assert slot.forward is not None
        try:
            form, where = self._form_of(slot)
            return dumps(
                {
                    "optimizers": self._kinds(),
                    "form": form,
                    "where": where,
                    "kind": parallel.describe(self._model),
                    "trees": trees(slot),
                    "sums": slot.sums,
                    "digests": {ranks: int(digest) for ranks, digest in slot.digests.items()},
                    "measurement": slot.measurement,
                    "before fetch": self._before_fetch.export(),
                    "forward": slot.forward.export(),
                    "entry": slot.entry,
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

    def _kinds(self) -> list[str]:
        return [type(optimizer).__qualname__ for optimizer in self._optimizers]

    def _form_of(self, slot: Slot) -> tuple[bytes, bytes]:
        """The form of a slot's plan and its catalogue, each pickled once."""
        plan, first = slot.plan, self.vote.ranks[0]
        if self._form[0] is not plan:
            catalogue = Catalogue.of(self._model, plan, slot.held, slot.starts, first)
            self._form = plan, (dumps(facts(plan)), dumps(catalogue))
        return self._form[1]

    # ------------------------------------------------------------------ resuming

    def resume(self, load: Load, scaler: Any) -> Resumed:
        """Restore the newest moment that every rank has. All ranks together; see the controller.

        Args:
            load: Gives the controller what it knew.
            scaler: The GradScaler of the loop, or None.
        """
        own: dict[Key, list[tuple[str, Found]]] = {}
        whole: dict[Key, tuple[str, Whole]] = {}
        said: list[str] = []
        for tier in self.tiers:
            listing = tier.list(self.vote.world, self._recovery.plan.signature)
            for found in listing.found:
                own.setdefault(found.head.key, []).append((tier.name, found))
            for each in listing.whole:
                whole.setdefault(each.head.key, (tier.name, each))
            said += listing.said[:4]
        told = self.vote.gather({"own": sorted(own), "whole": sorted(whole), "said": said}, -1)
        notes = _notes({rank: one["said"] for rank, one in told.items()})
        common = {
            kind: set.intersection(*({tuple(key) for key in one[kind]} for one in told.values()))
            for kind in ("own", "whole")
        }
        keys = sorted(common["own"] | common["whole"], reverse=True)
        everyone = {rank: [tuple(key) for key in (*one["own"], *one["whole"])] for rank, one in told.items()}
        notes += _missing(everyone, keys[0] if keys else None)
        for key in keys:
            ways: list[Callable[[], tuple[str, _Ready]]] = []
            if key in common["own"]:
                ways.append(partial(self._first_that_fits, own[key], scaler))
            if key in common["whole"]:
                ways.append(partial(self._reshape, *whole[key], scaler))
            for way in ways:
                ready: _Ready | None = None
                source, failure = "", None
                try:
                    source, ready = way()
                except Exception as error:
                    failure = error
                answers = self.vote.gather([_why(failure), source], -1)
                failed = {rank: text for rank, (text, _) in answers.items() if text is not None}
                if not failed:
                    assert ready is not None
                    sources = {rank: name for rank, (_, name) in answers.items()}
                    return self._restore(ready, load, scaler, sources, notes)
                if ready is not None:
                    ready.rebuilt.undo()
                    ready.close()
                notes += [f"attempt {key[0]} on {text}" for text in _notes({r: [t] for r, t in failed.items()})]
        self._recovery.plan = self._recovery.build_plan()
        why = "; ".join(notes) if notes else "no earlier process left anything"
        places = " or ".join(tier.where for tier in self.tiers)
        return Resumed(0, 0, "", f"nothing to resume from in {places}: {why}")

    def _first_that_fits(self, own: Sequence[tuple[str, Found]], scaler: Any) -> tuple[str, _Ready]:
        """Of one moment, the first tier whose record is sound; Unusable if none is."""
        wrong = []
        for name, found in own:
            try:
                return name, self._prepare(found, scaler)
            except Exception as error:
                wrong.append(f"{_why(error)}" if len(own) == 1 else f"in {name} it {_why(error)}")
        raise Unusable("; ".join(wrong))

    def _prepare(self, found: Found, scaler: Any) -> _Ready:
        """Check a record against the model and its digests; make optimizer state of its form.

        Raises:
            Unusable, SnapshotError: It does not fit, or is damaged; nothing has changed then.
        """
        rebuilt = None
        slot = Slot()
        try:
            head, body = found.head, loads(found.body)
            form, entry = loads(body["form"]), self._checked(body, scaler)
            ForwardState(self._model).check_buffers(body["forward"])
            rebuilt = Rebuilt(self._optimizers, body["trees"], form)
            plan = self._recovery.build_plan()
            other = differing(form, plan)
            if other is not None:
                raise Unusable(other)
            digests = Digests({ranks: torch.tensor(value) for ranks, value in body["digests"].items()}, body["sums"])
            slot.take(plan, found.open(), head.attempt, digests, body["sums"])
            damaged = slot.verify()
            if damaged:
                raise Unusable(f"is damaged: {', '.join(damaged[:3])}")
        except Exception:
            if rebuilt is not None:
                rebuilt.undo()
            slot.close()
            raise
        write = partial(slot.restore, on_chunk=self._phases.chunk("restore"))
        buffers = body["forward"]["buffers"]
        return _Ready(head, body, plan, entry, rebuilt, write, slot.close, buffers, body["replay"], slot, True, found)

    def _reshape(self, name: str, whole: Whole, scaler: Any) -> tuple[str, _Ready]:
        """The same for a state that was written under another kind of parallelism, or by other ranks."""
        from .snapshot.tiers.reshape import Reshaped, renumbered, wanted

        ranks = self.vote.ranks
        whole.check(ranks.index(self.vote.rank), len(ranks))
        head, body = whole.head, loads(whole.body)
        catalogue: Catalogue = loads(body["where"])
        entry = self._checked(body, scaler)
        buffers = renumbered(body["forward"]["buffers"], catalogue, self._model)
        rebuilt = Reshaped(self._optimizers, body["trees"], loads(body["form"]), catalogue)
        try:
            plan = self._recovery.build_plan()
            write = whole.reading(wanted(self._model, plan, ranks[0]))
        except Exception:
            rebuilt.undo()
            raise
        same, replay = head.world == len(ranks), body["replay"]
        if replay is not None and not same:
            replay = {**replay, "again": [], "loader": None}
        return name, _Ready(head, body, plan, entry, rebuilt, write, lambda: None, buffers, replay, None, same, None)

    def _checked(self, body: Mapping[str, Any], scaler: Any) -> EntryState:
        """What was set around the step, if it fits; Unusable otherwise."""
        if body["optimizers"] != self._kinds():
            raise Unusable(f"is of the optimizers {body['optimizers']}, and they are {self._kinds()}")
        entry: EntryState = body["entry"]
        self._check_entry(entry, scaler)
        return replace(entry, extra=self._fit(entry.extra))

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
        self, ready: _Ready, load: Load, scaler: Any, sources: Mapping[int, str], notes: Sequence[str]
    ) -> Resumed:
        """Write what is sound on all ranks into the live state, and declare it resumed when all have it."""
        head, body, slot, plan = ready.head, ready.body, ready.slot, ready.plan
        self._phases.attempt = head.made
        self._phases.enter("restore")
        failure = None
        try:
            self._recovery.before_step()
            parallel.reshard(self._model)
            ready.write()
        except Exception as error:
            failure = error
        self._agree(failure, head, {})
        if slot is not None and plan.shared:
            send = partial(self.vote.broadcast, head.made)
            slot.gather(send, self.vote.device, on_chunk=self._phases.chunk("restore"))
        live = Digests({}, torch.empty(0))
        try:
            ready.entry.restore(self._optimizers, scaler, self._extra_state)
            ForwardState(self._model).load_buffers({"buffers": ready.buffers})
            parallel.reshard(self._model)
            torch.clear_autocast_cache()
            live = plan.digests(plan.tensors())
            expected = {} if slot is None else slot.digests
            wrong = [ranks for ranks, digest in expected.items() if int(live[ranks]) != int(digest)]
            if wrong:
                raise SnapshotError(f"the restored state of ranks {list(wrong[0])} is not what was committed")
            load(body["controller"], ready.replay, head.key)
        except Exception as error:
            failure = error
        self._agree(failure, head, live)
        random = RandomState.of(body["forward"]["random"]) if ready.streams else None
        self._recovery.resumed(plan, head.attempt, body["measurement"], live, random)
        if ready.streams:
            RandomState.of(body["before fetch"]).restore()
        self.mark()
        ready.close()
        self._began = True
        for tier in self.tiers:
            tier.begin(head.made, ready.found if tier.name == sources[self.vote.rank] else None)
        if self._courier is not None:
            self._courier.start_at(head.made)
        self._phases.enter("training")
        source = _named(sources)
        job = f"job {head.job}, " if head.job else ""
        line = (
            f"resumed at attempt {head.made} from {source} ({job}committed at attempt {head.attempt}, "
            f"{time.time() - head.written:.0f} s ago): the newest that all {self.vote.world} ranks have"
        )
        if slot is None:
            line += f"; {self._said_reshaped(ready)}"
        return Resumed(
            head.made,
            head.made if ready.replay is None else int(ready.replay["consumed"]),
            source,
            "; ".join([line, *notes]),
            slot is not None,
        )

    def _said_reshaped(self, ready: _Ready) -> str:
        now = f"{self.vote.world} ranks ({parallel.describe(self._model)})"
        text = f"written by {ready.head.world} ranks ({ready.body['kind']}) and taken over by {now}: values are equal"
        if ready.streams:
            return f"{text}, each rank goes on with its random streams"
        text += ", random streams begin anew, buffers are those of the first rank"
        replay = ready.body["replay"]
        if replay is not None and (replay["again"] or replay["loader"] is not None):
            text += ", batches that were to be shown again are lost and the loader is not put to its place"
        return text

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


def _notes(said: Mapping[int, Sequence[str]]) -> list[str]:
    """What ranks said, each text once, with the ranks it is about."""
    by_text: dict[str, list[int]] = {}
    for rank, texts in said.items():
        for text in texts:
            by_text.setdefault(text, []).append(rank)
    return [
        f"rank {ranks[0]}: {text}" if len(ranks) == 1 else f"ranks {ranks[:8]}: {text}"
        for text, ranks in by_text.items()
    ]


def _named(sources: Mapping[int, str]) -> str:
    """Where the ranks have it from."""
    names = list(dict.fromkeys(sources.values()))
    if len(names) == 1:
        return names[0]
    return " and ".join(f"{name} (ranks {[r for r, n in sources.items() if n == name][:8]})" for name in names)


def _missing(everyone: Mapping[int, list[Any]], chosen: Key | None) -> list[str]:
    """Which newer moments are not used, because some ranks do not have them."""
    newest = max((key for keys in everyone.values() for key in keys), default=None)
    if newest is None or newest == chosen:
        return []
    without = [rank for rank, keys in everyone.items() if newest not in keys]
    return [f"attempt {newest[0]} is not on ranks {without[:8]}"]
