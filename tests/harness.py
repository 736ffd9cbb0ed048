"""Real processes for the tests: pools of workers over gloo that live as long as the pytest session.

Lifecycle. ``pool(n)`` gives the one pool of ``n`` ranks. The first ``run`` starts its processes from a fork server that
has torch imported already (a few tens of milliseconds each); later runs use the same processes. Each run gets a new
store and a new default process group, fixed seeds and no leftover hooks. A run in which any rank raised, died or hung
costs the pool its processes, because a gloo group that lost a peer is unusable: they are killed (by pid, only our
own) and started again by the next run.

Contract for what is run: ``fn(rank, world, *args)`` is a module-level function of a module that the workers can import;
arguments and results are pickled. A rank that raises leaves its process at once after reporting, like a script would.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the fork server, which inherits this environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_PRELOAD = [
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",  # with it torch._dynamo, which alone takes half a second
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "pytest",
    "dist_stability.testing",
]

_MEETING = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class RankError:
    """What went wrong on one rank.

    ``type`` is the exception's class name, or "Died" (the process ended without a reply) or "Hung" (no reply in time;
    the traceback then shows where its threads were). ``facts`` has the plain attributes of the exception.
    """

    rank: int
    type: str
    message: str
    traceback: str = ""
    bases: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def is_a(self, name: str) -> bool:
        """Whether the exception's class or one of its bases has this name."""
        return name == self.type or name in self.bases

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.type}: {self.message}\n{self.traceback}"


class RanksFailed(AssertionError):
    """A run failed on some rank although the test did not expect it. ``results`` has the per-rank outcome."""

    def __init__(self, results: list[Any]) -> None:
        self.results = results
        errors = [result for result in results if isinstance(result, RankError)]
        super().__init__("\n".join(str(error) for error in errors))


