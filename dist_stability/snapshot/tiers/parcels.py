"""Sealed slots from rank to rank: straight from the memory of one into the memory of the other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from .courier import Channel

CHUNK = 256 << 20
"""Bytes of one exchange. Nothing of that size is set aside: they go from where they are to where they belong."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent.

    Attributes:
        seal: The seal, as bytes.
        data: The bytes of the slot, uint8, on the CPU.
    """

    seal: bytes
    data: torch.Tensor


def rounds(moves: Iterable[tuple[int, int]]) -> list[dict[int, int]]:
    """Moves (from a rank, to a rank) as rounds, in each of which a rank sends to one at most and takes from one.

    Returns:
        Each round by source.
    """
    found: list[dict[int, int]] = []
    for source, target in sorted(moves):
        fitting = (one for one in found if source not in one and target not in one.values())
        one = next(fitting, None)
        if one is None:
            found.append(one := {})
        one[source] = target
    return found


def send(
    channel: Channel,
    moves: Iterable[tuple[int, int]],
    give: Callable[[], Mapping[int, Parcel]],
    room: Callable[[int, bytes, int], torch.Tensor],
    tell: Callable[[], object],
) -> None:
    """Send parcels between ranks. All ranks of the channel together, with the same moves.

    Args:
        channel: Of the courier.
        moves: (from a rank, to a rank), each pair once.
        give: What this rank sends, by the rank it is for.
        room: Memory of the size of a parcel, from (the rank it comes from, its seal, its number of bytes).
        tell: Called after each exchange.

    Raises:
        Undelivered: On every rank: ``give`` or ``room`` raised on some rank.
        Broken: A rank is gone.
    """
    me, plan = channel.rank, rounds(moves)
    parcels: dict[int, Parcel] = {}
    places: dict[int, torch.Tensor] = {}

    def measure() -> dict[int, tuple[int, int]]:
        parcels.update(give())
        return {target: (len(parcel.seal), parcel.data.numel()) for target, parcel in parcels.items()}

    sizes = channel.together("what is to be sent", measure)
    seals = {
        source: torch.empty(sizes[source][me][0], dtype=torch.uint8)
        for one in plan
        for source, target in one.items()
        if target == me
    }
    given = {target: torch.frombuffer(bytearray(parcel.seal), dtype=torch.uint8) for target, parcel in parcels.items()}
    for one in plan:
        _exchange(channel, one, given, seals, max(sizes[source][target][0] for source, target in one.items()), tell)

    def make_room() -> None:
        for source, seal in seals.items():
            places[source] = room(source, ctypes.string_at(seal.data_ptr(), seal.numel()), sizes[source][me][1])

    channel.together("room for what is sent", make_room)
    given = {target: parcel.data for target, parcel in parcels.items()}
    for one in plan:
        _exchange(channel, one, given, places, max(sizes[source][target][1] for source, target in one.items()), tell)


def _exchange(
    channel: Channel,
    one: Mapping[int, int],
    given: Mapping[int, torch.Tensor],
    taken: Mapping[int, torch.Tensor],
    longest: int,
    tell: Callable[[], object],
) -> None:
    """One round; as many exchanges on every rank, whatever it has itself."""
    nothing = torch.empty(0, dtype=torch.uint8)
    to = one.get(channel.rank)
    source = next((source for source, target in one.items() if target == channel.rank), None)
    data = nothing if to is None else given[to]
    into = nothing if source is None else taken[source]
    for start in range(0, longest, CHUNK):
        part = slice(start, start + CHUNK)
        channel.exchange(data[part], to, into[part], source)
        tell()
