"""What a controller does once, at construction: find its ranks, and agree with them on what was given."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import LockstepError
from .vote import Vote, close_at_exit
from .watch import Watch

# Controllers are made by all ranks together, so this counts alike everywhere and keeps their notes apart.
_controllers = itertools.count()


def world_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Global ranks that train together; (0,) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return (0,)
    return tuple(dist.get_process_group_ranks(group)) if group is not None else tuple(range(dist.get_world_size()))


def make_vote(group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> tuple[Vote, Watch | None]:
    """The voting group and the watch over its ranks. Collective: every rank of ``group`` makes them together.

    The group is a new one that nobody else uses: other collectives cannot come between, and its timeout is ours.

    Args:
        group: The ranks that train together; None for all.
        device: Where the parameters are.
        timeout: Seconds.
    """
    ranks = world_of(group)
    if len(ranks) == 1:
        return Vote(None, ranks, ranks[0], device, timeout, None), None
    mine = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout), use_local_synchronization=group is not None)
    if "nccl" in str(dist.get_backend(mine)):
        device = torch.device("cuda", torch.cuda.current_device())  # offloaded parameters are on the CPU
    # There is no public way to the store that init_process_group made or was given.
    store = dist.distributed_c10d._get_default_store()
    # torchrun may hand the same store to the workers it starts again, with the notes of those that died.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(store, f"dist_stability/{start}/{next(_controllers)}", dist.get_rank(), ranks, timeout)
    vote = Vote(mine, ranks, dist.get_rank(), device, timeout, watch)
    close_at_exit(vote)
    return vote, watch


def agree_on_settings(vote: Vote, settings: Mapping[str, Any]) -> None:
    """Compare JSON-able settings over the ranks.

    Collectives: two all-gathers of a few bytes; two more, of the settings themselves, if some rank has others.

    Raises:
        LockstepError: On every rank, naming the first setting that differs, the ranks and their values.
    """
    text = json.dumps(settings, sort_keys=True)
    if len(set(vote.gather(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), -1).values())) == 1:
        return
    everyone = vote.gather(dict(settings), -1)
    first = vote.ranks[0]
    for name in settings:
        expected = everyone[first].get(name)
        differing = [rank for rank in vote.ranks if everyone[rank].get(name) != expected]
        if differing:
            shown = "; ".join(f"rank {rank}: {everyone[rank].get(name)}" for rank in (first, *differing[:3]))
            raise LockstepError(
                f"the ranks were given a different {name} ({shown}); give every rank the same", ranks=differing
            )
    raise LockstepError(f"the ranks were given different settings: {sorted({*itertools.chain(*everyone.values())})}")


def agree_on_replicas(vote: Vote, residences: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """All groups of ranks that hold the same state, in one order for all. Collectives: two all-gathers."""
    everyone = vote.gather(spoken(residences, vote.rank), -1)
    return tuple(sorted({_ranks(each) for groups in everyone.values() for each in groups}))


def spoken(residences: Sequence[tuple[int, ...]], rank: int) -> list[list[int] | dict[str, list[int]]]:
    """What a rank tells the others of its replicas: those it is the first of, evenly spaced ranks as a range.

    With thousands of ranks, lists of all of them from all of them would take gigabytes.
    """
    told: list[list[int] | dict[str, list[int]]] = []
    for ranks in residences:
        if len(ranks) > 1 and ranks[0] == rank:
            steps = range(ranks[0], ranks[-1] + 1, ranks[1] - ranks[0])
            told.append({"range": [steps.start, steps.stop, steps.step]} if tuple(steps) == ranks else list(ranks))
    return told


def _ranks(told: list[int] | dict[str, list[int]]) -> tuple[int, ...]:
    return tuple(range(*told["range"]) if isinstance(told, dict) else told)
