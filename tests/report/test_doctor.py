"""The doctor finds limits where the system keeps them, and turns them into advice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dist_stability.report import doctor


def machine(**changes: Any) -> dict[str, Any]:
    """A machine in good health, with changes."""
    return {
        "memory": {"physical": 2**36, "cgroup_limit": None, "memlock_limit": None, "shared_memory": 2**33},
        "devices": {"cpus": 8, "accelerator": None, "accelerators": 0, "names": [], "cuda": None},
        "groups": {"gloo_two_processes": True, "seconds": 1.0, "error": None},
        "backends": {"gloo": True, "nccl": False, "mpi": False},
        "extras": {"torchvision": True},
        "compiler": "c++",
        "threads": {"omp_num_threads": "1", "torch": 1},
        "deterministic_algorithms": False,
        **changes,
    }


def test_a_healthy_machine_has_no_hazards() -> None:
    assert doctor.hazards(machine()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": {"gloo_two_processes": False, "seconds": 60.0, "error": "no answer"}}, "GLOO_SOCKET_IFNAME"),
        ({"extras": {"torchvision": False}}, "dist-stability[train]"),
        ({"memory": {**machine()["memory"], "cgroup_limit": 2**30}}, "control group allows 1.0 GiB"),
        (
            {
                "memory": {**machine()["memory"], "memlock_limit": 2**23},
                "devices": {**machine()["devices"], "accelerators": 1},
            },
            "ulimit -l",
        ),
        ({"memory": {**machine()["memory"], "shared_memory": 2**26}}, "/dev/shm holds only 64.0 MiB"),
        ({"threads": {"omp_num_threads": None, "torch": 8}}, "OMP_NUM_THREADS is not set"),
        ({"devices": {**machine()["devices"], "accelerator": "cuda"}}, "use_deterministic_algorithms"),
        ({"devices": {**machine()["devices"], "accelerators": 2}}, "no NCCL"),
        ({"compiler": None}, "No C++ compiler"),
    ],
)
def test_each_hazard_is_named_with_its_remedy(changes: dict[str, Any], said: str) -> None:
    hazards = doctor.hazards(machine(**changes))
    assert len(hazards) == 1 and said in hazards[0]


def test_locked_memory_does_not_matter_without_an_accelerator() -> None:
    assert doctor.hazards(machine(memory={**machine()["memory"], "memlock_limit": 2**16})) == []


@pytest.mark.parametrize(
    ("entry", "files", "limit"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "1000", "memory.max": "5000"}, 1000),
        ("0::/job\n", {"job/memory.max": "5000", "memory.max": "1000"}, 1000),
        ("0::/job\n", {"job/memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "77"}, 77),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "500"}, 500),
        ("4:cpu,memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("3:cpu:/job\n", {"memory/job/memory.limit_in_bytes": "500"}, None),
        ("", {}, None),
    ],
)
def test_the_tightest_control_group_binds(tmp_path: Path, entry: str, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    # A limit above the mount point is none of ours.
    (tmp_path / "memory.max").write_text("1\n")
    own = tmp_path / "self"
    own.write_text(entry)
    assert doctor.memory(tmp_path / "cgroup", own)["cgroup_limit"] == limit


def test_two_processes_that_cannot_meet_are_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PEER", "import sys; sys.exit('no loopback here')")
    found = doctor.two_processes()
    assert found["gloo_two_processes"] is False and "rank 0: no loopback here" in found["error"]
    monkeypatch.setattr(doctor, "_PEER", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "GROUP_SECONDS", 0.5)
    assert "no answer within" in doctor.two_processes()["error"]


def test_devices_and_backends_are_found_on_this_machine() -> None:
    found = doctor.devices()
    assert found["cpus"] >= 1 and (found["accelerators"] > 0) == (found["accelerator"] is not None)
    assert doctor.backends()["gloo"] or sys.platform == "win32"
