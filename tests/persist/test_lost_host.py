"""Two hosts, one of them lost: network namespaces joined by a wire, torchrun's agents, and a folder of memory each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_stability.testing import compare

WORKER = Path(__file__).with_name("host_worker.py")
STEPS, DEATH = 14, 9
SECONDS = 240


class Hosts:
    """Two network namespaces, "A" and "B", with one wire between them and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, uuid.uuid4().hex[:6]
        self.agents: list[subprocess.Popen[str]] = []
        self.memory = {name: folder / f"memory-{name}" for name in "AB"}
        for name in "AB":
            self.memory[name].mkdir()
            self.ip("netns", "add", self.namespace(name))
        self.ip("link", "add", self.wire("A"), "netns", self.namespace("A"), "type", "veth", "peer", "name",
                self.wire("B"), "netns", self.namespace("B"))  # fmt: skip
        for name in "AB":
            inside = ("-n", self.namespace(name))
            self.ip(*inside, "addr", "add", f"{self.address(name)}/30", "dev", self.wire(name))
            self.ip(*inside, "link", "set", self.wire(name), "up")
            self.ip(*inside, "link", "set", "lo", "up")

    def namespace(self, name: str) -> str:
        return f"dist-stability-{self.tag}-{name}"

    def wire(self, name: str) -> str:
        return f"ds{self.tag}{name}"

    def address(self, name: str) -> str:
        return {"A": "192.0.2.1", "B": "192.0.2.2"}[name]

    @staticmethod
    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr}")

    def start(self, name: str, out: Path, mode: str, nodes: str, death: int = -1) -> subprocess.Popen[str]:
        """torchrun's agent on a host; the rendezvous is on A."""
        alone = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        torchrun = ["-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.address('A')}:29511", f"--rdzv-id=job-{self.tag}"]
        wait = "last_call_timeout=5,join_timeout=120,keep_alive_interval=1"
        torchrun += [f"--rdzv-conf=is_host={int(name == 'A')},{wait}", f"--local-addr={self.address(name)}"]
        job = [str(WORKER), mode, str(STEPS), str(self.memory[name]), name, str(out), str(death)]
        agent = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(name), sys.executable, *torchrun, *job],
            env={
                **alone,
                "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path]),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": self.wire(name),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
            stdout=(out / f"printed-{name}-{len(self.agents)}").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.agents.append(agent)
        return agent

    def close(self) -> None:
        """End every process that is in one of the namespaces, then the namespaces themselves."""
        for name in "AB":
            listed = subprocess.run(["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for agent in self.agents:
            agent.kill()
            agent.wait()
        for name in "AB":
            subprocess.run(["ip", "netns", "delete", self.namespace(name)], capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not (sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip")):
        pytest.skip("needs root and ip (iproute2) for network namespaces")
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="dist-stability-hosts-") as folder:
        made = None
        try:
            try:
                made = Hosts(Path(folder))
            except OSError as error:
                pytest.skip(f"no network namespaces here: {error}")
            yield made
        finally:
            if made is not None:
                made.close()


def printed(out: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(out.glob("printed-*")))


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=False)


def ended(agent: subprocess.Popen[str], out: Path) -> None:
    try:
        code = agent.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"an agent did not end\n{printed(out)}")
    assert code == 0, printed(out)


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_lost_host_is_replaced(mode: str, hosts: Hosts, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    out.mkdir()
    for agent in [hosts.start(name, whole, mode, "2") for name in "AB"]:
        ended(agent, whole)
    assert left(hosts.memory["A"]) == left(hosts.memory["B"]) == []
    first = hosts.start("A", out, mode, "2")
    lost = hosts.start("B", out, mode, "2", DEATH)
    assert lost.wait(SECONDS) == -signal.SIGKILL, printed(out)
    shutil.rmtree(hosts.memory["B"])
    hosts.memory["B"].mkdir()
    ended(hosts.start("B", out, mode, "2"), out)
    ended(first, out)
    said = read(out / "resumed-B-1.json")
    assert DEATH - 4 <= said["attempt"] <= DEATH and "rank 1's from rank 0" in said["line"], said
    for name in "AB":
        assert compare(read(whole / f"end-{name}.pt"), read(out / f"end-{name}.pt")) == []
        assert left(hosts.memory[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_lost_host_is_done_without(mode: str, hosts: Hosts, tmp_path: Path) -> None:
    first = hosts.start("A", tmp_path, mode, "1:2")
    lost = hosts.start("B", tmp_path, mode, "1:2", DEATH)
    assert lost.wait(SECONDS) == -signal.SIGKILL, printed(tmp_path)
    shutil.rmtree(hosts.memory["B"])
    ended(first, tmp_path)
    said = read(tmp_path / "resumed-A-1.json")
    assert said["world"] == 1 and DEATH - 4 <= said["attempt"] <= DEATH, said
    before, after = read(tmp_path / f"whole-A-{said['attempt']}.pt"), read(tmp_path / "resumed-A-1.pt")
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "end-A.pt").exists() and left(hosts.memory["A"]) == []
