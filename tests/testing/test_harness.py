"""The pool of worker processes: what the other tests rely on."""

from __future__ import annotations

import os
import signal
import time

import harness
import pytest
import torch
import torch.distributed as dist


def rank_sum(rank: int, world: int, start: float) -> tuple[int, float, float]:
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return os.getpid(), total.item(), torch.rand(()).item()


def raise_on_one(rank: int, world: int) -> str:
    if rank == 1:
        raise ValueError("bad rank")
    dist.barrier()
    return "not reached: the peer has left"


def stop_one(rank: int, world: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return "fine"


def hang(rank: int, world: int) -> None:
    time.sleep(1000)


def leave(rank: int, world: int) -> None:
    os._exit(7)


def no_group(rank: int, world: int) -> bool:
    return dist.is_initialized()


def leave_a_hook(rank: int, world: int) -> int:
    torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    dist.new_group([0])
    return len(torch.nn.modules.module._global_forward_hooks)


def test_results_in_rank_order_from_the_same_processes(two: harness.Pool) -> None:
    first = two.run(rank_sum, 1.0)
    second = two.run(rank_sum, 1.0)
    assert [value for _, value, _ in first] == [3.0, 3.0]
    assert first == second, "same processes, same seeds"
    assert [pid for pid, _, _ in first] == two.pids


def test_an_exception_comes_back_by_rank_and_the_pool_recovers(two: harness.Pool) -> None:
    before = two.starts
    results = two.run(raise_on_one, expect_failure=True)
    assert results[1].type == "ValueError" and results[1].message == "bad rank" and results[1].is_a("Exception")
    assert "raise_on_one" in results[1].traceback
    assert results[0].is_a("RuntimeError"), "its peer has left: not silence"
    with pytest.raises(harness.RanksFailed, match="rank 1: ValueError: bad rank"):
        two.run(raise_on_one)
    assert two.run(rank_sum, 0.0)[0][1] == 1.0
    assert two.starts >= before + 2


def test_a_stopped_a_hung_and_a_dead_rank_are_told_apart(two: harness.Pool) -> None:
    results = two.run(stop_one, timeout=8, expect_failure=True)
    assert results[0] == "fine" and results[1].type == "Hung"
    results = two.run(hang, timeout=8, expect_failure=True)
    assert [result.type for result in results] == ["Hung", "Hung"] and "in hang" in results[0].traceback
    results = two.run(leave, timeout=20, expect_failure=True)
    assert [result.type for result in results] == ["Died", "Died"] and "7" in results[0].message


def test_each_run_starts_clean(two: harness.Pool) -> None:
    assert two.run(leave_a_hook) == [1, 1]
    assert two.run(leave_a_hook) == [1, 1]
    assert two.run(no_group, group=False) == [False, False]


def test_closing_leaves_no_process() -> None:
    pool = harness.Pool(2)
    pids = [pid for pid, _, _ in pool.run(rank_sum, 0.0)]
    pool.close()
    assert not any(harness._alive(pid) for pid in pids)
    assert pool.pids == []
