"""``bench scale``: what it says of ranks that do not exist is what real ranks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from dist_stability.bench.engine import llama, scale
from dist_stability.bench.engine.llama import Llama
from dist_stability.cli import main
from dist_stability.report.events import read_json
from dist_stability.snapshot import StatePlan

TINY = Llama("tiny", 16, 33, 3, 2)
"""33 rows do not divide by 2."""


def rows(rank: int, world: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [scale.plan_case(TINY, *case) for case in cases]


def planned(*cases: tuple[Any, ...]) -> list[dict[str, Any]]:
    """In a process of its own: a pretended group must not meet a real one."""
    return harness.pool(1).run(rows, list(cases), group=False)[0]


def real(rank: int, world: int, mode: str) -> tuple[int, int]:
    """Bytes of the plan of the same model with memory, on real ranks."""
    blocks, model = llama.blocks_and_model(TINY)
    if mode == "FSDP":
        mesh = init_device_mesh("cpu", (world,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    plan = StatePlan.build(model, [optimizer], world, split=True)
    return plan.nbytes, plan.bytes_kept


@pytest.mark.parametrize("mode", ["FSDP", "DDP"])
def test_bytes_are_those_of_real_ranks(two: harness.Pool, mode: str) -> None:
    (row,) = planned((mode, 2, 50.0))
    everything, kept = zip(*two.run(real, mode), strict=True)
    assert row["bytes_per_rank"] == max(everything)
    assert abs(row["bytes_per_rank_split"] - max(kept)) <= 8
    assert row["shapes"] == {"FSDP": "fully_shard", "DDP": "as they are"}[mode]


def test_computed_shapes_are_those_of_fully_shard() -> None:
    for ranks in (2, 8, 64):
        sharded, computed = planned(("FSDP", ranks, 50.0), ("FSDP", ranks, 50.0, 1))
        assert computed["shapes"] == "computed" and sharded["shapes"] == "fully_shard"
        assert computed["bytes_per_rank"] == sharded["bytes_per_rank"]


def test_the_split_divides_by_the_replicas() -> None:
    ddp, hsdp, fsdp = planned(("DDP", 8, 50.0), ("HSDP", 8, 50.0), ("FSDP", 8, 50.0))
    assert ddp["bytes_per_rank_split"] == -(-ddp["bytes_per_rank"] // 8)
    assert (hsdp["shards"], hsdp["replicas"]) == (2, 4)
    assert hsdp["bytes_per_rank_split"] == -(-hsdp["bytes_per_rank"] // 4)
    assert fsdp["bytes_per_rank_split"] == fsdp["bytes_per_rank"]
    assert ddp["link_ms"] == pytest.approx(1e3 * ddp["bytes_per_rank"] / 50e9)


def test_the_vote_is_constant_in_the_number_of_ranks() -> None:
    """And as large as a real one: ``test_engine.py`` counts 728 bytes under DDP and 664 under FSDP2."""
    few = planned(("FSDP", 8, 50.0), ("HSDP", 8, 50.0), ("DDP", 8, 50.0))
    many = planned(("FSDP", 16384, 50.0), ("HSDP", 16384, 50.0), ("DDP", 16384, 50.0))
    assert [row["vote_bytes"] for row in few] == [row["vote_bytes"] for row in many] == [664, 664 + 2 * 64, 728]
    assert {row["collectives_per_step"] for row in [*few, *many]} == {1.0}


@pytest.mark.parametrize(("number", "parameters"), [(0, 8.03e9), (1, 70.6e9), (2, 406e9)])
def test_the_shapes_are_those_of_llama_3(number: int, parameters: float) -> None:
    _, model = llama.blocks_and_model(llama.LLAMAS[number])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)
    assert all(p.is_meta for p in model.parameters())


def quick(rank: int, world: int, out: str) -> int:
    return main(["bench", "scale", "--quick", "--link", "25", "--out", out])


def test_a_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert harness.pool(1).run(quick, str(tmp_path), group=False) == [0]
    summary = read_json(tmp_path / "summary.json")
    assert summary["link"] == {"gb_per_s": 25, "stated": False} and summary["collectives_per_step"] == 1
    assert "| small | HSDP | 64 | 8 | 8 |" in (tmp_path / "tables.md").read_text()


def beside(rank: int, world: int) -> str:
    with pytest.raises(RuntimeError, match="initialized already; run it in a process of its own"):
        scale.scale(True)
    return "refused"


def test_beside_a_real_group(one: harness.Pool) -> None:
    assert one.run(beside) == ["refused"]
