"""The vote: one packed float64 all-reduce in which the ranks agree on an attempt.

Everything travels as sums, because a sum of finite numbers is the one reduction that treats NaN the same everywhere
(gloo's MAX keeps or drops a NaN by its position): flags add up, a value is sent as (is it finite, value or 0), and
whole numbers that must be equal on all ranks are cut into 16-bit pieces x and sent as x and x^2. Over W ranks the
pieces are equal if and only if W * sum(x^2) == (sum x)^2, and then x = sum(x) / W is known exactly.

Only when something is wrong does a second collective follow, which names the ranks.
"""

from __future__ import annotations

import atexit
import json
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import LockstepError
from .signals.sums import joined, on_host
from .watch import Watch

_PIECES = 4
_SHIFTS = (0, 16, 32, 48)
_MASK = 0xFFFF


@dataclass(slots=True)
class Ballot:
    """What one rank brings to a vote. Tensors stay on their device; nothing here waits for them.

    Attributes:
        no: This rank refuses (an error on it).
        veto: A guard's flag, 0-d bool tensor or bool.
        replan: This rank's set of state tensors has changed.
        measurement: Value of the probe (0-d), None if this rank did not measure.
        confirmation: Value of the second probe (0-d), None if there is none or this rank did not measure.
        weight: Weight of the measurements in the mean; 0 when they do not count.
        square_sum: Sum of squared local gradients, each divided by its number of replicas (0-d), or None.
        overflow: For each optimizer, the GradScaler's found_inf (0-d tensors).
        agree: Whole numbers (Python int or 0-d int64 tensor) that must be equal on all ranks, by name.
        checksums: Digest (0-d int64 tensor) of the state this rank shares with the ranks of the key.
        signals: Finite numbers that add up over ranks (1-d float64), of equal length everywhere.
    """

    no: bool = False
    veto: torch.Tensor | bool = False
    replan: bool = False
    measurement: torch.Tensor | None = None
    confirmation: torch.Tensor | None = None
    weight: float = 0.0
    square_sum: torch.Tensor | None = None
    overflow: Sequence[torch.Tensor] = ()
    agree: Mapping[str, int | torch.Tensor] = field(default_factory=dict)
    checksums: Mapping[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    signals: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """The outcome of a vote; the same numbers on every rank."""

    no: int
    veto: int
    replan: int
    measurement: float
    confirmation: float
    gradient_norm: float | None
    overflow: tuple[bool, ...]
    agreed: Mapping[str, int]
    split_replicas: tuple[tuple[int, ...], ...]
    signals: tuple[float, ...] = ()


@dataclass(slots=True)
class Reduction:
    """A packed vector on its way to its sum over the ranks. Keep it until it was read: the device still writes to it.

    Attributes:
        vector: This rank's vector, then the sum.
        work: The all-reduce under way; None for a single process.
        host: Page-locked copy of the sum, for a vector on an accelerator.
        arrived: Event after that copy.
    """

    vector: torch.Tensor
    work: Any = None
    host: torch.Tensor | None = None
    arrived: Any = None


class Vote:
    """Packs ballots, reduces them, and reads the outcome.

    Args:
        group: Process group of the votes (one that nobody else uses), or None for a single process.
        ranks: Global ranks of the group.
        rank: This process's global rank.
        device: Device on which the group reduces.
        timeout: Seconds to wait for the other ranks.
        watch: Names the ranks that did not arrive; None for a single process.

    Attributes:
        asked_to_stop: Asked for every ballot of this rank; the answer rides in it.
        stopping: Some rank's answer was yes in a vote that was read; the same on every rank between two votes.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        timeout: float,
        watch: Watch | None,
    ) -> None:
        """Remember the group; enters no collective."""
        self.group = group
        self.ranks = tuple(ranks)
        self.rank = rank
        self.device = device
        self.timeout = timeout
        self.asked_to_stop: Callable[[], bool] | None = None
        self.stopping = False
        self._watch = watch
        self._dead: LockstepError | None = None
        # Sent to the device once: sending them anew for each vote would make the host wait for it.
        self._shifts = torch.tensor(_SHIFTS, device=device)
        self._under_way: Reduction | None = None
        self._host: torch.Tensor | None = None
        self._stream: Any = None
        self.replica_groups: tuple[tuple[int, ...], ...] = ()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}  # of :meth:`broadcast`

    @property
    def world(self) -> int:
        """Number of ranks that vote."""
        return len(self.ranks)

    def close(self) -> None:
        """Stop the watch; give the group back, unless it is broken or busy: then only the process's end frees it."""
        self.close_watch()
        work = None if self._under_way is None else self._under_way.work
        busy = work is not None and not work.is_completed()
        if self.group is not None and self._dead is None and not busy and dist.is_initialized():
            for group in (self.group, *self._groups.values()):
                dist.destroy_process_group(group)
        self._groups.clear()
        self.group, self._dead = None, LockstepError("the controller is closed")
        _open.discard(self)

    def close_watch(self) -> None:
        """Stop the watch only."""
        if self._watch is not None:
            self._watch.close()

    def pack(self, ballot: Ballot) -> torch.Tensor:
        """The ballot as one float64 vector on the voting device. Enters no collective, waits for nothing."""
        asked = self.asked_to_stop is not None and self.asked_to_stop()
        parts: list[torch.Tensor | float] = [float(ballot.no), float(ballot.replan), ballot.weight, float(asked)]
        parts += [self._flag(ballot.veto)]
        parts += [*self._finite(ballot.measurement, ballot.weight), *self._finite(ballot.square_sum, 1.0)]
        parts += self._finite(ballot.confirmation, ballot.weight)
        parts += [self._flag(found) for found in ballot.overflow]
        whole = [*ballot.agree.values(), *(ballot.checksums.get(ranks, 0) for ranks in self.replica_groups)]
        pieces = [self._pieces(value) for value in whole]
        for one in pieces:
            parts += [one] if isinstance(one, torch.Tensor) else one
        for one in pieces:
            parts += [one * one] if isinstance(one, torch.Tensor) else [piece * piece for piece in one]
        if ballot.signals is not None:
            parts.append(ballot.signals.detach().to(self.device, torch.float64))
        return joined(self.device, parts)

    def _flag(self, flag: torch.Tensor | bool) -> torch.Tensor | float:
        if isinstance(flag, torch.Tensor) and not on_host(flag):
            return (flag.detach() != 0).to(self.device, torch.float64)
        return float(bool(flag))

    def _finite(self, value: torch.Tensor | None, weight: float) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """(weighted value or 0, 1 if it is not finite): no NaN ever enters a collective."""
        if value is None or weight == 0.0:
            return 0.0, 0.0
        if on_host(value):
            number = float(value)
            return (number * weight, 0.0) if math.isfinite(number) else (0.0, 1.0)
        value = value.detach().to(self.device, torch.float64)
        finite = torch.isfinite(value)
        return torch.where(finite, value * weight, 0.0), (~finite).to(torch.float64)

    def _pieces(self, value: int | torch.Tensor) -> torch.Tensor | list[float]:
        """A whole number cut into pieces of 16 bits, each exact in float64."""
        if isinstance(value, torch.Tensor) and not on_host(value):
            return ((value.detach().to(self.device) >> self._shifts) & _MASK).to(torch.float64)
        number = int(value)
        return [float(number >> shift & _MASK) for shift in _SHIFTS]

    @staticmethod
    def refused(vector: torch.Tensor) -> torch.Tensor:
        """Whether any rank said no or vetoed, from a reduced vector: a 0-d bool tensor, not waited for."""
        return vector[0] + vector[4] > 0

    @staticmethod
    def square_sum(vector: torch.Tensor) -> torch.Tensor:
        """Squared global gradient norm, of its finite parts, from a reduced vector: 0-d float64, not waited for."""
        return vector[7]

    def reduce(self, vector: torch.Tensor, attempt: int) -> torch.Tensor:
        """Sum the vectors of all ranks, in place.

        Collectives: one all-reduce (none for a single process).

        Raises:
            LockstepError: A rank did not arrive within the timeout, or the transport failed.
        """
        if self.group is None:
            return vector
        self._wait(attempt, lambda group: dist.all_reduce(vector, group=group, async_op=True))
        return vector

    def begin(self, vector: torch.Tensor, attempt: int) -> Reduction:
        """Start to sum the vectors of all ranks, and to bring the sum to the host; waits for neither.

        At most one of these is under way at a time, and :meth:`finish` is called before any other collective of this
        vote.

        Collectives: one all-reduce (none for a single process).
        """
        work = None
        if self.group is not None:
            work = self._start(attempt, lambda group: dist.all_reduce(vector, group=group, async_op=True))
        self._under_way = reduction = Reduction(vector, work)
        if vector.device.type != "cpu":
            self._fetch(reduction)
        return reduction

    def _fetch(self, reduction: Reduction) -> None:
        """Queue the copy to the host on a stream of its own: the training stream does not wait for slower ranks."""
        vector = reduction.vector
        module = torch.get_device_module(vector.device)
        if self._stream is None:
            self._stream = module.Stream(device=vector.device)
        if self._host is None or self._host.numel() != vector.numel():
            self._host = torch.empty(vector.numel(), dtype=vector.dtype, pin_memory=True)
        self._stream.wait_stream(module.current_stream(vector.device))
        with module.stream(self._stream):
            if reduction.work is not None:
                reduction.work.wait()  # this stream waits for the sum, the host does not
            self._host.copy_(vector, non_blocking=True)
        reduction.host, reduction.arrived = self._host, module.Event()
        reduction.arrived.record(self._stream)

    def finish(self, reduction: Reduction, attempt: int) -> torch.Tensor:
        """The sum, on the host. Waits for the other ranks if they have not all voted yet.

        Raises:
            LockstepError: A rank did not arrive within the timeout, or the transport failed.
        """
        if reduction.host is not None:
            self._arrive(reduction, attempt)
        elif reduction.work is not None:
            self._until(attempt, reduction.work)
        self._under_way = None
        return reduction.vector if reduction.host is None else reduction.host

    def _arrive(self, reduction: Reduction, attempt: int) -> None:
        """Wait for the copy on the host, looking out for a failing rank's note."""
        begin = asked = time.monotonic()
        while not reduction.arrived.query():
            now = time.monotonic()
            noted = False
            if self._watch is not None and now - asked > 0.5:
                asked, noted = now, self._watch.failure() is not None
            if noted or now - begin > self.timeout * 0.75:
                self._dead = self.lost(attempt, RuntimeError("the sum of the votes did not reach the host"))
                raise self._dead
            time.sleep(0.0 if now - begin < 0.05 else 0.001)

    def gather(self, value: Any, attempt: int) -> dict[int, Any]:
        """Every rank's JSON-able value, by global rank. Only on the way to a refusal or an error.

        Collectives: two all-gathers (none for a single process).
        """
        if self.group is None:
            return {self.rank: value}
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in self.ranks]
        mine = torch.tensor([data.numel()], dtype=torch.int64, device=self.device)
        self._wait(attempt, lambda group: dist.all_gather(sizes, mine, group=group, async_op=True))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        texts = [torch.empty_like(padded) for _ in self.ranks]
        self._wait(attempt, lambda group: dist.all_gather(texts, padded, group=group, async_op=True))
        return {
            rank: json.loads(bytes(text[: int(size)].tolist()).decode())
            for rank, text, size in zip(self.ranks, texts, sizes, strict=True)
        }

    def broadcast(self, attempt: int, tensor: torch.Tensor, ranks: tuple[int, ...], source: int) -> None:
        """Send a tensor on the voting device from one rank to some others, in place. Only on the way of a restore.

        Collectives: one broadcast among ``ranks``; before the first one among other ranks than vote, they make a group.

        Raises:
            LockstepError: A rank did not arrive within the timeout, or the transport failed.
        """
        self._wait(attempt, lambda group: dist.broadcast(tensor, source, self._among(ranks, group), async_op=True))

    def _among(self, ranks: tuple[int, ...], group: dist.ProcessGroup) -> dist.ProcessGroup:
        if ranks == self.ranks:
            return group
        if ranks not in self._groups:
            limit = timedelta(seconds=self.timeout)
            self._groups[ranks] = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        return self._groups[ranks]

    def _start(self, attempt: int, start: Callable[[dist.ProcessGroup], Any]) -> Any:
        """Begin one collective."""
        assert self.group is not None
        if self._dead is not None:
            raise self._dead
        try:
            return start(self.group)
        except RuntimeError as error:
            self._dead = self.lost(attempt, error)
            raise self._dead from error

    def _wait(self, attempt: int, start: Callable[[dist.ProcessGroup], Any]) -> None:
        """One collective, from beginning to end."""
        self._until(attempt, self._start(attempt, start))

    def _until(self, attempt: int, work: Any) -> None:
        """Wait for one collective, looking out for a failing rank's note meanwhile."""
        deadline = time.monotonic() + self.timeout * 0.75  # the rest is for finding out who was missing
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    work.wait(timedelta(seconds=max(min(left, 0.5), 0.001)))
                    return
                except RuntimeError:
                    # Work.wait gives up without cancelling the operation, so it can be asked again.
                    if work.is_completed():
                        work.wait()  # it may have arrived just after the wait gave up; else this raises its own error
                        return
                    if left <= 0.5:
                        raise
                    if self._watch is not None and self._watch.failure() is not None:
                        raise
        except RuntimeError as error:
            self._dead = self.lost(attempt, error)
            raise self._dead from error

    def silent(self) -> tuple[int, ...]:
        """Ranks that were stopped or have died, as far as can be told without them. Enters no collective."""
        return () if self._watch is None else self._watch.silent()

    def lost(self, attempt: int, error: BaseException) -> LockstepError:
        """The error for a collective that did not complete: names the ranks it waited for."""
        said, ranks = self._watch.explain() if self._watch is not None else ("", ())
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return LockstepError(
            f"rank {self.rank}, attempt {attempt}: lost the other ranks (timeout {self.timeout:g} s): {said}. "
            f"The process groups cannot be used again; restart the job. ({first[:200]})",
            ranks=ranks,
            step=attempt,
        )

    def read(self, vector: torch.Tensor, ballot: Ballot, attempt: int) -> Tally:
        """Read a reduced vector; waits for it on the host.

        Args:
            vector: What :meth:`reduce` returned.
            ballot: This rank's ballot, for the layout and for naming what differs.
            attempt: Attempt index, for messages.

        Collectives: none if the ranks agree; two all-gathers if they do not.

        Raises:
            LockstepError: On every rank, naming the ranks, if a number in ``agree`` differs between ranks.
        """
        values = vector.tolist()
        no, replan, weight, asked, veto, measured, measured_bad, squares, squares_bad, second, second_bad = values[:11]
        rest = 11 + len(ballot.overflow)
        overflow = tuple(found > 0 for found in values[11:rest])
        self.stopping = self.stopping or asked > 0
        pieces = _PIECES * (len(ballot.agree) + len(self.replica_groups))
        sums = [int(x) for x in values[rest : rest + pieces]]
        squared = [int(x) for x in values[rest + pieces : rest + 2 * pieces]]

        names = list(ballot.agree)
        differing = [name for i, name in enumerate(names) if not _equal(sums, squared, i, self.world)]
        if differing:
            self._raise_disagreement(differing, ballot, attempt)
        agreed = {name: _join(sums, i, self.world) for i, name in enumerate(names)}
        split = tuple(
            ranks
            for i, ranks in enumerate(self.replica_groups, start=len(names))
            if not _equal(sums, squared, i, len(ranks))
        )
        norm = None
        if ballot.square_sum is not None:
            norm = math.sqrt(squares) if squares_bad == 0 else math.nan
        return Tally(
            no=int(no),
            veto=int(veto),
            replan=int(replan),
            measurement=measured / weight if weight > 0 and measured_bad == 0 else math.nan,
            confirmation=second / weight if weight > 0 and second_bad == 0 else math.nan,
            gradient_norm=norm,
            overflow=overflow,
            agreed=agreed,
            split_replicas=split,
            signals=tuple(values[rest + 2 * pieces :]),
        )

    def cast(self, ballot: Ballot, attempt: int) -> Tally:
        """Pack, reduce and read. Collectives: one all-reduce; see :meth:`read` for disagreement."""
        return self.read(self.reduce(self.pack(ballot), attempt), ballot, attempt)

    def name_split(self, tally: Tally, checksums: Mapping[tuple[int, ...], torch.Tensor], attempt: int) -> list[int]:
        """The ranks whose copy is not the majority's; all of them where there is no majority.

        Collectives: two all-gathers.
        """
        mine = [int(checksums[ranks]) if ranks in checksums else None for ranks in tally.split_replicas]
        everyone = self.gather(mine, attempt)
        blamed: set[int] = set()
        for i, ranks in enumerate(tally.split_replicas):
            values = [everyone[rank][i] for rank in ranks]
            common = max(values, key=values.count)
            majority = values.count(common) * 2 > len(ranks)
            blamed.update(r for r, value in zip(ranks, values, strict=True) if not majority or value != common)
        return sorted(blamed)

    def _raise_disagreement(self, names: Sequence[str], ballot: Ballot, attempt: int) -> None:
        mine = {name: int(ballot.agree[name]) for name in names}
        everyone = self.gather(mine, attempt)
        said, blamed = [], set()
        for name in names:
            by_value: dict[int, list[int]] = {}
            for rank, values in everyone.items():
                by_value.setdefault(values[name], []).append(rank)
            most = max(len(ranks) for ranks in by_value.values())
            majority = [value for value, ranks in by_value.items() if len(ranks) == most]
            # Without a majority nobody knows who is right: every rank is named.
            off = [r for value, ranks in by_value.items() if len(majority) > 1 or value != majority[0] for r in ranks]
            blamed.update(off)
            shown = "; ".join(f"ranks {ranks}: {_show(name, value)}" for value, ranks in by_value.items())
            said.append(f"{name} ({shown})")
        self._dead = LockstepError(
            f"attempt {attempt}: the ranks disagree on {', '.join(said)}. Every rank must call step() for the same "
            f"attempt, with the same model, settings and global gradient norm.",
            ranks=sorted(blamed),
            step=attempt,
        )
        raise self._dead


