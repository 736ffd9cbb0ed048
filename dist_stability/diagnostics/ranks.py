"""Sums and agreements over all ranks of the job; in a single process, nothing but the local value."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_stability import parallel
from dist_stability.errors import LockstepError

_DIGEST_PIECES = 4


class Ranks:
    """All ranks of the default process group.

    Attributes:
        rank: This process, 0 without a process group.
        size: Number of ranks, 1 without a process group.
        device: Where sums are made, and where the collectives of the group want their tensors.
        copies: Ranks that see the same tokens: those of one tensor-parallel replica, else 1.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look the group up. No collective."""
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1
        self.copies = self.size // parallel.data_replica(model)[1] if distributed else 1
        self.device = compute_device(model)
        if distributed and "nccl" in str(dist.get_backend()):
            self.device = torch.device("cuda", torch.cuda.current_device())  # offloaded parameters are on the CPU

    def sum(self, local: Tensor) -> Tensor:
        """Sum over ranks of a real tensor, on the device it came from. One all-reduce; may overwrite ``local``."""
        if self.size == 1:
            return local
        there = local.contiguous().to(self.device)
        dist.all_reduce(there)
        return there.to(local.device)

    def agree(self, facts: str, error: Exception | None, what: str) -> None:
        """Return on every rank, or raise on every rank. One all-reduce of 5 numbers per rank.

        Args:
            facts: What must be equal on all ranks.
            error: What this rank found wrong, or None.
            what: Subject of the errors, for example "rksp.profile".

        Raises:
            Exception: ``error``, where there is one.
            LockstepError: Another rank has an error, or other facts.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        digest = hashlib.sha256(facts.encode()).digest()
        # Pieces of 16 bits: exact in any sum, also one that a backend makes in float32.
        pieces = [int.from_bytes(digest[2 * place : 2 * place + 2], "big") for place in range(_DIGEST_PIECES)]
        table = torch.zeros(self.size, 1 + _DIGEST_PIECES, dtype=torch.float64)
        table[self.rank] = torch.tensor([float(error is not None), *map(float, pieces)])
        table = self.sum(table)
        if error is not None:
            raise error
        failed = [rank for rank in range(self.size) if table[rank, 0] > 0]
        if failed:
            raise LockstepError(
                f"{what}: rank {self.rank} is ready, rank(s) {failed} raised an error; see what they say", ranks=failed
            )
        other = [rank for rank in range(self.size) if not torch.equal(table[rank, 1:], table[0, 1:])]
        if other:
            raise LockstepError(
                f"{what}: rank(s) {other} differ from rank 0 in blocks, shapes or settings; rank {self.rank} has "
                f"{facts}. Call it with the same arguments on every rank",
                ranks=other,
            )


def compute_device(model: nn.Module) -> torch.device:
    """Where float64 sums of this model's activations are made: its device, or the CPU where that has no float64."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else parallel.local(first).device
    return torch.device("cpu") if device.type == "mps" else device
