"""The arithmetic of the vote on simulated ranks: what one all-reduce can tell, whatever goes into it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_stability.errors import LockstepError
from dist_stability.vote import Ballot, Tally, Vote, bits, from_bits

WHOLE = st.integers(-(2**63), 2**63 - 1)


def tally(ballots: list[Ballot], groups: tuple[tuple[int, ...], ...] = ()) -> Tally:
    """What every rank reads when these ballots are summed; the ranks are simulated, the packing is real."""
    ranks = range(len(ballots))
    votes = [Vote(None, ranks, rank, torch.device("cpu"), 1.0, None) for rank in ranks]
    for vote in votes:
        vote.replica_groups = groups
    total = torch.stack([vote.pack(ballot) for vote, ballot in zip(votes, ballots, strict=True)]).sum(0)
    assert torch.isfinite(total).all(), "no NaN or infinity may enter a collective"
    read = [vote.read(total.clone(), ballot, 0) for vote, ballot in zip(votes, ballots, strict=True)]
    assert all(repr(one) == repr(read[0]) for one in read)
    return read[0]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_float_is_ordinary_input(values: list[float]) -> None:
    ballots = [
        Ballot(measurement=scalar(v), weight=float(rank == 0), square_sum=scalar(abs(v) if v == v else v), veto=v > 1)
        for rank, v in enumerate(values)
    ]
    if sum(abs(v) for v in values if math.isfinite(v)) > 1e300:
        return  # a sum of finite squares may overflow; the norm is then infinite, which is refused like a NaN
    result = tally(ballots)
    if math.isfinite(values[0]):
        assert result.measurement == values[0]
    else:
        assert math.isnan(result.measurement)
    assert result.gradient_norm is not None
    assert math.isfinite(result.gradient_norm) == all(map(math.isfinite, values))
    assert result.veto == sum(v > 1 for v in values)


def test_measurement_is_rank_0s_value_or_the_mean() -> None:
    both = [Ballot(measurement=scalar(v), weight=1.0) for v in (1.0, 2.0, 6.0)]
    assert tally(both).measurement == 3.0
    first = [Ballot(measurement=scalar(v), weight=float(r == 0)) for r, v in enumerate((1.5, math.nan, 7.0))]
    assert tally(first).measurement == 1.5
    nobody = [Ballot(), Ballot()]
    assert math.isnan(tally(nobody).measurement)


@given(WHOLE, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_equal_numbers_come_back_exactly(value: int, world: int) -> None:
    result = tally([Ballot(agree={"step": value}) for _ in range(world)])
    assert result.agreed["step"] == value & 0xFFFFFFFFFFFFFFFF


@given(st.lists(WHOLE, min_size=2, max_size=5).filter(lambda v: len(set(v)) > 1))
@settings(max_examples=200, deadline=None)
def test_any_difference_is_seen(values: list[int]) -> None:
    """Also differences that cancel in the sum: that is what the squares are for."""
    result = tally([Ballot(checksums={(0,): torch.tensor(v)}) for v in values[:1]], groups=((0,),))
    assert result.split_replicas == ()
    ranks = tuple(range(len(values)))
    split = tally([Ballot(checksums={ranks: torch.tensor(v)}) for v in values], groups=(ranks,))
    assert split.split_replicas == (ranks,)


def test_cancelling_differences_are_seen() -> None:
    ranks = (0, 1, 2)
    sums = [Ballot(checksums={ranks: torch.tensor(v)}) for v in (4, 6, 5)]
    assert tally(sums, groups=(ranks,)).split_replicas == (ranks,)


def test_replica_groups_are_compared_among_themselves_only() -> None:
    groups = ((0, 2), (1, 3))
    same = [Ballot(checksums={groups[rank % 2]: torch.tensor(rank % 2 + 10)}) for rank in range(4)]
    assert tally(same, groups).split_replicas == ()
    same[3] = Ballot(checksums={groups[1]: torch.tensor(99)})
    assert tally(same, groups).split_replicas == ((1, 3),)


@given(st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=200, deadline=None)
def test_bits_round_trip(value: float) -> None:
    back = from_bits(int(bits(scalar(value))))
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert math.copysign(1, back) == math.copysign(1, value) or math.isnan(value)


def test_overflow_is_per_optimizer() -> None:
    found = [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    ballots = [Ballot(overflow=[scalar(f) for f in rank]) for rank in found]
    assert tally(ballots).overflow == (False, True, True)


def test_flags_count() -> None:
    result = tally([Ballot(no=True), Ballot(veto=torch.tensor(True)), Ballot(replan=True)])
    assert (result.no, result.veto, result.replan) == (1, 1, 1)
    vote = Vote(None, (0,), 0, torch.device("cpu"), 10.0, None)
    assert bool(Vote.refused(vote.pack(Ballot(veto=True)))) and bool(Vote.refused(vote.pack(Ballot(no=True))))
    assert not bool(Vote.refused(vote.pack(Ballot(replan=True, weight=1.0))))


def test_being_asked_to_stop_rides_in_every_vote_stays_and_refuses_nothing() -> None:
    vote = Vote(None, (0,), 0, torch.device("cpu"), 10.0, None)
    asked = False
    vote.asked_to_stop = lambda: asked
    ballot = Ballot(square_sum=scalar(4.0))
    assert vote.cast(ballot, 0).gradient_norm == 2.0 and not vote.stopping
    asked = True
    vector = vote.pack(ballot)
    assert not vote.stopping and not bool(Vote.refused(vector)) and float(Vote.square_sum(vector)) == 4.0
    tally = vote.read(vector, ballot, 1)
    assert vote.stopping and (tally.no, tally.veto, tally.replan, tally.gradient_norm) == (0, 0, 0, 2.0)
    asked = False
    vote.cast(ballot, 2)
    assert vote.stopping


@pytest.mark.parametrize("world", [1, 2, 1000, 65_536])
def test_sums_stay_exact_for_large_jobs(world: int) -> None:
    """Pieces are below 2^16, so sums of squares stay below 2^53 up to 2^21 ranks."""
    piece = 0xFFFF
    assert world * piece**2 < 2**53
    vector = torch.tensor([float(piece), float(piece**2)], dtype=torch.float64) * world
    assert world * int(vector[1]) == int(vector[0]) ** 2


class LateWork:
    """Arrives just after a wait for it has given up."""

    def __init__(self, error: str = "") -> None:
        self.waits, self.error = 0, error

    def wait(self, timeout: object = None) -> None:
        self.waits += 1
        if self.waits == 1 or self.error:
            raise RuntimeError("Operation timed out!" if self.waits == 1 else self.error)

    def is_completed(self) -> bool:
        return self.waits > 0


def test_what_arrives_as_the_wait_gives_up_has_arrived() -> None:
    vote = Vote(object(), (0, 1), 0, torch.device("cpu"), 10.0, None)  # type: ignore[arg-type]
    work = LateWork()
    vote._wait(3, lambda group: work)
    assert work.waits == 2
    with pytest.raises(LockstepError, match="connection closed"):
        vote._wait(3, lambda group: LateWork("connection closed"))