class Pool:
    """``world_size`` worker processes, started when needed."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.starts = 0
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._dumps: list[Path] = []
        self._stores: list[Any] = []

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers now alive (none before the first run)."""
        return [process.pid for process in self._processes]

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 120.0,
        grace: float = 20.0,
        expect_failure: bool = False,
        group: bool = True,
        group_timeout: float = 60.0,
    ) -> list[Any]:
        """Run ``fn(rank, world, *args)`` on every rank and return the results in rank order.

        Args:
            fn: A module-level function.
            *args: Picklable arguments, the same for every rank.
            timeout: Seconds for the whole run.
            grace: Seconds the other ranks get after the first one failed (none if they are stopped by a signal).
            expect_failure: Return :class:`RankError` objects among the results instead of raising.
            group: Initialise a default gloo process group (False for code that must run without one).
            group_timeout: Timeout of that group in seconds, once its ranks have met.

        Raises:
            RanksFailed: A rank failed, and ``expect_failure`` is False.
        """
        __tracebackhide__ = True
        if not self._processes:
            self._start()
        # Hosted here, as torchrun's agent does: the store outlives any rank. The previous one is kept until this run is
        # over, because the workers drop their clients of it only when they begin this run.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if group else None
        self._stores = [*self._stores[-1:], store]
        body = pickle.dumps((fn, args, store.port if store is not None else None, group_timeout))
        request = pickle.dumps((sys.path, body))
        replies: list[Any] = [None] * self.world_size
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(request)
        waiting = dict(enumerate(self._connections))
        deadline = time.monotonic() + timeout
        failed = False
        while waiting:
            left = deadline - time.monotonic()
            ready = multiprocessing.connection.wait(
                list(waiting.values()), max(0.0, min(left, 0.2) if failed else left)
            )
            if not ready and failed and left > 0:
                if all(_state(self._processes[rank].pid) == "T" for rank in waiting):
                    break  # stopped by a signal: nothing will come
                continue
            if not ready:
                break
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                replies[rank] = self._receive(rank)
                del waiting[rank]
                if isinstance(replies[rank], RankError) and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + grace)
        if waiting:
            failed = True
            for rank, dump in self._where(list(waiting)).items():
                message = f"no reply within {timeout:g} s (or {grace:g} s of grace)"
                replies[rank] = RankError(rank, "Hung", message, dump)
        if failed:
            self.close()
            if not expect_failure:
                raise RanksFailed(replies)
        return replies

    def close(self) -> None:
        """Kill the workers and make sure that they are gone."""
        pids = self.pids
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for connection in self._connections:
            connection.close()
        for dump in self._dumps:
            dump.unlink(missing_ok=True)
        self._processes, self._connections, self._dumps, self._stores = [], [], [], []
        left = [pid for pid in pids if _alive(pid)]
        assert not left, f"worker processes outlived their pool: {left}"

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.starts += 1
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            handle, name = tempfile.mkstemp(prefix="rank-stack-")
            os.close(handle)
            process = context.Process(target=_work, args=(rank, self.world_size, theirs, name), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._dumps.append(Path(name))

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            return RankError(rank, "Died", f"the process ended with exit code {code} without a reply")

    def _where(self, ranks: list[int]) -> dict[int, str]:
        """Ask hung workers for the stacks of their threads (a stopped one cannot answer)."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        deadline = time.monotonic() + 10.0
        # A process that does not get a core for a while answers late; one that is stopped or gone never does.
        while time.monotonic() < deadline and any(
            self._dumps[rank].stat().st_size == 0 and _state(self._processes[rank].pid) not in ("T", "Z", "X")
            for rank in ranks
        ):
            time.sleep(0.1)
        time.sleep(0.5)
        return {rank: self._dumps[rank].read_text() for rank in ranks}


_pools: dict[int, Pool] = {}


def pool(world_size: int) -> Pool:
    """The session's pool of this many ranks."""
    return _pools.setdefault(world_size, Pool(world_size))


def close_all() -> None:
    """Kill every pool's workers and assert that no pid is left."""
    for each in _pools.values():
        each.close()


def _state(pid: int) -> str:
    """One letter, as in proc(5); "X" for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _alive(pid: int) -> bool:
    return _state(pid) not in ("Z", "X")  # a zombie is one that the fork server has yet to reap


def _work(rank: int, world: int, connection: Any, dump: str) -> None:
    """Main loop of a worker: one request, one reply; leave after a failure or when the session has gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the fork server
    stacks = open(dump, "w")  # noqa: SIM115 - must stay open for faulthandler
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    # What was imported before the fork is there for good: without this each collection of garbage goes through all of
    # torch, which takes longer than most runs, and through copies of the pages that are shared with the fork server.
    gc.freeze()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            reply: Any = _serve(rank, world, request)
            payload = pickle.dumps(reply)
        except BaseException as error:
            reply = _describe(rank, error)
            payload = pickle.dumps(reply)
        with contextlib.suppress(BrokenPipeError):
            connection.send_bytes(payload)
        if isinstance(reply, RankError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def _serve(rank: int, world: int, request: bytes) -> Any:
    # In two layers: pytest grows sys.path while it collects, and unpickling the function imports its module.
    paths, body = pickle.loads(request)
    sys.path[:] = paths
    fn, args, port, group_timeout = pickle.loads(body)
    _clean()
    if port is not None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        timeout = datetime.timedelta(seconds=group_timeout)
        # Ranks that find each other late, on a machine that does much else, are not what a short timeout is to show.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=max(timeout, _MEETING))
        dist.barrier()
        store.set_timeout(timeout)
        _set_pg_timeout(timeout)
    return fn(rank, world, *args)


def _clean() -> None:
    """A state that no earlier run has touched."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DTensor caches layouts by equal meshes: a new tensor would carry the mesh of an earlier run, with dead groups.
        _clear_sharding_prop_cache()
    gc.collect()
    for hooks in (
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_backward_pre_hooks,
        torch.nn.modules.module._global_backward_hooks,
    ):
        hooks.clear()
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def _describe(rank: int, error: BaseException) -> RankError:
    facts = {k: v for k, v in vars(error).items() if isinstance(v, (bool, int, float, str, tuple, list, dict))}
    return RankError(
        rank,
        type(error).__name__,
        str(error),
        "".join(traceback.format_exception(error)),
        tuple(base.__name__ for base in type(error).__mro__),
        facts,
    )
