"""Going on where a process that died left off: the newest state that all ranks can agree on, wherever it is.

What is kept, and when, is in persistence.py.

All ranks list what they have in all tiers; the newest moment that every one of them has, wherever, is tried, then older
ones. A record is compared with the model and checked against its digests on every rank before anything is written; what
has then come over a link (from another rank, to a device) is checked again. A slot in shared memory is taken over: it
becomes the safe slot of this process without being copied. A checkpoint can also be taken over by another number of
ranks or another kind of parallelism: then each rank reads the parts of the whole tensors that it holds now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .attempt import Phases, one_line
from .errors import LockstepError, SnapshotError
from .recovery import Recovery
from .snapshot import Digests, EntryState, ForwardState, RandomState, Slot, StatePlan
from .snapshot.catalogue import Catalogue
from .snapshot.tiers.form import Rebuilt, differing
from .snapshot.tiers.record import Head, Unusable, fitted, loads
from .snapshot.tiers.tier import Found, Key, Tier, Whole
from .vote import Ballot, Vote


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


def kinds(optimizers: Sequence[Optimizer]) -> list[str]:
    """What must be the same optimizers when a state is gone on with."""
    return [type(optimizer).__qualname__ for optimizer in optimizers]


class Resuming:
    """Finds the newest state that all ranks can go on from, and restores it.

    Args:
        tiers: Where to look, in this order.
        model: As the loop calls it.
        optimizers: Of the controller.
        extra_state: Of the controller.
        recovery: Takes the restored state as the committed one.
        phases: Of the controller.
        vote: Of the controller.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        extra_state: Mapping[str, Any],
        recovery: Recovery,
        phases: Phases,
        vote: Vote,
    ) -> None:
        """Keep them; looks nowhere yet."""
        self._tiers, self._model, self._optimizers, self._extra_state = tiers, model, optimizers, extra_state
        self._recovery, self._phases, self._vote = recovery, phases, vote

    def run(self, load: Load, scaler: Any, notes: Sequence[str] = ()) -> Resumed:
        """Restore the newest moment that every rank has. All ranks together; see the controller.

        Args:
            load: Gives the controller what it knew.
            scaler: The GradScaler of the loop, or None.
            notes: To be said, the same on all ranks.
        """
        own: dict[Key, list[tuple[str, Found]]] = {}
        whole: list[dict[Key, Whole]] = []  # by tier: all ranks read the same one together
        said: list[str] = []
        for tier in self._tiers:
            listing = tier.list(self._vote.world, self._recovery.plan.signature)
            for found in listing.found:
                own.setdefault(found.head.key, []).append((tier.name, found))
            whole.append({each.head.key: each for each in listing.whole})
            said += listing.said[:4]
        told = self._vote.gather({"own": sorted(own), "whole": [sorted(keys) for keys in whole], "said": said}, -1)
        notes = [*notes, *_notes({rank: one["said"] for rank, one in told.items()})]
        own_of_all = _common([one["own"] for one in told.values()])
        whole_of_all = [_common([one["whole"][place] for one in told.values()]) for place in range(len(whole))]
        keys = sorted(own_of_all.union(*whole_of_all), reverse=True)
        everyone = {
            rank: [tuple(key) for keys in (one["own"], *one["whole"]) for key in keys] for rank, one in told.items()
        }
        notes += _missing(everyone, keys[0] if keys else None)
        for key in keys:
            ways: list[tuple[str, Callable[[], tuple[str, _Ready]]]] = []
            if key in own_of_all:
                ways.append(("", partial(self._first_that_fits, own[key], scaler)))
            for tier, has, of_all in zip(self._tiers, whole, whole_of_all, strict=True):
                if key in of_all:
                    ways.append((f" in {tier.name}", partial(self._reshape, tier.name, has[key], scaler)))
            for where, way in ways:
                ready: _Ready | None = None
                source, failure = "", None
                try:
                    source, ready = way()
                except Exception as error:
                    failure = error
                answers = self._vote.gather([_why(failure), source], -1)
                failed = {rank: text for rank, (text, _) in answers.items() if text is not None}
                if not failed:
                    assert ready is not None
                    sources = {rank: name for rank, (_, name) in answers.items()}
                    return self._restore(ready, load, scaler, sources, notes)
                if ready is not None:
                    ready.rebuilt.undo()
                    ready.close()
                where = where if len(ways) > 1 else ""
                notes += [f"attempt {key[0]}{where} on {text}" for text in _notes({r: [t] for r, t in failed.items()})]
        self._recovery.plan = self._recovery.build_plan()
        why = "; ".join(notes) if notes else "no earlier process left anything"
        places = " or ".join(tier.where for tier in self._tiers)
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
        slot = self._recovery.ring.begin()
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

        def write() -> None:  # the attempt that its chunks are of is known only then
            slot.restore(on_chunk=self._phases.chunk("restore"))

        buffers = body["forward"]["buffers"]
        return _Ready(head, body, plan, entry, rebuilt, write, slot.close, buffers, body["replay"], slot, True, found)

    def _reshape(self, name: str, whole: Whole, scaler: Any) -> tuple[str, _Ready]:
        """The same for a state that was written under another kind of parallelism, or by other ranks."""
        from .snapshot.tiers.reshape import Reshaped, renumbered, wanted

        ranks = self._vote.ranks
        whole.check(ranks.index(self._vote.rank), len(ranks))
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
        if body["optimizers"] != kinds(self._optimizers):
            raise Unusable(f"is of the optimizers {body['optimizers']}, and they are {kinds(self._optimizers)}")
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
            send = partial(self._vote.broadcast, head.made)
            slot.gather(send, self._vote.device, on_chunk=self._phases.chunk("restore"))
        live = Digests({}, torch.empty(0))
        try:
            ready.entry.restore(self._optimizers, scaler, self._extra_state)
            ForwardState(self._model).load_buffers({"buffers": ready.buffers})
            parallel.reshard(self._model)
            torch.clear_autocast_cache()
            live = self._standing(plan, slot)
            load(body["controller"], ready.replay, head.key)
        except Exception as error:
            failure = error
        self._agree(failure, head, live)
        drawn = body["forward"]["random"] if ready.streams else None
        random = None if drawn is None else RandomState.of(drawn)
        self._recovery.resumed(plan, head.attempt, head.made, body["measurement"], live, random, slot)
        if ready.streams:
            RandomState.of(body["before fetch"]).restore()
        for tier in self._tiers:
            tier.begin(head.made, ready.found if tier.name == sources[self._vote.rank] else None)
        self._phases.enter("training")
        source = _named(sources)
        job = f"job {head.job}, " if head.job else ""
        line = (
            f"resumed at attempt {head.made} from {source} ({job}committed at attempt {head.attempt}, "
            f"{time.time() - head.written:.0f} s ago): the newest that all {self._vote.world} ranks have"
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

    @staticmethod
    def _standing(plan: StatePlan, slot: Slot | None) -> Digests:
        """Digests of what stands; SnapshotError if they are not those of the slot that it is from.

        What was copied within the host's memory, from bytes whose digests have just been compared, is not read again.
        """
        if slot is not None and slot.on_host:
            return slot.digests
        live = plan.digests(plan.tensors())
        expected = {} if slot is None else slot.digests
        wrong = [ranks for ranks, digest in expected.items() if int(live[ranks]) != int(digest)]
        if wrong:
            raise SnapshotError(f"the restored state of ranks {list(wrong[0])} is not what was committed")
        return live

    def _said_reshaped(self, ready: _Ready) -> str:
        now = f"{self._vote.world} ranks ({parallel.describe(self._model)})"
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
        tally = self._vote.cast(Ballot(no=failure is not None, agree=agree, checksums=live), head.made)
        failed: dict[int, str] = {}
        if tally.no:
            said = self._vote.gather(one_line(failure), head.made)
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


def _common(keys: Sequence[Sequence[Sequence[int]]]) -> set[Key]:
    """What is in each of several lists; the keys have been through a gather."""
    return set.intersection(*({(made, attempt, history) for made, attempt, history in each} for each in keys))


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