def bits(value: torch.Tensor) -> torch.Tensor:
    """The 64 bits of a 0-d float64 tensor as an int64 tensor, on its device: numbers that must agree to the bit."""
    return value.detach().to(torch.float64).reshape(()).view(torch.int64)


def from_bits(value: int) -> float:
    """The float whose 64 bits are ``value``."""
    return float(struct.unpack("<d", struct.pack("<q", _signed(value)))[0])


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _equal(sums: Sequence[int], squares: Sequence[int], index: int, world: int) -> bool:
    pieces = range(_PIECES * index, _PIECES * (index + 1))
    return all(world * squares[i] == sums[i] ** 2 for i in pieces)


def _join(sums: Sequence[int], index: int, world: int) -> int:
    return sum((sums[_PIECES * index + i] // world) << shift for i, shift in enumerate(_SHIFTS))


def _show(name: str, value: int) -> str:
    return f"{from_bits(value):.9g}" if name == "gradient norm" else str(value)


_open: set[Vote] = set()


def close_at_exit(vote: Vote) -> None:
    """Close this vote at the end of the process if nobody did before.

    gloo's threads take the GIL when they let go of a tensor. A thread that asks for the GIL of an interpreter that is
    ending aborts the process, after everything went well; a group that was given back has no threads.
    """
    _open.add(vote)


@atexit.register
def _close_open() -> None:
    for vote in tuple(_open):
        if vote.device.type == "cpu":
            vote.close()
        else:
            vote.close_watch()  # NCCL's groups are left to torch
